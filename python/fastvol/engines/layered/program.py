"""A traced loss made ready to run: what rays share is done once, what is linear once a direction.

The parameters of a ray are W + c·Z. Whatever the graph makes of them by operations that are linear
in them, on data that all rays share, is base + c·change for every radius; base is made once, and
change once a direction: for most small nets that is the most expensive layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from ..._objective import Batch
from ..._reference.threshold_step import check_target
from ..protocol import LossPart
from .fused import Fused, FusedStep, Noise, Parameters
from .operations import Step, Values, evaluate, operation_name, shape_of, step_for, summed_loss
from .tracing import Traced, UntraceableError, arguments, is_view, leaves

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass
class _Instructions:
    """Steps in order, each with the nodes that nobody needs after it."""

    steps: list[tuple[fx.Node, Step, tuple[fx.Node, ...]]] = field(default_factory=list)

    def run(self, values: Values) -> None:
        """Fills ``values``."""
        for node, step, dead in self.steps:
            values[node] = step(values)
            for gone in dead:
                del values[gone]


class Program:
    """The loss of one batch.

    Args:
        traced: the graph of batches of its shape.
        batch: the data.
        ray_losses: the backend's; sums a loss that it knows over the examples of many rays.
        start: the parameters at θ*, by position.
        lanes: the most rays that are loaded at once.
        cached: whether what is linear in the parameters is kept for all radii of a direction.
        room: bytes that may be kept; where that needs more, nothing is.
        gradients_of: the program whose gradients this one is for: it keeps what that one keeps.
        parameters: for kernels that make the noise themselves; ``None`` is without them.
        fused: whether they run layers on rays too.
        by_onednn: whether oneDNN multiplies matrices where it can.

    Attributes:
        moved: positions of the parameters that :meth:`loss` has to be given.
        moved_fused: those that it has to be given beside the noise of the directions.
        shown: those that :meth:`load_together` has to be given beside it.
        weight: of the batch.
    """

    def __init__(
        self,
        traced: Traced,
        batch: Batch,
        ray_losses: Callable[..., tuple[Float, Bool]],
        start: Sequence[Tensor],
        *,
        lanes: int,
        cached: bool,
        room: float = math.inf,
        gradients_of: Program | None = None,
        parameters: Parameters | None = None,
        fused: bool = False,
        by_onednn: bool = False,
    ) -> None:
        self._lanes = lanes
        self._gradients_of = gradients_of
        # It has no gradients.
        self._by_onednn = by_onednn and gradients_of is None
        self._target_is_checked = False
        self._ray_losses = ray_losses
        self.weight = batch.weight
        nodes = list(traced.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        self._parameters = inputs[: traced.n_parameters]
        tensors = [part for part in leaves(batch) if isinstance(part, Tensor)]
        data = dict(zip(inputs[traced.n_parameters :], tensors, strict=True))
        (output,) = (node for node in nodes if node.op == "output")
        self._result = output.args[0]
        self._shared = self._evaluate_shared(nodes, data, traced.constants)
        if not isinstance(self._result, fx.Node) or self._result in self._shared:
            raise UntraceableError("the loss does not depend on the parameters")
        if shape_of(self._result).numel() != 1:
            raise UntraceableError("the loss is not a scalar")
        self._linear: set[fx.Node] = set()
        if cached:
            self._linear = _linear_nodes(nodes, self._parameters, self._shared)
            if _bytes(self._frontier(nodes)) * max(lanes, 1) > room:
                self._linear = set()
        self._fused = None if parameters is None else Fused(parameters, self._parameters)
        self._compile(nodes, start, fused)
        self._channels_last()

    def _evaluate_shared(
        self, nodes: Sequence[fx.Node], data: Mapping[fx.Node, Tensor], constants: Mapping[str, Any]
    ) -> Values:
        """Everything that no parameter reaches."""
        shared: Values = dict(data)
        with torch.no_grad():
            for node in nodes:
                if node.op == "get_attr":
                    shared[node] = constants[str(node.target)]
                elif node.op == "call_function" and all(
                    part in shared for part in node.all_input_nodes
                ):
                    shared[node] = evaluate(node, shared)
        return shared

    def _frontier(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """What is linear in the parameters, not a parameter, and wanted by what is not linear."""
        wanted = {
            part
            for node in nodes
            if _is_call(node) and node not in self._linear
            for part in node.all_input_nodes
        } | {self._result}
        beyond = self._linear - set(self._parameters)
        return [node for node in nodes if node in beyond and node in wanted]

    def _compile(self, nodes: Sequence[fx.Node], start: Sequence[Tensor], fused: bool) -> None:
        rays = {
            node
            for node in nodes
            if node not in self._shared and node.op in ("placeholder", "call_function")
        }
        nonlinear = [n for n in nodes if n in rays and n not in self._linear and _is_call(n)]
        differentiable = self._gradients_of is not None
        self._summed = None if differentiable else summed_loss(self._result, rays)
        wanted = {part for node in nonlinear for part in node.all_input_nodes}
        if self._result in self._linear:
            wanted.add(self._result)
        # Made by the engine, once for all batches.
        self.moved = [i for i, node in enumerate(self._parameters) if node in wanted]
        self._kept = self._frontier(nodes)
        # Autograd needs the values that a step in place would overwrite.
        reusable = None if differentiable else set(self._kept)
        last = self._result
        if self._summed is not None:
            # The core's own sum takes the place of the last step.
            last, nonlinear = self._summed.outputs, [n for n in nonlinear if n is not self._result]
        self._steps = self._instructions(nonlinear, rays, last, reusable=reusable)
        # The same operations on W give the base, and on Z the change.
        needed = _ancestors(self._kept)
        linear = [n for n in nodes if n in self._linear and n in needed and _is_call(n)]
        self._changes = self._instructions(linear, rays, None, keep=set(self._kept))
        # What stands for the data while changes are made.
        self._reduced: Values = {}
        if self._gradients_of is None:
            base: Values = {**self._shared}
            for node, tensor in zip(self._parameters, start, strict=True):
                base[node] = tensor[None]
            with torch.no_grad():
                self._changes.run(base)
            self._base = {node: base[node][0] for node in self._kept}
            self._change = {
                node: _rows_like(value, self._lanes) for node, value in self._base.items()
            }
        else:
            self._base, self._change = self._gradients_of._base, self._gradients_of._change
        self._used = [i for i, node in enumerate(self._parameters) if node in needed]
        self._compile_fused(nonlinear, linear, rays, last, on_rays=fused)
        reached = set(nonlinear) | set(linear)
        used = {part for node in reached for part in node.all_input_nodes}
        if self._summed is not None:
            used.add(self._summed.target)
            self._count = self._summed.count(self._shared[self._summed.target])
        self._shared = {node: value for node, value in self._shared.items() if node in used}

    def _compile_fused(
        self,
        nonlinear: Sequence[fx.Node],
        linear: Sequence[fx.Node],
        rays: set[fx.Node],
        last: fx.Node,
        *,
        on_rays: bool,
    ) -> None:
        """The same steps by kernels that make the noise themselves, as far as there are any."""
        self.moved_fused, self.shown = self.moved, self._used
        self._kept_fused, self._steps_fused = self._kept, self._steps
        self._written: set[fx.Node] = set()
        if self._fused is None:
            return
        made, self._written = self._fused.changes(linear, self._base, self._change, self._shared)
        self._changes_fused = self._instructions(
            linear, rays, None, keep=set(self._kept), fused=made
        )
        self.shown = self._read(node for node in linear if node not in made)
        if not on_rays:
            return
        steps = self._fused.layers(nonlinear, rays, self._base, self._change, self._shared)
        absorbed = {node for step in steps.values() for node in step.absorbed}
        rest = [node for node in nonlinear if node not in absorbed]
        self._steps_fused = self._instructions(
            rest, rays, last, reusable=set(self._kept), fused=steps
        )
        self.moved_fused = self._read(node for node in rest if node not in steps)
        self._kept_fused = [node for node in self._kept if node not in absorbed]

    def _instructions(
        self,
        nodes: Sequence[fx.Node],
        rays: set[fx.Node],
        result: fx.Node | None,
        **options: Any,
    ) -> _Instructions:
        return _instructions(
            nodes, rays, self._shared, result, by_onednn=self._by_onednn, **options
        )

    def _read(self, nodes: Iterable[fx.Node]) -> list[int]:
        """Positions of the parameters that some nodes read."""
        read = {part for node in nodes for part in node.all_input_nodes}
        return [i for i, node in enumerate(self._parameters) if node in read]

    def _channels_last(self) -> None:
        """Images in the order in which convolutions on a CPU are fastest."""
        for node, value in list(self._shared.items()):
            if not isinstance(value, Tensor) or value.dim() != 4 or value.device.type != "cpu":
                continue
            users = [user for user in node.users if user.op == "call_function"]
            if users and all(operation_name(user) == "conv2d" for user in users):
                self._shared[node] = value.contiguous(memory_format=torch.channels_last)

    @property
    def bytes_of_changes(self) -> int:
        """What is kept for one direction."""
        return sum(v[0].numel() * v.element_size() for v in self._change.values())

    def first_layer(self) -> tuple[int, Tensor] | None:
        """Position of the weights that alone meet the data in a linear layer, and those data.

        ``None`` where there is no such layer, or what it makes is not kept.
        """
        for node, _, _ in self._changes.steps:
            if operation_name(node) != "linear":
                continue
            given = arguments(node)
            x, weight = given["input"], given["weight"]
            readers = [user for user in x.users if user in self._linear]
            if weight in self._parameters and len(weight.users) == 1 and len(readers) == 1:
                return self._parameters.index(weight), self._shared[x]
        return None

    def reduce(self, basis: Tensor) -> None:
        """From now on the first layer's changes are given in a basis ``[in, r]`` of its inputs."""
        for node, _, _ in self._changes.steps:
            if operation_name(node) == "linear":
                x = arguments(node)["input"]
                data = self._shared[x]
                self._reduced[x] = (data.to(torch.float64) @ basis).to(data.dtype)
                return

    def load(self, lanes: Int, parameter: Callable[[int, int], Tensor]) -> None:
        """Makes what is linear for new directions.

        Args:
            lanes: where they are.
            parameter: (lane, position) to s⊙z of one parameter, ``[1, *shape]``.
        """
        if not self._kept:
            return
        for lane in lanes.tolist():
            values = {**self._shared, **self._reduced}
            for i in self._used:
                values[self._parameters[i]] = parameter(lane, i)
            self._changes.run(values)
            for node in self._kept:
                self._change[node][lane].copy_(values[node][0])

    def load_together(
        self,
        lanes: Tensor,
        parameter: Callable[[Tensor, int], Tensor],
        noise: Noise | None = None,
    ) -> None:
        """As :meth:`load`, all lanes in one operation each.

        Args:
            lanes: int64 ``[k]`` on the device.
            parameter: (lanes, position) to s⊙z of one parameter, ``[k, *shape]``.
            noise: of the directions, for what kernels make of it.
        """
        if not self._kept:
            return
        values = {**self._shared, **self._reduced}
        by_kernels = noise is not None and self._fused is not None
        for i in self.shown if by_kernels else self._used:
            values[self._parameters[i]] = parameter(lanes, i)
        if by_kernels and self._fused is not None:
            self._fused.current.noise = noise
            self._changes_fused.run(values)
        else:
            self._changes.run(values)
        for node in self._kept:
            if not (by_kernels and node in self._written):
                self._change[node].index_copy_(0, lanes, values[node])

    def resize(self, lanes: int) -> None:
        """Forgets all directions, and makes room for another number of them."""
        self._lanes = lanes
        for node, value in self._base.items():
            # One after the other, so that both sizes of all of them are never there at once.
            del self._change[node]
            self._change[node] = _rows_like(value, lanes)

    def mirror(self, lane: int, partner: int) -> None:
        """What :meth:`load` would make of the opposite of another lane's direction."""
        for change in self._change.values():
            torch.neg(change[partner], out=change[lane])

    def losses(
        self,
        lanes: Int,
        coefficient: Tensor,
        moved: Mapping[int, Tensor],
        span: slice | None,
        limit: Float | None,
        noise: Noise | None = None,
    ) -> tuple[Float, Bool | None]:
        """The loss of this batch on some rays, float64 ``[k]``, and where it is a lower bound.

        Args:
            lanes, coefficient, moved, span, noise: as for :meth:`loss`.
            limit: what each loss need not exceed, ``[k]``; beyond it a lower bound will do.
        """
        if self._summed is None:
            total = self.loss(lanes, coefficient, moved, span, noise)
            return total.to("cpu", torch.float64).numpy(), None
        values = self._values(lanes, coefficient, moved, span, noise)
        target = self._shared[self._summed.target]
        sums, outside = self._ray_losses(
            # The core has no bfloat16, in which a coarse engine's outputs come.
            values[self._summed.outputs].to(coefficient.dtype),
            target,
            kind=self._summed.kind,
            limit=None if limit is None else limit * self._count,
            ignore_index=self._summed.ignore_index,
            threads=torch.get_num_threads(),
        )
        return sums / self._count, outside

    def part(
        self,
        lanes: Int,
        coefficient: Tensor,
        moved: Mapping[int, Tensor],
        span: slice,
        *,
        total: float,
        where: slice,
        first: bool,
        last: bool,
        noise: Noise | None = None,
    ) -> LossPart:
        """What the loss of this batch on some rays is made of, left on the device.

        Args:
            lanes, coefficient, moved, span, noise: as for :meth:`loss`.
            total: weight of all batches.
            where, first, last: of the part.
        """
        scale = self.weight / total
        if self._summed is None:
            result = self.loss(lanes, coefficient, moved, span, noise)
            return LossPart(result, None, "given", scale, where, first, last)
        outputs = self._values(lanes, coefficient, moved, span, noise)[self._summed.outputs]
        # The outputs of a coarse engine may be narrower.
        outputs = outputs.to(coefficient.dtype)
        target, ignored = self._shared[self._summed.target], self._summed.ignore_index
        if not self._target_is_checked:
            check_target(outputs, target, kind=self._summed.kind, ignore_index=ignored)
            self._target_is_checked = True
        return LossPart(
            outputs, target, self._summed.kind, scale / self._count, where, first, last, ignored
        )

    def loss(
        self,
        lanes: Int,
        coefficient: Tensor,
        moved: Mapping[int, Tensor],
        span: slice | None,
        noise: Noise | None = None,
    ) -> Tensor:
        """The loss of this batch on some rays ``[k]``, by the graph's own last operation.

        Args:
            lanes: int64 ``[k]``.
            coefficient: c ``[k]``.
            moved: W + c·Z of the parameters :attr:`moved`, or of :attr:`moved_fused` with
                ``noise``, ``[k, *shape]`` by position.
            span: the lanes as a slice, where they are one.
            noise: of the directions, for what kernels make of it.
        """
        values = self._values(lanes, coefficient, moved, span, noise)
        result: Tensor = values[self._result].reshape(len(lanes))
        return result

    def loss_and_grad(
        self, lanes: Int, coefficient: Tensor, moved: Mapping[int, Tensor], span: slice | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Losses ``[k]``, and their gradients ``[k, *shape]`` by the parameters' positions.

        What is kept is not made again: gradients go through it by the transpose of what is linear.

        Args:
            lanes, coefficient, moved, span: as for :meth:`loss`.
        """
        values = {**self._shared}
        for i in self.moved:
            values[self._parameters[i]] = moved[i].detach().requires_grad_()
        for node, value in self._totals(self._kept, lanes, coefficient, span).items():
            values[node] = value.requires_grad_()
        leaves = [*(self._parameters[i] for i in self.moved), *self._kept]
        tensors = [values[leaf] for leaf in leaves]
        with torch.enable_grad():
            self._steps.run(values)
            result: Tensor = values[self._result].reshape(len(lanes))
            slopes = torch.autograd.grad(result.sum(), tensors, allow_unused=True)
        found = {
            leaf: slope for leaf, slope in zip(leaves, slopes, strict=True) if slope is not None
        }
        gradients = {
            i: found[self._parameters[i]] for i in self.moved if self._parameters[i] in found
        }
        kept = {node: found[node] for node in self._kept if node in found}
        for i, slope in self._transposed(kept).items():
            gradients[i] = gradients[i] + slope if i in gradients else slope
        return result.detach(), gradients

    def _transposed(self, slopes: Mapping[fx.Node, Tensor]) -> dict[int, Tensor]:
        """The gradients of the parameters from those of what is linear in them."""
        gradients: dict[int, Tensor] = {}

        def add(parameter: fx.Node, slope: Tensor) -> None:
            i = self._parameters.index(parameter)
            gradients[i] = gradients[i] + slope if i in gradients else slope

        parameters = set(self._parameters)
        others: dict[fx.Node, Tensor] = {}
        for node, slope in slopes.items():
            given = arguments(node) if operation_name(node) == "linear" else {}
            weight, bias = given.get("weight"), given.get("bias")
            if not isinstance(weight, fx.Node) or not {weight, bias or weight} <= parameters:
                others[node] = slope
                continue
            # One product of matrices, where autograd would first make the layer anew.
            rows = slope.reshape(len(slope), -1, slope.shape[-1])
            data = self._shared[given["input"]]
            data = data.reshape(1, -1, data.shape[-1]).expand(len(slope), -1, -1)
            add(weight, torch.bmm(rows.mT, data))
            if bias is not None:
                add(bias, rows.sum(1))
        if others:
            count = len(next(iter(others.values())))
            values = {**self._shared}
            for i in self._used:
                shape = shape_of(self._parameters[i])
                zeros = next(iter(others.values())).new_zeros(count, *shape)
                values[self._parameters[i]] = zeros.requires_grad_()
            with torch.enable_grad():
                self._changes.run(values)
                found = torch.autograd.grad(
                    [values[node] for node in others],
                    [values[self._parameters[i]] for i in self._used],
                    list(others.values()),
                    allow_unused=True,
                )
            for i, part in zip(self._used, found, strict=True):
                if part is not None:
                    add(self._parameters[i], part)
        return gradients

    def _values(
        self,
        lanes: Int,
        coefficient: Tensor,
        moved: Mapping[int, Tensor],
        span: slice | None,
        noise: Noise | None = None,
    ) -> Values:
        values = {**self._shared}
        if noise is not None and self._fused is not None:
            for i in self.moved_fused:
                values[self._parameters[i]] = moved[i]
            values.update(self._totals(self._kept_fused, lanes, coefficient, span))
            self._fused.current.noise = noise
            self._steps_fused.run(values)
            return values
        for i in self.moved:
            values[self._parameters[i]] = moved[i]
        values.update(self._totals(self._kept, lanes, coefficient, span))
        self._steps.run(values)
        return values

    def _totals(
        self, nodes: Sequence[fx.Node], lanes: Int, coefficient: Tensor, span: slice | None
    ) -> Values:
        """base + c·change of what is kept."""
        totals: Values = {}
        for node in nodes:
            base, change = self._base[node], self._change[node]
            if span is None and base.device.type != "cpu":
                index = torch.from_numpy(lanes).to(base.device)
                c = coefficient.view(-1, *(1,) * base.dim())
                total = torch.addcmul(base, change.index_select(0, index), c)
            elif span is None:
                total = _rows_like(base, len(lanes))
                for k, (lane, c) in enumerate(
                    zip(lanes.tolist(), coefficient.tolist(), strict=True)
                ):
                    torch.add(base, change[lane], alpha=c, out=total[k])
            else:
                c = coefficient.view(-1, *(1,) * base.dim())
                total = torch.addcmul(base, change[span], c)
            totals[node] = total
        return totals


def _bytes(nodes: Sequence[fx.Node]) -> int:
    return sum(node.meta["val"].numel() * node.meta["val"].element_size() for node in nodes)


def _rows_like(value: Tensor, count: int) -> Tensor:
    """Room for ``count`` of a tensor, each in its memory order."""
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda axis: strides[axis], reverse=True)
    back = [order.index(axis) + 1 for axis in range(value.dim())]
    shape = (count, *(value.shape[axis] for axis in order))
    return torch.empty(shape, dtype=value.dtype, device=value.device).permute(0, *back)


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function"


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes themselves and everything that they are made from."""
    seen: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return seen


def _linear_nodes(
    nodes: Sequence[fx.Node], parameters: Sequence[fx.Node], shared: Values
) -> set[fx.Node]:
    """The nodes that are linear in the parameters, without a constant of their own."""
    linear = set(parameters)
    for node in nodes:
        if _is_call(node) and node not in shared and _is_linear(node, linear, shared):
            linear.add(node)
    return linear


def _is_linear(node: fx.Node, linear: set[fx.Node], shared: Values) -> bool:
    name = operation_name(node)
    if not name:
        return False
    given = arguments(node)
    if name == "linear" or name in _CONVOLUTIONS:
        bias = given["bias"]
        from_weight = given["input"] in shared and given["weight"] in linear
        return from_weight and (bias is None or bias in linear)
    if name == "embedding":
        return given["weight"] in linear and given["indices"] in shared
    if name == "add":
        return given["self"] in linear and given["other"] in linear and given["alpha"] == 1
    inputs = node.all_input_nodes
    moves_only = is_view(node.target) or name in ("clone", "contiguous")
    return moves_only and len(inputs) == 1 and inputs[0] in linear and name not in _SEVERAL


# Views that return several tensors.
_SEVERAL = ("split", "split_with_sizes", "chunk", "unbind", "tensor_split")


def _instructions(
    nodes: Sequence[fx.Node],
    rays: set[fx.Node],
    shared: Values,
    result: fx.Node | None,
    *,
    keep: set[fx.Node] | None = None,
    reusable: set[fx.Node] | None = None,
    fused: Mapping[fx.Node, FusedStep] | None = None,
    by_onednn: bool = False,
) -> _Instructions:
    """Steps for ``nodes``, forgetting what is not needed any more; some are given."""
    fused = fused or {}
    keep = (keep or set()) | ({result} if result is not None else set())
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for part in fused[node].inputs if node in fused else node.all_input_nodes:
            if part in rays:
                last[part] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for part, node in last.items():
        if part not in keep and part.op != "placeholder":
            dying.setdefault(node, []).append(part)
    # Tensors of their own that no view shares.
    own = set(reusable or ())
    instructions = _Instructions()
    for node in nodes:
        if node in fused:
            own.add(node)
            step = fused[node].step
            instructions.steps.append((node, step, tuple(dying.get(node, ()))))
            continue
        source = node.args[0] if node.args else None
        reuse = (
            reusable is not None
            and isinstance(source, fx.Node)
            and source in own
            and source in dying.get(node, ())
            and not any(is_view(user.target) or _is_alias(user) for user in source.users)
            and _same_kind(source, node)
            and node.args[1:].count(source) == 0
        )
        step = step_for(node, rays, shared, reuse=reuse, by_onednn=by_onednn)
        if not is_view(node.target) and not _is_alias(node) and operation_name(node):
            own.add(node)
        instructions.steps.append((node, step, tuple(dying.get(node, ()))))
    return instructions


def _is_alias(node: fx.Node) -> bool:
    """Whether the step of a node hands its input on."""
    return "dropout" in operation_name(node) or operation_name(node) in ("clone", "lift_fresh_copy")


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta.get("val"), b.meta.get("val")
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one.shape == other.shape and one.dtype == other.dtype
