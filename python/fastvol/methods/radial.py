"""Plain Monte Carlo over directions: the mean of the radial integral over isotropic rays.

With r(u) the radius along the unit vector u in metric coordinates,
log V = log V_d(1) + log E[r(u)^d]; under a normal law the mass is E of the law's radial integral.
Unbiased before the logarithm, and short by the weight of the directions that were never drawn:
the gate says when that matters.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .._problem import Problem, Progress
from .._reference.search import Status
from ..engines import GeneralEngine, Indexed
from ..measures import Lebesgue
from ..result import Rays, VolumeEstimate, assemble, log_weights, sensitivity

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

_PILOT_DIRECTIONS = 32
_PILOT_STREAM = 1
# An infinite measure's search ends this many doublings beyond the pilot's median radius.
_CAP_DOUBLINGS = 20
_RTOL_MOST, _RTOL_LEAST = 1e-3, 1e-12
_PILOT_RTOL = 1e-4
# A log weight may be off by this much through the tolerance of its radius.
_TOLERATED_NATS = 0.02
_LEADERS = 64
_LEADER_SHARE_TIMES_N = 10.0
_LEADING_WEIGHT = 0.99
_SPOT_CHECK_COST = 0.10
_SPOT_CHECKS_LEAST = 64
_AUDIT_COST = 0.10
_SCAN_POINTS = 32
_SCAN_SPAN = math.log(8.0)


class _RayLoss:
    """What the lane loop calls: directions by item number, with what loading them told."""

    def __init__(self, problem: Problem, engine: GeneralEngine, stream: int) -> None:
        self._problem = problem
        self._engine = engine
        self._stream = stream
        self.ids = np.zeros(0, dtype=np.int64)
        self.dot_over_norm = np.zeros(0)
        self.n_loss = 0
        self.seconds = 0.0

    def assign(self, ids: Int) -> None:
        """Item j is direction ``ids[j]`` from now on."""
        self.ids = np.ascontiguousarray(ids, dtype=np.int64)
        self.dot_over_norm = np.zeros(len(ids))

    def load(self, lanes: Int, items: Int) -> None:
        began = time.perf_counter()
        rays = Indexed(
            self._problem.seed,
            self.ids[items],
            stream=self._stream,
            antithetic=self._problem.antithetic,
        )
        info = self._engine.load(lanes, rays)
        self.dot_over_norm[items] = info.dot / info.norm
        self.seconds += time.perf_counter() - began

    def loss(self, lanes: Int, radii: Float) -> Any:
        began = time.perf_counter()
        losses = self._engine.loss(radii, lanes)
        self.n_loss += len(lanes)
        self.seconds += time.perf_counter() - began
        return losses.values if losses.outside is None else (losses.values, losses.outside)


@dataclass(frozen=True)
class Pilot:
    """What a few directions tell before the run.

    Args:
        log_radius: median log radius, where every search starts.
        slope: median of d f / d log r at the threshold.
        rounding: error in log r that the loss's own rounding makes, of random sign.
        bias: error in log r common to all rays: the loss's last digit; half the tolerance where
            the loss jumps over the threshold, so that nothing can be interpolated.
        rtol: tolerance of the run.
        log_cap: where the search ends.
    """

    log_radius: float
    slope: float
    rounding: float
    bias: float
    rtol: float
    log_cap: float

    def describe(self) -> dict[str, float]:
        """JSON-ready."""
        return {
            "start_log_radius": self.log_radius,
            "slope": self.slope,
            "rounding": self.rounding,
            "bias": self.bias,
            "rtol": self.rtol,
            "log_cap": self.log_cap,
        }


def run(problem: Problem) -> list[VolumeEstimate]:
    """One estimate per threshold, from the same directions."""
    engine = problem.engine()
    results = []
    with problem.bar() as bar:
        for threshold in problem.thresholds:
            results.append(_run_threshold(problem, engine, threshold, bar))
    return results


def _run_threshold(
    problem: Problem, engine: GeneralEngine, threshold: float, bar: Any
) -> VolumeEstimate:
    began = time.perf_counter()
    rays = Rays.empty(problem.n)
    pilot_loss = _RayLoss(problem, engine, _PILOT_STREAM)
    pilot = _pilot(problem, pilot_loss, threshold)
    loss = _RayLoss(problem, engine, stream=0)

    n, block = problem.n, problem.plan.block
    running = problem.backend.LogMeanExp()
    for first in range(0, n, block):
        ids = np.arange(first, min(first + block, n))
        loss.assign(ids)
        outcome = problem.backend.search(
            loss,
            np.full(len(ids), pilot.log_radius),
            mode="search",
            **_search_options(problem, pilot, threshold),
        )
        rays.log_radii[ids], rays.status[ids] = outcome[0], outcome[1]
        rays.shift[ids] = loss.dot_over_norm
        if problem.first_crossing:
            _scan(problem, loss, pilot, threshold, rays, ids)
        weights, constant = log_weights(
            problem.measure, problem.dim, rays.log_radii[ids], rays.shift[ids]
        )
        running.update(weights)
        log_volume = running.log_mean + constant - 0.5 * problem.offset_squared
        bar.set_postfix_str(f"{log_volume:.4g} ± {running.stderr:.2g} nats", refresh=False)
        bar.update(len(ids))
        for callback in problem.callbacks:
            callback(
                Progress(
                    n_done=int(ids[-1]) + 1,
                    n=n,
                    threshold=threshold,
                    log_radii=rays.log_radii[: ids[-1] + 1].copy(),
                    log_volume_metric=log_volume,
                    stderr=running.stderr,
                    seconds=time.perf_counter() - problem.began,
                )
            )
    search_loss = loss.n_loss
    if problem.first_crossing:
        rays.audited[:] = True
    else:
        _audit(problem, loss, pilot, threshold, rays, search_loss)

    now = time.perf_counter()
    config = {
        **problem.config,
        "threshold": threshold,
        "method": "radial",
        "pilot": pilot.describe(),
    }
    provenance = {
        **problem.provenance,
        "engine_seconds": pilot_loss.seconds + loss.seconds,
        "run_seconds": now - began,
    }
    return assemble(
        rays,
        measure=problem.measure,
        dim=problem.dim,
        log_abs_scale=_log_abs_scale(problem),
        offset_squared=problem.offset_squared,
        seeds=(problem.seed,),
        config=config,
        plan=problem.plan.describe(),
        provenance=provenance,
        n_loss=pilot_loss.n_loss + loss.n_loss,
        n_grad=0,
        seconds=now - problem.began,
    )


def _search_options(problem: Problem, pilot: Pilot, threshold: float) -> dict[str, Any]:
    return {
        "lanes": problem.plan.lanes,
        "loss0": min(problem.loss0, threshold),
        "threshold": threshold,
        "xtol": pilot.rtol,
        "log_cap": pilot.log_cap,
        "slope": pilot.slope,
        "scan_span": _SCAN_SPAN,
        "scan_points": _SCAN_POINTS,
    }


def _pilot(problem: Problem, loss: _RayLoss, threshold: float) -> Pilot:
    measure_cap = _measure_log_cap(problem)
    guess = min(math.log(problem.typical_radius), measure_cap)
    blind = Pilot(
        log_radius=guess,
        slope=2.0,
        rounding=0.0,
        bias=0.0,
        rtol=_PILOT_RTOL,
        log_cap=min(measure_cap, guess + 2 * _CAP_DOUBLINGS * math.log(2.0)),
    )
    count = min(_PILOT_DIRECTIONS, max(4, problem.n))
    log_radii, status, shift = np.empty(count), np.empty(count, dtype=np.uint8), np.empty(count)
    start = blind.log_radius
    for ids in (np.arange(0, min(4, count)), np.arange(4, count)):
        if not len(ids):
            continue
        loss.assign(ids)
        outcome = problem.backend.search(
            loss,
            np.full(len(ids), start),
            mode="search",
            **_search_options(problem, blind, threshold),
        )
        log_radii[ids], status[ids], shift[ids] = outcome[0], outcome[1], loss.dot_over_norm
        start = float(np.median(log_radii[: ids[-1] + 1]))
    crossed = np.flatnonzero(status == Status.CONVERGED)[:4]
    boundary = _inspect_boundary(problem, loss, threshold, log_radii[crossed], crossed)
    log_cap = min(measure_cap, start + _CAP_DOUBLINGS * math.log(2.0))
    if (status == Status.UNBOUNDED).all():
        log_cap = blind.log_cap
    if problem.rtol is not None:
        rtol = problem.rtol
    else:
        kappa = sensitivity(problem.measure, problem.dim, log_radii, shift, status)
        # A pilot that saw no ray end inside the cap cannot know that there is none.
        kappa = max(1.0, kappa, problem.dim / (count + 1.0))
        rtol = min(_RTOL_MOST, max(_TOLERATED_NATS / kappa, boundary.rounding, _RTOL_LEAST))
    jumps = boundary.jumps or bool((status == Status.NONFINITE).any())
    return Pilot(
        log_radius=start,
        slope=boundary.slope,
        rounding=boundary.rounding,
        bias=max(boundary.last_digit, 0.5 * rtol if jumps else 0.0),
        rtol=rtol,
        log_cap=log_cap,
    )


def _measure_log_cap(problem: Problem) -> float:
    """Where the measure itself ends the search."""
    if isinstance(problem.measure, Lebesgue):
        return math.log(problem.measure.max_radius)
    # The law's radius is chi-distributed around its centre: beyond √d + 10 lies less than e^−50.
    return math.log(math.sqrt(problem.offset_squared) + math.sqrt(problem.dim) + 10.0)


@dataclass(frozen=True)
class _Boundary:
    """How the loss crosses the threshold: slope of f, errors in log r, whether it jumps."""

    slope: float
    rounding: float
    last_digit: float
    jumps: bool


def _inspect_boundary(
    problem: Problem, loss: _RayLoss, threshold: float, log_radii: Float, rays: Int
) -> _Boundary:
    """Evaluates the loss around the roots of a few pilot rays, on a fine grid and 2 % away.

    The noise of the loss is taken from the median second difference on the fine grid, which
    neither curvature nor a single jump moves. The loss jumps where the fine grid, a sixtieth as
    wide, holds a good part of the change.
    """
    wide = np.array([-0.02, 0.02])
    fine = np.arange(-5, 6) * 2.0**-14
    slopes, errors, jumps = [], [], []
    gap = threshold - problem.loss0
    lane = np.array([0])
    for ray, root in zip(rays, log_radii, strict=True):
        loss.assign(np.array([ray]))
        loss.load(lane, lane)
        points = root + np.concatenate([wide, fine])
        values = np.array([float(loss.loss(lane, np.exp([x]))[0]) for x in points])
        if not np.isfinite(values).all():
            jumps.append(True)
            continue
        # In units of the values' own size, so that no square overflows.
        scaled = (values - threshold) / (float(np.abs(values - threshold).max()) or 1.0)
        excess = values[:2] - problem.loss0
        if gap > 0 and (excess > 0).all():
            slopes.append(float(np.diff(np.log(excess))[0]) / 0.04)
        change, fine_change = float(scaled[1] - scaled[0]), float(np.ptp(scaled[2:]))
        still = int(np.count_nonzero(np.diff(scaled[2:]))) <= 2
        jumps.append(fine_change > 0.3 * abs(change) or (still and fine_change > 0))
        noise = float(np.median(np.abs(np.diff(scaled[2:], 2)))) / (0.6745 * math.sqrt(6.0))
        errors.append(noise / (change / 0.04) if change > 0 else math.inf)
    slope = float(np.median(slopes)) if slopes else 2.0
    slope = slope if 0.1 < slope < 1e3 else 2.0
    rounding = min(float(np.median(errors)), 1.0) if errors else 0.0
    last_digit = 0.0
    if gap > 0:
        largest = max(abs(threshold), abs(problem.loss0))
        # Half a step of the loss. A slope measured on a coarse staircase may be far too steep.
        last_digit = 0.5 * problem.objective.epsilon * largest / (min(slope, 2.0) * gap)
    return _Boundary(
        slope=slope,
        rounding=max(rounding, last_digit),
        last_digit=last_digit,
        jumps=bool(jumps) and sum(jumps) >= 0.5 * len(jumps),
    )


def _scan(
    problem: Problem,
    loss: _RayLoss,
    pilot: Pilot,
    threshold: float,
    rays: Rays,
    ids: Int,
) -> npt.NDArray[np.bool_]:
    """Looks for an earlier crossing on the rays ``ids`` and corrects their radii in place."""
    loss.assign(ids)
    log_radius, status, _, reentrant = problem.backend.search(
        loss,
        rays.log_radii[ids],
        mode="scan",
        **_search_options(problem, pilot, threshold),
    )
    found: npt.NDArray[np.bool_] = reentrant.astype(np.bool_)
    rays.log_radii[ids[found]] = log_radius[found]
    rays.status[ids[found]] = status[found]
    rays.audited[ids] = True
    rays.reentrant[ids] |= found
    return found


def _audit(
    problem: Problem,
    loss: _RayLoss,
    pilot: Pilot,
    threshold: float,
    rays: Rays,
    search_loss: int,
) -> None:
    """Scans the rays that carry the weight, and a random few, for an earlier crossing.

    Always the 64 largest and every ray with ten times the mean weight, re-ranked until all of them
    are audited; then, from the largest down, the rest of 99 % of the weight, as far as a tenth of
    the search's evaluations goes. Where no ray stands out, no single radius can matter, and the
    random few bound what the others might do.
    """
    n = rays.n
    generator = np.random.default_rng([problem.seed & 0xFFFFFFFF, problem.seed >> 32, n])
    affordable = int(_SPOT_CHECK_COST * search_loss / (_SCAN_POINTS + 1))
    spot_checks = min(n, max(_SPOT_CHECKS_LEAST, affordable))
    sample = np.sort(generator.choice(n, size=spot_checks, replace=False))
    before = _weights(problem, rays)
    for ids in np.array_split(sample, max(1, len(sample) // problem.plan.block)):
        _scan(problem, loss, pilot, threshold, rays, ids)
    rays.sampled[sample] = True

    budget = loss.n_loss + int(_AUDIT_COST * search_loss)
    while True:
        weights = _weights(problem, rays)
        order = np.argsort(-weights, kind="stable")
        share = (
            np.exp(weights[order] - weights[order[0]])
            if np.isfinite(weights[order[0]])
            else np.zeros(n)
        )
        total = float(share.sum())
        if total == 0:
            break
        share /= total
        must = np.arange(n) < _LEADERS
        must |= share > _LEADER_SHARE_TIMES_N / n
        todo = order[must & ~rays.audited[order]]
        if not len(todo):
            if loss.n_loss >= budget:
                break
            heavy = np.concatenate([[True], np.cumsum(share)[:-1] < _LEADING_WEIGHT])
            todo = order[heavy & ~rays.audited[order]]
            room = max(1, (budget - loss.n_loss) // (_SCAN_POINTS + 1))
            todo = todo[:room]
            if not len(todo):
                break
        for ids in np.array_split(todo, -(-len(todo) // problem.plan.block)):
            _scan(problem, loss, pilot, threshold, rays, np.sort(ids))

    # What the unaudited rays carry too much, by the change that the random ones showed.
    after = _weights(problem, rays)
    top = float(before.max())
    kept = float(np.exp(after - top).sum()) if math.isfinite(top) else 0.0
    if kept > 0:
        unaudited = ~rays.audited
        heaviest = float(after[unaudited].max()) if unaudited.any() else -math.inf
        # Heavier ones among the random rays would have been audited in any case.
        alike = sample[before[sample] <= heaviest]
        if len(alike):
            excess = np.exp(before[alike] - top) - np.exp(after[alike] - top)
            scale = int(unaudited.sum()) / kept
            rays.reentrant_share = float(excess.mean()) * scale
            rays.reentrant_error = float(excess.std()) / math.sqrt(len(alike)) * scale


def _weights(problem: Problem, rays: Rays) -> Float:
    weights, _ = log_weights(problem.measure, problem.dim, rays.log_radii, rays.shift)
    return weights


def _log_abs_scale(problem: Problem) -> float:
    scale = problem.metric_scale[problem.metric_scale > 0].to(problem.layout.dtype)
    return float(scale.to(torch.float64).log().sum())
