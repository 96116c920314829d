"""Coverage of the 95 % interval over many runs of the public call, per body, all runs counted."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

import fastvol

from . import bodies

COVERAGE_LEAST = 0.93
GATE_MOST = 0.95
HOPELESS = 0.8
FLAGGED_LEAST = 0.99


def cases(short: bool) -> list[bodies.Body]:
    """The bodies; the short form takes a few of each kind."""
    everything = [
        bodies.ellipsoid(2, 10.0),
        bodies.ellipsoid(5, 10.0),
        bodies.ellipsoid(10, 20.0),
        bodies.ellipsoid(20, 100.0),
        bodies.cube(5),
        bodies.cube(10),
        bodies.cube(20),
        bodies.l1_ball(5),
        bodies.l1_ball(20),
        bodies.simplex(5),
        bodies.simplex(20),
        bodies.star(3, 1.0),
        bodies.star(20, 4.0),
        bodies.ellipsoid(50, 100.0),
    ]
    return [everything[i] for i in (0, 5, 11, 13)] if short else everything


def run(short: bool) -> dict[str, Any]:
    """Coverage where the gate passes, flags where the interval fails; the rest is reported."""
    count = len(cases(short))
    if short:
        return {"level": 0.95, "bodies": [_case(index, short) for index in range(count)]}
    # A body to a process: the runs are too small for threads.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(_case, range(count), [short] * count))
    return {"level": 0.95, "bodies": rows}


def _case(index: int, short: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    runs, n = (40, 1000) if short else (1000, 2000)
    return _body(cases(short)[index], runs, n)


def _body(body: bodies.Body, runs: int, n: int) -> dict[str, Any]:
    model = body.model()
    covered = passed = misses = flagged = 0
    plan = None
    for seed in range(runs):
        result = fastvol.estimate(
            model, bodies.loss, n=n, threshold=1.0, seed=seed, plan=plan, progress=False
        )
        plan = result.plan
        low, high = result.ci(0.95)
        covered += low <= body.log_volume <= high
        passed += result.reliable
        if abs(result.log_volume - body.log_volume) > 3 * result.stderr:
            misses += 1
            flagged += not result.reliable
    coverage = covered / runs
    row = {
        "body": body.name,
        "d": body.dim,
        "n": n,
        "runs": runs,
        "coverage": coverage,
        "gate": passed / runs,
        "misses_beyond_3": misses,
        "of_them_flagged": flagged,
    }
    # What chance alone takes from a share over so few runs.
    slack = 0.0 if runs >= 1000 else 3 * math.sqrt(0.05 * 0.95 / runs)
    if row["gate"] >= GATE_MOST:
        row["kind"] = "asserted"
        assert coverage >= COVERAGE_LEAST - slack, row
    elif coverage < HOPELESS:
        row["kind"] = "must be flagged"
        assert flagged >= FLAGGED_LEAST * misses, row
    else:
        row["kind"] = "borderline, reported"
    return row
