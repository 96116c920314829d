"""Layers whose weights on a ray exist only inside the kernel that multiplies them.

W + c·s⊙Z is made from the number of the direction, a tile at a time: no direction is kept, and none
is read. Which layers that can be is told by the graph: a linear layer or a convolution of one
group, all of whose weights move, and lie side by side in the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..._backend import Backend
from ..._layout import Segment
from .operations import Step, Values, operation_name, shape_of
from .tracing import arguments

# As the kernels name them.
_ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "sigmoid")


@dataclass(frozen=True)
class Family:
    """What the directions of some lanes share.

    Args:
        seed, stream, antithetic: as in :class:`fastvol.engines.protocol.Indexed`.
    """

    seed: int
    stream: int
    antithetic: bool


@dataclass(frozen=True)
class Noise:
    """Whose noise a kernel makes.

    Args:
        family: of all these lanes.
        ids: directions, int64 ``[k]`` on the device.
        places: the lanes, int64 ``[k]`` on the device.
        precision: of products.
        coefficient: c ``[k]`` float64 on the device; not for changes.
    """

    family: Family
    ids: Tensor
    places: Tensor
    precision: str
    coefficient: Tensor | None = None

    def of(self, index: Tensor) -> Noise:
        """Of some of these lanes."""
        c = None if self.coefficient is None else self.coefficient[index]
        return replace(self, ids=self.ids[index], places=self.places[index], coefficient=c)

    @property
    def directions(self) -> tuple[int, int, Tensor]:
        """As the kernels take them."""
        return self.family.seed, self.family.stream, self.ids


@dataclass
class Current:
    """The noise of the steps that run now."""

    noise: Noise | None = None

    @property
    def here(self) -> Noise:
        """That noise."""
        assert self.noise is not None
        return self.noise


@dataclass(frozen=True)
class FusedStep:
    """A step that stands for several nodes of the graph.

    Args:
        step: makes the value of the last of them.
        inputs: the values that it reads.
        absorbed: the nodes whose own values nobody makes.
    """

    step: Step
    inputs: tuple[fx.Node, ...] = ()
    absorbed: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Parameters:
    """Where the moved parameters lie in a direction, and what multiplies their noise.

    Args:
        backend: whose kernels run.
        starts: first coordinate of each.
        values: at θ*.
        scales: s of each: in its shape, one number a row, or ``None`` for ones.
        flat_scales: s of each, one number an entry, or ``None`` for ones.
    """

    backend: Backend
    starts: tuple[int, ...]
    values: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...]
    flat_scales: tuple[Tensor | None, ...]

    @classmethod
    def of(
        cls,
        backend: Backend,
        segments: Sequence[Segment],
        values: Sequence[Tensor],
        scale: Tensor | None,
    ) -> Parameters:
        """From s of all coordinates ``[size]``, or ``None`` for ones."""
        scales: list[Tensor | None] = []
        flat: list[Tensor | None] = []
        for segment in segments:
            own = None if scale is None else scale[segment.start : segment.stop]
            own = None if own is None or bool((own == 1).all()) else own.contiguous()
            flat.append(own)
            if own is not None and len(segment.shape) > 1:
                rows = own.view(segment.shape[0], -1)
                alike = bool((rows == rows[:, :1]).all())
                own = rows[:, 0].contiguous() if alike else own.view(segment.shape)
            scales.append(own)
        starts = tuple(segment.start for segment in segments)
        return cls(backend, starts, tuple(values), tuple(scales), tuple(flat))


@dataclass(frozen=True)
class _Layer:
    """A linear layer or convolution of the graph, by the positions of its parameters."""

    node: fx.Node
    x: fx.Node
    weight: int
    bias: int | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_linear(self) -> bool:
        return operation_name(self.node) == "linear"


class Fused:
    """The steps of a graph that kernels can take.

    Args:
        parameters: of the model.
        nodes: of the parameters, in the same order.
    """

    def __init__(self, parameters: Parameters, nodes: Sequence[fx.Node]) -> None:
        self._parameters = parameters
        self._positions = {node: i for i, node in enumerate(nodes)}
        self.current = Current()

    def changes(
        self,
        nodes: Sequence[fx.Node],
        kept: Mapping[fx.Node, Tensor],
        changes: Mapping[fx.Node, Tensor],
        shared: Values,
    ) -> tuple[dict[fx.Node, FusedStep], set[fx.Node]]:
        """What of the linear nodes is made from counters, and of those what is written in place.

        Args:
            nodes: in order.
            kept: what those that are kept give at θ*.
            changes: what they change by, ``[lanes, …]``; its tensors may be replaced later.
            shared: what all rays share.
        """
        found, written = {}, set()
        for node in nodes:
            layer = self._layer(node)
            if layer is None or not _is_single(shared.get(layer.x)):
                continue
            base = kept.get(node)
            direct = None
            goes_on = any(user in nodes for user in node.users)
            if base is not None and base.is_contiguous() and not goes_on:
                direct = changes
                written.add(node)
            found[node] = FusedStep(self._change(layer, shared[layer.x], direct))
        return found, written

    def layers(
        self,
        nodes: Sequence[fx.Node],
        rays: Set[fx.Node],
        kept: Mapping[fx.Node, Tensor],
        changes: Mapping[fx.Node, Tensor],
        shared: Values,
    ) -> dict[fx.Node, FusedStep]:
        """What of the other nodes runs as a kernel, by the node whose value it makes.

        Args:
            nodes: in order.
            rays: those with a ray axis.
            kept: what the linear nodes give at θ*.
            changes: what they change by, ``[lanes, …]``; its tensors may be replaced later.
            shared: what all rays share.
        """
        there = set(nodes)
        found: dict[fx.Node, FusedStep] = {}
        # Activations of what is kept, to be made where they are read.
        read: dict[fx.Node, tuple[fx.Node, str | None]] = {}
        for node, base in kept.items():
            if not base.is_contiguous() or base.dtype != torch.float32:
                continue
            act = _only_user(node, there)
            name = None if act is None else _activation(act)
            if act is not None and name is not None:
                found[act] = FusedStep(self._activated(node, base, changes, name), absorbed=(node,))
                read[act] = (node, name)
        for node in nodes:
            layer = self._layer(node)
            if layer is None or layer.x in self._positions:
                continue
            if layer.x not in rays and not _is_single(shared.get(layer.x)):
                continue
            act = _only_user(node, there)
            name = None if act is None else _activation(act)
            end, absorbed = node, tuple[fx.Node, ...]()
            if act is not None and name is not None:
                end, absorbed = act, (node,)
            source = read.get(layer.x)
            if source is not None and layer.is_linear and _only_user(layer.x, there) is node:
                start, inner = source
                if len(shape_of(start)) >= 2 and shape_of(start)[-1] > 0:
                    del found[layer.x]
                    step = self._from_change(layer, name, start, kept[start], inner, changes)
                    found[end] = FusedStep(step, (), (*absorbed, layer.x, start))
                    continue
            on_rays = self._on_rays(layer, name, is_shared=layer.x not in rays)
            found[end] = FusedStep(on_rays, (layer.x,), absorbed)
        return found

    def _layer(self, node: fx.Node) -> _Layer | None:
        """The layer that a node is, if all of it moves."""
        name = operation_name(node)
        if name not in ("linear", "conv2d"):
            return None
        given = arguments(node)
        x, weight, bias = given["input"], given["weight"], given["bias"]
        at = self._positions.get(weight)
        if at is None or (bias is not None and bias not in self._positions):
            return None
        if node.meta["val"].dtype != torch.float32:
            return None
        options: dict[str, Any] = {}
        if name == "conv2d":
            if given["groups"] != 1 or len(shape_of(x)) != 4 or isinstance(given["padding"], str):
                return None
            for key in ("stride", "padding", "dilation"):
                pair = tuple(given[key])
                options[key] = pair if len(pair) == 2 else (pair[0], pair[0])
        elif len(shape_of(x)) < 2:
            return None
        return _Layer(node, x, at, None if bias is None else self._positions[bias], options)

    def _where(self, layer: _Layer) -> dict[str, Any]:
        """Offsets and scales of a layer, as the kernels take them."""
        own = self._parameters
        where: dict[str, Any] = {
            "offset": own.starts[layer.weight],
            "scale": own.scales[layer.weight],
            **layer.options,
        }
        if layer.bias is not None:
            where["bias_offset"] = own.starts[layer.bias]
            where["bias_scale"] = own.flat_scales[layer.bias]
        return where

    def _change(
        self, layer: _Layer, data: Tensor, changes: Mapping[fx.Node, Tensor] | None
    ) -> Step:
        """Of one layer; into ``changes``, where they are given."""
        where, shape = self._where(layer), self._parameters.values[layer.weight].shape
        out_shape, current, backend = shape_of(layer.node), self.current, self._parameters.backend
        rows = data.reshape(-1, data.shape[-1]).contiguous() if layer.is_linear else data
        make: Callable[..., Tensor] = (
            backend.direction_linear if layer.is_linear else backend.direction_conv2d
        )
        size: Any = shape[0] if layer.is_linear else shape

        def run(values: Values) -> Tensor:
            noise = current.here
            target: dict[str, Any] = {}
            if changes is not None:
                out = changes[layer.node]
                out = out.view(len(out), -1, out.shape[-1]) if layer.is_linear else out
                target = {"out": out, "places": noise.places}
            change = make(
                rows,
                size,
                *noise.directions,
                bias=layer.bias is not None,
                antithetic=noise.family.antithetic,
                precision=noise.precision,
                **where,
                **target,
            )
            return change.view(-1, *out_shape)

        return run

    def _activated(
        self, node: fx.Node, base: Tensor, changes: Mapping[fx.Node, Tensor], activation: str
    ) -> Step:
        current, add = self.current, self._parameters.backend.scaled_add

        def run(values: Values) -> Tensor:
            noise = current.here
            return add(
                base,
                changes[node],
                noise.coefficient,
                places=noise.places,
                activation=activation,
                dtype=_storage(noise),
            )

        return run

    def _on_rays(self, layer: _Layer, activation: str | None, *, is_shared: bool) -> Step:
        own, current = self._parameters, self.current
        where, weight = self._where(layer), own.values[layer.weight].contiguous()
        bias = None if layer.bias is None else own.values[layer.bias]
        out_shape, backend = shape_of(layer.node), own.backend
        layer_of = backend.perturbed_linear if layer.is_linear else backend.perturbed_conv2d

        def run(values: Values) -> Tensor:
            noise, x = current.here, values[layer.x]
            if layer.is_linear:
                x = x.reshape(*(() if is_shared else (len(x),)), -1, x.shape[-1])
                x = x if x.stride(-1) == 1 else x.contiguous()
            result: Tensor = layer_of(
                x,
                weight,
                bias,
                noise.coefficient,
                *noise.directions,
                antithetic=noise.family.antithetic,
                activation=activation,
                precision=noise.precision,
                **where,
            )
            return result.view(-1, *out_shape)

        return run

    def _from_change(
        self,
        layer: _Layer,
        activation: str | None,
        source: fx.Node,
        base: Tensor,
        base_activation: str | None,
        changes: Mapping[fx.Node, Tensor],
    ) -> Step:
        own, current = self._parameters, self.current
        where, weight = self._where(layer), own.values[layer.weight].contiguous()
        bias = None if layer.bias is None else own.values[layer.bias]
        out_shape, layer_of = shape_of(layer.node), own.backend.perturbed_linear
        start = base.reshape(-1, base.shape[-1])

        def run(values: Values) -> Tensor:
            noise, change = current.here, changes[source]
            result = layer_of(
                change.view(len(change), -1, change.shape[-1]),
                weight,
                bias,
                noise.coefficient,
                *noise.directions,
                antithetic=noise.family.antithetic,
                activation=activation,
                precision=noise.precision,
                base=start,
                base_activation=base_activation,
                places=noise.places,
                dtype=_storage(noise),
                **where,
            )
            return result.view(-1, *out_shape)

        return run


def _storage(noise: Noise) -> torch.dtype:
    """What lies between two layers."""
    return torch.bfloat16 if noise.precision == "bf16" else torch.float32


def _is_single(data: Any) -> bool:
    return isinstance(data, Tensor) and data.dtype == torch.float32


def _only_user(node: fx.Node, among: Set[fx.Node]) -> fx.Node | None:
    """The node that alone reads another, where it is one of some."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0] in among else None


def _activation(node: fx.Node) -> str | None:
    """What the kernels call the activation that a node is."""
    name = operation_name(node)
    if name not in _ACTIVATIONS or len(node.all_input_nodes) != 1:
        return None
    if name == "gelu" and arguments(node)["approximate"] != "none":
        return None
    return name
