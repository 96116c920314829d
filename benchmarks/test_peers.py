"""A direction by hand, against a direction of ``fastvol.estimate``: the ratio of their times.

Peers and fastvol take turns in one process, on one network, one data set, one threshold, one
metric; a ratio is formed within a round and the median over the rounds is reported. Before that the
radii of both are compared on the same directions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

import fastvol

from . import agreement, ellipsoid, ours, peers
from .conftest import Report
from .problems import Problem

RTOL = 1e-3
# A whole call is compared where its fixed costs, the pilot and the audit, are spread over as many.
_LONG_CALL = 1000


@dataclass(frozen=True)
class Effort:
    """How much a run does.

    Args:
        whole: directions of the one whole call.
        agree: directions on which radii are compared.
        rounds: of turns.
        block, blocks: directions a block of fastvol's search, and timed blocks a turn.
        bisections, sweeps: directions of a peer's turn.
    """

    whole: int
    agree: int
    rounds: int
    block: int
    blocks: int
    bisections: int
    sweeps: int


FULL = {"mlp": Effort(1024, 12, 5, 64, 2, 64, 8), "cnn": Effort(24, 6, 4, 12, 1, 12, 1)}
SHORT = {"mlp": Effort(8, 3, 2, 8, 1, 6, 1), "cnn": Effort(4, 2, 2, 6, 1, 4, 1)}


@dataclass
class Turn:
    """What a contender did in one round."""

    seconds: float = 0.0
    directions: int = 0
    evaluations: int = 0

    @property
    def ms_per_direction(self) -> float:
        """Milliseconds."""
        return 1e3 * self.seconds / self.directions


def take(count: int, find: Callable[[], peers.Found]) -> Turn:
    """A turn of ``count`` directions of a peer."""
    turn = Turn(directions=count)
    began = time.perf_counter()
    for _ in range(count):
        turn.evaluations += find().evaluations
    turn.seconds = time.perf_counter() - began
    return turn


Rounds = list[dict[str, Turn]]
_PEERS = ("sweep", "bisection")
_SEARCHES = ("search", "search_auto")


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_peers(
    net: str, benchmark: Any, request: pytest.FixtureRequest, report: Report, short: bool
) -> None:
    problem: Problem = request.getfixturevalue(net)
    effort = (SHORT if short else FULL)[net]
    whole = ours.whole_call(problem, effort.whole, RTOL, seed=0)
    with torch_threads(whole.plan["threads"]):
        way, quickest = peers.faster(problem)
        functional = peers.functional(problem)
        deviations = agreement.check(problem, functional, whole, RTOL, effort.agree)
        points = peers.HitOrMiss(problem, quickest, seed=2)
        points.run(whole.seconds)

        normals = peers.Normals(problem, seed=1)
        # The bisection starts where a pilot would tell it to, at no cost to it.
        start = math.exp(float(np.median(whole.log_radii)))
        rounds: Rounds = []

        def bisection() -> peers.Found:
            return peers.bisect(functional, normals(), problem.threshold, start, RTOL)

        def sweep() -> peers.Found:
            return peers.sweep(quickest, normals(), problem.threshold)

        def search(rtol: Any, plan: dict[str, Any] = whole.plan) -> Turn:
            seed = 1 + len(rounds)
            done = ours.search_alone(problem, plan, effort.block, effort.blocks, rtol, seed)
            return Turn(done.seconds, done.directions, done.evaluations)

        def one_round() -> None:
            rounds.append(
                {
                    "bisection": take(effort.bisections, bisection),
                    "search": search(RTOL),
                    "sweep": take(effort.sweeps, sweep),
                    "search_auto": search("auto"),
                }
            )

        benchmark.pedantic(one_round, rounds=effort.rounds, iterations=1)
        if whole.plan["chunk"] > 1:
            # Evaluations can be counted from outside only where rays go one at a time.
            for name, rtol in zip(_SEARCHES, (RTOL, "auto"), strict=True):
                counted = search(rtol, {**whole.plan, "chunk": 1})
                for turns in rounds:
                    turns[name].evaluations = counted.evaluations

    payload = {
        "problem": problem.describe(),
        "sweep_moves_parameters": way,
        "rtol": RTOL,
        "rounds": len(rounds),
        "directions_of_whole_call": whole.n,
        "plan": whole.plan,
        "largest_deviation_of_log_radius": deviations,
        **comparison(rounds, whole),
        "hit_or_miss": hit_or_miss(points, whole),
    }
    benchmark.extra_info.update(payload)
    show(report, problem, payload)
    report.keep(f"peers_{net}", payload)

    if not short:
        behind = {
            f"{peer} / {name}": ratio
            for peer, against in payload["ratios"].items()
            for name, ratio in against.items()
            # A whole call is timed once, not in turns: another process may have slowed it alone.
            if ratio <= 1 and name in _SEARCHES
        }
        assert not behind, f"fastvol is behind: {behind}"
        assert payload["hit_or_miss"]["fastvol_ahead_by"] > 0


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """As many threads for the peers as fastvol's plan has chosen for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def comparison(rounds: Rounds, whole: fastvol.VolumeEstimate) -> dict[str, Any]:
    """Times, evaluations and ratios: medians over the rounds."""

    def over_rounds(value: Callable[[dict[str, Turn]], float]) -> float:
        return median(value(turns) for turns in rounds)

    names = _PEERS + _SEARCHES
    ms = {name: over_rounds(lambda turns, n=name: turns[n].ms_per_direction) for name in names}
    ms["whole"] = 1e3 * whole.seconds / whole.n
    evaluations = {
        name: over_rounds(lambda turns, n=name: turns[n].evaluations / turns[n].directions)
        for name in names
    }
    evaluations["whole"] = whole.n_loss / whole.n
    ratios: dict[str, dict[str, float]] = {}
    for peer in _PEERS:
        ratios[peer] = {
            own: over_rounds(
                lambda turns, p=peer, o=own: turns[p].ms_per_direction / turns[o].ms_per_direction
            )
            for own in _SEARCHES
        }
        if whole.n >= _LONG_CALL:
            ratios[peer]["whole"] = ms[peer] / ms["whole"]
    return {
        "ms_per_direction": ms,
        "evaluations_per_direction": evaluations,
        # Plan, pilot and audit: what a call costs beyond its search.
        "seconds_beside_search": whole.seconds - whole.n * ms["search"] / 1e3,
        "ratios": ratios,
        "turns": [{name: asdict(turn) for name, turn in turns.items()} for turns in rounds],
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


def show(report: Report, problem: Problem, payload: dict[str, Any]) -> None:
    """The table of one network."""
    labels = {
        "sweep": f"sweep of 100 coefficients, {payload['sweep_moves_parameters']}",
        "bisection": f"bisection to {RTOL:g}, functional_call",
        "search": f"fastvol, search to {RTOL:g}",
        "search_auto": "fastvol, search to its default",
        "whole": f"fastvol, whole call of {payload['directions_of_whole_call']} directions",
    }
    rows: list[tuple[str, ...]] = [
        ("", "ms/direction", "losses/direction", "/ search", "/ search, default", "/ whole call")
    ]
    for name, label in labels.items():
        ratios = payload["ratios"].get(name)
        rows.append(
            (
                label,
                f"{payload['ms_per_direction'][name]:.2f}",
                f"{payload['evaluations_per_direction'][name]:.1f}",
                *(
                    f"{ratios[own]:.2f}" if ratios and own in ratios else ""
                    for own in ("search", "search_auto", "whole")
                ),
            )
        )
    off = payload["largest_deviation_of_log_radius"]
    report.table(
        f"{problem.name}: {problem.dim:,} parameters, {len(problem.inputs)} images "
        f"({problem.source}), medians of {payload['rounds']} rounds; the columns on the right are "
        "ratios, time of the peer / time of fastvol",
        rows,
    )
    found = payload["hit_or_miss"]
    ahead = found["fastvol_ahead_by"]
    balls = ", ".join(
        f"{ball['hits']} of {ball['points']} at R = {ball['radius']:g}" for ball in found["balls"]
    )
    report.lines += [
        f"  plan, pilot and audit took {payload['seconds_beside_search']:.1f} s of the whole call",
        f"  on the same directions log radii differ by at most {off['bisection']:.1e} (bisection), "
        f"{off['sweep']:.1e} (sweep)",
        f"  hit-or-miss: {found['points_per_second']:.0f} points a second; in the "
        f"{found['seconds']:.1f} s of the whole call its lower bound is "
        f"{abs(ahead):,.0f} nats {'below' if ahead > 0 else 'above'} fastvol's ({balls})",
    ]


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
