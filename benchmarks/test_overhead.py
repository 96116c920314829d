"""What the loop costs beside the engine: (run − engine) / run, from the result's provenance."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import pytest

from . import ours, problems
from .conftest import Problems, Report

# Directions of a full and a short run, and the most that the loop may take of a full one.
CASES = {"mlp": (256, 8, 0.05), "cnn": (8, 4, 0.05), "tiny": (8192, 256, None)}

# A warning that another engine had to serve is shown, as is the engine.
pytestmark = pytest.mark.filterwarnings("default::fastvol.FastvolWarning")


@pytest.fixture(scope="module")
def measured(report: Report) -> Iterator[dict[str, Any]]:
    nets: dict[str, Any] = {}
    yield nets
    report.keep("overhead", nets)


@pytest.mark.parametrize("net", CASES)
def test_loop_overhead(
    net: str,
    benchmark: Any,
    trained: Problems,
    measured: dict[str, Any],
    report: Report,
    short: bool,
) -> None:
    directions, few, most = CASES[net]
    build = {
        "mlp": lambda: problems.mnist_mlp(trained.sources, 60 if short else 600),
        "cnn": lambda: problems.mnist_cnn(trained.sources, 4 if short else 60),
        "tiny": lambda: problems.tiny_mlp(trained.sources),
    }[net]
    problem = trained.get(f"overhead_{net}", build)
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
        f"{1e6 * each:.2f} µs an evaluation ({runs[0]['plan']['engine']} engine, "
        f"{runs[0]['plan']['lanes']} lanes)",
    ]
    measured[net] = payload
    if most is not None and not short:
        assert overhead < most, f"the loop takes {overhead:.1%} of the run"
