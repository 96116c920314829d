"""The scale s of every coordinate, in little memory, and what is measured in its units."""

from __future__ import annotations

import bisect
import hashlib
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._layout import ParameterLayout
from ._sharding import Span, gathered, is_sharded
from .errors import FastvolError

# Coordinates that are worked on together: some temporaries in float64 stay in the cache.
SPAN = 1 << 18
# Up to so many the sums are over flat vectors.
_FLAT = 1 << 20


class Scale:
    """s > 0 of each coordinate; 0 where one does not move.

    Args:
        layout: the moved parameters.
        parts: of each segment what this process holds: float64 on the CPU, a number (``[]``), one
            for each row of dimension 0 (``[rows]``), or one for each entry (``[entries]``).
        dropped: rows with the scale 0, in order, by segment; rows of the whole parameter.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        parts: Sequence[Tensor],
        dropped: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.layout = layout
        self._parts = tuple(parts)
        self._dropped = dict(dropped or {})

    @classmethod
    def uniform(cls, layout: ParameterLayout, value: float = 1.0) -> Scale:
        """The same scale everywhere."""
        one = torch.full((), value, dtype=torch.float64, device="cpu")
        return cls(layout, [one] * len(layout.segments))

    @classmethod
    def from_flat(cls, layout: ParameterLayout, flat: Tensor) -> Scale:
        """From one entry a coordinate, float64 ``[size]`` on the CPU."""
        scale = cls(layout, [flat[s.start : s.stop] for s in layout.segments])
        scale.__dict__["flat"] = flat
        return scale

    @classmethod
    def given(cls, layout: ParameterLayout, value: Any, argument: str) -> Scale:
        """What a caller gave as ``argument``; see :meth:`ParameterLayout.expand`."""
        if isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)):
            if _is_usable(value, layout.dtype):
                return cls.uniform(layout, float(value))
        elif layout.is_sharded:
            names = [segment.name for segment in layout.segments]
            plain = isinstance(value, Mapping) and sorted(map(str, value)) == sorted(names)
            if not plain or not all(_is_usable(value[name], layout.dtype) for name in names):
                raise FastvolError(
                    f"{argument} of a sharded module must be a positive number, or a mapping from "
                    "the name of every moved parameter to one"
                )
            ones = torch.ones((), dtype=torch.float64, device="cpu")
            return cls(layout, [float(value[name]) * ones for name in names])
        return cls.from_flat(layout, layout.expand(value, argument))

    @cached_property
    def flat(self) -> Tensor:
        """float64 ``[size]`` on the CPU; not of a sharded module."""
        flat = torch.empty(self.layout.size, dtype=torch.float64, device="cpu")
        for i, segment in enumerate(self.layout.segments):
            flat[segment.start : segment.stop] = self.of(i, 0, segment.stop - segment.start)
        return flat

    def of(self, i: int, start: int, stop: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Of entries ``start`` to ``stop`` of what is here of segment i: on the CPU."""
        part = self._parts[i]
        entries = self.layout.local[i].values.numel()
        if part.dim() == 0:
            return part.to(dtype).expand(stop - start)
        if part.numel() == entries:
            return part[start:stop].to(dtype)
        width = entries // part.numel()
        rows = slice(start // width, -(-stop // width))
        whole = part[rows].to(dtype)[:, None].expand(-1, width).reshape(-1)
        lead = start - rows.start * width
        return whole[lead : lead + stop - start]

    def constant(self, i: int) -> float | None:
        """The one scale of segment i, if it has one."""
        return float(self._parts[i]) if self._parts[i].dim() == 0 else None

    def rows(self, i: int) -> Tensor | None:
        """Of each row of what is here of segment i, ``[rows]`` on the CPU, if it has one scale."""
        part, values = self._parts[i], self.layout.local[i].values
        count = len(values) if values.dim() else 1
        if part.numel() == count:
            return part.reshape(count)
        if part.dim() == 0 or not count:
            return part.expand(count)
        by_row = part.view(count, -1)
        return by_row[:, 0] if bool((by_row == by_row[:, :1]).all()) else None

    def stretches(self, i: int) -> list[Span]:
        """What is here of segment i and moves; ``coordinate`` counts what moves of the whole."""
        segment, local = self.layout.segments[i], self.layout.local[i]
        rows = self._dropped.get(i, ())
        if not rows:
            return list(local.spans)
        width = (segment.stop - segment.start) // segment.shape[0]
        result = []
        for span in local.spans:
            first, end = span.coordinate, span.coordinate + span.length
            for row in (*rows, segment.shape[0]):
                stop = min(row * width, end)
                if stop > first:
                    before = bisect.bisect_left(rows, first // width)
                    start = span.start + first - span.coordinate
                    result.append(Span(start, first - before * width, stop - first))
                first = max(first, (row + 1) * width)
        return result

    def moving(self, i: int) -> int:
        """Entries of the whole segment i that move."""
        segment = self.layout.segments[i]
        size = segment.stop - segment.start
        rows = len(self._dropped.get(i, ()))
        return size - rows * (size // segment.shape[0]) if rows else size

    @cached_property
    def dim(self) -> int:
        """d: coordinates that move, in all processes."""
        return sum(self.moving(i) for i in range(len(self.layout.segments)))

    @cached_property
    def log_sum(self) -> float:
        """Σ log s over the coordinates that move, s rounded to the working dtype."""

        def logs(scale: Tensor) -> float:
            return float(scale[scale > 0].to(self.layout.dtype).to(torch.float64).log().sum())

        if self._is_small:
            return logs(self.flat)
        return self._sum(lambda i, start, stop: logs(self.of(i, start, stop)))

    @cached_property
    def length(self) -> float:
        """‖θ/s‖ of the parameters as they stand, over the coordinates that move."""

        def scaled(theta: Tensor, scale: Tensor) -> Tensor:
            moving = scale > 0
            return theta[moving] / scale[moving]

        if self._is_small:
            return float(scaled(self.layout.flatten().to("cpu", torch.float64), self.flat).norm())

        def square(i: int, start: int, stop: int) -> float:
            own = scaled(self._theta(i, start, stop), self.of(i, start, stop))
            return float(own.square().sum())

        return math.sqrt(self._sum(square))

    @property
    def _is_small(self) -> bool:
        return self.layout.size <= _FLAT and not self.layout.is_sharded

    def digest(self, *, with_parameters: bool = True) -> str:
        """SHA-256 of the parameters in the working dtype, and of the scale: of the whole module."""
        sha = hashlib.sha256()
        if with_parameters:
            for i in range(len(self.layout.segments)):
                self._hash(sha, i, lambda i, a, b: self._theta(i, a, b).to(self.layout.dtype))
        for i in range(len(self.layout.segments)):
            self._hash(sha, i, lambda i, a, b: self.of(i, a, b))
        return sha.hexdigest()

    def _hash(self, sha: Any, i: int, read: Callable[[int, int, int], Tensor]) -> None:
        parameter = self.layout.parameters[i]
        local = self.layout.local[i].values
        if not is_sharded(parameter):
            for start, stop in spans_of(local.numel()):
                sha.update(read(i, start, stop).contiguous().numpy())
            return
        # One parameter at a time is brought together.
        own = read(i, 0, local.numel()).to(local.device).reshape(local.shape)
        sha.update(gathered(own, parameter, parameter.shape).cpu().contiguous().numpy())

    def _theta(self, i: int, start: int, stop: int) -> Tensor:
        """float64, on the CPU."""
        return self.layout.local[i].values.reshape(-1)[start:stop].to("cpu", torch.float64)

    def _sum(self, part: Callable[[int, int, int], float]) -> float:
        """The sum over all parts of all segments, in all processes."""
        values = [
            part(i, start, stop)
            for i, local in enumerate(self.layout.local)
            if local.counts
            for start, stop in spans_of(local.values.numel())
        ]
        return float(self.layout.group.sum(math.fsum(values))[0])


def spans_of(entries: int, at_once: int | None = None) -> Iterator[tuple[int, int]]:
    """Stretches (start, stop) of at most ``at_once`` entries."""
    at_once = at_once or SPAN
    for start in range(0, entries, at_once):
        yield start, min(start + at_once, entries)


def _is_usable(value: Any, dtype: torch.dtype) -> bool:
    """Whether it is a number that is positive and finite, as ``dtype`` too."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.is_meta:
            return False
    elif not isinstance(value, numbers.Real) or isinstance(value, (bool, np.bool_)):
        return False
    try:
        working = float(torch.tensor(float(value), dtype=dtype, device="cpu"))
    except (OverflowError, RuntimeError):
        return False
    return math.isfinite(working) and working > 0
