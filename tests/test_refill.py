"""What lanes do between two rounds: the kernel, its definition, and a loop that anyone can read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastvol._reference import refill as reference
from fastvol._reference.refill import KEPT, Found
from fastvol._reference.search_step import Mark, Number, Phase, Rule, SearchState

pytest.importorskip("triton")
from fastvol.kernels import refill as kernels

# The interpreter computes what masks will hide.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAP, SPAN = 0.5, 2.0


def state_of(lanes: int, seed: int) -> SearchState:
    """Lanes in all phases, of which those with an item have one of their own; the rest is NaN."""
    draw = np.random.default_rng(seed)
    state = SearchState.empty(lanes, "cpu")
    state.numbers.fill_(math.nan)
    state.marks[:] = torch.from_numpy(draw.integers(2, 99, (len(Mark), lanes)))
    phases = draw.integers(0, len(Phase), lanes)
    state.marks[Mark.PHASE] = torch.from_numpy(phases)
    settled = phases == Phase.SETTLED
    state.numbers[Number.X, torch.from_numpy(settled)] = torch.from_numpy(
        draw.normal(size=int(settled.sum()))
    )
    state.items[:] = torch.from_numpy(np.where(phases == Phase.IDLE, -1, draw.permutation(lanes)))
    rules = {**dict.fromkeys(Rule, math.nan), Rule.LOG_CAP: CAP, Rule.SCAN_SPAN: SPAN}
    state.keep_rules(rules)
    return SearchState(*(t.to(DEVICE) for t in vars(state).values()))


def free_of(state: SearchState) -> int:
    phase = state.marks[Mark.PHASE]
    return int(((phase == Phase.IDLE) | (phase == Phase.SETTLED)).sum())


def one_by_one(
    state: SearchState,
    found: Found,
    starts: torch.Tensor,
    first: int,
    count: int,
    *,
    scan: bool,
    first_lane: int,
) -> torch.Tensor:
    """The definition's definition."""
    lanes = []
    for lane in range(state.lanes):
        phase = int(state.marks[Mark.PHASE, lane])
        if phase == Phase.SETTLED:
            item = int(state.items[lane])
            found.x[item] = state.numbers[Number.X, lane]
            for row, mark in enumerate(KEPT):
                found.marks[row, item] = state.marks[mark, lane]
            state.items[lane], state.marks[Mark.PHASE, lane] = -1, Phase.IDLE
        if phase in (Phase.IDLE, Phase.SETTLED) and len(lanes) < count:
            start = float(starts[first + len(lanes)])
            x = start - SPAN if scan else min(start, CAP)
            state.numbers[:, lane], state.marks[:, lane] = 0.0, 0
            state.numbers[Number.X, lane], state.numbers[Number.RADIUS, lane] = x, math.exp(x)
            state.numbers[Number.KNOWN_X, lane] = start if scan else 0.0
            state.marks[Mark.PHASE, lane] = Phase.SCAN if scan else Phase.BRACKET
            state.items[lane] = first + len(lanes)
            lanes.append(first_lane + lane)
    return torch.tensor(lanes, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("function", [reference.refill, kernels.refill])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("lanes", "left"), [(1, 0), (1, 1), (13, 0), (13, 3), (63, None), (1025, 7), (2500, None)]
)
def test_free_lanes_take_items_in_their_order(
    function: Callable[..., Any], scan: bool, lanes: int, left: int | None
) -> None:
    """Of more lanes than one block, and of fewer items than lanes are free."""
    results = []
    items = 3 * lanes
    starts = torch.randn(items, dtype=torch.float64).to(DEVICE)
    for refill in (one_by_one, function):
        state, found = state_of(lanes, seed=lanes), Found.empty(items, DEVICE)
        found.x.fill_(math.nan)
        count = free_of(state) if left is None else min(left, free_of(state))
        taken = refill(state, found, starts, lanes, count, scan=scan, first_lane=5)
        assert len(taken) == count
        results.append((taken, state, found))
    (taken, wanted, kept), (found_taken, found, found_kept) = results
    assert torch.equal(found_taken, taken)
    assert torch.equal(found.items, wanted.items)
    assert torch.equal(found.marks, wanted.marks)
    torch.testing.assert_close(found.numbers, wanted.numbers, rtol=1e-14, atol=0, equal_nan=True)
    torch.testing.assert_close(found_kept.x[:-1], kept.x[:-1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found_kept.marks[:, :-1], kept.marks[:, :-1])


@pytest.mark.parametrize("scan", [False, True])
def test_the_reference_reads_nothing_on_the_host(scan: bool) -> None:
    # Tensors without values: whatever asks for one fails.
    state, found = SearchState.empty(5, "meta"), Found.empty(9, "meta")
    starts = torch.empty(9, dtype=torch.float64, device="meta")
    taken = reference.refill(state, found, starts, 2, 3, scan=scan)
    assert taken.is_meta
    assert taken.shape == (3,)
