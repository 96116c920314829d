"""How far the profile of a trained MNIST network reaches: plain rays, and two kinds of chains.

    python -m benchmarks.mnist_reach --data DIR [--n N] [STAGE …]

d = 235,146, 600 images, filter metric, threshold 0.1. Each stage is kept when it ends, in
``results/mnist_reach_STAGE.json``; a later run of the same stage replaces it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

import fastvol

from .data import Sources
from .problems import Problem, mnist_mlp
from .record import RESULTS, record

_RADII = (25.0, 28.0, 31.1, 34.2, 36.6, 40.0, 45.0, 50.0, 55.0, 57.0, 60.0, 64.0, 68.0)
# Typical radius of the widest normal law.
_WIDEST = 68.0


def _without_gradient(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.detach(), target)


# Stage to the arguments of its call: n is the budget in plain directions.
STAGES: dict[str, dict[str, Any]] = {
    "radial": {"method": "radial", "n": 30_000, "measure": fastvol.Lebesgue(60.0)},
    # Hamiltonian moves, once those of one loss have become short.
    "annealed": {
        "method": "annealed",
        "n": 60_000,
        "measure": fastvol.Lebesgue(57.0),
        "preconditioner": None,
    },
    # Another path and another move: Crank–Nicolson steps alone.
    "splitting": {
        "method": "splitting",
        "loss_fn": _without_gradient,
        "n": 60_000,
        "measure": fastvol.Lebesgue(57.0),
        "preconditioner": None,
    },
    "gaussian": {"method": "annealed", "n": 60_000, "measure": None, "preconditioner": None},
    "gaussian_splitting": {
        "method": "splitting",
        "loss_fn": _without_gradient,
        "n": 60_000,
        "measure": None,
        "preconditioner": None,
    },
}


def measure(
    problem: Problem, stage: str, n: float | None, replicates: int, radius: float | None = None
) -> dict[str, Any]:
    """One stage, with another budget or cap where they are given."""
    call = dict(STAGES[stage])
    if radius is not None and call["measure"] is not None:
        call["measure"] = fastvol.Lebesgue(radius)
    if call["measure"] is None:
        scale = {name: _WIDEST / problem.dim**0.5 * s for name, s in problem.scale().items()}
        call["measure"] = fastvol.Gaussian(scale)
    if n is not None:
        call["n"] = n
    began = time.perf_counter()
    result = fastvol.estimate(
        problem.model,
        call.pop("loss_fn", F.cross_entropy),
        data=(problem.inputs, problem.targets),
        threshold=problem.threshold,
        metric="filter",
        seed=1,
        replicates=replicates,
        **call,
    )
    gaussian = stage.startswith("gaussian")
    radii = np.array(_RADII) / _WIDEST if gaussian else np.array(_RADII)
    if not gaussian:
        radii = radii[radii <= call["measure"].max_radius]
    profile = result.profile(radii)
    runs = getattr(result, "_runs", ())
    return {
        "network": problem.describe(),
        "stage": stage,
        "n": result.config["n"],
        "plan": result.plan,
        "replicates": replicates,
        "seconds": time.perf_counter() - began,
        "n_loss": result.n_loss,
        "n_grad": result.n_grad,
        "reliable": result.reliable,
        "warnings": list(result.warnings),
        "reliable_radius": profile.reliable_radius,
        "profile": [
            {
                "radius": float(radius),
                "log_fraction": float(value),
                "stderr": float(error),
                "ess": float(ess),
                "reliable": bool(reliable),
            }
            for radius, value, error, ess, reliable in zip(
                profile.radius,
                profile.log_fraction,
                profile.stderr,
                profile.ess,
                profile.reliable,
                strict=True,
            )
        ],
        "runs": [
            {"levels": len(run.levels), "last": run.reports[-1], "length": run.length}
            for run in runs
        ],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mnist_reach", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all")
    parser.add_argument("--data", type=Path, help="folder of train.parquet; else generated images")
    parser.add_argument("--n", type=float, help="budget, instead of the stage's own")
    parser.add_argument("--radius", type=float, help="cap, instead of the stage's own")
    parser.add_argument("--replicates", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    problem = mnist_mlp(Sources(mnist=options.data))
    show: Callable[..., None] = print
    for stage in options.stages or STAGES:
        found = measure(problem, stage, options.n, options.replicates, options.radius)
        record(f"mnist_reach_{stage}", found, folder=options.results)
        show(stage, f"{found['seconds']:.0f} s", found["warnings"])
        for row in found["profile"]:
            show("  ", row, flush=True)


if __name__ == "__main__":
    main()
