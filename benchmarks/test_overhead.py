"""What the loop costs beside the engine: (run − engine) / run, from the result's provenance."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import pytest

from . import ours
from .conftest import Report
from .problems import Problem

# Directions of a full and a short run, and the most that the loop may take of it.
CASES = {"mlp": (32, 8, 0.05), "cnn": (8, 4, 0.05), "tiny": (8192, 512, None)}


@pytest.fixture(scope="module")
def measured(report: Report) -> Iterator[dict[str, Any]]:
    nets: dict[str, Any] = {}
    yield nets
    report.keep("overhead", nets)


@pytest.mark.parametrize("net", CASES)
def test_loop_overhead(
    net: str,
    benchmark: Any,
    request: pytest.FixtureRequest,
    measured: dict[str, Any],
    report: Report,
    short: bool,
) -> None:
    problem: Problem = request.getfixturevalue(net)
    directions, few, most = CASES[net]
    n = few if short else directions
    runs: list[dict[str, Any]] = []

    def one_round() -> None:
        result = ours.whole_call(problem, n, 1e-3, seed=len(runs))
        engine = result.provenance["engine_seconds"]
        run = result.provenance["run_seconds"]
        runs.append(
            {
                "run_seconds": run,
                "engine_seconds": engine,
                "overhead": (run - engine) / run,
                "evaluations": result.n_loss,
                "plan": result.plan,
            }
        )

    benchmark.pedantic(one_round, rounds=1 if short else 3, iterations=1)
    overhead = median(run["overhead"] for run in runs)
    each = median((run["run_seconds"] - run["engine_seconds"]) / run["evaluations"] for run in runs)
    payload = {
        "problem": problem.describe(),
        "directions": n,
        "overhead": overhead,
        "seconds_per_evaluation_outside_engine": each,
        "runs": runs,
    }
    benchmark.extra_info.update(payload)
    report.lines += [
        "",
        f"{problem.name}: the loop takes {overhead:.2%} of a run of {n} directions, "
        f"{1e6 * each:.2f} µs an evaluation (chunk {runs[0]['plan']['chunk']}, lanes "
        f"{runs[0]['plan']['lanes']})",
    ]
    measured[net] = payload
    if most is not None:
        assert overhead < most, f"the loop takes {overhead:.1%} of the run"
