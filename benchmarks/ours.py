"""How the benchmarks call fastvol: the public function, on a problem's network and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

import fastvol
from fastvol import Progress, VolumeEstimate

from .problems import Problem


def whole_call(
    problem: Problem, n: int, rtol: Any, seed: int, plan: Mapping[str, Any] | None = None
) -> VolumeEstimate:
    """``fastvol.estimate`` with everything that belongs to it: plan, pilot, search, audit."""
    return _estimate(problem, F.cross_entropy, n, rtol, seed, plan, [])


@dataclass(frozen=True)
class Search:
    """The search alone, between two blocks of a run.

    Args:
        seconds: of it.
        directions: settled in that time.
        evaluations: of the loss, where the plan evaluates one ray at a time.
        log_radii: of all directions, float64 ``[n]``.
    """

    seconds: float
    directions: int
    evaluations: int
    log_radii: npt.NDArray[np.float64]


def search_alone(
    problem: Problem, plan: Mapping[str, Any], block: int, blocks: int, rtol: Any, seed: int
) -> Search:
    """Time of ``blocks`` blocks after a first one, which the pilot precedes.

    The run is ended from its callback before the audit, whose cost does not grow like n in runs as
    short as these: 64 leaders and 32 random rays, 32 evaluations each, at any n.

    Args:
        problem: what is measured.
        plan: of an earlier result.
        block: directions a block.
        blocks: timed.
        rtol: tolerance of a radius.
        seed: of the directions.
    """
    calls = 0
    marks: list[tuple[Progress, int]] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(output, target)

    def mark(progress: Progress) -> None:
        marks.append((progress, calls))
        if progress.n_done == progress.n:
            raise _SearchedError

    try:
        n = block * (blocks + 1)
        _estimate(problem, loss, n, rtol, seed, {**plan, "block": block}, [mark])
    except _SearchedError:
        pass
    (first, calls_before), (last, calls_after) = marks[0], marks[-1]
    return Search(
        last.seconds - first.seconds,
        last.n_done - first.n_done,
        calls_after - calls_before,
        np.array(last.log_radii),
    )


class _SearchedError(Exception):
    """Every direction has its radius."""


def _estimate(
    problem: Problem,
    loss_fn: Any,
    n: int,
    rtol: Any,
    seed: int,
    plan: Mapping[str, Any] | None,
    callbacks: list[Any],
) -> VolumeEstimate:
    return fastvol.estimate(
        problem.model,
        loss_fn,
        n,
        data=(problem.inputs, problem.targets),
        threshold=problem.threshold,
        metric="filter",
        rtol=rtol,
        seed=seed,
        plan=plan,
        progress=False,
        callbacks=callbacks,
    )
