"""The layered engine: a traced model with a ray axis, for feed-forward nets of any shape."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..._backend import Backend
from ..._layout import ParameterLayout
from ..._objective import Batch, Objective
from ..general import GeneralEngine, Plan, span_of
from ..memory import kept_bytes, to_device
from ..protocol import Bool, Dense, Float, Indexed, Int, Losses, LossPart, RayInfo, Rays
from . import onednn
from .fused import Family, Noise, Parameters
from .program import Program
from .rowspace import RowSpace, row_space
from .tracing import Traced, UntraceableError, signature, trace

# Directions on a GPU that are brought through the linear layers at once.
_SHOWN_AT_ONCE = 32


class LayeredEngine(GeneralEngine):
    """Losses by a traced graph, its first linear layers made once a direction.

    Args:
        objective, layout, scale, plan, backend, project: as for :class:`GeneralEngine`.
        rowspace: draw only what the data can see of the first layer's directions; see
            :mod:`fastvol.engines.layered.rowspace`. Such an engine has no dense rays and gradients.

    Raises:
        UntraceableError: why the model cannot be evaluated so.
    """

    def __init__(
        self,
        objective: Objective,
        layout: ParameterLayout,
        scale: Tensor,
        plan: Plan,
        backend: Backend,
        project: Tensor | None = None,
        *,
        rowspace: bool = False,
    ) -> None:
        # Of its own noise such an engine has no kernels.
        self._is_reduced = rowspace
        super().__init__(objective, layout, scale, plan, backend, project)
        if not objective.in_memory:
            raise UntraceableError("the data are read anew for every evaluation")
        if not layout.is_single_dtype:
            raise UntraceableError("the parameters have several dtypes")
        # s⊙z of every coordinate, where some do not move.
        self._full: Tensor | None = None
        if self._index is not None:
            self._full = torch.zeros((plan.lanes, layout.size)).to(self._theta0)
        self._start = [self._theta0[s.start : s.stop].view(s.shape) for s in layout.segments]
        self._traced = _traced_parts(objective, layout, plan.rows)
        self._kept_room = kept_bytes(self.device)
        self._by_kernels = self._kernel_parameters()
        self._families: list[Family] = []
        self._latest = -1
        self._begin_lanes()
        self._programs = [self._compiled(*part) for part in self._traced]
        self._pairs = _Pairs()
        # Lanes whose direction the programs have not seen.
        self._fresh = np.zeros(plan.lanes, dtype=np.bool_)
        self._weight = sum(program.weight for program in self._programs)
        # Where each parameter lies in a direction, and the point that directions start from.
        self._places = [(s.start, s.stop, s.shape) for s in layout.segments]
        self._origin = self._theta0
        self._row_space = self._reduced_to(scale) if rowspace else None
        self._moved = self._stretch({i for program in self._programs for i in program.moved})
        fused = {i for program in self._programs for i in program.moved_fused}
        self._moved_fused = self._stretch(fused)
        # Whether any layer reads a direction.
        shown = any(program.shown for program in self._programs)
        needed = not self._is_fused or bool(fused) or shown
        self._keep_rows = super()._wants_rows() and needed
        if self._keep_rows and self._rows is None:
            self._rows = self._new_rows(self.lanes)

    def _stretch(self, moved: set[int]) -> _Stretch:
        """Where some parameters lie."""
        return _Stretch(
            sorted(moved),
            min((self._places[i][0] for i in moved), default=0),
            max((self._places[i][1] for i in moved), default=0),
        )

    def _kernel_parameters(self) -> Parameters | None:
        """What kernels that make noise need to know; ``None`` where they cannot be used."""
        usable = self._backend.name == "triton" or self._plan.fused
        single = self._theta0.dtype == torch.float32
        if not (usable and single and self._index is None) or self._is_reduced:
            return None
        return Parameters.of(self._backend, self._layout.segments, self._start, self._scale)

    @property
    def _is_fused(self) -> bool:
        return self._plan.fused and self._by_kernels is not None

    def _wants_rows(self) -> bool:
        # Until the layers are known: those that read none have the memory for more lanes.
        return super()._wants_rows() and (
            not self._plan.fused or self._index is not None or self._is_reduced
        )

    def _begin_lanes(self) -> None:
        """What is known of the directions on the lanes: of none anything."""
        self._family = np.full(self.lanes, -1)
        self._ids_here = torch.zeros(self.lanes, dtype=torch.int64, device=self.device)
        self._numbers_here = torch.arange(self.lanes, device=self.device)

    def _note(self, lanes: Int | Tensor, rays: Rays) -> None:
        """Which directions the lanes hold, for kernels that make them."""
        self._latest = self._family_of(rays)
        if isinstance(lanes, np.ndarray):
            self._family[lanes] = self._latest
        if self._latest < 0 or not isinstance(rays, Indexed):
            return
        self._ids_here.index_copy_(
            0, to_device(lanes, self.device), to_device(rays.ids, self.device)
        )

    def _family_of(self, rays: Rays) -> int:
        """Which family kernels make the rays from; -1 where they cannot."""
        plain = isinstance(rays, Indexed) and rays.preconditioner is None
        if self._by_kernels is None or not plain or not isinstance(rays, Indexed):
            return -1
        family = Family(rays.seed, rays.stream, rays.antithetic)
        if family not in self._families:
            self._families.append(family)
        return self._families.index(family)

    def _learned(self, lanes: Int, rays: Indexed) -> None:
        super()._learned(lanes, rays)
        for lane in lanes.tolist():
            self._pairs.forget(lane)
        self._family[lanes] = self._family_of(rays)
        # What the device alone has loaded has been shown at once.
        self._fresh[lanes] = False

    def _noise(self, index: Tensor | slice, family: int, coefficient: Tensor | None) -> Noise:
        """Of some lanes."""
        if isinstance(index, slice):
            ids, places = self._ids_here[index], self._numbers_here[index]
        else:
            ids, places = self._ids_here.index_select(0, index), index
        precision = {"bfloat16": "bf16", "tf32": "tf32"}.get(self.coarse, "fp32")
        c = None if coefficient is None else coefficient.to(torch.float64)
        return Noise(self._families[family], ids, places, precision, c)

    @property
    def bound_to(self) -> Hashable:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""
        fused = self._is_fused and self._latest >= 0
        return self._families[self._latest] if fused else None

    def _reduced_to(self, scale: Tensor) -> RowSpace:
        """The row space of the first layer's inputs; lays the directions out in it."""
        layers = [program.first_layer() for program in self._programs]
        position = None if layers[0] is None else layers[0][0]
        inputs = [layer[1] for layer in layers if layer is not None and layer[0] == position]
        if position is None or len(inputs) < len(layers) or self._project is not None:
            raise ValueError(
                "noise='rowspace' needs a first layer that alone multiplies its weights with the "
                "data, and a measure around the minimum; use noise='full'"
            )
        space = row_space(self._layout.segments, scale, position, inputs)
        for program in self._programs:
            program.reduce(space.basis)
        starts = space.starts
        self._places = list(zip(starts[:-1], starts[1:], space.shapes, strict=True))
        parts, scales = [], []
        for i, (segment, shape) in enumerate(zip(self._layout.segments, space.shapes, strict=True)):
            part = slice(segment.start, segment.stop)
            own = scale[part].to(self._theta0)
            if i == position:
                parts.append(torch.zeros(shape.numel()).to(self._theta0))
                own = own.view(segment.shape)[:, :1].expand(shape).reshape(-1)
            else:
                parts.append(self._theta0[part])
            scales.append(own)
        one = torch.ones(1).to(self._theta0)
        self._origin = torch.cat([*parts, 0 * one])
        self._scale = torch.cat([*scales, one])
        self._rows = torch.empty((self.lanes, space.size)).to(self._theta0)
        self.capabilities = replace(self.capabilities, gradients=False)
        return space

    def load(self, lanes: Int, rays: Rays) -> RayInfo:
        """See :class:`fastvol.engines.protocol.Engine`."""
        self._learn()
        paired = isinstance(rays, Indexed) and rays.antithetic and rays.preconditioner is None
        for lane in lanes.tolist():
            self._pairs.forget(lane)
        self._note(lanes, rays)
        if not (paired and isinstance(rays, Indexed)):
            return self._load(lanes, rays)
        norm, dot = np.empty(len(lanes)), np.empty(len(lanes))
        first, second = self._pairs.split(lanes, rays)
        if len(first):
            alone = replace(rays, ids=rays.ids[first])
            norm[first], dot[first] = self._load(lanes[first], alone)
        for k in first:
            self._pairs.keep(int(lanes[k]), rays, int(rays.ids[k]), norm[k], dot[k])
        for k in second:
            lane = int(lanes[k])
            self._rays[lane] = (rays, int(k))
            partner, norm[k], dot[k] = self._pairs.partner(rays, int(rays.ids[k]))
            self._mirror(lane, partner)
            self._pairs.keep(lane, rays, int(rays.ids[k]), norm[k], dot[k])
        return RayInfo(norm, dot)

    def _load(self, lanes: Int, rays: Rays) -> RayInfo:
        if self._row_space is not None:
            return self._load_reduced(self._row_space, lanes, rays)
        info = super().load(lanes, rays)
        self._spread(lanes)
        return info

    def load_async(self, lanes: Int | Tensor, rays: Rays) -> tuple[Tensor, Tensor] | None:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""
        if self._row_space is not None or (isinstance(rays, Indexed) and rays.antithetic):
            return None
        told = super().load_async(lanes, rays)
        if told is not None:
            self._note(lanes, rays)
            self._spread(lanes)
        return told

    def _made_async(self, lanes: Int | Tensor, rays: Indexed) -> tuple[Tensor, Tensor] | None:
        if self._rows is None and self._is_fused:
            return self._reductions(rays)
        return super()._made_async(lanes, rays)

    def _measured(self, rays: Indexed) -> tuple[Float, Float]:
        norm, dot = self._reductions(rays)
        return norm.cpu().numpy(), dot.cpu().numpy()

    def _reductions(self, rays: Indexed) -> tuple[Tensor, Tensor]:
        """‖z‖ and ⟨z, project⟩, on the device, of directions that are not kept."""
        return self._backend.direction_reductions(
            self.dim,
            rays.seed,
            rays.stream,
            rays.ids,
            antithetic=rays.antithetic,
            project=self._project,
            dtype=self._theta0.dtype,
            device=self.device,
        )

    def _spread(self, lanes: Int | Tensor) -> None:
        """Puts new directions where the coordinates lie that do not move."""
        if self._full is not None:
            assert self._rows is not None
            index = to_device(lanes, self._full.device)
            full = self._full.new_zeros((len(lanes), self._layout.size))
            full[:, self._index] = self._rows[index]
            self._full.index_copy_(0, index, full)
        if isinstance(lanes, np.ndarray):
            self._fresh[lanes] = True

    def resize(self, lanes: int) -> None:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""
        self.__dict__.pop("_differentiable", None)
        if self._full is not None:
            self._full = self._full[:0].clone()
        for program in self._programs:
            program.resize(0)
        super().resize(lanes)
        if self._full is not None:
            self._full = self._full.new_zeros((lanes, self._layout.size))
        if self._row_space is not None:
            self._rows = self._theta0.new_empty((lanes, self._row_space.size))
        for program in self._programs:
            program.resize(lanes)
        self._fresh = np.zeros(lanes, dtype=np.bool_)
        self._pairs = _Pairs()
        self._begin_lanes()

    def _load_reduced(self, space: RowSpace, lanes: Int, rays: Rays) -> RayInfo:
        if isinstance(rays, Dense) or rays.preconditioner is not None:
            raise ValueError("noise='rowspace' has no directions but its own; use noise='full'")
        assert self._rows is not None
        rows = torch.empty((len(lanes), space.size)).to(self._rows)
        norm, dot = self._backend.normals(
            rows,
            rays.seed,
            rays.stream,
            rays.ids,
            antithetic=rays.antithetic,
            scale=self._scale,
            threads=self._plan.noise_threads,
        )
        hidden = rows[:, -1].to("cpu", torch.float64).numpy()
        # Opposite directions have one length.
        turned = (rays.ids % 2 == 1) if rays.antithetic else np.zeros(len(lanes), dtype=np.bool_)
        square = space.hidden_square(np.where(turned, -hidden, hidden))
        norm = np.sqrt(norm**2 - hidden**2 + square)
        self._rows[torch.from_numpy(lanes).to(rows.device)] = rows
        self._keep_factor(lanes, 1.0 / norm)
        self._fresh[lanes] = True
        return RayInfo(norm, dot)

    def _mirror(self, lane: int, partner: int) -> None:
        """Puts the opposite of one lane's direction on another, without new noise or products."""
        for rows in (self._rows, self._full):
            if rows is not None:
                torch.neg(rows[partner], out=rows[lane])
        self._keep_factor(np.array([lane]), self._host_factor()[partner])
        self._fresh[lane] = self._fresh[partner]
        if not self._fresh[partner]:
            for program in self._programs:
                program.mirror(lane, partner)

    @property
    def bytes_kept(self) -> int:
        """What is kept of one direction for all its radii."""
        return sum(program.bytes_of_changes for program in self._programs)

    def _show(self, lanes: Int | Tensor) -> None:
        """Lets the programs make what they keep of some directions, the latest on the device."""
        # One direction after the other stays in a CPU's caches; a GPU wants few large operations.
        if self.device.type != "cpu" or self._by_kernels is not None:
            self._show_together(lanes)
            return
        if len(lanes):
            lanes = lanes.numpy() if isinstance(lanes, Tensor) else lanes
            for program in self._programs:
                program.load(lanes, self._direction)
            self._fresh[lanes] = False

    def _show_together(self, lanes: Int | Tensor) -> None:
        """As :meth:`_show`, many directions in one operation."""
        if isinstance(lanes, Tensor):
            self._show_alike(lanes, self._latest)
            return
        for family in np.unique(self._family[lanes]).tolist():
            self._show_alike(lanes[self._family[lanes] == family], family)
        self._fresh[lanes] = False

    def _show_alike(self, alike: Int | Tensor, family: int) -> None:
        """As :meth:`_show_together`, of one family."""
        # Kernels that make the noise need no room for it.
        unseen = family >= 0 and not any(program.shown for program in self._programs)
        at_once = len(alike) if unseen else _SHOWN_AT_ONCE
        for first in range(0, len(alike), at_once):
            some = to_device(alike[first : first + at_once], self.device)
            noise = self._noise(some, family, None) if family >= 0 else None
            for program in self._programs:
                program.load_together(some, self._parameter_rows, noise)

    def _parameter_rows(self, lanes: Tensor, position: int) -> Tensor:
        """s⊙z of one parameter on some lanes ``[k, *shape]``."""
        start, stop, shape = self._places[position]
        return self._directions[:, start:stop].index_select(0, lanes).view(len(lanes), *shape)

    def _direction(self, lane: int, position: int) -> Tensor:
        """s⊙z of one parameter ``[1, *shape]``."""
        start, stop, shape = self._places[position]
        return self._directions[lane, start:stop].view(1, *shape)

    @property
    def _directions(self) -> Tensor:
        """s⊙z of every coordinate ``[lanes, size]``."""
        return self._rows_for_writing() if self._full is None else self._full

    def loss(self, radii: Float, lanes: Int | None = None, *, limit: float = math.inf) -> Losses:
        """See :class:`fastvol.engines.protocol.Engine`."""
        self._learn()
        lanes = np.arange(self.lanes) if lanes is None else lanes
        total, outside = np.zeros(len(lanes)), np.zeros(len(lanes), dtype=np.bool_)
        with torch.no_grad(), self.arithmetic():
            self._show(lanes[self._fresh[lanes]])
            for first in range(0, len(lanes), self._plan.chunk):
                part = slice(first, first + self._plan.chunk)
                total[part], outside[part] = self._chunk(radii[part], lanes[part], limit)
        return Losses(total / self._weight, outside if outside.any() else None)

    def _chunk(self, radii: Float, lanes: Int, limit: float) -> tuple[Float, Bool]:
        """Weighted sums of the batches' losses, and where they stopped at the limit."""
        total, outside = np.zeros(len(lanes)), np.zeros(len(lanes), dtype=np.bool_)
        going = np.arange(len(lanes))
        coefficient = self._coefficient(radii, lanes)
        span = span_of(lanes)
        noise, families = None, np.unique(self._family[lanes])
        if self._is_fused and len(families) == 1 and families[0] >= 0:
            where = to_device(lanes, self.device)
            noise = self._noise(where, int(families[0]), coefficient)
        moved = self._parameters(coefficient, lanes, span, noise)
        for program in self._programs:
            left = None
            if math.isfinite(limit):
                left = (limit * self._weight - total[going]) / program.weight
            values, beyond = program.losses(lanes, coefficient, moved, span, left, noise)
            total[going] += program.weight * values
            if beyond is None or not beyond.any():
                continue
            outside[going[beyond]] = True
            stays = np.flatnonzero(~beyond)
            if not len(stays):
                break
            # The others go on without them.
            going, lanes, span = going[stays], lanes[stays], None
            index = torch.from_numpy(stays).to(coefficient.device)
            coefficient = coefficient[index]
            moved = {i: value[index] for i, value in moved.items()}
            noise = None if noise is None else noise.of(index)
        return total, outside

    def prepare(self, lanes: Int | Tensor) -> None:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""
        with torch.no_grad(), self.arithmetic():
            self._show(lanes if isinstance(lanes, Tensor) else lanes[self._fresh[lanes]])

    def loss_parts(self, radii: Tensor, lanes: slice) -> Iterator[LossPart]:
        """See :class:`fastvol.engines.protocol.DeviceEngine`."""
        fused = self._is_fused and self._latest >= 0
        if not (fused and self._rows is None):
            self._check_stays()
        for part, coefficient in self._chunks_here(radii, lanes):
            inside = np.arange(part.start, part.stop)
            noise = self._noise(part, self._latest, coefficient) if fused else None
            moved = self._parameters(coefficient, inside, part, noise)
            where = slice(part.start - lanes.start, part.stop - lanes.start)
            for i, program in enumerate(self._programs):
                yield program.part(
                    inside,
                    coefficient,
                    moved,
                    part,
                    total=self._weight,
                    where=where,
                    first=i == 0,
                    last=part.stop == lanes.stop and i == len(self._programs) - 1,
                    noise=noise,
                )

    def _coefficient(self, radii: Float, lanes: Int) -> Tensor:
        """What s⊙z is multiplied with ``[k]``."""
        c = radii * self._host_factor()[lanes]
        return torch.as_tensor(c, device=self._theta0.device, dtype=self._theta0.dtype)

    def _parameters(
        self, coefficient: Tensor, lanes: Int, span: slice | None, noise: Noise | None = None
    ) -> dict[int, Tensor]:
        """W + c·Z of the parameters that are made for the layers, by position."""
        stretch = self._moved if noise is None else self._moved_fused
        if not stretch.positions:
            return {}
        # One stretch of the directions holds them all.
        part = slice(stretch.start, stretch.stop)
        picked = self._picked(lanes, span, part)
        theta = torch.addcmul(self._origin[part], picked, coefficient[:, None])
        moved = {}
        for i in stretch.positions:
            start, stop, shape = self._places[i]
            moved[i] = theta[:, start - part.start : stop - part.start].view(len(lanes), *shape)
        return moved

    def _picked(self, lanes: Int, span: slice | None, part: slice) -> Tensor:
        """A stretch of the directions on some lanes."""
        rows = self._directions
        if span is not None:
            return rows[span, part]
        return rows[:, part].index_select(0, torch.from_numpy(lanes).to(rows.device))

    def loss_and_grad(self, radii: Float, lanes: Int | None = None) -> tuple[Float, Tensor]:
        """See :class:`fastvol.engines.protocol.Engine`."""
        if self._row_space is not None:
            raise ValueError("noise='rowspace' has no gradients; use noise='full'")
        self._learn()
        lanes = np.arange(self.lanes) if lanes is None else lanes
        total = np.zeros(len(lanes))
        gradients = torch.zeros((len(lanes), self._layout.size)).to(self._theta0)
        with torch.no_grad():
            self._show(lanes[self._fresh[lanes]])
            for first in range(0, len(lanes), self._plan.chunk):
                part = slice(first, first + self._plan.chunk)
                total[part] = self._chunk_with_grad(radii[part], lanes[part], gradients[part])
        if self._index is not None:
            gradients = gradients[:, self._index]
        return total / self._weight, self._scaled(gradients.div_(self._weight))

    def _chunk_with_grad(self, radii: Float, lanes: Int, gradients: Tensor) -> Float:
        """Adds the gradients of some rays to ``gradients`` ``[k, size]``; returns their losses."""
        coefficient, span = self._coefficient(radii, lanes), span_of(lanes)
        moved = self._parameters(coefficient, lanes, span)
        total = np.zeros(len(lanes))
        for program in self._differentiable:
            values, slopes = program.loss_and_grad(lanes, coefficient, moved, span)
            total += program.weight * values.to("cpu", torch.float64).numpy()
            for i, slope in slopes.items():
                start, stop, _ = self._places[i]
                part = gradients[:, start:stop]
                part.add_(slope.reshape(len(lanes), -1), alpha=program.weight)
        return total

    @cached_property
    def _differentiable(self) -> list[Program]:
        """The programs in a form that remembers how its values were made."""
        return [
            self._compiled(*part, gradients_of=program)
            for part, program in zip(self._traced, self._programs, strict=True)
        ]

    def _compiled(
        self, traced: Traced, batch: Batch, *, gradients_of: Program | None = None
    ) -> Program:
        return Program(
            traced,
            batch,
            self._backend.ray_losses,
            self._start,
            lanes=self.lanes,
            cached=self._plan.cached,
            room=self._kept_room / len(self._traced),
            gradients_of=gradients_of,
            parameters=self._by_kernels if gradients_of is None else None,
            fused=self._is_fused,
            by_onednn=self._plan.products == "onednn"
            and onednn.is_available(self._theta0.dtype, self.device),
        )


@dataclass(frozen=True)
class _Stretch:
    """Parameters by position, and what of a direction they lie in."""

    positions: list[int]
    start: int
    stop: int


def _traced_parts(
    objective: Objective, layout: ParameterLayout, rows: int
) -> list[tuple[Traced, Batch]]:
    """The batches in parts of at most ``rows`` examples, each with its graph."""
    # Parts of one shape share a graph, which lasts as long as the objective.
    graphs = objective.graphs.setdefault(layout.segments, {})
    result = []
    for batch in objective.batches():
        for part in objective.split(batch, rows):
            key = signature(part)
            if key not in graphs:
                graphs[key] = trace(objective, layout, part)
            result.append((graphs[key], part))
    return result


class _Pairs:
    """Which lane holds which direction of antithetic pairs, and what loading it told."""

    def __init__(self) -> None:
        self._lane: dict[tuple[int, int, int], int] = {}
        self._held: dict[int, tuple[tuple[int, int, int], float, float]] = {}

    def forget(self, lane: int) -> None:
        """The lane gets another direction."""
        held = self._held.pop(lane, None)
        if held is not None and self._lane.get(held[0]) == lane:
            del self._lane[held[0]]

    def keep(self, lane: int, rays: Indexed, index: int, norm: float, dot: float) -> None:
        """The lane has direction ``index``."""
        key = (rays.seed, rays.stream, index)
        self._lane[key] = lane
        self._held[lane] = key, norm, dot

    def split(self, lanes: Int, rays: Indexed) -> tuple[Int, Int]:
        """Positions of those to be made, and of those whose partner is there or among these."""
        first, second = [], []
        here: set[int] = set()
        for k, index in enumerate(rays.ids.tolist()):
            partner = index ^ 1
            if partner in here or (rays.seed, rays.stream, partner) in self._lane:
                second.append(k)
            else:
                first.append(k)
                here.add(index)
        return np.array(first, dtype=np.int64), np.array(second, dtype=np.int64)

    def partner(self, rays: Indexed, index: int) -> tuple[int, float, float]:
        """Lane of the opposite direction, and norm and dot of this one."""
        lane = self._lane[rays.seed, rays.stream, index ^ 1]
        _, norm, dot = self._held[lane]
        return lane, norm, -dot
