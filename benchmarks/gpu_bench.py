"""What the rows of the GPU table share: sizes, trained networks, whole calls, their peer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fastvol

from . import data, networks, peers
from .problems import THRESHOLD, Problem

RTOL = 1e-3
# A row whose next figure takes longer than this many seconds hangs.
PATIENCE = 100.0
# Of the published code, a direction.
PUBLISHED = {"mlp": 0.1, "cifar": 1.0}
_TRAINED, _STEPS = 1e-3, 1500


class SkippedError(Exception):
    """Why a row has no figure."""


@dataclass
class Bench:
    """What all rows share.

    Args:
        device: the card.
        smoke: tiny sizes.
        ends: when the last row should have begun, ``time.perf_counter()``.
    """

    device: torch.device
    smoke: bool
    ends: float

    def __post_init__(self) -> None:
        self._problems: dict[str, Problem] = {}
        self._bisection: dict[str, float] = {}
        self.limits: dict[str, float] = {}
        # Of the long run.
        self.plan: dict[str, Any] | None = None

    def size(self, real: int, tiny: int) -> int:
        """One of two sizes."""
        return tiny if self.smoke else real

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.perf_counter()

    def problem(self, name: str) -> Problem:
        """``"mlp"``, ``"cnn"`` or ``"cifar"``, trained on the card."""
        if name not in self._problems:
            few = {"mlp": 600, "cnn": 600, "cifar": 2000}[name]
            count = self.size(few, 12)
            build: dict[str, Callable[[], nn.Module]] = {
                "mlp": lambda: networks.mlp(784, *((256, 128) if not self.smoke else (16,)), 10),
                "cnn": lambda: networks.cnn(10),
                "cifar": lambda: networks.cifar_cnn(10),
            }
            make = data.pictures if name == "cifar" else data.digits
            self._problems[name] = _trained(
                name, build[name], make(count, data.Sources()), self.device, self.smoke
            )
        return self._problems[name]

    def estimate(self, problem: Problem, n: int, **options: Any) -> fastvol.VolumeEstimate:
        """Whole calls of fastvol."""
        settings: dict[str, Any] = {
            "data": (problem.inputs, problem.targets),
            "threshold": problem.threshold,
            "metric": "filter",
            "method": "radial",
            "rtol": RTOL,
            "progress": False,
            "backend": "triton",
            **options,
        }
        if self.smoke:
            settings["lanes"] = 4
        found = fastvol.estimate(problem.model, F.cross_entropy, n=n, **settings)
        assert isinstance(found, fastvol.VolumeEstimate)
        return found

    def bisection(self, name: str) -> float:
        """Seconds a direction of bisecting with ``functional_call`` on the card."""
        if name not in self._bisection:
            problem = self.problem(name)
            loss_at = peers.functional(problem)
            scale = problem.scale()
            start = float(np.exp(self.estimate(problem, self.size(64, 4)).log_radii).mean())
            spent, count = 0.0, self.size(12, 1)
            for i in range(count + 1):
                began = time.perf_counter()
                z = {key: torch.randn_like(value) for key, value in scale.items()}
                norm = math.sqrt(sum(float(part.square().sum()) for part in z.values()))
                direction = peers.Direction({key: z[key] * scale[key] for key in z}, norm)
                peers.bisect(loss_at, direction, problem.threshold, start, RTOL)
                # The first one is to warm up.
                spent += (time.perf_counter() - began) * (i > 0)
            self._bisection[name] = spent / count
        return self._bisection[name]


def _trained(
    name: str,
    build: Callable[[], nn.Module],
    examples: data.Data,
    device: torch.device,
    smoke: bool,
) -> Problem:
    inputs, targets, source = examples
    inputs, targets = inputs.to(device), targets.to(device)
    if smoke and name != "mlp":
        # The networks want their own size of images.
        inputs, targets = inputs[:2], targets[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3 if not smoke else 2e-2)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if loss.item() < (_TRAINED if not smoke else 0.05):
            break
    else:
        raise RuntimeError(f"{name} did not train: its loss is still {loss.item()}")
    model.eval().zero_grad()
    return Problem(name, model, inputs, targets, THRESHOLD, source)


Row = dict[str, Any]


def row(work: str, measured: str, goal: str = "", met: bool | None = None, **numbers: Any) -> Row:
    return {"work": work, "measured": measured, "goal": goal, "met": met, **numbers}


def kernels_of() -> Any:
    """fastvol's Triton kernels.

    Raises:
        SkippedError: there are none.
    """
    try:
        from fastvol import kernels
    except ImportError as error:
        raise SkippedError(f"the kernels cannot be imported: {error}") from error
    if not hasattr(kernels, "perturb"):
        raise SkippedError("this version has no kernels for the noise")
    return kernels
