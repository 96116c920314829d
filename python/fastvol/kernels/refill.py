"""``refill`` on a GPU: see :mod:`fastvol._reference.refill`, which defines it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._reference.refill import Found
from .._reference.search_step import Mark, Number, Phase, Rule, SearchState
from .launch import launch

# One program counts the free lanes of all blocks, in their order.
_REFILL = triton.Config({"BLOCK": 1024}, num_warps=8, num_stages=1)

_X = tl.constexpr(int(Number.X))
_RADIUS = tl.constexpr(int(Number.RADIUS))
_KNOWN_X = tl.constexpr(int(Number.KNOWN_X))
_NUMBERS = tl.constexpr(len(Number))
_PHASE = tl.constexpr(int(Mark.PHASE))
_STATUS = tl.constexpr(int(Mark.STATUS))
_EVALUATIONS = tl.constexpr(int(Mark.EVALUATIONS))
_REENTRANT = tl.constexpr(int(Mark.REENTRANT))
_MARKS = tl.constexpr(len(Mark))
_LOG_CAP = tl.constexpr(int(Rule.LOG_CAP))
_SCAN_SPAN = tl.constexpr(int(Rule.SCAN_SPAN))
_IDLE = tl.constexpr(int(Phase.IDLE))
_BRACKET = tl.constexpr(int(Phase.BRACKET))
_SCAN = tl.constexpr(int(Phase.SCAN))
_SETTLED = tl.constexpr(int(Phase.SETTLED))


def refill(
    state: SearchState,
    found: Found,
    starts: Tensor,
    first: int,
    count: int,
    *,
    scan: bool,
    first_lane: int = 0,
) -> Tensor:
    """See :func:`fastvol._reference.refill.refill`."""
    taken = torch.empty(count, dtype=torch.int64, device=state.items.device)
    launch(
        refill_kernel,
        lambda meta: (1,),
        {
            "numbers": state.numbers,
            "marks": state.marks,
            "rules": state.rules,
            "items": state.items,
            "found": found.x,
            "found_marks": found.marks,
            "starts": starts,
            "taken": taken,
            "lanes": state.lanes,
            "places": len(found.x),
            "first": first,
            "count": count,
            "first_lane": first_lane,
            "SCANNING": scan,
        },
        fixed=_REFILL,
    )
    return taken


@triton.jit(do_not_specialize=["lanes", "places", "first", "count", "first_lane"])
def refill_kernel(
    numbers: tl.tensor,
    marks: tl.tensor,
    rules: tl.tensor,
    items: tl.tensor,
    found: tl.tensor,
    found_marks: tl.tensor,
    starts: tl.tensor,
    taken: tl.tensor,
    lanes: tl.tensor,
    places: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    first_lane: tl.tensor,
    SCANNING: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """See :func:`fastvol._reference.refill.refill`; one program for all lanes."""
    log_cap = tl.load(rules + _LOG_CAP)
    span = tl.load(rules + _SCAN_SPAN)
    before = tl.full((), 0, tl.int32)
    # Not every version of the interpreter can count to a bound that is no plain number.
    start = tl.full((), 0, tl.int32)
    while start < lanes:
        lane = start + tl.arange(0, BLOCK)
        valid = lane < lanes
        phase = tl.load(marks + _PHASE * lanes + lane, mask=valid, other=_BRACKET)
        settled = valid & (phase == _SETTLED)
        free = settled | (phase == _IDLE)
        item = tl.load(items + lane, mask=settled, other=0)
        x = tl.load(numbers + _X * lanes + lane, mask=settled, other=0.0)
        status = tl.load(marks + _STATUS * lanes + lane, mask=settled, other=0)
        evaluations = tl.load(marks + _EVALUATIONS * lanes + lane, mask=settled, other=0)
        reentrant = tl.load(marks + _REENTRANT * lanes + lane, mask=settled, other=0)
        tl.store(found + item, x, mask=settled)
        tl.store(found_marks + item, status, mask=settled)
        tl.store(found_marks + places + item, evaluations, mask=settled)
        tl.store(found_marks + 2 * places.to(tl.int64) + item, reentrant, mask=settled)

        rank = before + tl.cumsum(free.to(tl.int32), axis=0) - 1
        takes = free & (rank < count)
        new = first.to(tl.int64) + rank
        begin = tl.load(starts + new, mask=takes, other=0.0)
        if SCANNING:
            begin_x = begin - span
            known_x = begin
        else:
            begin_x = tl.minimum(begin, log_cap)
            known_x = tl.zeros((BLOCK,), tl.float64)
        # What one thread has read another one may overwrite.
        tl.debug_barrier()
        for row in tl.static_range(_NUMBERS):
            if row == _X:
                value = begin_x
            elif row == _RADIUS:
                value = tl.exp(begin_x)
            elif row == _KNOWN_X:
                value = known_x
            else:
                value = tl.zeros((BLOCK,), tl.float64)
            tl.store(numbers + row * lanes + lane, value, mask=takes)
        for row in tl.static_range(_MARKS):
            if row == _PHASE:
                begun = tl.full((BLOCK,), _SCAN if SCANNING else _BRACKET, tl.int32)
                tl.store(marks + lane, tl.where(takes, begun, _IDLE), mask=takes | settled)
            else:
                zero = tl.zeros((BLOCK,), tl.int32)
                tl.store(marks + row * lanes + lane, zero, mask=takes)
        tl.store(items + lane, tl.where(takes, new, -1), mask=takes | settled)
        tl.store(taken + rank, (first_lane + lane).to(tl.int64), mask=takes)
        before += tl.sum(free.to(tl.int32), axis=0)
        start += BLOCK
