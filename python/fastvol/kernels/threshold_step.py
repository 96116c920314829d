"""``threshold_step`` on a GPU: see :mod:`fastvol._reference.threshold_step`, which defines it.

The losses are summed as in :mod:`fastvol.kernels.losses`; then the searches move, one a thread. No
loss crosses to the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._reference.search import Status
from .._reference.search_step import Mark, Number, Phase, Rule, SearchState
from .launch import launch
from .losses import add_losses

# Of one program. Their arithmetic is long: few, so that a card has a processor for each.
_MOVE = triton.Config({"BLOCK": 64}, num_warps=2, num_stages=1)

_X = tl.constexpr(int(Number.X))
_RADIUS = tl.constexpr(int(Number.RADIUS))
_TOTAL = tl.constexpr(int(Number.TOTAL))
_INSIDE_X = tl.constexpr(int(Number.INSIDE_X))
_INSIDE_LOSS = tl.constexpr(int(Number.INSIDE_LOSS))
_OUTSIDE_X = tl.constexpr(int(Number.OUTSIDE_X))
_OUTSIDE_LOSS = tl.constexpr(int(Number.OUTSIDE_LOSS))
_THIRD_X = tl.constexpr(int(Number.THIRD_X))
_THIRD_LOSS = tl.constexpr(int(Number.THIRD_LOSS))
_LAST_STEP = tl.constexpr(int(Number.LAST_STEP))
_GUARD_WIDTH = tl.constexpr(int(Number.GUARD_WIDTH))
_KNOWN_X = tl.constexpr(int(Number.KNOWN_X))

_PHASE = tl.constexpr(int(Mark.PHASE))
_STATUS = tl.constexpr(int(Mark.STATUS))
_EVALUATIONS = tl.constexpr(int(Mark.EVALUATIONS))
_REENTRANT = tl.constexpr(int(Mark.REENTRANT))
_BEYOND = tl.constexpr(int(Mark.BEYOND))
_INSIDE_KNOWN = tl.constexpr(int(Mark.INSIDE_KNOWN))
_OUTSIDE_KNOWN = tl.constexpr(int(Mark.OUTSIDE_KNOWN))
_OUTSIDE_SMOOTH = tl.constexpr(int(Mark.OUTSIDE_SMOOTH))
_THIRD_KNOWN = tl.constexpr(int(Mark.THIRD_KNOWN))
_THIRD_SMOOTH = tl.constexpr(int(Mark.THIRD_SMOOTH))
_GUARD_STEPS = tl.constexpr(int(Mark.GUARD_STEPS))
_SCAN_INDEX = tl.constexpr(int(Mark.SCAN_INDEX))

_LOSS0 = tl.constexpr(int(Rule.LOSS0))
_THRESHOLD = tl.constexpr(int(Rule.THRESHOLD))
_XTOL = tl.constexpr(int(Rule.XTOL))
_LOG_CAP = tl.constexpr(int(Rule.LOG_CAP))
_SLOPE = tl.constexpr(int(Rule.SLOPE))
_SCAN_SPAN = tl.constexpr(int(Rule.SCAN_SPAN))
_SCAN_POINTS = tl.constexpr(int(Rule.SCAN_POINTS))
_MAX_EVALUATIONS = tl.constexpr(int(Rule.MAX_EVALUATIONS))

_BRACKET = tl.constexpr(int(Phase.BRACKET))
_REFINE = tl.constexpr(int(Phase.REFINE))
_SCAN = tl.constexpr(int(Phase.SCAN))
_SETTLED = tl.constexpr(int(Phase.SETTLED))

_CONVERGED = tl.constexpr(int(Status.CONVERGED))
_UNBOUNDED = tl.constexpr(int(Status.UNBOUNDED))
_NONFINITE = tl.constexpr(int(Status.NONFINITE))
_FAILED = tl.constexpr(int(Status.FAILED))


def threshold_step(
    state: SearchState,
    outputs: Tensor,
    target: Tensor | None,
    *,
    kind: str,
    scale: float = 1.0,
    ignore_index: int = -100,
    lanes: slice | None = None,
    first: bool = True,
    last: bool = True,
) -> None:
    """Adds a batch's losses to each lane's sum, and after the last batch moves the searches.

    Arguments and results are those of :func:`fastvol._reference.threshold_step.threshold_step`; the
    sums differ from its by rounding.

    Raises:
        ValueError: an unknown kind, or outputs of another dtype than float16, bfloat16, float32 or
            float64.
    """
    part = slice(None) if lanes is None else lanes
    add_losses(
        outputs,
        target,
        state.numbers[Number.TOTAL, part],
        state.marks[Mark.BEYOND, part],
        state.rules[Rule.LIMIT : Rule.LIMIT + 1],
        state.marks[Mark.PHASE, part],
        kind=kind,
        scale=scale,
        ignore_index=ignore_index,
        first=first,
    )
    if last:
        move(state)


def move(state: SearchState) -> None:
    """See :func:`fastvol._reference.search_step.search_step`."""
    launch(
        move_kernel,
        lambda meta: (triton.cdiv(state.lanes, meta["BLOCK"]),),
        {
            "numbers": state.numbers,
            "marks": state.marks,
            "rules": state.rules,
            "settled_count": state.settled,
            "lanes": state.lanes,
        },
        fixed=_MOVE,
    )


@triton.jit
def _scaled(
    loss: tl.tensor, on_log: tl.tensor, loss0: tl.tensor, threshold: tl.tensor
) -> tl.tensor:
    excess = tl.where(on_log, loss - loss0, 1.0)
    gap = tl.where(threshold > loss0, threshold - loss0, 1.0)
    return tl.where(on_log, tl.log(excess) - tl.log(gap), loss - threshold)


@triton.jit
def _log_excess(
    loss: tl.tensor, usable: tl.tensor, loss0: tl.tensor, threshold: tl.tensor
) -> tl.tensor:
    excess = tl.where(usable, loss - loss0, 1.0)
    gap = tl.where(threshold > loss0, threshold - loss0, 1.0)
    return tl.log(excess) - tl.log(gap)


@triton.jit
def _is_finite(x: tl.tensor) -> tl.tensor:
    return tl.abs(x) < float("inf")


@triton.jit(do_not_specialize=["lanes"])
def move_kernel(
    numbers: tl.tensor,
    marks: tl.tensor,
    rules: tl.tensor,
    settled_count: tl.tensor,
    lanes: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """See :func:`fastvol._reference.search_step.search_step`, in the same order."""
    loss0 = tl.load(rules + _LOSS0)
    threshold = tl.load(rules + _THRESHOLD)
    xtol = tl.load(rules + _XTOL)
    log_cap = tl.load(rules + _LOG_CAP)
    base_slope = tl.load(rules + _SLOPE)
    span = tl.load(rules + _SCAN_SPAN)
    points = tl.load(rules + _SCAN_POINTS)
    max_evaluations = tl.load(rules + _MAX_EVALUATIONS)
    gapped = (tl.zeros((BLOCK,), tl.float64) + threshold) > loss0
    # A bare number may pass through float32.
    log2 = tl.full((BLOCK,), 0.6931471805599453, tl.float64)
    nearest = tl.full((BLOCK,), 0.9, tl.float64) * xtol
    # A little too far is better than a little too near: it ends the bracketing.
    delta = tl.maximum(2.0 * xtol, tl.full((BLOCK,), 0.01, tl.float64))
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = lane < lanes
    # Points of lanes that know none are NaN nowhere, and their marks say so.
    phase = tl.load(marks + _PHASE * lanes + lane, mask=valid, other=0)
    x = tl.load(numbers + _X * lanes + lane, mask=valid, other=0.0)
    loss = tl.load(numbers + _TOTAL * lanes + lane, mask=valid, other=0.0)
    beyond = tl.load(marks + _BEYOND * lanes + lane, mask=valid, other=0)
    scanning = phase == _SCAN
    bracketing = phase == _BRACKET
    refining = phase == _REFINE
    active = scanning | bracketing | refining
    evaluations = tl.load(marks + _EVALUATIONS * lanes + lane, mask=valid, other=0)
    evaluations += active.to(tl.int32)

    smooth = _is_finite(loss) & (beyond == 0)
    inside = smooth & (loss <= threshold)
    low_x = tl.load(numbers + _INSIDE_X * lanes + lane, mask=valid, other=0.0)
    low_loss = tl.load(numbers + _INSIDE_LOSS * lanes + lane, mask=valid, other=0.0)
    high_x = tl.load(numbers + _OUTSIDE_X * lanes + lane, mask=valid, other=0.0)
    high_loss = tl.load(numbers + _OUTSIDE_LOSS * lanes + lane, mask=valid, other=0.0)
    third_x = tl.load(numbers + _THIRD_X * lanes + lane, mask=valid, other=0.0)
    third_loss = tl.load(numbers + _THIRD_LOSS * lanes + lane, mask=valid, other=0.0)
    low_known = tl.load(marks + _INSIDE_KNOWN * lanes + lane, mask=valid, other=0) != 0
    high_known = tl.load(marks + _OUTSIDE_KNOWN * lanes + lane, mask=valid, other=0) != 0
    high_smooth = tl.load(marks + _OUTSIDE_SMOOTH * lanes + lane, mask=valid, other=0) != 0
    third_known = tl.load(marks + _THIRD_KNOWN * lanes + lane, mask=valid, other=0) != 0
    third_smooth = tl.load(marks + _THIRD_SMOOTH * lanes + lane, mask=valid, other=0) != 0

    # The displaced end of a bracket is the third point of the interpolation.
    displaced = active & (phase != _SCAN)
    third_x = tl.where(displaced, tl.where(inside, low_x, high_x), third_x)
    third_loss = tl.where(displaced, tl.where(inside, low_loss, high_loss), third_loss)
    from_low = displaced & inside
    from_high = displaced & (inside == 0)
    kept = displaced == 0
    third_known = (from_low & low_known) | (from_high & high_known) | (kept & third_known)
    third_smooth = (from_low & low_known) | (from_high & high_smooth) | (kept & third_smooth)
    new_low = active & inside
    new_high = active & (inside == 0)
    low_x = tl.where(new_low, x, low_x)
    low_loss = tl.where(new_low, loss, low_loss)
    low_known = low_known | new_low
    high_x = tl.where(new_high, x, high_x)
    high_loss = tl.where(new_high, loss, high_loss)
    high_known = high_known | new_high
    high_smooth = (new_high & smooth) | ((new_high == 0) & high_smooth)

    # Scan.
    scan_index = tl.load(marks + _SCAN_INDEX * lanes + lane, mask=valid, other=0)
    scan_index += (scanning & inside).to(tl.int32)
    scanned = scanning & inside & (scan_index.to(tl.float64) >= points)
    known_x = tl.load(numbers + _KNOWN_X * lanes + lane, mask=valid, other=0.0)
    next_scan = known_x - span + scan_index.to(tl.float64) / points * span
    found = scanning & (inside == 0)

    # Bracket.
    moved = found | bracketing
    entering = moved & low_known & high_known
    stepping = moved & (entering == 0)
    capped = stepping & inside & (x >= log_cap)
    usable = smooth & (loss > loss0) & gapped
    f = _log_excess(loss, usable, loss0, threshold)
    usable_before = third_known & third_smooth & (third_loss > loss0) & gapped
    f_before = _log_excess(third_loss, usable_before, loss0, threshold)
    run = x - third_x
    secant = (f - f_before) / tl.where(run == 0.0, 1.0, run)
    follow = usable & usable_before & (run != 0.0) & _is_finite(secant) & (secant > 0.0)
    clamped = tl.minimum(tl.maximum(secant, base_slope / 4.0), base_slope * 4.0)
    slope = tl.where(follow, clamped, base_slope)
    last_step = tl.load(numbers + _LAST_STEP * lanes + lane, mask=valid, other=0.0)
    step = tl.where(usable, 1.25 * tl.abs(f) / slope + delta, log2)
    step = tl.minimum(tl.maximum(step, 2.0 * last_step), log2)
    next_bracket = tl.where(inside, tl.minimum(x + step, log_cap), x - step)

    # Refine.
    working = refining | entering
    third_known = third_known & (entering == 0)
    third_smooth = third_smooth & (entering == 0)
    width = high_x - low_x
    middle = low_x + 0.5 * width
    guard_width = tl.load(numbers + _GUARD_WIDTH * lanes + lane, mask=valid, other=0.0)
    guard_width = tl.where(entering, width, guard_width)
    guard_steps = tl.load(marks + _GUARD_STEPS * lanes + lane, mask=valid, other=0)
    guard_steps = tl.where(entering, 0, guard_steps + refining.to(tl.int32))
    on_log = (low_loss > loss0) & (high_loss > loss0) & gapped
    f_low = _scaled(low_loss, on_log, loss0, threshold)
    f_high = _scaled(high_loss, on_log, loss0, threshold)
    crossing = low_x + width * (f_low / (f_low - f_high))
    root = tl.where(high_smooth & _is_finite(crossing), crossing, middle)
    root = tl.minimum(tl.maximum(root, low_x), high_x)
    all_log = on_log & (third_loss > loss0)
    f_low = _scaled(low_loss, all_log, loss0, threshold)
    f_high = _scaled(high_loss, all_log, loss0, threshold)
    fc = _scaled(third_loss, all_log, loss0, threshold)
    a = tl.where(inside, low_x, high_x)
    b = tl.where(inside, high_x, low_x)
    c = third_x
    fa = tl.where(inside, f_low, f_high)
    fb = tl.where(inside, f_high, f_low)
    xi = (a - b) / (c - b)
    phi = (fa - fb) / (fc - fb)
    safe = (phi * phi < xi) & ((1.0 - phi) * (1.0 - phi) < 1.0 - xi)
    t = fa / (fb - fa) * fc / (fb - fc)
    t += (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
    trial = tl.where(third_known, tl.where(safe, a + t * (b - a), middle), root)
    trusted = high_smooth & (third_smooth | (third_known == 0)) & _is_finite(trial)
    trial = tl.where(trusted, trial, middle)
    checked = guard_steps >= 3
    trial = tl.where(checked & (width > 0.5 * guard_width), middle, trial)
    guard_width = tl.where(checked, width, guard_width)
    guard_steps = tl.where(checked, 0, guard_steps)
    margin = tl.minimum(0.5 * width, nearest)
    trial = tl.minimum(tl.maximum(trial, low_x + margin), high_x - margin)
    closed = working & ((width <= xtol) | (trial <= low_x) | (trial >= high_x))

    # What each lane makes of it.
    settled = scanned | capped | closed
    next_x = tl.where(scanning & inside, tl.where(scanned, known_x, next_scan), x)
    next_x = tl.where(stepping, tl.where(capped, log_cap, next_bracket), next_x)
    next_x = tl.where(working, tl.where(closed, root, trial), next_x)
    status = tl.where(capped, _UNBOUNDED, _CONVERGED)
    status = tl.where(closed & (_is_finite(high_loss) == 0), _NONFINITE, status)
    spent = active & (settled == 0) & (evaluations.to(tl.float64) >= max_evaluations)
    next_x = tl.where(spent, tl.where(low_known, low_x, high_x), next_x)
    status = tl.where(spent, _FAILED, status)
    settled = settled | spent
    next_phase = tl.where(working, _REFINE, tl.where(stepping, _BRACKET, _SCAN))
    next_phase = tl.where(settled, _SETTLED, next_phase)
    next_phase = tl.where(active, next_phase, phase)
    newly = valid & active & settled
    tl.atomic_add(settled_count, tl.sum(newly.to(tl.int32), axis=0))

    going = active & (settled == 0)
    tl.store(numbers + _X * lanes + lane, next_x, mask=active)
    tl.store(numbers + _RADIUS * lanes + lane, tl.exp(next_x), mask=going)
    tl.store(numbers + _INSIDE_X * lanes + lane, low_x, mask=active)
    tl.store(numbers + _INSIDE_LOSS * lanes + lane, low_loss, mask=active)
    tl.store(numbers + _OUTSIDE_X * lanes + lane, high_x, mask=active)
    tl.store(numbers + _OUTSIDE_LOSS * lanes + lane, high_loss, mask=active)
    tl.store(numbers + _THIRD_X * lanes + lane, third_x, mask=active)
    tl.store(numbers + _THIRD_LOSS * lanes + lane, third_loss, mask=active)
    tl.store(numbers + _LAST_STEP * lanes + lane, step, mask=stepping & (capped == 0))
    tl.store(numbers + _GUARD_WIDTH * lanes + lane, guard_width, mask=working)
    tl.store(marks + _PHASE * lanes + lane, next_phase, mask=active)
    tl.store(marks + _STATUS * lanes + lane, status, mask=settled)
    tl.store(marks + _EVALUATIONS * lanes + lane, evaluations, mask=active)
    tl.store(marks + _REENTRANT * lanes + lane, found.to(tl.int32), mask=found)
    tl.store(marks + _INSIDE_KNOWN * lanes + lane, low_known.to(tl.int32), mask=active)
    tl.store(marks + _OUTSIDE_KNOWN * lanes + lane, high_known.to(tl.int32), mask=active)
    tl.store(marks + _OUTSIDE_SMOOTH * lanes + lane, high_smooth.to(tl.int32), mask=active)
    tl.store(marks + _THIRD_KNOWN * lanes + lane, third_known.to(tl.int32), mask=active)
    tl.store(marks + _THIRD_SMOOTH * lanes + lane, third_smooth.to(tl.int32), mask=active)
    tl.store(marks + _GUARD_STEPS * lanes + lane, guard_steps, mask=working)
    tl.store(marks + _SCAN_INDEX * lanes + lane, scan_index, mask=scanning)
