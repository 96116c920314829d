"""The calls that the tests of many processes make: ``python tests/calls.py OUT SCENARIO …``.

Each process writes what its scenarios gave to ``OUT/SCENARIO-RANK.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvol
from benchmarks.proofs import bodies
from fastvol import _processes

PLAN: dict[str, Any] = {
    "engine": "general",
    "chunk": 4,
    "lanes": 4,
    "keep_rows": True,
    "dtype": "float64",
    "threads": 1,
    "noise_threads": 1,
    "backend": "cpp",
    "block": 16,
    "screening": "off",
}


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        x = torch.randn(10, 2, dtype=torch.float64)
    return model, (x, model(x).detach())


def rays(**options: Any) -> fastvol.VolumeEstimate:
    model, data = problem()
    settings = {
        "n": 200, "increase": 1.0, "method": "radial", "plan": PLAN, "progress": False, **options,
    }  # fmt: skip
    loss_fn = settings.pop("loss_fn", F.mse_loss)
    result: fastvol.VolumeEstimate = fastvol.estimate(model, loss_fn, data=data, **settings)
    return result


def chains(**options: Any) -> fastvol.VolumeEstimate:
    settings = {
        "n": 250, "threshold": 1.0, "method": "annealed", "progress": False, "replicates": 3,
        "plan": {**PLAN, "chunk": 16, "lanes": 16}, **options,
    }  # fmt: skip
    body = bodies.ellipsoid(10, 1e3)
    result: fastvol.VolumeEstimate = fastvol.estimate(body.model(), bodies.loss, **settings)
    return result


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class Dying:
    """A loss that kills its process after so many calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.__qualname__ = "mse_loss"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.mse_loss(output, target)


def scenario(name: str, folder: Path) -> fastvol.VolumeEstimate:
    """One call, by name."""
    if name == "alone":
        return rays()
    if name == "kept":
        return rays(checkpoint=folder)
    if name == "unseen":
        return rays(checkpoint=folder.with_name("led") if rank() == 0 else "/no/such/place/led")
    if name == "law":
        return rays(method="preconditioned", preconditioner="hessian")
    if name == "measured":
        return rays(plan=None, n=100)
    if name == "chains":
        return chains()
    if name == "other seeds":
        return rays(seed=rank())
    if name == "one fails":
        return rays(loss_fn=F.mse_loss if rank() == 0 else Failing())
    if name == "restarted":
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        dies = first and rank() == 1
        return rays(checkpoint=folder, n=2000, loss_fn=Dying(100) if dies else F.mse_loss)
    if name.startswith("rank "):
        _, victim, calls = name.split()
        loss = Dying(int(calls)) if rank() == int(victim) else F.mse_loss
        return rays(checkpoint=folder, n=50_000, loss_fn=loss)
    raise ValueError(name)


class Failing:
    """A loss that raises after some calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.__qualname__ = "mse_loss"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 30:
            raise RuntimeError("the cat sat on it")
        return F.mse_loss(output, target)


def told(result: fastvol.VolumeEstimate) -> dict[str, Any]:
    """What has to be the same everywhere."""
    return {
        "log_radii": hashlib.sha256(result.log_radii.tobytes()).hexdigest(),
        "log_volume": result.log_volume,
        "stderr": result.stderr,
        "n_loss": result.n_loss,
        "n_grad": result.n_grad,
        "config": result.config,
        "plan": result.plan,
    }


def main() -> None:
    # Where a process dies the others shall know at once.
    _processes._BEAT, _processes._PATIENCE = 0.2, 4.0
    torch.set_num_threads(1)
    warnings.simplefilter("error", fastvol.FastvolWarning)
    out = Path(sys.argv[1])
    if os.environ.get("FASTVOL_TEST_INIT"):
        torch.distributed.init_process_group(
            "gloo", init_method=os.environ["FASTVOL_TEST_INIT"], rank=rank(),
            world_size=int(os.environ["WORLD_SIZE"]),
        )  # fmt: skip
    for name in sys.argv[2:]:
        if name == "1 is killed" and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "1 ends" and rank() == 1:
            return
        if name in ("1 is killed", "1 ends"):
            continue
        try:
            found = told(scenario(name, out / "run"))
        except fastvol.FastvolError as error:
            found = {"error": str(error)}
            if name.startswith("rank ") or name == "restarted":
                raise
        text = json.dumps(found)
        (out / f"{name}-{rank()}.json").write_text(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
