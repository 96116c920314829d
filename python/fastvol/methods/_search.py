"""Radii of rays: directions by item number on the lane loop, the pilot, and the scan of a ray."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .._problem import Problem
from .._proposal import Proposal
from .._reference.search import Status
from ..engines import Dense, Engine, Indexed
from ..engines.protocol import DeviceEngine
from ..measures import Lebesgue
from ..result import Rays, ray_offsets, sensitivity
from ._device_loop import search

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

SCAN_POINTS = 32
_FAR = 50.0
_SCAN_SPAN = math.log(8.0)
_PILOT_DIRECTIONS = 32
_PILOT_STREAM = 1
# An infinite measure's search ends this many doublings beyond the pilot's median radius.
_CAP_DOUBLINGS = 20
_RTOL_MOST, _RTOL_LEAST = 1e-3, 1e-12
_PILOT_RTOL = 1e-4
# A log weight may be off by this much through the tolerance of its radius.
_TOLERATED_NATS = 0.02


class RayLoss:
    """What the lane loop calls: directions by item number, with what loading them told.

    Args:
        problem: the call.
        engine: where the rays are evaluated.
        stream: which family of directions.
        proposal: their law; ``None`` is isotropic. A radius counts in multiples of v = P u then.
    """

    def __init__(
        self, problem: Problem, engine: Engine, stream: int, proposal: Proposal | None = None
    ) -> None:
        self._problem = problem
        self._engine = engine
        self.stream = stream
        self.proposal = proposal
        self.ids = np.zeros(0, dtype=np.int64)
        self.shift = self.log_norm = self.proposal_shift = np.zeros(0)
        self.n_loss = 0
        self.seconds = 0.0
        # A loss beyond is only known to lie there.
        self.limit = math.inf
        # Losses a direction, as the pilot found.
        self.price = math.nan
        # Items, ‖z‖ and ⟨z, project⟩ that the device has not told yet.
        self._untold: list[tuple[Int, torch.Tensor, torch.Tensor]] = []

    @property
    def engine(self) -> Engine:
        """Where the rays are evaluated."""
        return self._engine

    def assign(self, ids: Int) -> None:
        """Item j is direction ``ids[j]`` from now on."""
        self.ids = np.ascontiguousarray(ids, dtype=np.int64)
        self._untold = []
        self.shift, self.log_norm, self.proposal_shift = np.zeros((3, len(ids)))

    def load(self, lanes: Int, items: Int) -> None:
        """Puts items on lanes."""
        began = time.perf_counter()
        problem, ids = self._problem, self.ids[items]
        if self.proposal is None:
            rays = Indexed(problem.seed, ids, stream=self.stream, antithetic=problem.antithetic)
            info = self._engine.load(lanes, rays)
            self.shift[items] = info.dot / info.norm
        else:
            rows = self.proposal.directions(self.normals(ids))
            self._engine.load(lanes, Dense(rows.v))
            self.shift[items] = rows.shift(problem.offset)
            self.log_norm[items] = rows.log_norm
            self.proposal_shift[items] = rows.proposal_shift
        self.seconds += time.perf_counter() - began

    def load_async(self, lanes: Int | torch.Tensor, items: Int) -> None:
        """As :meth:`load`, without waiting for a device; :meth:`finish_loading` ends it.

        The device may be all that knows the lanes: the host waits for them where it has to.
        """
        began = time.perf_counter()
        told = None
        if self.proposal is None and isinstance(self._engine, DeviceEngine):
            problem, ids = self._problem, self.ids[items]
            rays = Indexed(problem.seed, ids, stream=self.stream, antithetic=problem.antithetic)
            told = self._engine.load_async(lanes, rays)
        if told is None:
            self.load(lanes.cpu().numpy() if isinstance(lanes, torch.Tensor) else lanes, items)
            return
        self._untold.append((items, *told))
        self.seconds += time.perf_counter() - began

    def finish_loading(self) -> None:
        """Reads what :meth:`load_async` left on the device."""
        if self._untold:
            items, norms, dots = zip(*self._untold, strict=True)
            self.shift[np.concatenate(items)] = (torch.cat(dots) / torch.cat(norms)).cpu().numpy()
            self._untold = []

    def normals(self, ids: Int) -> torch.Tensor:
        """The standard normal vectors of some directions, ``[k, d]`` in the working dtype."""
        problem = self._problem
        z = torch.empty(
            (len(ids), problem.dim), dtype=problem.layout.dtype, device=problem.layout.device
        )
        problem.backend.normals(
            z,
            problem.seed,
            self.stream,
            ids,
            antithetic=problem.antithetic,
            threads=problem.plan.noise_threads,
        )
        return z

    def loss(self, lanes: Int, radii: Float) -> Any:
        """The losses of some lanes at their radii."""
        self._problem.work.check()
        began = time.perf_counter()
        losses = self._engine.loss(radii, lanes, limit=self.limit)
        self.n_loss += len(lanes)
        self.seconds += time.perf_counter() - began
        return losses.values if losses.outside is None else (losses.values, losses.outside)

    def offsets(self) -> Float:
        """What the law of the directions adds to each item's log weight, nats."""
        if self.proposal is None:
            return np.zeros(len(self.ids))
        return ray_offsets(self._problem.dim, self.log_norm, self.proposal_shift)


@dataclass(frozen=True)
class Pilot:
    """What a few directions tell before the run; radii are in multiples of v.

    Args:
        start_log_radius: median log radius, where every search starts.
        slope: median of d f / d log r at the threshold.
        rounding: error in log r that the loss's own rounding makes, of random sign.
        bias: error in log r common to all rays: the loss's last digit; half the tolerance where
            the loss jumps over the threshold, so that nothing can be interpolated.
        rtol: tolerance of the run.
        log_cap: where the search ends.
        metric_log_cap: where the measure itself ends it, in log length of the ray.
        log_weight_sd: standard deviation of the pilot's log weights, nats.
        log_weight_mean: their mean. With the constant of the law of the directions it bounds the
            answer from below in expectation, so that of two laws the one with more is the better.
    """

    start_log_radius: float
    slope: float
    rounding: float
    bias: float
    rtol: float
    log_cap: float
    metric_log_cap: float
    log_weight_sd: float = math.nan
    log_weight_mean: float = math.nan

    def describe(self) -> dict[str, float | None]:
        """JSON-ready."""
        return {
            name: value if math.isfinite(value) else None for name, value in asdict(self).items()
        }


def search_options(problem: Problem, pilot: Pilot, threshold: float) -> dict[str, Any]:
    """Keyword arguments of the lane loop, but for the lanes."""
    return {
        "loss0": min(problem.loss0, threshold),
        "threshold": threshold,
        "xtol": pilot.rtol,
        "log_cap": pilot.log_cap,
        "slope": pilot.slope,
        "scan_span": _SCAN_SPAN,
        "scan_points": SCAN_POINTS,
    }


def settle(
    problem: Problem,
    loss: RayLoss,
    pilot: Pilot,
    threshold: float,
    ids: Int,
    start: Float | None = None,
) -> tuple[Float, npt.NDArray[np.uint8]]:
    """Log length and status of the rays ``ids``, which stay assigned to ``loss``.

    Args:
        problem, loss, pilot, threshold: of the run.
        ids: directions ``[k]``.
        start: log multiples of v to start from ``[k]``; the pilot's median by default.
    """
    loss.assign(ids)
    # Interpolation has little use for a loss far above the threshold.
    loss.limit = problem.loss0 + _FAR * max(threshold - problem.loss0, 0.0)
    if start is None:
        start = np.full(len(ids), pilot.start_log_radius)
    log_rho, status = search(
        problem, loss, start, mode="search", options=search_options(problem, pilot, threshold)
    )[:2]
    if loss.proposal is None:
        return log_rho, status
    cap = pilot.metric_log_cap
    log_radii = log_rho + loss.log_norm
    # The loop has one cap for all rays: one whose v is shorter than the pilot's were has been
    # stopped before the measure's own cap.
    short = np.flatnonzero((status == Status.UNBOUNDED) & (log_radii < cap - 1e-12))
    if len(short) and math.isfinite(cap):
        told = (loss.shift, loss.log_norm, loss.proposal_shift)
        wider = replace(pilot, log_cap=cap - float(loss.log_norm[short].min()))
        log_radii[short], status[short] = settle(
            problem, loss, wider, threshold, ids[short], log_rho[short]
        )
        loss.assign(ids)
        loss.shift, loss.log_norm, loss.proposal_shift = told
    beyond = log_radii >= cap
    log_radii[beyond], status[beyond] = cap, Status.UNBOUNDED
    return log_radii, status


def make_pilot(
    problem: Problem, loss: RayLoss, threshold: float, *, count: int = _PILOT_DIRECTIONS
) -> tuple[Pilot, Rays]:
    """Median radius, slope, tolerance and caps from a few directions, and their rays."""
    metric_cap = measure_log_cap(problem)
    count = min(count, max(4, problem.n))
    guess, measure_cap = math.log(problem.typical_radius), metric_cap
    if loss.proposal is not None:
        norms = loss.proposal.directions(loss.normals(np.arange(count))).log_norm
        guess -= float(np.median(norms))
        measure_cap -= float(norms.min())
    guess = min(guess, measure_cap)
    blind = Pilot(
        start_log_radius=guess,
        slope=2.0,
        rounding=0.0,
        bias=0.0,
        rtol=_PILOT_RTOL,
        log_cap=min(measure_cap, guess + 2 * _CAP_DOUBLINGS * math.log(2.0)),
        metric_log_cap=metric_cap,
    )
    rays = Rays.empty(count)
    log_rho = np.empty(count)
    start = blind.start_log_radius
    for ids in (np.arange(0, min(4, count)), np.arange(4, count)):
        if not len(ids):
            continue
        log_radii, status = settle(
            problem, loss, blind, threshold, ids, start=np.full(len(ids), start)
        )
        rays.log_radii[ids], rays.status[ids], rays.shift[ids] = log_radii, status, loss.shift
        rays.log_offset[ids] = loss.offsets()
        log_rho[ids] = log_radii - loss.log_norm
        start = float(np.median(log_rho[: ids[-1] + 1]))
    loss.price = loss.n_loss / count
    crossed = np.flatnonzero(rays.status == Status.CONVERGED)[:4]
    boundary = _inspect_boundary(problem, loss, threshold, log_rho[crossed], crossed)
    log_cap = min(measure_cap, start + _CAP_DOUBLINGS * math.log(2.0))
    if (rays.status == Status.UNBOUNDED).all():
        log_cap = blind.log_cap
    if problem.rtol is not None:
        rtol = problem.rtol
    else:
        kappa = sensitivity(problem.measure, problem.dim, rays)
        # A pilot that saw no ray end inside the cap cannot know that there is none.
        kappa = max(1.0, kappa, problem.dim / (count + 1.0))
        rtol = min(_RTOL_MOST, max(_TOLERATED_NATS / kappa, boundary.rounding, _RTOL_LEAST))
    jumps = boundary.jumps or bool((rays.status == Status.NONFINITE).any())
    weights, _ = rays.log_weights(problem.measure, problem.dim)
    usable = np.isfinite(weights)
    pilot = Pilot(
        start_log_radius=start,
        slope=boundary.slope,
        rounding=boundary.rounding,
        bias=max(boundary.last_digit, 0.5 * rtol if jumps else 0.0),
        rtol=rtol,
        log_cap=log_cap,
        metric_log_cap=metric_cap,
        log_weight_sd=float(weights.std()) if usable.all() else math.inf,
        log_weight_mean=float(weights.mean()) if usable.all() else -math.inf,
    )
    return pilot, rays


def pilot_source(problem: Problem, engine: Engine, proposal: Proposal | None = None) -> RayLoss:
    """The directions of the pilot: a family of their own."""
    return RayLoss(problem, engine, _PILOT_STREAM, proposal)


def measure_log_cap(problem: Problem) -> float:
    """Where the measure itself ends a ray, log length."""
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
    problem: Problem, loss: RayLoss, threshold: float, log_radii: Float, rays: Int
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
        loss.limit = math.inf
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


def scan(
    problem: Problem,
    loss: RayLoss,
    pilot: Pilot,
    threshold: float,
    rays: Rays,
    ids: Int,
    rows: Int | None = None,
) -> npt.NDArray[np.bool_]:
    """Looks for an earlier crossing on the rays ``ids`` and corrects their radii in place.

    ``rows`` are their rows in ``rays``, where these are not all directions.
    """
    rows = ids if rows is None else rows
    loss.assign(ids)
    # A scan only asks whether a point lies outside, but for the crossing that it may find.
    loss.limit = problem.loss0 + _FAR * max(threshold - problem.loss0, 0.0)
    known = rays.log_radii[rows]
    norms: Float | float = 0.0
    if loss.proposal is not None:
        norms = -rays.log_offset[rows] / problem.dim
        if loss.proposal.offset is not None:
            norms = loss.proposal.directions(loss.normals(ids)).log_norm
    log_rho, status, _, reentrant = search(
        problem, loss, known - norms, mode="scan", options=search_options(problem, pilot, threshold)
    )
    found: npt.NDArray[np.bool_] = reentrant.astype(np.bool_)
    rays.log_radii[rows[found]] = (log_rho + norms)[found]
    rays.status[rows[found]] = status[found]
    rays.audited[rows] = True
    rays.reentrant[rows] |= found
    return found
