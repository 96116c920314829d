"""Where rays are searched: on the engine's device as far as that goes, else by the core's loop.

On a device the lanes are two groups. While one group's round runs the host reads how many searches
of the other have ended, all that it is told in a round, and has new directions made: neither waits
for the other. Only the device knows which lanes these are on, and it keeps what was found. On
the way out of memory the lanes are halved and the same rays searched again, which has the same
answer.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._backend import Backend
from .._problem import Problem
from .._reference.refill import Found
from .._reference.search_step import Rule
from ..engines.protocol import DeviceEngine, OffDeviceError
from ..engines.rounds import Pools, Rounds
from ..errors import FastvolError

if TYPE_CHECKING:
    from ._search import RayLoss

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Results = tuple[Float, npt.NDArray[np.uint8], npt.NDArray[np.int32], npt.NDArray[np.uint8]]

# Lanes are given new directions when this share of a group has settled.
_REFILL_SHARE = 1 / 16
_MAX_EVALUATIONS = 200

# None: the engine's losses do not stay on its device.
_loops: weakref.WeakKeyDictionary[Any, _DeviceLoop | None] = weakref.WeakKeyDictionary()


def search(
    problem: Problem, loss: RayLoss, start: Float, *, mode: str, options: Mapping[str, Any]
) -> Results:
    """What ``problem.backend.search`` returns for the rays assigned to ``loss``.

    Args:
        problem, loss: of the run.
        start: log radii ``[n]``.
        mode: ``"search"`` or ``"scan"``.
        options: of ``search``, without the lanes.

    Raises:
        FastvolError: the device has not the memory for a single ray.
    """
    engine, backend = loss.engine, problem.backend
    if isinstance(engine, DeviceEngine) and (
        engine.device.type == "cuda" or backend.name == "triton"
    ):
        try:
            return _on_device(problem, loss, engine, start, mode, options)
        except OffDeviceError as error:
            if _loops.get(engine) is not None:
                _tell(problem, f"loop on the device: {error}")
            _loops[engine] = None
    problem.provenance.setdefault("loop", f"host, {backend.name}")
    results: Results = backend.search(loss, start, mode=mode, lanes=engine.lanes, **options)
    return results


def _on_device(
    problem: Problem,
    loss: RayLoss,
    engine: DeviceEngine,
    start: Float,
    mode: str,
    options: Mapping[str, Any],
) -> Results:
    while True:
        try:
            return _attempt(problem, loss, engine, start, mode, options)
        except torch.OutOfMemoryError as error:
            if engine.lanes == 1:
                raise FastvolError(
                    f"{engine.device} has not the memory for one ray in flight; pass data in "
                    f"smaller batches, or take a smaller model. It was: {error}"
                ) from error
        # Beyond the handler, which keeps the frames of the failure and their tensors; the graphs go
        # with the loop.
        _loops.pop(engine, None)
        lanes = engine.lanes // 2
        engine.resize(lanes)
        _tell(problem, f"{engine.device} was out of memory: {lanes} lanes")


def _attempt(
    problem: Problem,
    loss: RayLoss,
    engine: DeviceEngine,
    start: Float,
    mode: str,
    options: Mapping[str, Any],
) -> Results:
    if engine not in _loops:
        _loops[engine] = _DeviceLoop(engine, problem.backend)
    loop = _loops[engine]
    if loop is None:
        raise OffDeviceError("it has been tried")
    found = loop.run(loss, start, mode == "scan", options)
    problem.provenance["loop"] = loop.described
    for trouble in loop.troubles():
        _tell(problem, trouble)
    return found


def _tell(problem: Problem, text: str) -> None:
    told = problem.provenance["fell_back"]
    if text not in told:
        told.append(text)


class _DeviceLoop:
    """The lane loop of one engine on its device.

    Args:
        engine: evaluates the lanes.
        backend: runs the loop, and its kernels the rounds.
    """

    def __init__(self, engine: DeviceEngine, backend: Backend) -> None:
        # The engine is the key under which this is kept.
        self._engine = weakref.proxy(engine)
        self.device = engine.device
        self._run_rounds = backend.run_rounds
        pools = Pools()
        middle = (engine.lanes + 1) // 2
        bounds = [0, middle, engine.lanes] if engine.lanes > 1 else [0, 1]
        self._groups = [
            Rounds(self._engine, slice(a, b), backend.threshold_step, backend.refill, pools)
            for a, b in itertools.pairwise(bounds)
        ]

    @property
    def described(self) -> str:
        """What runs the rounds."""
        captured = any(group.is_captured for group in self._groups)
        return f"{self.device.type}, {'CUDA graph' if captured else 'operation by operation'}"

    def troubles(self) -> set[str]:
        """Why rounds are not captured."""
        found = {group.trouble for group in self._groups}
        return {f"CUDA graph: {trouble}" for trouble in found if trouble is not None}

    def run(self, loss: RayLoss, start: Float, scan: bool, options: Mapping[str, Any]) -> Results:
        """See :func:`search`."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                return self._run(loss, start, scan, options)
        return self._run(loss, start, scan, options)

    def _run(self, loss: RayLoss, start: Float, scan: bool, options: Mapping[str, Any]) -> Results:
        began, before = time.perf_counter(), loss.seconds
        n = len(start)
        starts = torch.from_numpy(np.ascontiguousarray(start)).to(self.device)
        found = Found.empty(n, self.device)
        rules = _rules(options, loss.limit)
        for group in self._groups:
            group.clear(rules)
        supplied = [
            _Supplied(group, self._engine, loss, found, starts, scan) for group in self._groups
        ]
        self._run_rounds(supplied, items=n, refill_share=_REFILL_SHARE)
        loss.finish_loading()
        results = _read(found)
        loss.n_loss += int(results[2].sum())
        # With what loading has counted already.
        loss.seconds = before + time.perf_counter() - began
        return results


@dataclass(frozen=True)
class _Supplied:
    """A group of lanes as the loop sees it: what it takes is loaded too.

    Args:
        rounds: of the group.
        engine: evaluates the lanes.
        loss: the rays that the items are.
        found, starts, scan: see :func:`fastvol._reference.refill.refill`.
    """

    rounds: Rounds
    engine: DeviceEngine
    loss: RayLoss
    found: Found
    starts: Tensor
    scan: bool

    def refill(self, first: int) -> int:
        """See :class:`fastvol._reference.rounds.LaneGroup`."""
        count, lanes = self.rounds.refill(self.found, self.starts, first, scan=self.scan)
        if count:
            self.loss.load_async(lanes, np.arange(first, first + count))
            self.engine.prepare(lanes)
        return count

    def begin(self) -> None:
        """See :class:`fastvol._reference.rounds.LaneGroup`."""
        self.rounds.begin()

    def settled(self) -> int:
        """See :class:`fastvol._reference.rounds.LaneGroup`."""
        return self.rounds.settled()


def _read(found: Found) -> Results:
    """All of it, on the host."""
    marks = found.marks[:, :-1].cpu().numpy()
    return (
        found.x[:-1].cpu().numpy(),
        marks[0].astype(np.uint8),
        marks[1].copy(),
        marks[2].astype(np.uint8),
    )


def _rules(options: Mapping[str, Any], limit: float) -> dict[Rule, float]:
    given = {"max_evaluations": _MAX_EVALUATIONS, **options, "limit": limit}
    return {rule: float(given[rule.name.lower()]) for rule in Rule}
