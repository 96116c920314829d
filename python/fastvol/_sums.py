"""Weighted sums of batches' losses on many rays, left off where they have told enough."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ._sharding import Group

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class Running:
    """Losses of some rays, summed batch by batch in float64.

    Args:
        count: rays.
        weight: of all batches in all processes; the sum of a ray over it is its loss.
        limit: a loss that is known to exceed it need not be known better; only where no batch has a
            negative loss, else ``inf``.
        group: the processes whose sums belong together.
    """

    def __init__(self, count: int, weight: float, limit: float, group: Group) -> None:
        self._total = np.zeros(count)
        self._weight = weight
        self._most = limit * weight
        self._group = group
        self._stops = math.isfinite(limit)
        # With a limit the processes agree after each batch, else at the end.
        self._each = self._stops and not group.alone
        self._outside = np.zeros(count, dtype=np.bool_)

    def add(self, rays: Int, weight: float, values: Float) -> None:
        """A batch's losses on some rays."""
        values = weight * values
        self._total[rays] += self._group.sum(values) if self._each else values

    def settled(self, rays: Int) -> bool:
        """Whether all of these may be left before the next batch; then they count as left."""
        beyond: Bool = self._total[rays] > self._most
        if not (self._stops and beyond.all()):
            return False
        self._outside[rays] = True
        return True

    def going(self) -> Int:
        """The rays that need the next batch; the others count as left."""
        if self._stops:
            self._outside |= self._total > self._most
        return np.flatnonzero(~self._outside)

    @property
    def values(self) -> Float:
        """Losses ``[count]``; of rays that were left lower bounds above the limit."""
        total = self._total if self._each else self._group.sum(self._total)
        return total / self._weight

    @property
    def outside(self) -> Bool | None:
        """Which rays were left before their last batch, if any were."""
        return self._outside if self._outside.any() else None
