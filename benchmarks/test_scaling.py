"""How the time of a direction grows with the data and the width, and that of a run with n."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
import pytest

from . import million, ours, peers, problems
from .conftest import Problems, Report
from .data import Sources
from .floor import Floor
from .problems import Problem

RTOL = 1e-3
IMAGES = (60, 300, 2000, 12_000, 60_000)
WIDTHS = (32, 64, 128, 256, 512, 1024)
DIRECTIONS = (1000, 10_000, 100_000, 1_000_000)
MEMORY_GOAL = 400.0


# A warning that another engine had to serve is shown, as is the engine.
pytestmark = pytest.mark.filterwarnings("default::fastvol.FastvolWarning")


@pytest.fixture(scope="module")
def scaling(report: Report) -> Iterator[dict[str, Any]]:
    parts: dict[str, Any] = {}
    yield parts
    report.keep("cpu_scaling" if len(parts) == 3 else "cpu_scaling_part", parts)


def test_images(
    benchmark: Any,
    sources: Sources,
    threads: int,
    scaling: dict[str, Any],
    report: Report,
    short: bool,
) -> None:
    counts = [12, 48] if short else list(IMAGES)
    made = problems.growing_mlp(sources, counts)
    points: list[dict[str, Any]] = []

    def measure() -> None:
        for count, problem in made.items():
            points.append({"images": count, **direction(problem, threads, short)})

    benchmark.pedantic(measure, rounds=1, iterations=1)
    scaling["images"] = payload = {
        "network": "784-256-128-10",
        "source": made[counts[0]].source,
        "points": points,
        "exponent": exponent(points, "images", "ms_per_direction"),
    }
    benchmark.extra_info.update(payload)
    show(report, "images", payload)


def test_width(
    benchmark: Any,
    trained: Problems,
    threads: int,
    scaling: dict[str, Any],
    report: Report,
    short: bool,
) -> None:
    count = 12 if short else 600
    points: list[dict[str, Any]] = []

    def measure() -> None:
        for width in (8, 32) if short else WIDTHS:
            problem = problems.mnist_mlp(trained.sources, count, (width, width // 2))
            points.append(
                {"width": width, "parameters": problem.dim, **direction(problem, threads, short)}
            )

    benchmark.pedantic(measure, rounds=1, iterations=1)
    scaling["width"] = payload = {
        "network": "784-w-w/2-10",
        "images": count,
        "points": points,
        "exponent": exponent(points, "width", "ms_per_direction"),
    }
    benchmark.extra_info.update(payload)
    show(report, "width", payload)


def test_directions(
    benchmark: Any, threads: int, scaling: dict[str, Any], report: Report, short: bool
) -> None:
    *fewer, most = (100, 400, 1000) if short else DIRECTIONS
    problem = problems.arcs_mlp()
    points: list[dict[str, Any]] = []
    # PyTorch sets itself up in the first call of a process.
    ours.whole_call(problem, 64, RTOL, seed=1)

    def measure() -> None:
        for n in fewer:
            result = ours.whole_call(problem, n, RTOL, seed=0)
            points.append({"n": n, "seconds": result.seconds})
        own = million.measure(most, threads)
        points.append({"n": most, "seconds": own["seconds"]})
        scaling["directions"] = {"points": points, "longest": own}

    benchmark.pedantic(measure, rounds=1, iterations=1)
    payload = scaling["directions"]
    payload |= {
        "network": "2-16-2",
        "problem": problem.describe(),
        "exponent": exponent(points, "n", "seconds"),
        "goal_megabytes": MEMORY_GOAL,
    }
    benchmark.extra_info.update(payload)
    own = payload["longest"]
    memory = own["megabytes_above_model_and_data"]
    rows: list[tuple[str, ...]] = [("n", "seconds")]
    rows += [(f"{row['n']:,}", f"{row['seconds']:.2f}") for row in points]
    report.table(
        f"Time of a run against n, {payload['network']} MLP, {problem.dim} parameters, "
        f"{len(problem.inputs)} examples: n^{payload['exponent']:.2f}",
        rows,
    )
    report.lines.append(
        f"  {own['n']:,} directions take {own['seconds']:.1f} s and {memory:.0f} MB above model "
        f"and data (goal: less than {MEMORY_GOAL:g}); {own['losses_per_direction']:.1f} losses a "
        f"direction, {own['engine']} engine, {own['lanes']} lanes"
    )


def direction(problem: Problem, threads: int, short: bool) -> dict[str, Any]:
    """Time of a direction between blocks, beside that of a pass of matrix work."""
    turn, budget, least = (0.03, 0.2, 4) if short else (1.0, 10.0, 8)
    _, quickest = peers.ways(problem, threads)
    whole = ours.affordable_call(problem, quickest.seconds, budget, least, RTOL)
    block = ours.block_size(whole, turn)
    lasts = block * ours.seconds_per_direction(whole)
    blocks = 1 if short or lasts > 3 * turn else 3
    floor = Floor(problem, threads)
    floors: list[float] = []
    seconds = ours.search_blocks(
        problem,
        whole.plan,
        block,
        blocks,
        RTOL,
        1,
        lambda progress, seconds: floors.append(floor.milliseconds()),
    )
    return {
        "ms_per_direction": 1e3 * median(seconds) / block,
        "ms_of_floor": median(floors),
        "directions": block * blocks,
        "engine": whole.plan["engine"],
        "lanes": whole.plan["lanes"],
    }


def exponent(points: list[dict[str, Any]], x: str, y: str) -> float:
    """Of the power law y ∝ x^exponent, by least squares in logarithms."""
    logs = np.log([[point[x], point[y]] for point in points])
    away = logs - logs.mean(0)
    return float(away[:, 0] @ away[:, 1] / (away[:, 0] @ away[:, 0]))


def show(report: Report, against: str, payload: dict[str, Any]) -> None:
    """The table of one variable."""
    rows: list[tuple[str, ...]] = [(against, "ms/direction", "ms of the floor", "ratio", "lanes")]
    for point in payload["points"]:
        ms, floor = point["ms_per_direction"], point["ms_of_floor"]
        rows.append(
            (
                f"{point[against]:,}",
                f"{ms:.3g}",
                f"{floor:.3g}",
                f"{ms / floor:.2f}",
                f"{point['lanes']}",
            )
        )
    report.table(
        f"Time of a direction against {against}, {payload['network']} MLP, rtol {RTOL:g}: "
        f"{against}^{payload['exponent']:.2f}",
        rows,
    )
