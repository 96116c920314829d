"""The loss of one batch as a graph of operations, its moved parameters as inputs.

``make_fx`` runs model and loss once on tensors without values and writes down every operation
before it is decomposed, so that a linear layer is one node, whatever spelling the model used.
Control flow that depends on values cannot be written down, and is refused.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ..._layout import ParameterLayout
from ..._objective import PREFIX, Batch, Objective
from ...errors import FastvolError

Operation = torch._ops.OpOverload


class UntraceableError(Exception):
    """Why a model and its loss cannot be written down, in words."""


@dataclass(frozen=True)
class Traced:
    """A graph whose placeholders are the moved parameters and then the tensors of the batch.

    Args:
        graph: of ``torch.ops.aten`` nodes, none of which writes to its input.
        constants: tensors that the graph names, by attribute.
        n_parameters: how many of the placeholders are parameters.
    """

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    n_parameters: int


def leaves(batch: Batch) -> list[Any]:
    """The parts of a batch in a fixed order, tensors and others."""
    parts: list[Any] = pytree.tree_leaves((batch.args, batch.kwargs, batch.target))
    return parts


def signature(batch: Batch) -> Any:
    """What two batches must share to share a graph."""
    parts, spec = pytree.tree_flatten((batch.args, batch.kwargs, batch.target))
    return spec, tuple(
        (tuple(part.shape), part.dtype) if isinstance(part, Tensor) else ("value", repr(part))
        for part in parts
    )


def trace(objective: Objective, layout: ParameterLayout, batch: Batch) -> Traced:
    """The graph of the loss on batches of this shape.

    Raises:
        UntraceableError: what stood in the way.
    """
    parts, spec = pytree.tree_flatten((batch.args, batch.kwargs, batch.target))
    where = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]
    names = [PREFIX + segment.name for segment in layout.segments]

    def loss(*values: Tensor) -> Any:
        filled = list(parts)
        for i, tensor in zip(where, values[len(names) :], strict=True):
            filled[i] = tensor
        args, kwargs, target = pytree.tree_unflatten(filled, spec)
        moved = dict(zip(names, values[: len(names)], strict=True))
        return objective.call(moved, replace(batch, args=args, kwargs=kwargs, target=target))

    examples = [
        torch.empty(s.shape, dtype=s.dtype, device=layout.device) for s in layout.segments
    ] + [parts[i] for i in where]
    try:
        module = _make_graph(loss, examples)
    except Exception as error:
        raise UntraceableError(_reason(error)) from error
    constants = {
        str(node.target): _attribute(module, str(node.target))
        for node in module.graph.nodes
        if node.op == "get_attr"
    }
    for tensor in constants.values():
        if not isinstance(tensor, Tensor) or tensor.is_meta or _is_fake(tensor):
            raise UntraceableError("it computes something from parameters beside the graph")
    _without_writes(module.graph)
    _without_broadcasts(module.graph)
    _check(module.graph)
    return Traced(module.graph, constants, len(names))


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, FastvolError) and error.__cause__ else error
    if isinstance(cause, DataDependentOutputException):
        return "what it computes depends on values, which a graph cannot hold"
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}"


def _make_graph(loss: Callable[..., Any], examples: list[Tensor]) -> fx.GraphModule:
    # Slow to import, and of no use to short runs.
    from torch.fx.experimental.proxy_tensor import make_fx

    with (
        warnings.catch_warnings(),
        _quiet_modules(),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
    ):
        warnings.simplefilter("ignore")
        fakes = [mode.from_tensor(tensor) for tensor in examples]
        module: fx.GraphModule = make_fx(loss, pre_dispatch=True)(*fakes)
    return module


@contextmanager
def _quiet_modules() -> Iterator[None]:
    """Without the fast path of ``nn.MultiheadAttention``, which is one opaque operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def is_view(target: Any) -> bool:
    """Whether an operation's result may share memory with its input."""
    if not isinstance(target, Operation):
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


def _without_writes(graph: fx.Graph) -> None:
    """Turns every operation that writes to its first argument into one that makes a new tensor.

    The graph already names the written tensor by the operation that wrote last.

    Raises:
        UntraceableError: a view is written to, or something that has one.
    """
    for node in list(graph.nodes):
        target = node.target
        if not isinstance(target, Operation) or not target._schema.is_mutable:
            continue
        name = target._schema.name.removeprefix("aten::")
        written = node.args[0] if node.args else None
        packet = getattr(torch.ops.aten, name[:-1], None)
        plain = getattr(packet, target._overloadname, None)
        shares = isinstance(written, fx.Node) and (
            (written.op == "call_function" and is_view(written.target))
            or any(user is not node and is_view(user.target) for user in written.users)
        )
        if not name.endswith("_") or plain is None or shares:
            raise UntraceableError(f"{name} writes to a tensor that others see")
        node.target = plain


def _without_broadcasts(graph: fx.Graph) -> None:
    """Takes out ``broadcast_tensors`` of equal shapes, of which losses make much use.

    It would hide that a target does not depend on the parameters.
    """
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.broadcast_tensors.default:
            continue
        inputs = node.args[0]
        if any(part.meta["val"].shape != inputs[0].meta["val"].shape for part in inputs):
            continue
        for entry in list(node.users):
            if entry.target is operator.getitem:
                entry.replace_all_uses_with(inputs[entry.args[1]])
                graph.erase_node(entry)
        if not node.users:
            graph.erase_node(node)


def _check(graph: fx.Graph) -> None:
    """Refuses what would not be the same function at every call."""
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, Operation):
            continue
        name = node.target._schema.name
        if torch.Tag.nondeterministic_seeded in node.target.tags and not _is_idle_dropout(node):
            raise UntraceableError(f"{name} draws random numbers")
        if "batch_norm" in name and bool(_argument(node, "training")):
            raise UntraceableError("batch normalisation in training mode mixes its batch")


def _is_idle_dropout(node: fx.Node) -> bool:
    name = node.target._schema.name  # type: ignore[union-attr]
    if name.endswith("scaled_dot_product_attention"):
        return not _argument(node, "dropout_p")
    return "dropout" in name and not _argument(node, "train")


def _argument(node: fx.Node, name: str) -> Any:
    """The value of an argument of a node by its name in the schema."""
    return arguments(node).get(name)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a node by name, defaults included."""
    assert isinstance(node.target, Operation)
    result: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            result[argument.name] = node.args[position]
        else:
            result[argument.name] = node.kwargs.get(
                argument.name, argument.default_value if argument.has_default_value() else None
            )
    return result
