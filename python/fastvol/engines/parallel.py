"""Several engines as one: each has some of the lanes, and a thread of its own.

PyTorch divides one operation among threads only where it is large; the many small operations of a
transformer leave most threads idle. Here each thread takes other rays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .layered import LayeredEngine
from .protocol import Dense, Float, Indexed, Int, Losses, RayInfo, Rays


class ParallelEngine:
    """Engines side by side; see :class:`fastvol.engines.protocol.Engine`.

    Args:
        engines: of one problem; the first has the first lanes.
    """

    def __init__(self, engines: Sequence[LayeredEngine]) -> None:
        self._engines = list(engines)
        self._starts = np.cumsum([0, *(engine.lanes for engine in self._engines)])
        self.lanes = int(self._starts[-1])
        self.capabilities = self._engines[0].capabilities
        self.dim = self._engines[0].dim
        self._pool = ThreadPoolExecutor(
            len(self._engines), "fastvol lanes", initializer=torch.set_num_threads, initargs=(1,)
        )

    @property
    def coarse(self) -> str:
        """See :class:`fastvol.engines.general.GeneralEngine`."""
        return self._engines[0].coarse

    @coarse.setter
    def coarse(self, coarse: str) -> None:
        for engine in self._engines:
            engine.coarse = coarse

    @property
    def bytes_kept(self) -> int:
        """See :class:`LayeredEngine`."""
        return self._engines[0].bytes_kept

    def load(self, lanes: Int, rays: Rays) -> RayInfo:
        """See :class:`fastvol.engines.protocol.Engine`."""
        told = RayInfo(np.empty(len(lanes)), np.empty(len(lanes)))

        def work(engine: LayeredEngine, which: Int, own: Int) -> None:
            told.norm[which], told.dot[which] = engine.load(own, _some(rays, which))

        self._each(lanes, work)
        return told

    def loss(self, radii: Float, lanes: Int | None = None, *, limit: float = math.inf) -> Losses:
        """See :class:`fastvol.engines.protocol.Engine`."""
        lanes = np.arange(self.lanes) if lanes is None else lanes
        values, outside = np.empty(len(lanes)), np.zeros(len(lanes), dtype=np.bool_)

        def work(engine: LayeredEngine, which: Int, own: Int) -> None:
            found = engine.loss(radii[which], own, limit=limit)
            values[which] = found.values
            if found.outside is not None:
                outside[which] = found.outside

        self._each(lanes, work)
        return Losses(values, outside if outside.any() else None)

    def loss_and_grad(self, radii: Float, lanes: Int | None = None) -> tuple[Float, Tensor]:
        """See :class:`fastvol.engines.protocol.Engine`."""
        lanes = np.arange(self.lanes) if lanes is None else lanes
        values, parts = np.empty(len(lanes)), []

        def work(engine: LayeredEngine, which: Int, own: Int) -> None:
            values[which], gradients = engine.loss_and_grad(radii[which], own)
            parts.append((torch.from_numpy(which), gradients))

        self._each(lanes, work)
        whole = parts[0][1].new_empty((len(lanes), self.dim))
        for which, gradients in parts:
            whole[which] = gradients
        return values, whole

    def _each(self, lanes: Int, work: Callable[[LayeredEngine, Int, Int], Any]) -> None:
        """Has every engine work on its own of some lanes: which of them, by its own numbers."""
        owner = np.searchsorted(self._starts, lanes, side="right") - 1
        waiting = []
        for i, engine in enumerate(self._engines):
            which = np.flatnonzero(owner == i)
            if len(which):
                own = lanes[which] - self._starts[i]
                waiting.append(self._pool.submit(work, engine, which, own))
        # All have ended before an error of one is told.
        errors = [future.exception() for future in waiting]
        for error in errors:
            if error is not None:
                raise error


def _some(rays: Rays, which: Int) -> Rays:
    if isinstance(rays, Dense):
        return Dense(rays.directions[torch.from_numpy(which)], rays.preconditioner)
    return Indexed(rays.seed, rays.ids[which], rays.stream, rays.antithetic, rays.preconditioner)
