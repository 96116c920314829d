"""The general engine: any module, on any device that has float64, through ``torch.func``.

Rays are evaluated in chunks under ``vmap``, or one at a time where a measurement finds that no
slower (a batch of rays falls out of cache) or where ``vmap`` cannot go.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value

from .._backend import Backend
from .._layout import ParameterLayout
from .._objective import PREFIX, Batch, Objective, as_float
from .._precision import products
from ..errors import FastvolError, warn
from .memory import chunk_bytes, rows_bytes, to_device
from .protocol import (
    Capabilities,
    Dense,
    Float,
    Indexed,
    Int,
    Losses,
    LossPart,
    OffDeviceError,
    RayInfo,
    Rays,
)

SINGLE_LANES = 4
PROBE_STREAM = 2
SCREENINGS = (
    "unmeasured",
    "off",
    "subset",
    "tf32",
    "bfloat16",
    "subset in bfloat16",
)


@dataclass(frozen=True)
class Plan:
    """How a run is carried out. A block's result depends on the config, this, and its index.

    Args:
        engine: the engine's name.
        chunk: rays evaluated together under vmap; 1 is one at a time.
        lanes: rays in flight.
        keep_rows: whether the noise of a ray is kept between its evaluations.
        dtype: the working dtype of the moved parameters.
        threads: PyTorch's intra-op threads.
        noise_threads: threads that make the noise; the noise does not depend on them.
        backend: who runs the loop and makes the noise.
        block: directions per block.
        reason: why this chunk, in words.
        rows: examples that the layered engine takes at once; 0 is a whole batch.
        cached: whether it keeps what is linear in the parameters for all radii of a direction.
        workers: threads of the layered engine that take some of the lanes each.
        fused: whether it makes the noise of its other layers inside the kernels that need it.
        products: who multiplies its matrices: ``"torch"``, or ``"onednn"`` on a CPU.
        processes: for how many processes the rays of chains are divided.
        screening: what a search looks at first to learn where to begin: ``"off"``, ``"subset"`` (of
            ``screen_examples`` examples), ``"tf32"``, ``"bfloat16"``, ``"subset in bfloat16"``,
            or ``"unmeasured"``: then a run measures which of them pays.
        screen_examples: of the subset; 0 is all.
        screen_offset: what a radius has more in log than on the screen.
    """

    engine: str
    chunk: int
    lanes: int
    keep_rows: bool
    dtype: str
    threads: int
    noise_threads: int
    backend: str
    block: int = 1024
    reason: str = ""
    rows: int = 0
    cached: bool = False
    workers: int = 1
    screening: str = "unmeasured"
    screen_examples: int = 0
    screen_offset: float = 0.0
    fused: bool = False
    products: str = "torch"
    processes: int = 1

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`describe` wrote.

        Raises:
            ValueError: naming ``plan``.
        """
        try:
            plan = cls(**description)
        except TypeError as error:
            raise ValueError(f"plan is not the plan of a result: {error}") from error
        if plan.engine not in ("general", "layered", "inplace"):
            raise ValueError(
                f"plan has the engine {plan.engine!r}; this version has 'general', 'layered' and "
                "'inplace'"
            )
        for name in ("keep_rows", "cached", "fused"):
            if type(getattr(plan, name)) is not bool:
                raise ValueError(
                    f"plan[{name!r}] must be True or False, got {getattr(plan, name)!r}"
                )
        for name in ("rows", "screen_examples"):
            count = getattr(plan, name)
            if type(count) is not int or count < 0:
                raise ValueError(f"plan[{name!r}] must be a whole number from 0, got {count!r}")
        if plan.products not in ("torch", "onednn"):
            raise ValueError(f"plan['products'] must be 'torch' or 'onednn', got {plan.products!r}")
        if plan.screening not in SCREENINGS:
            raise ValueError(
                f"plan['screening'] must be one of {', '.join(SCREENINGS)}, got {plan.screening!r}"
            )
        if type(plan.screen_offset) is not float or not math.isfinite(plan.screen_offset):
            raise ValueError(
                f"plan['screen_offset'] must be a finite number, got {plan.screen_offset!r}"
            )
        cores = os.cpu_count() or 1
        most = dict.fromkeys(("chunk", "lanes", "block", "processes"), 2**16)
        for name in (*most, "threads", "noise_threads", "workers"):
            count = getattr(plan, name)
            if type(count) is not int or not 1 <= count <= most.get(name, cores):
                raise ValueError(
                    f"plan[{name!r}] must be a whole number from 1 to {most.get(name, cores)}, got "
                    f"{count!r}"
                )
        return plan


class GeneralEngine:
    """``torch.func`` over any module.

    Args:
        objective: the loss over the data.
        layout: where the moved parameters lie.
        scale: s, float64 ``[size]`` on the CPU; 0 where a coordinate does not move.
        plan: chunk and lanes.
        backend: makes the noise.
        project: float64 ``[d]``, whose product with every z is reported by :meth:`load`.

    Attributes:
        coarse: ``"bfloat16"`` where losses are made so as far as PyTorch's autocast goes,
            ``"tf32"`` where products may round to that: good enough to choose where to look, not to
            say where a boundary is; else empty.
    """

    coarse = ""

    def __init__(
        self,
        objective: Objective,
        layout: ParameterLayout,
        scale: Tensor,
        plan: Plan,
        backend: Backend,
        project: Tensor | None = None,
    ) -> None:
        self._objective = objective
        self._layout = layout
        self._backend = backend
        self._plan = plan
        self.lanes = plan.lanes
        self.capabilities = Capabilities(
            gradients=True, dtypes=("float32", "float64"), devices=("cpu", "cuda")
        )
        device, dtype = layout.device, layout.dtype
        self.device = device
        self._theta0 = layout.flatten()
        moving = scale > 0
        self._index = None if bool(moving.all()) else moving.nonzero().flatten().to(device)
        compact = scale if self._index is None else scale[moving]
        self.dim = compact.numel()
        self._scale = None if bool((compact == 1).all()) else compact.to(device, dtype)
        self._project = None if project is None else project.to(device)
        self._keep_rows = self._wants_rows()
        self._allocate()
        # vmap does not look inside a Batch: its tensors are shared by all rays.
        self._vmapped = torch.func.vmap(objective.call, in_dims=(0, None), randomness="error")

    def _wants_rows(self) -> bool:
        return self._plan.keep_rows or self._index is not None

    def _new_rows(self, count: int, size: int | None = None) -> Tensor:
        """Room for as many directions; on a GPU each begins where four can be written at once."""
        size = self.dim if size is None else size
        width = size if self.device.type == "cpu" else -(-size // 4) * 4
        return self._theta0.new_empty((count, width))[:, :size]

    def _allocate(self) -> None:
        """Room for the rays that the plan wants."""
        plan, layout, like = self._plan, self._layout, self._theta0
        self.lanes = plan.lanes
        # Rows of noise are kept from one evaluation of a ray to the next while they are small; else
        # they are made anew each time, in the same pass that perturbs the parameters.
        self._rows = self._new_rows(plan.lanes) if self._keep_rows else None
        # θ = θ* + (radius · factor) · row; on a GPU the second of these is the newer one.
        self._factor = np.ones(plan.lanes)
        self._factor_here = torch.from_numpy(self._factor).to(like.device)
        self._factor_is_old = False
        self._rays: list[tuple[Indexed, int] | None] = [None] * plan.lanes
        # What the host does not know yet: which directions the lanes hold that only the device has
        # chosen, of what seed, stream and kind; -1 for the others.
        self._untold = torch.full((plan.lanes,), -1, dtype=torch.int64, device=like.device)
        self._untold_like: Indexed | None = None
        self._theta = self._new_rows(plan.chunk, layout.size)
        # With one dtype the named views follow the buffer, so they are made once.
        self._views = layout.unflatten(self._theta[0], PREFIX) if layout.is_single_dtype else None

    def resize(self, lanes: int) -> None:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""
        self._plan = replace(self._plan, lanes=lanes, chunk=min(self._plan.chunk, lanes))
        # The old room goes before the new one is asked for.
        self._rows, self._theta, self._views = None, self._theta[:0].clone(), None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._allocate()

    def _host_factor(self) -> Float:
        if self._factor_is_old:
            self._factor[:] = self._factor_here.cpu().numpy()
            self._factor_is_old = False
        return self._factor

    def _keep_factor(self, lanes: Int, factor: Float | float) -> None:
        self._host_factor()[lanes] = factor
        if self.device.type != "cpu":
            self._factor_here.copy_(torch.from_numpy(self._factor))

    def _learn(self) -> None:
        """Reads which lanes the device has loaded without the host."""
        if self._untold_like is None:
            return
        ids = self._untold.cpu().numpy()
        lanes = np.flatnonzero(ids >= 0)
        self._learned(lanes, replace(self._untold_like, ids=ids[lanes]))
        self._untold.fill_(-1)
        self._untold_like = None

    def _learned(self, lanes: Int, rays: Indexed) -> None:
        """Notes which rays the lanes hold."""
        for position, lane in enumerate(lanes.tolist()):
            self._rays[lane] = (rays, position)

    def load(self, lanes: Int, rays: Rays) -> RayInfo:
        """See :class:`fastvol.engines.protocol.Engine`."""
        self._learn()
        if isinstance(rays, Dense):
            return self._load_dense(lanes, rays)
        for position, lane in enumerate(lanes):
            self._rays[lane] = (rays, position)
        if self._rows is None and rays.preconditioner is None:
            norm, dot = self._measured(rays)
        else:
            norm, dot = self._fill_rows(lanes, rays, self._backend.normals)
        self._keep_factor(lanes, 1.0 / norm)
        return RayInfo(norm, dot)

    def _measured(self, rays: Indexed) -> tuple[Float, Float]:
        """‖z‖ and ⟨z, project⟩ of directions that are not kept."""
        count = len(rays.ids)
        scratch = self._new_rows(1)
        norm, dot = np.empty(count), np.empty(count)
        for i in range(count):
            norm[i : i + 1], dot[i : i + 1] = self._backend.normals(
                scratch,
                rays.seed,
                rays.stream,
                rays.ids[i : i + 1],
                antithetic=rays.antithetic,
                project=self._project,
                threads=self._plan.noise_threads,
            )
        return norm, dot

    def _fill_rows(self, lanes: Int | Tensor, rays: Indexed, normals: Callable[..., Any]) -> Any:
        """Writes s⊙z, or s⊙Pz, of some lanes; returns what ``normals`` tells."""
        rows = self._rows_for_writing()
        span = None if isinstance(lanes, Tensor) else span_of(lanes)
        target = self._new_rows(len(lanes)) if span is None else rows[span]
        plain = rays.preconditioner is None
        told = normals(
            target,
            rays.seed,
            rays.stream,
            rays.ids,
            antithetic=rays.antithetic,
            scale=self._scale if plain else None,
            project=self._project,
            threads=self._plan.noise_threads,
        )
        if rays.preconditioner is not None:
            target.copy_(self._scaled(rays.preconditioner.matvec(target)))
        if span is None:
            rows.index_copy_(0, to_device(lanes, rows.device), target)
        return told

    def load_async(self, lanes: Int | Tensor, rays: Rays) -> tuple[Tensor, Tensor] | None:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""
        if isinstance(rays, Dense) or rays.preconditioner is not None:
            return None
        told = self._made_async(lanes, rays)
        if told is None:
            return None
        norm, dot = told
        known, alike = self._untold_like, replace(rays, ids=rays.ids[:0])
        if isinstance(lanes, np.ndarray) or (known is not None and not _are_alike(known, alike)):
            self._learn()
        if isinstance(lanes, Tensor):
            self._untold_like = alike
            self._untold.index_copy_(0, lanes, to_device(rays.ids, self.device))
        else:
            self._learned(lanes, rays)
        self._factor_here.index_copy_(0, to_device(lanes, self.device), 1.0 / norm)
        # On a CPU both are one memory.
        self._factor_is_old = self.device.type != "cpu"
        return norm, dot

    def _made_async(self, lanes: Int | Tensor, rays: Indexed) -> tuple[Tensor, Tensor] | None:
        """The directions of :meth:`load_async`, and what it returns."""
        if self._rows is None:
            return None
        told: tuple[Tensor, Tensor] = self._fill_rows(lanes, rays, self._backend.write_normals)
        return told

    def _load_dense(self, lanes: Int, rays: Dense) -> RayInfo:
        directions = rays.directions.to(self._theta0)
        if directions.shape != (len(lanes), self.dim):
            raise ValueError(
                f"directions must have shape {(len(lanes), self.dim)}, got "
                f"{tuple(directions.shape)}"
            )
        norm = torch.linalg.vector_norm(directions, dim=1, dtype=torch.float64).cpu().numpy()
        dot = np.zeros(len(lanes))
        if self._project is not None:
            dot = (directions.to(torch.float64) @ self._project).cpu().numpy()
        if rays.preconditioner is not None:
            directions = rays.preconditioner.matvec(directions)
        self._rows_for_writing()[torch.from_numpy(lanes).to(directions.device)] = self._scaled(
            directions
        )
        for lane in lanes:
            self._rays[lane] = None
        self._keep_factor(lanes, 1.0)
        return RayInfo(norm, dot)

    def _rows_for_writing(self) -> Tensor:
        if self._rows is None:
            # Rows that cannot be made again from a counter have to be kept, whatever their size.
            self._rows = self._new_rows(self.lanes)
            for lane, loaded in enumerate(self._rays):
                if loaded is not None:
                    rays, position = loaded
                    self._backend.normals(
                        self._rows[lane : lane + 1],
                        rays.seed,
                        rays.stream,
                        rays.ids[position : position + 1],
                        antithetic=rays.antithetic,
                        scale=self._scale,
                        threads=self._plan.noise_threads,
                    )
        return self._rows

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self._scale is None else rows * self._scale

    def loss(self, radii: Float, lanes: Int | None = None, *, limit: float = math.inf) -> Losses:
        """See :class:`fastvol.engines.protocol.Engine`.

        A ray is left between two batches where what has been summed exceeds the limit already.
        """
        self._learn()
        lanes = np.arange(self.lanes) if lanes is None else lanes
        chunk = self._plan.chunk
        running = self._objective.running(len(lanes), limit)
        with torch.no_grad(), self.arithmetic():
            if self._objective.in_memory:
                for start in range(0, len(lanes), chunk):
                    part = np.arange(start, min(start + chunk, len(lanes)))
                    self._perturb(radii[part], lanes[part])
                    for batch in self._objective.batches():
                        if running.settled(part):
                            break
                        running.add(part, batch.weight, self._evaluate(batch, len(part)))
            else:
                # A batch that has to be read is read once for all rays.
                for batch in self._objective.batches():
                    going = running.going()
                    if not len(going):
                        break
                    for start in range(0, len(going), chunk):
                        part = going[start : start + chunk]
                        self._perturb(radii[part], lanes[part])
                        running.add(part, batch.weight, self._evaluate(batch, len(part)))
        return Losses(running.values, running.outside)

    def loss_parts(self, radii: Tensor, lanes: slice) -> Iterator[LossPart]:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""
        self._check_stays()
        batches = list(self._objective.batches())
        weight = sum(batch.weight for batch in batches)
        for part, coefficient in self._chunks_here(radii, lanes):
            count = len(coefficient)
            self._perturb_here(coefficient, part)
            for i, batch in enumerate(batches):
                if self._plan.chunk == 1:
                    views = self._views or self._layout.unflatten(self._theta[0], PREFIX)
                    values = self._objective.call(views, batch)
                else:
                    values = self._vmapped(
                        self._layout.unflatten(self._theta[:count], PREFIX), batch
                    )
                if not isinstance(values, Tensor) or values.device != self.device:
                    raise OffDeviceError("loss_fn does not return a tensor on the model's device")
                if values.numel() != count:
                    raise OffDeviceError("loss_fn does not return a scalar")
                where = slice(part.start - lanes.start, part.stop - lanes.start)
                outputs = values.detach().reshape(count)
                last = part.stop == lanes.stop and i == len(batches) - 1
                yield LossPart(outputs, None, "given", batch.weight / weight, where, i == 0, last)

    def prepare(self, lanes: Int | Tensor) -> None:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""

    def _check_stays(self) -> None:
        """Whether evaluations need nothing from the host.

        Raises:
            OffDeviceError: what they need.
        """
        if not self._objective.in_memory:
            raise OffDeviceError("the data are read anew for every evaluation")
        if self._rows is None:
            raise OffDeviceError("the directions are too large to be kept")

    def _chunks_here(self, radii: Tensor, lanes: slice) -> Iterator[tuple[slice, Tensor]]:
        """Lanes that are evaluated together, and what their s⊙z is multiplied with ``[k]``."""
        coefficient = (radii * self._factor_here[lanes]).to(self._theta0.dtype)
        for start in range(lanes.start, lanes.stop, self._plan.chunk):
            part = slice(start, min(start + self._plan.chunk, lanes.stop))
            yield part, coefficient[part.start - lanes.start : part.stop - lanes.start]

    def _perturb_here(self, coefficient: Tensor, part: slice) -> None:
        """As :meth:`_perturb`, with everything on the device."""
        assert self._rows is not None
        theta, rows = self._theta[: len(coefficient)], self._rows[part]
        if self._index is None:
            torch.addcmul(self._theta0, rows, coefficient[:, None], out=theta)
            return
        theta.copy_(self._theta0.expand_as(theta))
        theta[:, self._index] += coefficient[:, None] * rows

    def loss_and_grad(self, radii: Float, lanes: Int | None = None) -> tuple[Float, Tensor]:
        """See :class:`fastvol.engines.protocol.Engine`."""
        self._learn()
        lanes = np.arange(self.lanes) if lanes is None else lanes
        chunk = self._plan.chunk
        total, weight = np.zeros(len(lanes)), 0.0
        gradients = torch.zeros(
            (len(lanes), self.dim), device=self._theta0.device, dtype=self._theta0.dtype
        )
        for start in range(0, len(lanes), chunk):
            part = slice(start, start + chunk)
            self._perturb(radii[part], lanes[part])
            weight = 0.0
            for batch in self._objective.batches():
                weight += batch.weight
                # Without a graph through the parameters that stay.
                with torch.no_grad():
                    values, slopes = self._evaluate_with_grad(batch, len(lanes[part]))
                total[part] += batch.weight * values
                if self._index is not None:
                    slopes = slopes[:, self._index]
                gradients[part] += batch.weight * self._scaled(slopes)
        return total / weight, gradients / weight

    @property
    def bound_to(self) -> Hashable:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""
        return None

    def arithmetic(self) -> AbstractContextManager[Any]:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""
        if self.coarse == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return products(tf32=True) if self.coarse == "tf32" else nullcontext()

    def _perturb(self, radii: Float, lanes: Int) -> None:
        """Writes θ for each lane into the first rows of the buffer."""
        coefficient = radii * self._host_factor()[lanes]
        count = len(lanes)
        if self._rows is None:
            for slot, (lane, c) in enumerate(zip(lanes, coefficient, strict=True)):
                loaded = self._rays[lane]
                assert loaded is not None
                rays, position = loaded
                self._backend.perturb(
                    self._theta[slot : slot + 1],
                    self._theta0,
                    np.array([c]),
                    rays.seed,
                    rays.stream,
                    rays.ids[position : position + 1],
                    antithetic=rays.antithetic,
                    scale=self._scale,
                    threads=self._plan.noise_threads,
                )
            return
        theta = self._theta[:count]
        if self._index is not None:
            theta.copy_(self._theta0.expand_as(theta))
            c = torch.as_tensor(coefficient, device=theta.device, dtype=theta.dtype)
            theta[:, self._index] += c[:, None] * self._rows[torch.from_numpy(lanes)]
        elif count == 1:
            lane = int(lanes[0])
            torch.add(self._theta0, self._rows[lane], alpha=float(coefficient[0]), out=theta[0])
        else:
            rows = self._rows
            span = span_of(lanes)
            picked = rows[torch.from_numpy(lanes).to(rows.device)] if span is None else rows[span]
            c = torch.as_tensor(coefficient, device=theta.device, dtype=theta.dtype)
            torch.addcmul(self._theta0, picked, c[:, None], out=theta)

    def _evaluate(self, batch: Batch, count: int) -> Float:
        if self._plan.chunk == 1:
            views = self._views or self._layout.unflatten(self._theta[0], PREFIX)
            return np.array([as_float(self._objective.call(views, batch))])
        views = self._layout.unflatten(self._theta[:count], PREFIX)
        return _as_floats(self._vmapped(views, batch), count)

    def _evaluate_with_grad(self, batch: Batch, count: int) -> tuple[Float, Tensor]:
        layout = self._layout
        if self._plan.chunk == 1:
            theta = self._theta[0].clone().requires_grad_()
            with torch.enable_grad():
                value = self._objective.call(layout.unflatten(theta, PREFIX), batch)
                (slope,) = torch.autograd.grad(value, theta)
            return np.array([as_float(value)]), slope[None]

        def flat_loss(theta: Tensor) -> Tensor:
            value: Tensor = self._objective.call(layout.unflatten(theta, PREFIX), batch)
            return value

        slopes, values = torch.func.vmap(grad_and_value(flat_loss), randomness="error")(
            self._theta[:count]
        )
        return _as_floats(values, count), slopes


def _are_alike(a: Indexed, b: Indexed) -> bool:
    """Whether directions differ in their number alone."""
    return (a.seed, a.stream, a.antithetic) == (b.seed, b.stream, b.antithetic)


def span_of(lanes: Int) -> slice | None:
    """Consecutive ascending lanes as a slice, which needs no copy."""
    first, stop = int(lanes[0]), int(lanes[0]) + len(lanes)
    return slice(first, stop) if np.array_equal(lanes, np.arange(first, stop)) else None


def _as_floats(values: Any, count: int) -> Float:
    if not isinstance(values, Tensor):
        raise TypeError(f"loss_fn must return a tensor under vmap, got {type(values).__name__}")
    if values.numel() != count:
        raise ValueError(
            f"loss_fn must return a scalar, got a tensor of shape {tuple(values.shape[1:])}; "
            "reduce it with .mean()"
        )
    result: Float = values.detach().reshape(count).to("cpu", torch.float64).numpy()
    return result


def measure_plan(
    objective: Objective,
    layout: ParameterLayout,
    scale: Tensor,
    backend: Backend,
    *,
    lanes: int | None,
    block: int,
    radius: float,
    rays: int,
) -> tuple[Plan, str | None]:
    """Chooses chunk, lanes and threads by timing the loss on a few rays at radius ``radius``.

    PyTorch's own thread count is the most that is used; small losses are faster on one thread, by
    far where other work keeps the cores busy.

    Args:
        objective, layout, scale, backend: as for :class:`GeneralEngine`.
        lanes: rays in flight, if the caller fixed them.
        block: directions per block, the most lanes there can be.
        radius: where to evaluate.
        rays: how many rays the run has: a short run is not measured for longer than it lasts.

    Returns:
        The plan, and why vmap was not possible, if so. PyTorch's thread count is left changed.
    """
    most_threads = torch.get_num_threads()
    bytes_per_ray = layout.size * torch.finfo(layout.dtype).bits // 8
    rows_room = rows_bytes(layout.device)
    coarsest = max(objective.epsilon, *(torch.finfo(s.dtype).eps for s in layout.segments))
    tolerance = 1e-9 if coarsest < 1e-12 else max(1e-3, 8 * coarsest)

    def plan_for(chunk: int, lane_count: int, threads: int, reason: str = "") -> Plan:
        return Plan(
            engine="general",
            chunk=chunk,
            lanes=lane_count,
            keep_rows=lane_count * bytes_per_ray <= rows_room,
            dtype=str(layout.dtype).removeprefix("torch."),
            threads=threads,
            noise_threads=most_threads,
            backend=backend.name,
            block=block,
            reason=reason,
        )

    def seconds_per_ray(chunk: int) -> tuple[float, int, Float]:
        """Of the faster thread count, with that count and the losses."""
        engine = GeneralEngine(objective, layout, scale, plan_for(chunk, chunk, 1), backend)
        ids = np.arange(chunk)
        engine.load(ids, Indexed(0, ids, stream=PROBE_STREAM))
        radii = np.full(chunk, radius)
        first = values = engine.loss(radii).values
        best, best_threads = float("inf"), most_threads
        for threads in sorted({most_threads, 1}):
            torch.set_num_threads(threads)
            spent = 0.0
            for _ in range(5):
                began = time.perf_counter()
                values = engine.loss(radii).values
                elapsed = time.perf_counter() - began
                if elapsed < best:
                    best, best_threads = elapsed, threads
                spent += elapsed
                if spent > 0.03:
                    break
        if chunk == 1 and not losses_agree(values[0], first[0], tolerance):
            raise ValueError(
                f"loss_fn gave {first[0]!r} and then {values[0]!r} at the same perturbed "
                "parameters; it must be a fixed function of them"
            )
        return best / chunk, best_threads, values

    affordable = chunk_bytes(layout.device) // max(bytes_per_ray, objective.bytes_per_ray(), 1)
    most = max(1, min(block, rays, affordable))
    if lanes is not None:
        most = min(most, lanes)
    single, threads, reference = seconds_per_ray(1)
    best_chunk, best_seconds, best_threads, trouble = 1, single, threads, None
    chunk, deadline = 2, time.perf_counter() + max(0.3, 4 * single)
    worse, previous = 0, float("inf")
    while chunk <= most and time.perf_counter() < deadline:
        try:
            seconds, threads_here, values = seconds_per_ray(chunk)
        except torch.OutOfMemoryError:
            break
        except (FastvolError, TypeError, ValueError, RuntimeError) as error:
            trouble = str(error).splitlines()[0] if str(error) else type(error).__name__
            break
        if not losses_agree(values[0], reference[0], tolerance):
            trouble = f"vmap gave a loss of {values[0]} where one ray alone gave {reference[0]}"
            best_chunk, best_seconds, best_threads = 1, single, threads
            break
        if seconds < 0.95 * best_seconds:
            best_chunk, best_seconds, best_threads = chunk, seconds, threads_here
        # vmap's own cost makes small chunks slower than one ray alone: it is the trend that counts.
        worse = worse + 1 if seconds > 0.95 * previous else 0
        if worse == 2:
            break
        previous = seconds
        chunk *= 2
    if trouble is not None and best_chunk == 1:
        reason = f"vmap: {trouble}"
    else:
        reason = f"{best_seconds * 1e3:.3g} ms a ray, one at a time {single * 1e3:.3g} ms"
    # On a GPU one half of the lanes is evaluated while the host looks after the other.
    groups = 1 if layout.device.type == "cpu" else 2
    lane_count = min(lanes or max(groups * best_chunk, SINGLE_LANES), block)
    return plan_for(min(best_chunk, lane_count), lane_count, best_threads, reason), trouble


def warn_of_single_rays(plan: Plan, trouble: str | None) -> None:
    """Warns where the general engine has to take one ray at a time."""
    if trouble is not None and plan.engine == "general" and plan.chunk == 1:
        warn(
            f"rays are evaluated one at a time: vmap cannot run this model and loss ({trouble})",
        )


def losses_agree(a: float, b: float, tolerance: float) -> bool:
    """Whether two losses are equal to a relative tolerance, or both not finite."""
    if not (np.isfinite(a) and np.isfinite(b)):
        return bool(np.isfinite(a) == np.isfinite(b))
    return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-6)
