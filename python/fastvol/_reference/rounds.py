"""The loop over a device's lanes: the searches live there, and the host keeps them supplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class LaneGroup(Protocol):
    """Some lanes of a device, which are evaluated together."""

    def refill(self, first: int, /) -> int:
        """Keeps what settled lanes found, and puts items from ``first`` on on free lanes.

        Returns:
            How many; 0 only where no item is left or no lane is free.
        """
        ...

    def begin(self) -> None:
        """Issues a round, without waiting for it."""
        ...

    def settled(self) -> int:
        """Waits for the last round: how many lanes have settled and not been refilled."""
        ...


def run_rounds(groups: Sequence[LaneGroup], *, items: int, refill_share: float) -> None:
    """Settles items 0 … items − 1 on groups of a device's lanes.

    While the host waits for the round of one group those of the others run.

    Args:
        groups: of lanes, all idle.
        items: how many.
        refill_share: a group is refilled when this share of its searches has settled.

    Raises:
        RuntimeError: a group's numbers cannot be.
    """
    fresh = 0

    def refill(group: LaneGroup) -> int:
        nonlocal fresh
        taken = group.refill(fresh)
        if not 0 <= taken <= items - fresh:
            raise RuntimeError("a group of lanes took items that there are not")
        fresh += taken
        return taken

    carried: dict[int, int] = {}
    for i, group in enumerate(groups):
        taken = refill(group)
        if taken:
            carried[i] = taken
            group.begin()
    if items and not carried:
        raise RuntimeError("no group of lanes took an item")
    while carried:
        for i in list(carried):
            group, settled = groups[i], groups[i].settled()
            if not 0 <= settled <= carried[i]:
                raise RuntimeError("more lanes have settled than there are searches")
            enough = fresh < items and settled >= max(1.0, refill_share * carried[i])
            if enough or settled == carried[i]:
                carried[i] += refill(group) - settled
            if carried[i]:
                group.begin()
            else:
                del carried[i]
