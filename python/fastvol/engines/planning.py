"""Which engine a run gets, and with how many rays and examples at once: by a short measurement."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._backend import Backend
from .._layout import ParameterLayout
from .._objective import Objective
from .._scale import Scale
from ..errors import FastvolError
from .blocks import fitting_block, usual_block
from .general import (
    PROBE_STREAM,
    SINGLE_LANES,
    GeneralEngine,
    Plan,
    losses_agree,
    measure_plan,
    warn_of_single_rays,
)
from .inplace import InPlaceEngine
from .layered import LayeredEngine, UntraceableError, onednn
from .memory import Peak, rows_bytes
from .parallel import ParallelEngine
from .protocol import Engine, Float, Indexed, Int

_LANES_OF_STREAMS = 32
# A block has so many directions for each lane, at the least, so that few lanes are idle at its end.
_FULL = 4
# Losses that a search spends on a direction, about.
_LOSSES = 4
# Tracing takes about as long as this many seconds of a run; shorter runs do without.
_SHORT_RUN = 0.4
# Of the run's own time, what the choice may take; and at the least, seconds.
_SHARE, _LEAST = 0.03, 0.5
_CHUNKS = (2, 4, 8, 16, 32)
_DEVICE_CHUNKS = (8, 32, 64, 128, 256, 512)
_ROWS = (2048, 512, 128)
# Another plan has to be faster by this much.
_BETTER = 0.95
# Seconds for which work that takes less is repeated.
_SHORT_TRIAL = 0.05
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def open_engine(
    objective: Objective,
    layout: ParameterLayout,
    scale: Scale,
    plan: Plan,
    backend: Backend,
    project: Tensor | None = None,
    *,
    toward_origin: bool = False,
    rowspace: bool = False,
) -> Engine:
    """The engine that a plan names; the arguments are :class:`LayeredEngine`'s.

    ``toward_origin`` says in place of ``project``, to engines that keep no such vector, that it is
    −θ*/s.

    Raises:
        ValueError: the plan has the layered engine, which this model or data do not allow.
    """
    if rowspace and not (plan.engine == "layered" and plan.cached):
        raise ValueError("noise='rowspace' needs a plan of the layered engine that keeps its layer")
    if plan.engine == "inplace":
        return InPlaceEngine(objective, layout, scale, plan, backend, toward_origin=toward_origin)
    if layout.is_sharded:
        raise ValueError(f"plan has the engine {plan.engine!r}; a sharded module needs 'inplace'")
    flat = scale.flat
    if plan.engine == "general":
        return GeneralEngine(objective, layout, flat, plan, backend, project)
    try:
        return _layered(objective, layout, flat, plan, backend, project, rowspace=rowspace)
    except UntraceableError as error:
        raise ValueError(f"plan: the layered engine cannot run this model: {error}") from error


def _layered(
    objective: Objective,
    layout: ParameterLayout,
    scale: Tensor,
    plan: Plan,
    backend: Backend,
    project: Tensor | None = None,
    *,
    rowspace: bool = False,
) -> LayeredEngine | ParallelEngine:
    """The layered engine of a plan, or as many as it has workers."""
    workers = min(plan.workers, plan.lanes)
    if workers == 1:
        return LayeredEngine(objective, layout, scale, plan, backend, project, rowspace=rowspace)
    engines = []
    for i in range(workers):
        lanes = (plan.lanes + i) // workers
        own = replace(plan, lanes=lanes, chunk=min(plan.chunk, lanes), noise_threads=1, workers=1)
        engines.append(
            LayeredEngine(objective, layout, scale, own, backend, project, rowspace=rowspace)
        )
    return ParallelEngine(engines)


def large_bytes(device: torch.device) -> int:
    """Parameters beyond this size, in the working dtype, are too many to batch.

    The general engine cannot keep the noise of its rays then and makes it anew for each evaluation,
    as the in-place one does, which needs one copy of the parameters where it needs two (measured:
    benchmarks/inplace_memory.py).
    """
    return rows_bytes(device) // SINGLE_LANES


def reason_to_write(engine: str, layout: ParameterLayout, model: nn.Module) -> str | None:
    """Why rays are to be written into the model's own parameters; ``None`` where others can do.

    Raises:
        ValueError: another engine was asked for than a sharded module can have.
    """
    if layout.is_sharded:
        if engine not in ("auto", "inplace"):
            raise ValueError(
                f"engine={engine!r} cannot run a sharded module; engine='inplace' or 'auto' can"
            )
        return "the parameters are sharded over processes"
    if engine == "inplace":
        return "it was asked for"
    if engine != "auto":
        return None
    size = layout.size * torch.finfo(layout.dtype).bits // 8
    if size > large_bytes(layout.device):
        return f"{size / 2**20:.0f} MiB of {layout.dtype} parameters are too many to batch"
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "torch.func.functional_call does not reach into modules of TorchScript"
    return None


def plan_in_place(
    objective: Objective,
    layout: ParameterLayout,
    backend: Backend,
    *,
    lanes: int | None,
    block: int | None,
    rays: int,
    reason: str,
    shares: int = 1,
) -> Plan:
    """A plan of the in-place engine, of which there is nothing to measure: it takes ray by ray.

    More lanes make no ray cheaper, but of data that have to be read: a batch is read once for all.
    """
    most = SINGLE_LANES if objective.in_memory else _LANES_OF_STREAMS
    if block is None:
        most = min(lanes or most, usual_block(layout.device))
        least = 1 if objective.in_memory else most
        # Besides the loss each evaluation makes the noise, about as long again.
        seconds = 2 * _LOSSES * objective.seconds
        block = fitting_block(layout.device, seconds, least=least, rays=rays, shares=shares)
    threads = torch.get_num_threads()
    return Plan(
        engine="inplace",
        chunk=1,
        lanes=min(lanes or most, block, rays),
        keep_rows=False,
        dtype=str(layout.dtype).removeprefix("torch."),
        threads=threads,
        noise_threads=threads,
        backend=backend.name,
        block=block,
        reason=reason,
    )


def choose_plan(
    engine: str,
    objective: Objective,
    layout: ParameterLayout,
    scale: Scale,
    backend: Backend,
    *,
    lanes: int | None,
    block: int | None,
    radius: float,
    rays: int,
    shares: int = 1,
) -> tuple[Plan, str | None]:
    """The fastest plan found; with ``engine="auto"`` of both engines.

    Args:
        engine: ``"auto"``, ``"general"`` or ``"layered"``.
        objective, layout, scale, backend, lanes, radius, rays: as for
            :func:`fastvol.engines.general.measure_plan`.
        block: directions per block; ``None`` for what suits their price.
        shares: processes, or devices, that take blocks.

    Returns:
        The plan, and why vmap was not possible, if so. PyTorch's thread count is left changed.

    Raises:
        ValueError: ``engine="layered"`` for a model that cannot be traced; it says why.
    """
    trial = _Trial(objective, layout, scale, backend, radius)
    if engine == "auto" and trial.is_out_of_reach():
        return plan_in_place(
            objective,
            layout,
            backend,
            lanes=lanes,
            block=block,
            rays=rays,
            reason="the model does not notice that functional_call replaces its parameters",
            shares=shares,
        ), None
    usual = block or usual_block(layout.device)
    plan, trouble, seconds = _choose(engine, trial, lanes, usual, rays)
    if block is None:
        least = _FULL * plan.lanes
        block = fitting_block(layout.device, seconds, least=least, rays=rays, shares=shares)
        plan = replace(plan, block=block)
    warn_of_single_rays(plan, trouble)
    return plan, trouble


def _choose(
    engine: str, trial: _Trial, lanes: int | None, block: int, rays: int
) -> tuple[Plan, str | None, float]:
    """The plan, why vmap was not possible, and the seconds of a direction."""
    most_threads = torch.get_num_threads()
    general, trouble = measure_plan(
        *trial.setting, lanes=lanes, block=block, radius=trial.radius, rays=rays
    )
    if engine == "general":
        # There is nothing to compare it with: about will do.
        return general, trouble, _LOSSES * trial.objective.seconds
    torch.set_num_threads(general.threads)
    seconds = trial.seconds(trial.general(general))
    if engine == "auto" and rays * seconds < _SHORT_RUN:
        return general, trouble, seconds
    try:
        plan, own = _layered_plan(trial, general, lanes, block, rays, seconds, most_threads)
    except UntraceableError as error:
        if engine == "layered":
            raise ValueError(
                f"engine='layered' cannot run this model and loss ({error}); engine='auto' can"
            ) from error
        plan = replace(general, reason=f"not layered: {error}; {general.reason}")
        return plan, trouble, seconds
    told = f"{own * 1e3:.3g} ms a direction layered, {seconds * 1e3:.3g} ms general"
    if engine == "auto" and own > seconds:
        torch.set_num_threads(general.threads)
        return replace(general, reason=f"{told}; {general.reason}"), trouble, seconds
    return replace(plan, reason=told), None, own


def _layered_plan(
    trial: _Trial,
    general: Plan,
    lanes: int | None,
    block: int,
    rays: int,
    seconds: float,
    most_threads: int,
) -> tuple[Plan, float]:
    """The fastest layered plan, and its seconds a direction.

    Raises:
        UntraceableError: the model cannot be evaluated so, or not to the same losses.
    """
    device = trial.layout.device
    # On a GPU one half of the lanes is evaluated while the host looks after the other.
    groups, chunks = (1, _CHUNKS) if device.type == "cpu" else (2, _DEVICE_CHUNKS)
    most_lanes = min(lanes or groups * max(chunks), block)
    few = min(most_lanes, 4)
    best = replace(
        general, engine="layered", chunk=1, lanes=few, keep_rows=True, rows=0, cached=True
    )
    engine = trial.open(best)
    kept, fastest = engine.bytes_kept, trial.seconds(engine)
    # From here on: tracing, and on a GPU compiling, say nothing of the run.
    deadline = time.perf_counter() + max(_LEAST, _SHARE * rays * min(seconds, fastest))
    # Its memory, before the next one is opened.
    del engine

    def attempt(plan: Plan) -> float:
        """Seconds a direction; infinite where the plan will not do."""
        nonlocal deadline
        # A fused plan may keep no directions; its measured peak tells.
        rows = 0 if plan.fused else trial.layout.size * trial.bytes_a_number
        per_lane = rows + (kept if plan.cached else 0)
        if time.perf_counter() > deadline or plan.lanes * per_lane > 2 * rows_bytes(device):
            return float("inf")
        peak = Peak(device)
        began = time.perf_counter()
        try:
            engine = trial.open(plan)
            if device.type != "cpu":
                # What had to be compiled says nothing of the run.
                deadline += time.perf_counter() - began
            found = trial.seconds(engine)
        except (UntraceableError, torch.OutOfMemoryError):
            return float("inf")
        return float("inf") if peak.is_too_high else found

    choices = _Choices(
        most_lanes=most_lanes,
        lanes=lanes,
        examples=trial.examples,
        groups=groups,
        chunks=chunks,
        workers=most_threads if device.type == "cpu" else 1,
        onednn=onednn.is_available(trial.layout.dtype, device),
        fusible=device.type == "cuda" and trial.setting[3].name == "triton",
    )
    # The variants look at the best plan so far.
    found_yet = [best]
    for variants in choices.variants(found_yet):
        worse = 0
        for variant in variants:
            plan = replace(best, **variant)
            torch.set_num_threads(plan.threads)
            found = attempt(plan)
            if found < _BETTER * fastest:
                best, fastest, worse = plan, found, 0
                found_yet[0] = best
            else:
                worse += 1
            if worse == 2:
                break
    torch.set_num_threads(best.threads)
    return best, fastest


@dataclass(frozen=True)
class _Choices:
    """What a layered plan may be changed in.

    Args:
        most_lanes: rays in flight.
        lanes: the number that was asked for.
        examples: of the largest batch.
        groups: parts of the lanes that are evaluated in turn.
        chunks: numbers of rays to try at once.
        workers: the most threads that take rays of their own.
        onednn: whether there is another way to multiply.
        fusible: whether kernels can make the noise.
    """

    most_lanes: int
    lanes: int | None
    examples: int
    groups: int
    chunks: tuple[int, ...]
    workers: int
    onednn: bool
    fusible: bool

    def variants(self, best: list[Plan]) -> Iterator[list[dict[str, Any]]]:
        """Changes to try, one list after the other; of each the first that helps no more ends it.

        What may change most comes first: a short run has not the time for all.
        """
        many = self.examples >= 4 * _ROWS[0]
        if many:
            # What is kept of all of them at once has to be fetched from memory for every radius.
            yield [{"rows": _ROWS[0]}]
        yield [{"cached": False}]
        if self.onednn:
            yield [{"products": "onednn"}]
        if self.workers > 1:
            yield [self._working(best[0], self.workers)]
        working = best[0].workers
        sizes = [
            self._working(replace(best[0], chunk=chunk), working)
            if working > 1
            else {"chunk": chunk, "lanes": max(self.groups * chunk, min(4, self.most_lanes))}
            for chunk in self.chunks
            if self.groups * chunk * working <= self.most_lanes
        ]
        yield sizes
        if self.fusible:
            # Then larger sizes, for which the other form may have had no memory.
            chunk = best[0].chunk
            yield [{"fused": True}]
            if best[0].fused:
                yield [size for size in sizes if size["chunk"] > chunk]
        if best[0].chunk > 1:
            # What was settled for one ray at a time.
            if self.onednn:
                yield [{"products": "torch" if best[0].products == "onednn" else "onednn"}]
            if self.workers > 1:
                other = 1 if working > 1 else self.workers
                yield [self._working(best[0], other)]
        yield [{"rows": rows} for rows in _ROWS[many:] if 2 * rows <= self.examples]
        if self.workers > 1 and best[0].workers == 1:
            yield [{"threads": 1 if best[0].threads > 1 else self.workers}]

    def _working(self, plan: Plan, workers: int) -> dict[str, Any]:
        """Change to a number of workers."""
        chunk = plan.chunk if self.lanes is None else max(1, self.lanes // workers)
        chunk = min(chunk, max(1, self.most_lanes // workers))
        few = min(4, self.most_lanes)
        return {
            "chunk": chunk,
            "lanes": self.lanes or max(workers * chunk, few),
            "threads": 1 if workers > 1 else self.workers,
            "workers": workers,
        }


class _Trial:
    """Times engines, and compares their losses with the general engine's."""

    def __init__(
        self,
        objective: Objective,
        layout: ParameterLayout,
        scale: Scale,
        backend: Backend,
        radius: float,
    ) -> None:
        self.setting = objective, layout, scale.flat, backend
        self._scale = scale
        self.objective, self.layout = objective, layout
        self.bytes_a_number = torch.finfo(layout.dtype).bits // 8
        self.examples = objective.largest_batch
        self.radius = radius
        # A loss that hardly moves would hide an operation that was left out.
        self._radii = np.array([radius, 3.0 * radius, 10.0 * radius])
        self._reference: Float | None = None

    def general(self, plan: Plan) -> GeneralEngine:
        """The general engine of a plan."""
        objective, layout, scale, backend = self.setting
        return GeneralEngine(objective, layout, scale, plan, backend)

    def open(self, plan: Plan) -> LayeredEngine | ParallelEngine:
        """The layered engine of a plan.

        Raises:
            UntraceableError: it cannot be opened, fails, or gives other losses.
        """
        try:
            objective, layout, scale, backend = self.setting
            engine = _layered(objective, layout, scale, plan, backend)
            values = self._probe(engine)
        except UntraceableError:
            raise
        except Exception as error:
            text = str(error).strip().splitlines()
            raise UntraceableError(f"{type(error).__name__}: {text[0] if text else ''}") from error
        if self._reference is None:
            single = replace(plan, engine="general", chunk=1)
            self._reference = self._probe(self.general(single))
        tolerance = max(_TOLERANCE[self.layout.dtype], 64 * self.objective.epsilon)
        for value, wanted in zip(values, self._reference, strict=True):
            if not losses_agree(value, wanted, tolerance):
                raise UntraceableError(f"it gave a loss of {value} where the model gave {wanted}")
        return engine

    def is_out_of_reach(self) -> bool:
        """Whether the loss stays as it is under ``functional_call``, and moves in place."""
        objective, layout, _, backend = self.setting
        name = str(layout.dtype).removeprefix("torch.")
        plan = Plan("general", 1, 1, False, name, 1, 1, backend.name)
        try:
            if (self._probe(self.general(plan), self._radii[-1:]) != objective.loss0).any():
                return False
            written = InPlaceEngine(objective, layout, self._scale, plan, backend)
            return bool((self._probe(written) != self._probe(self.general(plan))).any())
        except FastvolError:
            # Whatever it is, the measurement of the general engine tells.
            return False

    def _probe(self, engine: Engine, radii: Float | None = None) -> Float:
        values = []
        lane = np.array([0])
        for i, radius in enumerate(self._radii if radii is None else radii):
            engine.load(lane, Indexed(0, np.array([i]), stream=PROBE_STREAM))
            values.append(engine.loss(np.array([radius]), lane).values[0])
        return np.array(values)

    def seconds(self, engine: Engine) -> float:
        """Of a direction: loading it, and the losses that a search takes."""
        lanes, radii = np.arange(engine.lanes), np.full(engine.lanes, self.radius)

        def load(some: Int) -> None:
            engine.load(some, Indexed(0, some, stream=PROBE_STREAM))

        began = time.perf_counter()
        load(lanes)
        engine.loss(radii)
        middle = time.perf_counter()
        engine.loss(radii)
        loss = time.perf_counter() - middle
        once = max(middle - began - loss, 0.0) + _LOSSES * loss
        if once > _SHORT_TRIAL:
            return once / engine.lanes
        # As in a search, where now this ray is settled and now that: each lane gets a new one in
        # one of so many rounds, whenever that may be.
        generator = np.random.default_rng(0)
        turns = generator.integers(0, _LOSSES, len(lanes))
        best, began = float("inf"), time.perf_counter()
        while time.perf_counter() - began < _SHORT_TRIAL:
            start = time.perf_counter()
            for turn in range(_LOSSES):
                settled = lanes[turns == turn]
                if len(settled):
                    load(settled)
                engine.loss(radii)
            best = min(best, time.perf_counter() - start)
        return best / engine.lanes
