"""The ray search: many lanes, each looking for the radius where the loss first exceeds τ.

x is the logarithm of a radius. A point is *inside* where the loss is finite and at most τ; a loss
that is not finite, or that the engine flags as a lower bound, is *outside* and never interpolated.
The search runs on f(x) = log(L − L*) − log(τ − L*), which is a straight line for a homogeneous
excess loss, or on L − τ where an excess is not positive. It brackets by steps of at most a factor
of 2, then closes the bracket by Chandrupatla's method (Chandrupatla 1997, Adv. Eng. Softw. 28,
145–149), started with a secant step instead of a bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


class Status(IntEnum):
    """How the search of one ray ended."""

    CONVERGED = 0
    UNBOUNDED = 1  # inside up to the cap
    NONFINITE = 2  # bounded by a loss that is not finite
    FAILED = 3  # out of evaluations: the largest radius known to be inside


class _Phase(IntEnum):
    IDLE = 0
    BRACKET = 1
    REFINE = 2
    SCAN = 3
    SETTLED = 4


class LoopEngine(Protocol):
    """What the loop calls: once a round for all lanes, never once a ray."""

    def load(self, lanes: Int, items: Int) -> None: ...

    def loss(self, lanes: Int, radii: Float) -> Any: ...


@dataclass(frozen=True)
class _Rules:
    loss0: float
    threshold: float
    xtol: float
    log_cap: float
    slope: float
    max_evaluations: int
    scan_span: float
    scan_points: int


_LOG2 = math.log(2.0)


class _Points:
    """One remembered point a lane: x, its loss, whether it may be interpolated, whether it is."""

    def __init__(self, lanes: int) -> None:
        self.x = torch.zeros(lanes, dtype=torch.float64)
        self.loss = torch.zeros(lanes, dtype=torch.float64)
        self.smooth = torch.zeros(lanes, dtype=torch.bool)
        self.known = torch.zeros(lanes, dtype=torch.bool)

    def clear(self, lanes: Tensor) -> None:
        self.known[lanes] = False
        self.smooth[lanes] = False

    def put(self, lanes: Tensor, x: Tensor, loss: Tensor, smooth: Tensor) -> None:
        self.x[lanes], self.loss[lanes], self.smooth[lanes] = x, loss, smooth
        self.known[lanes] = True

    def copy(self, other: _Points, lanes: Tensor) -> None:
        self.x[lanes], self.loss[lanes] = other.x[lanes], other.loss[lanes]
        self.smooth[lanes], self.known[lanes] = other.smooth[lanes], other.known[lanes]


class LaneSearch:
    """The state of K lanes, as one array per quantity."""

    def __init__(self, lanes: int, rules: _Rules) -> None:
        self._rules = rules
        zeros = torch.zeros(lanes, dtype=torch.float64)
        self.phase = torch.full((lanes,), int(_Phase.IDLE))
        self.x = zeros.clone()
        self.status = torch.zeros(lanes, dtype=torch.uint8)
        self.evaluations = torch.zeros(lanes, dtype=torch.int32)
        self.reentrant = torch.zeros(lanes, dtype=torch.uint8)
        self._inside = _Points(lanes)
        self._outside = _Points(lanes)
        # While bracketing, the previous point on the same side; while refining, the displaced one.
        self._third = _Points(lanes)
        self._newest_is_inside = torch.zeros(lanes, dtype=torch.bool)
        self._last_step = zeros.clone()
        self._guard_width = zeros.clone()
        self._guard_steps = torch.zeros(lanes, dtype=torch.int64)
        self._known_x = zeros.clone()
        self._scan_index = torch.zeros(lanes, dtype=torch.int64)

    def begin(self, lanes: Tensor, start: Tensor, scan: bool) -> None:
        """Starts a search from ``start``, or a scan of the rays inside the radius ``start``."""
        for points in (self._inside, self._outside, self._third):
            points.clear(lanes)
        self.evaluations[lanes] = 0
        self.reentrant[lanes] = 0
        self._last_step[lanes] = 0.0
        if scan:
            self.phase[lanes] = _Phase.SCAN
            self._known_x[lanes] = start
            self._scan_index[lanes] = 0
            self.x[lanes] = start - self._rules.scan_span
        else:
            self.phase[lanes] = _Phase.BRACKET
            self.x[lanes] = start.clamp(max=self._rules.log_cap)

    def active(self) -> Tensor:
        """The lanes that wait for a loss, ascending."""
        return ((self.phase > _Phase.IDLE) & (self.phase < _Phase.SETTLED)).nonzero().flatten()

    def settled(self) -> Tensor:
        """The lanes whose result has not been collected yet, ascending."""
        return (self.phase == _Phase.SETTLED).nonzero().flatten()

    def update(self, lanes: Tensor, loss: Tensor, flagged: Tensor) -> None:
        """Moves the search of ``lanes``, whose losses at ``x`` have come."""
        rules = self._rules
        self.evaluations[lanes] += 1
        smooth = loss.isfinite() & ~flagged
        inside = smooth & (loss <= rules.threshold)
        scanning = self.phase[lanes] == _Phase.SCAN
        bracketing = self.phase[lanes] == _Phase.BRACKET
        refining = self.phase[lanes] == _Phase.REFINE

        # The displaced end of a bracket is the third point of the interpolation.
        self._third.copy(self._inside, lanes[~scanning & inside])
        self._third.copy(self._outside, lanes[~scanning & ~inside])
        x = self.x[lanes]
        self._inside.put(lanes[inside], x[inside], loss[inside], smooth[inside])
        self._outside.put(lanes[~inside], x[~inside], loss[~inside], smooth[~inside])
        self._newest_is_inside[lanes] = inside

        self._after_scan(lanes[scanning & inside], lanes[scanning & ~inside])
        moved = scanning & ~inside | bracketing
        both = self._inside.known[lanes] & self._outside.known[lanes]
        self._enter_refine(lanes[moved & both])
        self._bracket(lanes[moved & ~both & inside], outward=True)
        self._bracket(lanes[moved & ~both & ~inside], outward=False)
        self._guard_steps[lanes[refining]] += 1
        refining = refining | (moved & both)
        self._refine(lanes[refining])
        spent = (self.evaluations[lanes] >= rules.max_evaluations) & (
            self.phase[lanes] != _Phase.SETTLED
        )
        failed = lanes[spent]
        inside_known = self._inside.known[failed]
        best = torch.where(inside_known, self._inside.x[failed], self._outside.x[failed])
        self._settle(failed, best, Status.FAILED)

    def _settle(self, lanes: Tensor, x: Tensor, status: int | Tensor) -> None:
        self.x[lanes] = x
        self.status[lanes] = torch.as_tensor(status, dtype=torch.uint8)
        self.phase[lanes] = _Phase.SETTLED

    def _after_scan(self, inside: Tensor, outside: Tensor) -> None:
        rules = self._rules
        self._scan_index[inside] += 1
        done = self._scan_index[inside] >= rules.scan_points
        self._settle(inside[done], self._known_x[inside[done]], Status.CONVERGED)
        going = inside[~done]
        fraction = self._scan_index[going].to(torch.float64) / rules.scan_points
        self.x[going] = self._known_x[going] - rules.scan_span + fraction * rules.scan_span
        self.reentrant[outside] = 1
        self.phase[outside] = _Phase.BRACKET

    def _bracket(self, lanes: Tensor, outward: bool) -> None:
        rules = self._rules
        point = self._inside if outward else self._outside
        if outward:
            capped = self.x[lanes] >= rules.log_cap
            self._settle(
                lanes[capped], torch.tensor(rules.log_cap, dtype=torch.float64), Status.UNBOUNDED
            )
            lanes = lanes[~capped]
        delta = max(2.0 * rules.xtol, 0.01)
        f, usable = self._log_excess(point, lanes)
        f_before, usable_before = self._log_excess(self._third, lanes)
        usable_before &= self._third.known[lanes]
        secant = (f - f_before) / (point.x[lanes] - self._third.x[lanes])
        follow = usable & usable_before & (secant > 0)
        slope = torch.where(
            follow, secant.clamp(rules.slope / 4, rules.slope * 4), torch.full_like(f, rules.slope)
        )
        step = torch.where(usable, 1.25 * f.abs() / slope + delta, torch.full_like(f, _LOG2))
        step = torch.maximum(step, 2.0 * self._last_step[lanes]).clamp(max=_LOG2)
        self._last_step[lanes] = step
        if outward:
            self.x[lanes] = (self.x[lanes] + step).clamp(max=rules.log_cap)
        else:
            self.x[lanes] -= step

    def _log_excess(self, points: _Points, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """f on the log scale, and where it is defined; 0 elsewhere."""
        rules = self._rules
        excess = points.loss[lanes] - rules.loss0
        gap = rules.threshold - rules.loss0
        usable = points.smooth[lanes] & (excess > 0) & (gap > 0)
        safe = torch.where(usable, excess, torch.full_like(excess, max(gap, 1.0)))
        return safe.log() - math.log(max(gap, 1.0) if gap <= 0 else gap), usable

    def _enter_refine(self, lanes: Tensor) -> None:
        self.phase[lanes] = _Phase.REFINE
        self._third.clear(lanes)
        self._guard_width[lanes] = self._outside.x[lanes] - self._inside.x[lanes]
        self._guard_steps[lanes] = 0

    def _refine(self, lanes: Tensor) -> None:
        rules = self._rules
        low, high, third = self._inside, self._outside, self._third
        width = high.x[lanes] - low.x[lanes]
        middle = low.x[lanes] + 0.5 * width

        gap = rules.threshold - rules.loss0
        positive = (low.loss[lanes] > rules.loss0) & (high.loss[lanes] > rules.loss0) & (gap > 0)
        with_third = third.known[lanes] & third.smooth[lanes]
        positive_third = positive & (third.loss[lanes] > rules.loss0)
        f_low, f_high = self._scaled(low, lanes, positive), self._scaled(high, lanes, positive)
        secant = low.x[lanes] + width * (f_low / (f_low - f_high))
        smooth = high.smooth[lanes]
        root = torch.where(smooth & secant.isfinite(), secant, middle)
        root = torch.minimum(torch.maximum(root, low.x[lanes]), high.x[lanes])

        trial = torch.where(
            third.known[lanes], self._inverse_quadratic(lanes, positive_third, middle), root
        )
        trial = torch.where(
            smooth & (with_third | ~third.known[lanes]) & trial.isfinite(), trial, middle
        )
        checked = self._guard_steps[lanes] >= 3
        stalled = checked & (width > 0.5 * self._guard_width[lanes])
        trial = torch.where(stalled, middle, trial)
        self._guard_width[lanes] = torch.where(checked, width, self._guard_width[lanes])
        self._guard_steps[lanes] = torch.where(
            checked, torch.zeros_like(self._guard_steps[lanes]), self._guard_steps[lanes]
        )
        margin = (0.5 * width).clamp(max=0.9 * rules.xtol)
        trial = torch.minimum(torch.maximum(trial, low.x[lanes] + margin), high.x[lanes] - margin)

        stuck = (trial <= low.x[lanes]) | (trial >= high.x[lanes])
        done = (width <= rules.xtol) | stuck
        status = torch.where(
            high.loss[lanes].isfinite(), int(Status.CONVERGED), int(Status.NONFINITE)
        )
        self._settle(lanes[done], root[done], status[done])
        self.x[lanes[~done]] = trial[~done]

    def _scaled(self, points: _Points, lanes: Tensor, log_scale: Tensor) -> Tensor:
        rules = self._rules
        loss = points.loss[lanes]
        gap = rules.threshold - rules.loss0
        excess = torch.where(log_scale, loss - rules.loss0, torch.ones_like(loss))
        logarithmic = excess.log() - (math.log(gap) if gap > 0 else 0.0)
        return torch.where(log_scale, logarithmic, loss - rules.threshold)

    def _inverse_quadratic(self, lanes: Tensor, log_scale: Tensor, middle: Tensor) -> Tensor:
        newest_inside = self._newest_is_inside[lanes]
        f_low = self._scaled(self._inside, lanes, log_scale)
        f_high = self._scaled(self._outside, lanes, log_scale)
        x_low, x_high = self._inside.x[lanes], self._outside.x[lanes]
        a, fa = torch.where(newest_inside, x_low, x_high), torch.where(newest_inside, f_low, f_high)
        b, fb = torch.where(newest_inside, x_high, x_low), torch.where(newest_inside, f_high, f_low)
        c, fc = self._third.x[lanes], self._scaled(self._third, lanes, log_scale)
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        safe = (phi.square() < xi) & ((1 - phi).square() < 1 - xi)
        t = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        return torch.where(safe, a + t * (b - a), middle)


def search(
    engine: LoopEngine,
    start: Float,
    *,
    lanes: int,
    mode: str,
    loss0: float,
    threshold: float,
    xtol: float,
    log_cap: float,
    slope: float,
    max_evaluations: int = 200,
    scan_span: float = math.log(8.0),
    scan_points: int = 32,
    poll: Callable[[], None] | None = None,
) -> tuple[Float, npt.NDArray[np.uint8], npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """The lane loop: settles all items, refilling a lane as soon as its item is settled.

    Args:
        engine: evaluates losses; ``load(lanes, items)`` puts items on lanes, ``loss(lanes, radii)``
            returns float64 ``[lanes]``, or that and a mask of entries that are lower bounds known
            to lie outside.
        start: log radius to start from ``[n]``; for ``mode="scan"`` the known log radius.
        lanes: how many items are worked on at once.
        mode: ``"search"``, or ``"scan"`` to look for an earlier crossing on ``scan_points`` points
            that go geometrically from exp(start − scan_span) to exp(start).
        loss0, threshold: L(θ*) and τ ≥ L(θ*).
        xtol: width of the final bracket in log radius.
        log_cap: the search ends here, as unbounded.
        slope: typical d f / d x, for the first steps.
        max_evaluations: a lane that spends them fails.
        poll: called once a round.

    Returns:
        log_radius, status, evaluations, reentrant: ``[n]`` each.
    """
    if mode not in ("search", "scan"):
        raise ValueError(f"mode must be 'search' or 'scan', got {mode!r}")
    with torch.device("cpu"):  # whatever the caller's default device is
        return _search(
            engine,
            start,
            lanes,
            mode == "scan",
            _Rules(
                loss0,
                threshold,
                xtol,
                log_cap,
                slope,
                max_evaluations,
                scan_span,
                scan_points,
            ),
            poll,
        )


def _search(
    engine: LoopEngine,
    start: Float,
    lanes: int,
    scan: bool,
    rules: _Rules,
    poll: Callable[[], None] | None,
) -> tuple[Float, npt.NDArray[np.uint8], npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    starts = torch.as_tensor(np.ascontiguousarray(start, dtype=np.float64))
    n = starts.numel()
    state = LaneSearch(min(lanes, max(n, 1)), rules)
    item_of_lane = torch.full((state.x.numel(),), -1)
    log_radius = torch.empty(n, dtype=torch.float64)
    status = torch.empty(n, dtype=torch.uint8)
    evaluations = torch.empty(n, dtype=torch.int32)
    reentrant = torch.empty(n, dtype=torch.uint8)
    fresh = 0
    while True:
        if fresh < n:
            idle = (state.phase == _Phase.IDLE).nonzero().flatten()[: n - fresh]
            if idle.numel():
                items = torch.arange(fresh, fresh + idle.numel())
                fresh += idle.numel()
                item_of_lane[idle] = items
                engine.load(idle.numpy(), items.numpy())
                state.begin(idle, starts[items], scan=scan)
        active = state.active()
        if not active.numel():
            break
        answer = engine.loss(active.numpy(), state.x[active].exp().numpy())
        values, flagged = answer if isinstance(answer, tuple) else (answer, None)
        loss = torch.from_numpy(np.asarray(values, dtype=np.float64))
        outside = (
            torch.zeros(loss.shape, dtype=torch.bool)
            if flagged is None
            else torch.from_numpy(np.asarray(flagged, dtype=np.bool_))
        )
        state.update(active, loss, outside)
        done = state.settled()
        items = item_of_lane[done]
        log_radius[items], status[items] = state.x[done], state.status[done]
        evaluations[items], reentrant[items] = state.evaluations[done], state.reentrant[done]
        state.phase[done] = _Phase.IDLE
        if poll is not None:
            poll()
    return log_radius.numpy(), status.numpy(), evaluations.numpy(), reentrant.numpy()
