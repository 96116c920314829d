"""Between two rounds of the device loop: what has settled is kept, and free lanes take items."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .search_step import Mark, Number, Phase, SearchState

# What of a lane's marks is a result, in the order of Found.marks.
KEPT = (Mark.STATUS, Mark.EVALUATIONS, Mark.REENTRANT)


@dataclass(frozen=True)
class Found:
    """The results of n items, written in place; the last column is of no item, and means nothing.

    Args:
        x: where each search ended, float64 ``[n + 1]``.
        marks: status, evaluations, and whether the ray comes back, int32 ``[3, n + 1]``.
    """

    x: Tensor
    marks: Tensor

    @classmethod
    def empty(cls, items: int, device: torch.device | str) -> Found:
        """Room for so many items."""
        return cls(
            torch.zeros(items + 1, dtype=torch.float64, device=device),
            torch.zeros((len(KEPT), items + 1), dtype=torch.int32, device=device),
        )


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
    """Keeps what settled lanes found, and puts items first … first + count − 1 on free lanes.

    Settled and idle lanes are free, and take the items in their order; those that none is left for
    are idle then. Nothing is read by the host, which knows how many lanes are free from how many
    it has filled and how many have settled.

    Args:
        state: of the searches; of a lane that waits for a loss nothing changes.
        found: of all items.
        starts: log radii, float64 ``[n]`` on the state's device.
        first: the next item.
        count: of items, no more than lanes are free.
        scan: see :meth:`SearchState.begin`.
        first_lane: what the first of these lanes is called.

    Returns:
        The lanes of the items, counted from ``first_lane``: int64 ``[count]`` on the device.
    """
    phase, items = state.marks[Mark.PHASE], state.items
    settled = phase == Phase.SETTLED
    free = settled | (phase == Phase.IDLE)
    place = items.masked_fill(~settled, len(found.x) - 1)
    found.x.index_copy_(0, place, state.numbers[Number.X])
    for row, mark in enumerate(KEPT):
        found.marks[row].index_copy_(0, place, state.marks[mark])
    phase.masked_fill_(settled, int(Phase.IDLE))
    items.masked_fill_(settled, -1)

    rank = free.cumsum(0) - 1
    rank = rank.masked_fill(~free | (rank >= count), count)
    # The last place is of the lanes that take nothing.
    lanes = items.new_empty(count + 1)
    lanes.index_copy_(0, rank, torch.arange(state.lanes, device=items.device))
    lanes = lanes[:count]
    state.begin(lanes, starts[first : first + count], scan=scan)
    items.index_copy_(0, lanes, torch.arange(first, first + count, device=items.device))
    return lanes + first_lane
