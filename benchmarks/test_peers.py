"""A direction by hand, against a direction of ``fastvol.estimate``: the ratio of their times.

Peers and fastvol take turns in one process, on one network, one data set, one threshold, one
metric: after each block of fastvol's search its callback gives the peers their turn. A ratio is
formed within a round and the median over the rounds is reported. Before the first round the radii
of both are compared on the same directions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import pytest

import fastvol
from fastvol import Progress

from . import agreement, ellipsoid, ours, peers
from .conftest import Problems, Report
from .floor import Floor
from .problems import Problem
from .works import WORKS, Work

RTOL = 1e-3
# A whole call is compared where its fixed costs, the pilot and the audit, are spread over as many.
_LONG_CALL = 1000


# A warning that another engine had to serve is shown, as is the engine.
pytestmark = pytest.mark.filterwarnings("default::fastvol.FastvolWarning")


@dataclass(frozen=True)
class Effort:
    """How long a run is.

    Args:
        whole: seconds of the one whole call, at a peer's speed of evaluation.
        least: directions of that call in any case.
        turn: seconds of a turn; whoever cannot do a direction in them does one.
        rounds: of turns at 1e-3, and at the default tolerance.
        agree: directions on which radii are compared.
    """

    whole: float
    least: int
    turn: float
    rounds: tuple[int, int]
    agree: int


FULL = Effort(40.0, 8, 1.2, (5, 3), 3)
SHORT = Effort(0.3, 4, 0.03, (1, 1), 1)


@dataclass
class Turn:
    """What a contender did in one round."""

    seconds: float
    directions: int

    @property
    def ms_per_direction(self) -> float:
        """Milliseconds."""
        return 1e3 * self.seconds / self.directions


@dataclass(frozen=True)
class Peer:
    """A peer of one work: how it finds a radius, and how much of it is a turn."""

    way: peers.Way
    find: Callable[[], peers.Found]
    directions: int

    def turn(self) -> Turn:
        """Takes it."""
        began = time.perf_counter()
        with peers.torch_threads(self.way.threads):
            for _ in range(self.directions):
                self.find()
        return Turn(time.perf_counter() - began, self.directions)


Round = dict[str, Turn]


@pytest.fixture(scope="module")
def table(report: Report) -> Iterator[dict[str, Any]]:
    works: dict[str, Any] = {}
    yield works
    show_table(report, works)
    # A part of the table does not replace the whole.
    name = "cpu_table" if works.keys() == WORKS.keys() else "cpu_table_part"
    report.keep(name, {"works": works})


@pytest.mark.parametrize("name", WORKS)
def test_peers(
    name: str,
    benchmark: Any,
    trained: Problems,
    threads: int,
    table: dict[str, Any],
    report: Report,
    short: bool,
) -> None:
    work, effort = WORKS[name], SHORT if short else FULL
    problem = trained.work(name)
    functional, quickest = peers.ways(problem, threads)
    whole = ours.affordable_call(problem, quickest.seconds, effort.whole, effort.least, "auto")
    floor = Floor(problem, threads)
    # What the default tolerance is here.
    own = float(whole.config["pilot"]["rtol"])
    measured: dict[str, Any] = {}

    def both() -> None:
        for label, rtol, rounds in zip(
            ("rtol_1e-3", "default"), (RTOL, own), effort.rounds, strict=True
        ):
            measured[label] = in_turns(
                problem, whole, (functional, quickest), floor, rtol, rounds, effort
            )

    benchmark.pedantic(both, rounds=1, iterations=1)
    payload: dict[str, Any] = {
        "name": work.name,
        "problem": problem.describe(),
        "engine": whole.plan["engine"],
        "plan": whole.plan,
        "goals": {"bisection": work.bisection, "sweep": work.sweep, "floor": work.floor},
        "peers": {
            "bisection": {"moves": functional.name, "threads": functional.threads},
            "sweep": {"moves": quickest.name, "threads": quickest.threads},
        },
        "whole_call": whole_call(whole, measured["default"]),
        **measured,
    }
    if work.hit_or_miss:
        points = peers.HitOrMiss(problem, quickest.loss_at, seed=2)
        with peers.torch_threads(quickest.threads):
            points.run(whole.seconds)
        payload["hit_or_miss"] = hit_or_miss(points, whole)
    table[name] = payload
    benchmark.extra_info.update(payload)
    show(report, work, payload)

    if not short:
        behind = {
            f"{peer}, {label}": result["ratios"][peer]
            for label, result in measured.items()
            for peer in ("bisection", "sweep")
            if result["ratios"][peer] < 1
        }
        assert not behind, f"fastvol is behind: {behind}"
        if work.hit_or_miss:
            assert payload["hit_or_miss"]["fastvol_ahead_by"] > 0


def in_turns(
    problem: Problem,
    whole: fastvol.VolumeEstimate,
    ways: tuple[peers.Way, peers.Way],
    floor: Floor,
    rtol: float,
    rounds: int,
    effort: Effort,
) -> dict[str, Any]:
    """Times and ratios at one tolerance: medians over the rounds.

    Args:
        problem: what is measured.
        whole: an earlier call, which tells the plan and where a bisection may start.
        ways: of the bisection and the sweep to evaluate the loss.
        floor: one pass of matrix work.
        rtol: of fastvol. The bisection has 1e-3 in any case; a second one is as fine as fastvol.
        rounds, effort: how much is done.
    """
    functional, quickest = ways
    seed = 1
    normals = peers.Normals(problem, seed=1)
    # The bisection starts where a pilot would tell it to, at no cost to it.
    start = math.exp(float(np.median(whole.log_radii)))

    def directions(way: peers.Way, evaluations: int) -> int:
        return max(1, round(effort.turn / (evaluations * way.seconds)))

    def bisection(to: float) -> Peer:
        return Peer(
            functional,
            lambda: peers.bisect(functional.loss_at, normals(), problem.threshold, start, to),
            directions(functional, 3 + round(math.log2(1 / to))),
        )

    contenders = {
        "bisection": bisection(RTOL),
        "sweep": Peer(
            quickest,
            lambda: peers.sweep(quickest.loss_at, normals(), problem.threshold),
            directions(quickest, len(peers.COEFFICIENTS)),
        ),
    }
    if rtol != RTOL:
        contenders["bisection_as_fine"] = bisection(rtol)
    block = ours.block_size(whole, effort.turn)
    taken: list[Round] = []
    agreements: list[agreement.Agreement] = []

    def between(progress: Progress, seconds: list[float]) -> None:
        if not seconds:
            with peers.torch_threads(functional.threads):
                agreements.append(
                    agreement.check(
                        problem,
                        functional.loss_at,
                        progress.log_radii[: effort.agree],
                        seed,
                        rtol,
                        first_crossings=lambda: ours.first_crossings(
                            problem, whole.plan, effort.agree, rtol, seed
                        ),
                        sweep=rtol == RTOL,
                    )
                )
            return
        turns = {"search": Turn(seconds[-1], block)}
        turns |= {name: peer.turn() for name, peer in contenders.items()}
        turns["floor"] = Turn(1e-3 * floor.milliseconds(), 1)
        turns["torch_floor"] = Turn(1e-3 * floor.milliseconds(torch_only=True), 1)
        taken.append(turns)

    ours.search_blocks(problem, whole.plan, block, rounds, rtol, seed, between)

    def over_rounds(value: Callable[[Round], float]) -> float:
        return median(value(turns) for turns in taken)

    def ms(name: str) -> float:
        return over_rounds(lambda turns: turns[name].ms_per_direction)

    def ratio(slow: str, fast: str) -> float:
        return over_rounds(
            lambda turns: turns[slow].ms_per_direction / turns[fast].ms_per_direction
        )

    return {
        "rtol": rtol,
        "ms_per_direction": {name: ms(name) for name in ("search", *contenders)},
        "ms_of_floor": ms("floor"),
        "ms_of_torch_floor": ms("torch_floor"),
        "ratios": {name: ratio(name, "search") for name in contenders},
        "search_over_floor": ratio("search", "floor"),
        "search_over_torch_floor": ratio("search", "torch_floor"),
        "agreement": asdict(agreements[0]),
        "rounds": len(taken),
        "turns": [{name: asdict(turn) for name, turn in turns.items()} for turns in taken],
    }


def whole_call(whole: fastvol.VolumeEstimate, beside: dict[str, Any]) -> dict[str, Any]:
    """What plan, pilot and audit add, at the default tolerance; timed once, not in turns."""
    ms = beside["ms_per_direction"]
    own = 1e3 * whole.seconds / whole.n
    return {
        "directions": whole.n,
        "seconds": whole.seconds,
        "seconds_beside_search": whole.seconds - whole.n * ms["search"] / 1e3,
        "losses_per_direction": whole.n_loss / whole.n,
        "ratios": {name: ms[name] / own for name in ("bisection", "sweep")}
        if whole.n >= _LONG_CALL
        else None,
    }


def hit_or_miss(points: peers.HitOrMiss, result: fastvol.VolumeEstimate) -> dict[str, Any]:
    """What hit-or-miss found in the seconds of one call of fastvol, beside what that call found."""
    bound = result.lower_bound(0.95) - result.log_volume + result.log_volume_metric
    theirs = points.log_lower_bound(0.95)
    return {
        "points_per_second": points.points / points.seconds,
        "seconds": points.seconds,
        "balls": [vars(ball) for ball in points.balls],
        "log_lower_bound": theirs,
        "fastvol_log_lower_bound": bound,
        "fastvol_ahead_by": bound - theirs,
        "fastvol_largest_radius": math.exp(float(result.log_radii.max())),
    }


def against(value: float, goal: float | None, *, least: bool = True) -> str:
    """A figure beside its goal, as the inequality that holds."""
    if goal is None:
        return f"{value:.2f}"
    met = value >= goal if least else value <= goal
    sign = ("≥" if met else "<") if least else ("≤" if met else ">")
    return f"{value:.2f} {sign} {goal:g}"


def show_table(report: Report, works: dict[str, Any]) -> None:
    """All works: times, ratios, and the goals beside them."""
    heading = ("", "rtol", "fastvol", "bisection", "sweep", "bisection / fastvol")
    rows: list[tuple[str, ...]] = [(*heading, "sweep / fastvol", "fastvol / floor")]
    for row in works.values():
        goals = row["goals"]
        for label in ("rtol_1e-3", "default"):
            found = row[label]
            ms, ratios = found["ms_per_direction"], found["ratios"]
            rows.append(
                (
                    row["name"] if label == "rtol_1e-3" else "  the default tolerance",
                    f"{found['rtol']:.2g}",
                    *(f"{ms[name]:.2f}" for name in ("search", "bisection", "sweep")),
                    against(ratios["bisection"], goals["bisection"]),
                    against(ratios["sweep"], goals["sweep"]),
                    against(found["search_over_floor"], goals["floor"], least=False),
                )
            )
    report.table(
        "A direction in ms; ratios of times, medians of turns, ≥ or < the goal; rtol is fastvol's, "
        "the bisection has 1e-3; the floor is one pass of matrix work over the data",
        rows,
    )


def show(report: Report, work: Work, payload: dict[str, Any]) -> None:
    """What the table has no column for."""
    problem, plan, whole = payload["problem"], payload["plan"], payload["whole_call"]
    agreed = payload["rtol_1e-3"]["agreement"]
    off = ", ".join(f"{value:.1e} ({peer})" for peer, value in agreed["largest"].items())
    sweep, bisection = payload["peers"]["sweep"], payload["peers"]["bisection"]
    ratios, fine = whole["ratios"], payload["default"]["ratios"]["bisection_as_fine"]
    compared = (
        f"; of a whole call: {ratios['bisection']:.2f} (bisection), {ratios['sweep']:.2f} (sweep)"
        if ratios
        else ""
    )
    report.lines += [
        "",
        f"{work.name}: {problem['parameters']:,} parameters, {problem['examples']} examples "
        f"({problem['source']}); {payload['engine']} engine, {plan['lanes']} lanes, "
        f"{plan['threads']} thread(s)",
        f"  the sweep moves parameters {sweep['moves']} on {sweep['threads']} thread(s), the "
        f"bisection has {bisection['threads']}",
        f"  log radii on {agreed['compared']} same direction(s) differ by at most {off or '-'}; "
        f"{agreed['reentrant']} of these rays cross the threshold more than once",
        f"  at the default tolerance fastvol is {fine:.2f} times as fast as a bisection as fine",
        f"  a whole call of {whole['directions']} directions: {whole['seconds']:.1f} s, of them "
        f"{whole['seconds_beside_search']:.1f} s for plan, pilot and audit; "
        f"{whole['losses_per_direction']:.1f} losses a direction, all counted{compared}",
    ]
    if "hit_or_miss" not in payload:
        return
    found = payload["hit_or_miss"]
    ahead = found["fastvol_ahead_by"]
    balls = ", ".join(
        f"{ball['hits']} of {ball['points']} at R = {ball['radius']:g}" for ball in found["balls"]
    )
    report.lines.append(
        f"  hit-or-miss: {found['points_per_second']:.0f} points a second; in the "
        f"{found['seconds']:.1f} s of the whole call its lower bound is "
        f"{abs(ahead):,.0f} nats {'below' if ahead > 0 else 'above'} fastvol's ({balls})"
    )


def test_error_of_hit_or_miss(benchmark: Any, report: Report, short: bool) -> None:
    """The error of the log volume in the same seconds, where the volume is known."""
    model, n, rounds = ellipsoid.Ellipsoid(16, 20.0), 1000 if short else 4000, 2 if short else 8
    truth = model.log_volume(1.0)
    ball = peers.log_ball_volume(16, model.enclosing_radius(1.0))
    runs: list[dict[str, Any]] = []

    def one_round() -> None:
        seed = len(runs)
        result = fastvol.estimate(
            model, lambda m: m(), n, threshold=1.0, seed=seed, rtol=RTOL, progress=False
        )
        hits, points = ellipsoid.hit_or_miss(model, 1.0, result.seconds, seed)
        runs.append(
            {
                "seconds": result.seconds,
                "fastvol_error": result.log_volume - truth,
                "fastvol_stderr": result.stderr,
                "points": points,
                "hits": hits,
                "hit_or_miss_error": ball + math.log(hits / points) - truth if hits else None,
            }
        )

    benchmark.pedantic(one_round, rounds=rounds, iterations=1)

    def rms(name: str) -> float:
        errors = [run[name] for run in runs]
        if None in errors:
            return math.inf
        return math.sqrt(sum(error**2 for error in errors) / len(errors))

    own, theirs = rms("fastvol_error"), rms("hit_or_miss_error")
    payload = {
        "body": "ellipsoid, d = 16, condition 20",
        "directions": n,
        "fastvol_rms_error": own,
        "hit_or_miss_rms_error": theirs if math.isfinite(theirs) else None,
        "runs": runs,
    }
    benchmark.extra_info.update(payload)
    report.lines += [
        "",
        f"Ellipsoid, d = 16, condition 20: in {median(run['seconds'] for run in runs):.2f} s "
        f"({n} directions) fastvol errs by {own:.3f} nats, hit-or-miss in the smallest enclosing "
        f"ball by {theirs:.3f} ({median(run['hits'] for run in runs):g} hits of "
        f"{median(run['points'] for run in runs):,g} points); root mean squares of {rounds} runs",
    ]
    report.keep("hit_or_miss_ellipsoid", payload)
    if not short:
        assert own < theirs
