"""Rounds on a device: losses at the trial radii, and the searches' next step, without the host.

On a GPU a round is captured in a CUDA graph, which has to repeat what the same operations do one by
one; elsewhere, and where that cannot be, they are issued one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._reference.refill import Found
from .._reference.search_step import Mark, Number, Phase, Rule, SearchState
from .protocol import DeviceEngine

Int = npt.NDArray[np.int64]

# A run of fewer rounds is over before a graph would pay.
_BEFORE_CAPTURE = 4
# Of a captured round's losses, against those of the same operations one by one, which a library may
# multiply by another algorithm.
_TOLERANCE = 1e-4


class Pools:
    """The memory of the captured rounds of one engine, which never run at once.

    Rounds of the same directions share a pool. One whose graphs are gone cannot be captured into
    again while anything in it is held, so other directions get another.
    """

    def __init__(self) -> None:
        self._bound: Hashable = None
        self._handle: Any = None

    def of(self, bound: Hashable) -> Any:
        """The pool for rounds that are bound to these directions."""
        if self._handle is None or bound != self._bound:
            self._bound, self._handle = bound, torch.cuda.graph_pool_handle()
        return self._handle

    def forget(self) -> None:
        """A capture has failed: what it leaves behind is used no more."""
        self._handle = None


class Rounds:
    """The searches of some lanes of an engine.

    Args:
        engine: evaluates them.
        lanes: consecutive ones.
        threshold_step, refill: the backend's.
        pools: of the graphs of the engine; its own by default.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        lanes: slice,
        threshold_step: Callable[..., None],
        refill: Callable[..., Tensor],
        pools: Pools | None = None,
    ) -> None:
        self._engine = engine
        self.lanes = lanes
        self._step, self._refill = threshold_step, refill
        self._pools = Pools() if pools is None else pools
        self.state = SearchState.empty(lanes.stop - lanes.start, engine.device)
        self._gpu = engine.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._done = 0
        self._bound = engine.bound_to
        # Why the round is not captured.
        self.trouble: str | None = None
        # What the host reads: how many searches have ended; how many of them it has taken note of.
        self._count = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=self._gpu)
        self._kept = 0
        # Lanes that hold an item.
        self.carried = 0
        self._told: Any = torch.cuda.Event() if self._gpu else None  # type: ignore[no-untyped-call]

    @property
    def is_captured(self) -> bool:
        """Whether rounds are one launch of a graph."""
        return self._graph is not None

    def begin(self) -> None:
        """Issues a round, and the copy of what it tells."""
        bound = self._engine.bound_to
        if bound != self._bound:
            # What was captured is of other directions.
            self._graph, self._bound, self._done = None, bound, 0
        if self._gpu and self._graph is None and self.trouble is None:
            if self._done >= _BEFORE_CAPTURE:
                self._capture()
            self._done += 1
        if self._graph is None:
            self._round()
        else:
            self._graph.replay()
        self._count.copy_(self.state.settled, non_blocking=self._gpu)
        if self._told is not None:
            self._told.record()

    def settled(self) -> int:
        """How many lanes wait for :meth:`refill` after the latest round, for which this waits."""
        if self._told is not None:
            self._told.synchronize()
        return int(self._count[0]) - self._kept

    def clear(self, rules: Mapping[Rule, float]) -> None:
        """Forgets all searches; ``rules`` are of the next ones."""
        self.state.clear()
        self.state.keep_rules(rules)
        self._kept = self.carried = 0

    def refill(
        self, found: Found, starts: Tensor, first: int, *, scan: bool
    ) -> tuple[int, Int | Tensor]:
        """Keeps what settled lanes found, and gives the next items to the free ones.

        Args:
            found, starts, first, scan: see :func:`fastvol._reference.refill.refill`.

        Returns:
            How many items were taken, and the engine's lanes that they are on: on the host, if all
            are free, else on the device.
        """
        # Without a round there is nothing to wait for.
        settled = self.settled() if self.carried else 0
        self._kept += settled
        carried = self.carried - settled
        count = min(self.state.lanes - carried, len(starts) - first)
        where = self._refill(
            self.state, found, starts, first, count, scan=scan, first_lane=self.lanes.start
        )
        self.carried = carried + count
        if not carried:
            return count, np.arange(self.lanes.start, self.lanes.start + count)
        return count, where

    def _round(self) -> None:
        with torch.no_grad(), self._engine.arithmetic():
            for part in self._engine.loss_parts(self.state.radii, self.lanes):
                self._step(
                    self.state,
                    part.outputs,
                    part.target,
                    kind=part.kind,
                    scale=part.scale,
                    ignore_index=part.ignore_index,
                    lanes=part.lanes,
                    first=part.first,
                    last=part.last,
                )

    def _capture(self) -> None:
        """Captures the round in a graph, and checks it; the state stays as it was."""
        state = self.state
        saved = [t.clone() for t in (state.numbers, state.marks, state.settled)]

        def restore() -> None:
            for tensor, value in zip(
                (state.numbers, state.marks, state.settled), saved, strict=True
            ):
                tensor.copy_(value)

        current = torch.cuda.current_stream(self._engine.device)
        try:
            # What is made at a first use must not be made inside the graph.
            stream: Any = torch.cuda.Stream(self._engine.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self._round()
                restore()
                self._round()
                wanted = [state.numbers.clone(), state.marks.clone()]
                restore()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = self._pools.of(self._bound)
            # On the same stream, for which libraries have their working memory by now; PyTorch's
            # own choice is of whatever device came first.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                self._round()
            graph.replay()
            if self._agrees(wanted, saved[1]):
                self._graph = graph
            else:
                self.trouble = "the captured round gave other losses"
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.trouble = (str(error).strip() or type(error).__name__).splitlines()[0]
        finally:
            # A capture that fails leaves its own stream behind.
            torch.cuda.set_stream(current)
            if self._graph is None:
                self._pools.forget()
        restore()

    def _agrees(self, wanted: list[Tensor], before: Tensor) -> bool:
        phases = before[Mark.PHASE]
        waited = (phases > Phase.IDLE) & (phases < Phase.SETTLED)
        ours, theirs = (
            numbers[Number.TOTAL][waited] for numbers in (self.state.numbers, wanted[0])
        )
        return bool(torch.isclose(ours, theirs, rtol=_TOLERANCE, atol=0, equal_nan=True).all())
