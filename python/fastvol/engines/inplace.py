"""The in-place engine: models too large to batch, one ray at a time in the model's own parameters.

θ = θ0 + c·s⊙z is written over the parameters in one pass, from the copy θ0 that is kept and noise
that is made on the way: never from what an earlier ray left, so nothing drifts. The model is called
as it is, which also serves modules that ``torch.func.functional_call`` cannot reach, and modules
that FSDP2 shards, where each process writes its own shard of the same direction. After every
evaluation the parameters are θ0 again, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._backend import Backend
from .._layout import ParameterLayout
from .._objective import Batch, Objective, as_float
from .._scale import Scale, spans_of
from .._sharding import reshard
from ..errors import NotAvailableError
from .general import Plan
from .protocol import Capabilities, Dense, Float, Indexed, Int, Losses, RayInfo, Rays

# Coordinates that are made together where they do not go straight into the model: enough for some
# threads.
SPAN = 1 << 19
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Span:
    """Entries of one parameter that lie side by side, here and in the direction.

    ``scale`` is the one number that all have, or ``None`` where they differ.
    """

    segment: int
    start: int
    coordinate: int
    length: int
    scale: float | None


@dataclass(frozen=True)
class _Part:
    """What one launch writes.

    ``scale`` holds one number for each row of the span, or is ``None`` where the span has one.
    """

    out: Tensor
    theta0: Tensor
    span: _Span
    scale: Tensor | None


class _Launches:
    """The launches that write θ = θ0 + c·s⊙z, a kernel a stretch of parameters.

    A large model has so many that a host takes longer to issue them than a GPU to write: there they
    are captured in a CUDA graph, which reads the number of the direction and the coefficients.

    Args:
        perturb: the backend's.
        parts: where to write, θ0 and s there; all laid out in order.
        device: of all of them.
    """

    def __init__(
        self,
        perturb: Callable[..., None],
        parts: Sequence[_Part],
        device: torch.device,
    ) -> None:
        self._perturb = perturb
        self._parts = parts
        self._device = device
        scales = [1.0 if part.span.scale is None else part.span.scale for part in parts]
        self._scales = torch.tensor(scales, dtype=torch.float64, device=device)
        self._coefficients = torch.zeros_like(self._scales)
        self._id = torch.zeros(1, dtype=torch.int64, device=device)
        # What of a direction is not read from the device.
        self._family: tuple[int, int, bool] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._can_capture = device.type == "cuda"

    def write(self, coefficient: float, rays: Indexed, direction: int) -> None:
        """Writes one ray, without waiting."""
        torch.mul(self._scales, coefficient, out=self._coefficients)
        self._id.fill_(direction)
        family = (rays.seed, rays.stream, rays.antithetic)
        if family == self._family and self._graph is None and self._can_capture:
            # What is made at a first use has been made by the ray before.
            self._capture()
        if family == self._family and self._graph is not None:
            self._graph.replay()
            return
        self._family, self._graph = family, None
        self._issue()

    def _issue(self) -> None:
        assert self._family is not None
        seed, stream, antithetic = self._family
        for k, part in enumerate(self._parts):
            self._perturb(
                part.out[None],
                part.theta0,
                self._coefficients[k : k + 1],
                seed,
                stream,
                self._id,
                antithetic=antithetic,
                scale=part.scale,
                first=part.span.coordinate,
            )

    def _capture(self) -> None:
        current = torch.cuda.current_stream(self._device)
        # PyTorch's own choice is of whatever device came first.
        stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._issue()
            self._graph = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # One by one they do the same.
            self._can_capture = False
        finally:
            # A capture that fails leaves its own stream behind.
            torch.cuda.set_stream(current)


class InPlaceEngine:
    """Losses by writing to the model's parameters.

    Args:
        objective: the loss over the data.
        layout: where the moved parameters lie.
        scale: s of every coordinate.
        plan: lanes, and threads that make the noise.
        backend: makes the noise.
        toward_origin: whether ⟨z, −θ0/s⟩ is reported by :meth:`load`.
    """

    def __init__(
        self,
        objective: Objective,
        layout: ParameterLayout,
        scale: Scale,
        plan: Plan,
        backend: Backend,
        *,
        toward_origin: bool = False,
    ) -> None:
        self._objective = objective
        self._layout = layout
        self._scale = scale
        self._backend = backend
        self._threads = plan.noise_threads
        self._toward_origin = toward_origin
        self.lanes = plan.lanes
        self.dim = scale.dim
        self.capabilities = Capabilities(
            gradients=not layout.is_sharded,
            dtypes=("float32", "float64", "bfloat16", "float16"),
            devices=("cpu", "cuda"),
        )
        self._theta0 = layout.keep()
        self._spans_of = _spans_by_segment(layout, scale)
        self._spans = [span for spans in self._spans_of for span in spans]
        size = min(SPAN, max((span.length for span in self._spans), default=1))
        # Two pieces of working memory, whatever the model's size: noise or θ, and what goes in.
        self._scratch = torch.empty((2, size), device=layout.device, dtype=layout.dtype)
        # θ = θ0 + (radius · factor) · s ⊙ row
        self._factor = np.ones(plan.lanes)
        self._rays: list[tuple[Indexed, int] | Tensor | None] = [None] * plan.lanes
        self._launches = self._kernel_launches()

    def _kernel_launches(self) -> _Launches | None:
        """What writes a ray by kernels that make the noise in registers, if they can all of it."""
        known = self._layout.dtype in (torch.float32, torch.float64)
        if self._backend.name != "triton" or not known or self._layout.is_sharded:
            return None
        parts = []
        for i, spans in enumerate(self._spans_of):
            values, theta0 = self._layout.local[i].values, self._theta0[i]
            ordered = values.is_contiguous() and theta0.is_contiguous()
            # Of half precision θ is made in float32 and rounded once, in registers.
            rounded = values.dtype in _HALF and self._layout.dtype == torch.float32
            if not (ordered and (rounded or values.dtype == self._layout.dtype)):
                return None
            scale = None
            if self._scale.constant(i) is None:
                scale = self._scale.rows(i)
                if scale is None:
                    return None
                # One number a row is kept; one an entry would be the model once more.
                scale = scale.to(self._layout.device, self._layout.dtype)
            for span in spans:
                at, own = slice(span.start, span.start + span.length), None
                if scale is not None:
                    # What moves, moves in whole rows.
                    width = values.numel() // len(scale)
                    own = scale[at.start // width : at.stop // width]
                parts.append(_Part(values.view(-1)[at], theta0.view(-1)[at], span, own))
        return _Launches(self._backend.perturb, parts, self._layout.device) if parts else None

    def load(self, lanes: Int, rays: Rays) -> RayInfo:
        """See :class:`fastvol.engines.protocol.Engine`; dense rays are kept, a row each."""
        if isinstance(rays, Dense) or rays.preconditioner is not None:
            return self._load_rows(lanes, rays)
        if self._launches is not None and not self._toward_origin:
            return self._measured(lanes, rays)
        square, dot = np.zeros(len(lanes)), np.zeros(len(lanes))
        counted = [span for span in self._spans if self._layout.local[span.segment].counts]
        for k, lane in enumerate(lanes):
            for span in counted:
                for start, stop in spans_of(span.length, SPAN):
                    own_square, own_dot = self._sums(rays, k, span, start, stop)
                    square[k] += own_square
                    dot[k] += own_dot
            self._rays[lane] = (rays, k)
        square, dot = self._layout.group.sum([square, dot])
        norm = np.sqrt(square)
        self._factor[lanes] = 1.0 / norm
        return RayInfo(norm, dot)

    def _measured(self, lanes: Int, rays: Indexed) -> RayInfo:
        """As :meth:`load`, all of it in one pass that keeps nothing."""
        lengths, _ = self._backend.direction_reductions(
            self.dim,
            rays.seed,
            rays.stream,
            rays.ids,
            antithetic=rays.antithetic,
            dtype=self._layout.dtype,
            device=self._layout.device,
        )
        norm: Float = lengths.cpu().numpy()
        for k, lane in enumerate(lanes):
            self._rays[lane] = (rays, k)
        self._factor[lanes] = 1.0 / norm
        return RayInfo(norm, np.zeros(len(lanes)))

    def _sums(
        self, rays: Indexed, k: int, span: _Span, start: int, stop: int
    ) -> tuple[float, float]:
        """‖z‖² of a part of a span, and its share of ⟨z, −θ0/s⟩."""
        project = None
        if self._toward_origin:
            theta = self._theta0[span.segment].reshape(-1)
            first = span.start + start
            theta = theta[first : first + stop - start].to("cpu", torch.float64)
            scale = self._scale.of(span.segment, first, first + stop - start)
            project = (-theta / scale).to(self._layout.device)
        norm, dot = self._backend.normals(
            self._scratch[:1, : stop - start],
            rays.seed,
            rays.stream,
            rays.ids[k : k + 1],
            antithetic=rays.antithetic,
            project=project,
            threads=self._threads,
            first=span.coordinate + start,
        )
        return float(norm[0]) ** 2, float(dot[0])

    def _load_rows(self, lanes: Int, rays: Rays) -> RayInfo:
        if self._layout.is_sharded:
            raise NotAvailableError(
                "directions of a sharded module are not kept; use method='radial'"
            )
        device, dtype = self._layout.device, self._layout.dtype
        factor = np.ones(len(lanes))
        if isinstance(rays, Dense):
            rows = rays.directions.to(device, dtype)
            if rows.shape != (len(lanes), self.dim):
                raise ValueError(
                    f"directions must have shape {(len(lanes), self.dim)}, got {tuple(rows.shape)}"
                )
            norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()
        else:
            rows = torch.empty((len(lanes), self.dim), device=device, dtype=dtype)
            norm, _ = self._backend.normals(
                rows,
                rays.seed,
                rays.stream,
                rays.ids,
                antithetic=rays.antithetic,
                threads=self._threads,
            )
            factor = 1.0 / norm
        dot = np.zeros(len(lanes))
        if self._toward_origin:
            moving = self._scale.flat > 0
            offset = -self._layout.flatten().to("cpu", torch.float64)[moving]
            offset /= self._scale.flat[moving]
            dot = (rows.to(torch.float64) @ offset.to(device)).cpu().numpy()
        if rays.preconditioner is not None:
            rows = rays.preconditioner.matvec(rows)
        for k, lane in enumerate(lanes):
            self._rays[lane] = rows[k].clone()
        self._factor[lanes] = factor
        return RayInfo(norm, dot)

    def loss(self, radii: Float, lanes: Int | None = None, *, limit: float = math.inf) -> Losses:
        """See :class:`fastvol.engines.protocol.Engine`.

        A ray is left between two batches where what has been summed exceeds the limit already.
        """
        lanes = np.arange(self.lanes) if lanes is None else lanes
        running = self._objective.running(len(lanes), limit)
        with torch.no_grad(), self._written():
            if self._objective.in_memory:
                for k in range(len(lanes)):
                    self._write(int(lanes[k]), radii[k])
                    one = np.array([k])
                    for batch in self._objective.batches():
                        if running.settled(one):
                            break
                        running.add(one, batch.weight, self._values(batch))
            else:
                # A batch that has to be read is read once for all rays.
                for batch in self._objective.batches():
                    going = running.going()
                    if not len(going):
                        break
                    values = np.empty(len(going))
                    for position, k in enumerate(going):
                        self._write(int(lanes[k]), radii[k])
                        values[position] = self._values(batch)[0]
                    running.add(going, batch.weight, values)
        return Losses(running.values, running.outside)

    def _values(self, batch: Batch) -> Float:
        return np.array([as_float(self._objective.call(None, batch))])

    def loss_and_grad(self, radii: Float, lanes: Int | None = None) -> tuple[Float, Tensor]:
        """See :class:`fastvol.engines.protocol.Engine`; not of a sharded module."""
        if self._layout.is_sharded:
            raise NotAvailableError("gradients of a sharded module are not kept")
        lanes = np.arange(self.lanes) if lanes is None else lanes
        parameters = self._layout.parameters
        weight = self._objective.weight
        total = np.zeros(len(lanes))
        gradients = torch.zeros(
            (len(lanes), self.dim), device=self._layout.device, dtype=self._layout.dtype
        )
        with self._written():
            for k in range(len(lanes)):
                self._write(int(lanes[k]), radii[k])
                for batch in self._objective.batches():
                    with torch.enable_grad():
                        value = self._objective.call(None, batch)
                        slopes = torch.autograd.grad(value, parameters, allow_unused=True)
                    total[k] += batch.weight * as_float(value)
                    self._add(gradients[k], slopes, batch.weight / weight)
        return total / weight, gradients

    def _add(self, row: Tensor, slopes: tuple[Tensor | None, ...], share: float) -> None:
        """Adds share · s ⊙ ∂L/∂θ to a gradient in metric coordinates ``[d]``."""
        for span in self._spans:
            slope = slopes[span.segment]
            if slope is None:
                continue
            own = slope.reshape(-1)[span.start : span.start + span.length].to(row.dtype)
            stop = span.start + span.length
            scale = self._scale.of(span.segment, span.start, stop, row.dtype).to(row.device)
            row[span.coordinate : span.coordinate + span.length].addcmul_(own, scale, value=share)

    @contextmanager
    def _written(self) -> Iterator[None]:
        """The parameters as they came at the end, whatever happens."""
        try:
            yield
        finally:
            self._gather_anew()
            self._layout.restore()

    def _gather_anew(self) -> None:
        """Voids what FSDP2 has gathered of the parameters, as they are about to change."""
        if self._layout.is_sharded:
            reshard(self._objective.module)

    def _write(self, lane: int, radius: float) -> None:
        """Writes θ of a lane over the model's parameters."""
        self._gather_anew()
        coefficient = float(radius * self._factor[lane])
        loaded = self._rays[lane]
        with torch.no_grad():
            if self._launches is not None and isinstance(loaded, tuple):
                rays, position = loaded
                self._launches.write(coefficient, rays, int(rays.ids[position]))
                return
            for i, spans in enumerate(self._spans_of):
                values, theta0 = self._layout.local[i].values, self._theta0[i].view(-1)
                # One that is not laid out in order is made apart.
                ordered = values.is_contiguous()
                out = values.view(-1) if ordered else theta0.clone()
                for span in spans:
                    self._write_span(lane, coefficient, span, out, theta0)
                if not ordered:
                    values.copy_(out.view(values.shape))

    def _write_span(
        self, lane: int, coefficient: float, span: _Span, out: Tensor, theta0: Tensor
    ) -> None:
        dtype, device = self._layout.dtype, self._layout.device
        direct = out.dtype == dtype
        if span.scale is not None:
            coefficient *= span.scale
        whole = direct and span.scale is not None and device.type == "cpu"
        for first, stop in spans_of(span.length, span.length if whole else SPAN):
            at = slice(span.start + first, span.start + stop)
            scale = None
            if span.scale is None:
                scale = self._scale.of(span.segment, at.start, at.stop, dtype)
                scale = scale.contiguous().to(device)
            coordinate = span.coordinate + first
            if direct:
                self._add_noise(lane, coefficient, coordinate, scale, out[at], theta0[at])
                continue
            # Arithmetic in the working dtype, and one rounding to the parameter's own.
            made, start = self._scratch[:, : stop - first]
            start.copy_(theta0[at])
            self._add_noise(lane, coefficient, coordinate, scale, made, start)
            out[at].copy_(made)

    def _add_noise(
        self,
        lane: int,
        coefficient: float,
        coordinate: int,
        scale: Tensor | None,
        out: Tensor,
        start: Tensor,
    ) -> None:
        """out = start + coefficient · scale · the lane's ray from ``coordinate`` on."""
        loaded = self._rays[lane]
        if isinstance(loaded, Tensor):
            row = loaded[coordinate : coordinate + len(out)]
            torch.add(start, row if scale is None else row * scale, alpha=coefficient, out=out)
            return
        assert loaded is not None
        rays, position = loaded
        self._backend.perturb(
            out[None],
            start,
            np.array([coefficient]),
            rays.seed,
            rays.stream,
            rays.ids[position : position + 1],
            antithetic=rays.antithetic,
            scale=scale,
            threads=self._threads,
            first=coordinate,
        )


def _spans_by_segment(layout: ParameterLayout, scale: Scale) -> list[list[_Span]]:
    """Where what is here of each parameter lies in a direction; a direction has what moves."""
    result, first = [], 0
    for i in range(len(layout.segments)):
        constant = scale.constant(i)
        result.append(
            [
                _Span(i, part.start, first + part.coordinate, part.length, constant)
                for part in scale.stretches(i)
            ]
        )
        first += scale.moving(i)
    return result
