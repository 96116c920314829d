"""Do antithetic pairs pay? ``python -m benchmarks.antithetic [--data DIR]``.

On three trained networks, with equal n: the variance of φ at the median radius and of the mean log
radius with pairs over that without, times the ratio of their times. Below 1 pairs pay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch.nn.functional as F

import fastvol

from .data import Sources
from .problems import Problem, mnist_cnn, mnist_mlp, transformer
from .record import RESULTS, record

RTOL = 1e-3


def measured(problem: Problem, n: int, rounds: int) -> dict[str, Any]:
    """One network: ratios of variance, of time, and their products."""
    plan: dict[str, Any] | None = None
    seconds: dict[bool, list[float]] = {False: [], True: []}
    radii: dict[bool, list[np.ndarray[Any, np.dtype[np.float64]]]] = {False: [], True: []}
    for seed in range(rounds):
        # In turns, since the machine may be shared.
        for pairs in (False, True):
            result = fastvol.estimate(
                problem.model,
                F.cross_entropy,
                n,
                data=(problem.inputs, problem.targets),
                threshold=problem.threshold,
                metric="filter",
                measure=fastvol.Lebesgue(1e3),
                method="radial",
                rtol=RTOL,
                seed=seed,
                antithetic=pairs,
                plan=plan,
                progress=False,
            )
            plan = result.plan
            seconds[pairs].append(result.provenance["engine_seconds"])
            radii[pairs].append(result.log_radii)
    pairs_of = np.concatenate(radii[True]).reshape(-1, 2)
    middle = float(np.median(pairs_of))
    beyond = (pairs_of > middle).astype(float)
    # Var of a pair's mean over that of the mean of two independent ones.
    variance = {
        "log radius": 1.0 + float(np.corrcoef(pairs_of.T)[0, 1]),
        "share beyond the median radius": 1.0 + float(np.corrcoef(beyond.T)[0, 1]),
    }
    time = median(b / a for a, b in zip(seconds[False], seconds[True], strict=True))
    return {
        "problem": problem.describe(),
        "directions": n * rounds,
        "plan": plan,
        "time_ratio": time,
        "variance_ratios": variance,
        "products": {name: ratio * time for name, ratio in variance.items()},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.antithetic", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of MNIST's train.parquet; else generated")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    sources = Sources(mnist=options.data)
    works = {
        "MLP, 600 images": (mnist_mlp(sources), 512, 5),
        "CNN, 60 images": (mnist_cnn(sources, 60), 128, 5),
        "transformer": (transformer(), 256, 5),
    }
    rows = {}
    for name, (problem, n, rounds) in works.items():
        rows[name] = measured(problem, n, rounds)
        print(name, {key: rows[name][key] for key in ("time_ratio", "variance_ratios", "products")})
    print(record("antithetic", {"rtol": RTOL, "works": rows}, folder=options.results).name)


if __name__ == "__main__":
    main()
