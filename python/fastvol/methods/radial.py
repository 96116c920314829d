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
from ..result import Rays, VolumeEstimate, assemble, log_weights

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

_PILOT_DIRECTIONS = 32
_PILOT_STREAM = 1
# An infinite measure's search ends this many doublings beyond the pilot's median radius.
_CAP_DOUBLINGS = 20
_RTOL_MOST, _RTOL_LEAST = 1e-3, 1e-12
# A log weight may be off by this much through the tolerance of its radius.
_TOLERATED_NATS = 0.02
_LEADERS = 64
_LEADER_SHARE_TIMES_N = 10.0
_LEADING_WEIGHT = 0.99
_SPOT_CHECK_COST = 0.05
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
        rounding: error in log r that the loss's own rounding makes.
        rtol: tolerance of the run.
        log_cap: where the search ends.
    """

    log_radius: float
    slope: float
    rounding: float
    rtol: float
    log_cap: float

    def describe(self) -> dict[str, float]:
        """JSON-ready."""
        return {
            "start_log_radius": self.log_radius,
            "slope": self.slope,
            "rounding": self.rounding,
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
        rtol=1e-3,
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
    crossed = np.flatnonzero(status == Status.CONVERGED)
    slope, rounding = _slope_and_rounding(problem, loss, threshold, log_radii, crossed)
    log_cap = min(measure_cap, start + _CAP_DOUBLINGS * math.log(2.0))
    if not len(crossed):
        log_cap = blind.log_cap
    if problem.rtol is not None:
        rtol = problem.rtol
    else:
        kappa = sensitivity(problem.measure, problem.dim, log_radii, shift)
        rtol = min(_RTOL_MOST, max(_TOLERATED_NATS / kappa, rounding, _RTOL_LEAST))
    return Pilot(start, slope, rounding, rtol, log_cap)


def _measure_log_cap(problem: Problem) -> float:
    """Where the measure itself ends the search."""
    if isinstance(problem.measure, Lebesgue):
        return math.log(problem.measure.max_radius)
    # The law's radius is chi-distributed around its centre: beyond √d + 10 lies less than e^−50.
    return math.log(math.sqrt(problem.offset_squared) + math.sqrt(problem.dim) + 10.0)


def _slope_and_rounding(
    problem: Problem, loss: _RayLoss, threshold: float, log_radii: Float, crossed: Int
) -> tuple[float, float]:
    """The slope of f at the root, and the loss's rounding there as an error in log r.

    The loss is evaluated on a fine grid around the roots of a few pilot rays; what a parabola does
    not explain is rounding.
    """
    rays = crossed[:4]
    if not len(rays):
        return 2.0, 0.0
    wide = np.array([-0.02, 0.02])
    fine = np.arange(-5, 6) * 2.0**-14
    slopes, errors = [], []
    for ray in rays:
        loss.assign(np.array([ray]))
        lane = np.array([0])
        loss.load(lane, lane)
        points = log_radii[ray] + np.concatenate([wide, fine])
        values = np.array([float(loss.loss(lane, np.exp([x]))[0]) for x in points])
        if not np.isfinite(values).all():
            continue
        gap = threshold - problem.loss0
        excess = values[:2] - problem.loss0
        if gap > 0 and (excess > 0).all():
            slopes.append(float(np.diff(np.log(excess))[0]) / 0.04)
        residual = values[2:] - np.polyval(np.polyfit(fine, values[2:], 2), fine)
        sd = math.sqrt(float(residual @ residual) / (len(fine) - 3))
        steepness = float(np.diff(values[:2])[0]) / 0.04
        errors.append(sd / steepness if steepness > 0 else math.inf)
    slope = float(np.median(slopes)) if slopes else 2.0
    rounding = float(np.median(errors)) if errors else 0.0
    return (slope if 0.1 < slope < 1e3 else 2.0), min(rounding, 1.0)


def sensitivity(measure: Any, dim: int, log_radii: Float, shift: Float) -> float:
    """κ: nats by which the answer moves per unit of log radius, from some radii.

    d for an uncapped volume; under a cap the weighted share of rays that end inside it, times d.
    """
    step = 1e-4
    weights, _ = log_weights(measure, dim, log_radii, shift)
    if isinstance(measure, Lebesgue):
        free = log_radii < math.log(measure.max_radius)
        derivative = np.where(free, float(dim), 0.0)
    else:
        derivative = (log_weights(measure, dim, log_radii + step, shift)[0] - weights) / step
    if not np.isfinite(weights).any():
        return float(dim)
    share = np.exp(weights - weights.max())
    share /= share.sum()
    kappa = float(share @ np.nan_to_num(derivative, posinf=float(dim)))
    # A pilot that saw no free ray cannot know that there is none.
    return max(1.0, min(float(dim), max(kappa, dim / (len(log_radii) + 1.0))))


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
    spot_checks = min(n, max(32, int(_SPOT_CHECK_COST * search_loss / (_SCAN_POINTS + 1))))
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
            else (np.zeros(n))
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

    # What the unaudited rays may carry too much, by the change that the random ones showed.
    after = _weights(problem, rays)
    top = max(float(before.max()), float(after.max()))
    if math.isfinite(top):
        loss_of_weight = float((np.exp(before[sample] - top) - np.exp(after[sample] - top)).sum())
        unaudited = n - int(rays.audited.sum())
        kept = float(np.exp(after - top).sum())
        rays.reentrant_error = (
            max(0.0, loss_of_weight) / len(sample) * unaudited / kept if kept > 0 else math.inf
        )


def _weights(problem: Problem, rays: Rays) -> Float:
    weights, _ = log_weights(problem.measure, problem.dim, rays.log_radii, rays.shift)
    return weights


def _log_abs_scale(problem: Problem) -> float:
    scale = problem.metric_scale[problem.metric_scale > 0].to(problem.layout.dtype)
    return float(scale.to(torch.float64).log().sum())
