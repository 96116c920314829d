"""How each operation is carried out on many rays at once.

A *ray value* has a leading axis over K rays; what all rays share has none. A rule looks at one node
of the graph, before the run, and returns the function that makes its value from the values so far.
An operation without a rule goes through ``torch.func.vmap``, one operation at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx

from . import onednn
from .tracing import arguments

Values = dict[fx.Node, Any]
Step = Callable[[Values], Any]
Rule = Callable[[fx.Node, Set[fx.Node], Values], "Step | None"]

_RULES: dict[str, Rule] = {}
# Of layers that oneDNN can multiply.
_ONEDNN_RULES: dict[str, Rule] = {}

_MEAN, _SUM = 1, 2
# Fewer multiplications are over before oneDNN has begun: better many rays in one operation.
_SMALL_PRODUCT = 1 << 22
# A convolution of more columns a patch is faster as it stands, and one of more bytes is too large.
_MOST_COLUMNS = 128
_PATCHES_BYTES = 256 << 20


def step_for(
    node: fx.Node,
    rays: Set[fx.Node],
    shared: Values,
    *,
    reuse: bool = False,
    by_onednn: bool = False,
) -> Step:
    """The function that makes the ray value of ``node``.

    Args:
        node: a call with at least one ray value among its arguments.
        rays: the nodes that have ray values.
        shared: the values of the others.
        reuse: whether the first argument's memory may be overwritten.
        by_onednn: whether oneDNN multiplies matrices where it can.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return _call(node)
    name, step = operation_name(node), None
    if by_onednn and name in _ONEDNN_RULES:
        step = _ONEDNN_RULES[name](node, rays, shared)
    if step is None and name in _RULES:
        step = _RULES[name](node, rays, shared)
    if step is None and torch.Tag.pointwise in node.target.tags:
        step = _pointwise(node, rays, reuse)
    return _by_vmap(node, rays) if step is None else step


def operation_name(node: fx.Node) -> str:
    """As in ``torch.ops.aten``, without the overload; empty for plain Python functions."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return str(node.target._schema.name).removeprefix("aten::")


def shape_of(node: fx.Node) -> torch.Size:
    """Of the value that one ray alone would have."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.shape


def evaluate(node: fx.Node, values: Values) -> Any:
    """The operation of ``node`` on values that have no ray axis."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _rule(*names: str, rules: dict[str, Rule] = _RULES) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            rules[name] = rule
        return rule

    return register


def _call(node: fx.Node) -> Step:
    # Plain Python on what came before: an entry of a tuple.
    return lambda values: evaluate(node, values)


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [part for part in node.all_input_nodes if isinstance(part.meta.get("val"), Tensor)]


def _lift(value: Tensor, rank: int) -> Tensor:
    """A ray value ``[K, …]`` with axes of length 1 put in after the first, up to ``1 + rank``."""
    missing = rank + 1 - value.dim()
    if missing <= 0:
        return value
    return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:])


def _unmerged(value: Tensor, like: Tensor) -> Tensor:
    """``[K·N, …]`` as ``[K, N, …]``."""
    result: Tensor = value.unflatten(0, like.shape[:2])  # type: ignore[no-untyped-call]
    return result


def _pointwise(node: fx.Node, rays: Set[fx.Node], reuse: bool) -> Step:
    rank = max(len(shape_of(part)) for part in _inputs(node))
    target: Any = node.target
    lifted = {part for part in _inputs(node) if part in rays and len(shape_of(part)) < rank}
    if reuse:
        packet = getattr(torch.ops.aten, operation_name(node) + "_", None)
        target = getattr(packet, node.target._overloadname, target)  # type: ignore[union-attr]
    first = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if isinstance(first, fx.Node):
        only = first
        return lambda values: target(values[only])

    def run(values: Values) -> Any:
        def value(part: fx.Node) -> Any:
            return _lift(values[part], rank) if part in lifted else values[part]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return target(*args, **kwargs)

    return run


def _by_vmap(node: fx.Node, rays: Set[fx.Node]) -> Step:
    flat, spec = pytree.tree_flatten((node.args, node.kwargs), is_leaf=lambda x: x is None)
    places = [i for i, part in enumerate(flat) if isinstance(part, fx.Node)]
    target: Any = node.target

    def one(*parts: Any) -> Any:
        filled = list(flat)
        for i, part in zip(places, parts, strict=True):
            filled[i] = part
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return target(*args, **kwargs)

    dims = tuple(0 if flat[i] in rays else None for i in places)
    many = torch.func.vmap(one, in_dims=dims, randomness="error")
    return lambda values: many(*(values[flat[i]] for i in places))


@_rule(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
    "reshape_as",
)
def _reshape(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    source, shape = node.args[0], shape_of(node)
    if not isinstance(source, fx.Node) or source not in rays:
        return None
    return lambda values: values[source].reshape(-1, *shape) if shape.numel() else values[source]


@_rule("detach", "contiguous", "clone", "alias", "lift_fresh_copy")
def _same(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step:
    source, name = node.args[0], operation_name(node)
    assert isinstance(source, fx.Node)
    if name == "detach":
        return lambda values: values[source].detach()
    if name == "contiguous":
        return lambda values: values[source].contiguous()
    return lambda values: values[source]


@_rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def _idle_dropout(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return lambda values: values[source]


def _axis(axis: int, rank: int) -> int:
    """An axis of one ray's value, counted with the ray axis in front."""
    return axis + 1 if axis >= 0 else axis + rank + 1


@_rule("transpose", "swapaxes", "select", "slice", "narrow", "split", "split_with_sizes", "chunk")
def _along_axes(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    source = node.args[0]
    if not isinstance(source, fx.Node) or source not in rays or len(node.all_input_nodes) > 1:
        return None
    rank = len(shape_of(source))
    given = arguments(node)
    target: Any = node.target
    for name in ("dim", "dim0", "dim1", "axis0", "axis1"):
        if name in given:
            given[name] = _axis(given[name], rank)
    first, *rest = given.values()
    del first
    return lambda values: target(values[source], *rest)


@_rule("permute", "t", "mT", "numpy_T")
def _permute(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(shape_of(source))
    if operation_name(node) == "permute":
        order = [_axis(axis, rank) for axis in arguments(node)["dims"]]
    elif operation_name(node) == "mT":
        order = [*range(1, rank - 1), rank, rank - 1]
    else:
        order = list(range(rank, 0, -1))
    return lambda values: values[source].permute(0, *order)


@_rule("expand", "expand_as", "broadcast_to")
def _expand(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    source, shape = node.args[0], shape_of(node)
    if not isinstance(source, fx.Node) or source not in rays:
        return None
    return lambda values: _lift(values[source], len(shape)).expand(-1, *shape)


@_rule("cat", "stack", "concat", "concatenate")
def _cat(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step:
    parts, axis = arguments(node)["tensors"], arguments(node)["dim"]
    rank = len(shape_of(node))
    axis = _axis(axis, rank)
    join: Any = torch.stack if operation_name(node) == "stack" else torch.cat

    def run(values: Values) -> Tensor:
        count = next(values[part].shape[0] for part in parts if part in rays)
        full = [
            values[part] if part in rays else values[part].expand(count, *values[part].shape)
            for part in parts
        ]
        result: Tensor = join(full, axis)
        return result

    return run


@_rule("mean", "sum", "amax", "amin", "softmax", "log_softmax", "_softmax", "_log_softmax")
def _reduce(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = len(shape_of(source))
    given = arguments(node)
    target: Any = node.target
    if rank == 0:
        return None
    axes = given.get("dim")
    if axes is None or axes == []:
        if operation_name(node) not in ("mean", "sum"):
            return None
        dtype = given.get("dtype")
        reduce: Any = torch.mean if operation_name(node) == "mean" else torch.sum
        keep = bool(given.get("keepdim")) and rank
        return lambda values: reduce(values[source].flatten(1), 1, dtype=dtype).reshape(
            -1, *(1,) * keep
        )
    moved = [_axis(axis, rank) for axis in axes] if isinstance(axes, list) else _axis(axes, rank)
    names = list(node.target._schema.arguments)  # type: ignore[union-attr]
    positional = [
        moved if a.name == "dim" else given[a.name] for a in names[1:] if not a.kwarg_only
    ]
    keywords = {a.name: given[a.name] for a in names if a.kwarg_only and given[a.name] is not None}
    return lambda values: target(values[source], *positional, **keywords)


@_rule("matmul", "bmm", "mm")
def _matmul(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    ranks = len(shape_of(left)), len(shape_of(right))
    if min(ranks) < 2:
        return None
    rank = max(ranks)

    def value(values: Values, part: fx.Node) -> Tensor:
        return _lift(values[part], rank) if part in rays else values[part]

    return lambda values: torch.matmul(value(values, left), value(values, right))


@_rule("linear")
def _linear(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    out_shape = shape_of(node)

    def run(values: Values) -> Tensor:
        w = values[weight]
        b = None if bias is None else values[bias]
        rows = values[x]
        if weight not in rays:
            if bias not in rays:
                return F.linear(rows, w, b)
            assert b is not None
            return F.linear(rows, w) + _lift(b, len(out_shape))
        count = len(w)
        if x in rays:
            rows = rows.reshape(count, -1, w.shape[-1])
        else:
            rows = rows.reshape(1, -1, w.shape[-1]).expand(count, -1, -1)
        if b is None:
            result = torch.bmm(rows, w.mT)
        else:
            added = b[:, None, :] if bias in rays else b
            result = torch.baddbmm(added, rows, w.mT)
        return result.view(count, *out_shape)

    return run


@_rule("linear", rules=_ONEDNN_RULES)
def _linear_by_onednn(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    out_shape = shape_of(node)
    if weight not in rays:
        return None
    if x in rays and shape_of(x).numel() * out_shape[-1] < _SMALL_PRODUCT:
        return None

    def run(values: Values) -> Tensor:
        w, rows = values[weight], values[x]
        rows = rows.reshape(*rows.shape[:1] * (x in rays), -1, w.shape[-1])
        b = None if bias is None else values[bias]
        return onednn.linear_of_rays(rows, w, b).view(len(w), *out_shape)

    return run


@_rule("addmm")
def _addmm(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    bias, left, right = given["self"], given["mat1"], given["mat2"]
    if given["alpha"] != 1 or given["beta"] != 1:
        return None

    def run(values: Values) -> Tensor:
        b = _lift(values[bias], 2) if bias in rays else values[bias]
        return torch.matmul(values[left], values[right]) + b

    return run


@_rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    target: Any = node.target
    if node.target._overloadname == "padding":  # type: ignore[union-attr]
        rest = (given["stride"], given["padding"], given["dilation"], given["groups"])
    elif "transpose" in operation_name(node):
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        rest = tuple(given[name] for name in names)
    else:
        rest = tuple(given[name] for name in ("stride", "padding", "dilation", "groups"))
    out_shape = shape_of(node)
    if len(shape_of(x)) != len(shape_of(weight)):
        return None

    patches = None
    if x not in rays and weight in rays:
        patches = _patches(node, shared[x])
    if patches is not None:
        return _by_patches(node, rays, *patches, by_onednn=False)

    def one(values: Values, ray: int) -> Tensor:
        def of(part: fx.Node | None) -> Tensor | None:
            if part is None:
                return None
            value: Tensor = values[part]
            return value[ray] if part in rays else value

        w = of(weight)
        assert w is not None
        if w.dim() == 4 and w.device.type == "cpu":
            w = w.contiguous(memory_format=torch.channels_last)
        result: Tensor = target(of(x), w, of(bias), *rest)
        return result

    def run(values: Values) -> Tensor:
        if weight in rays:
            count = len(values[weight])
            return _stacked([one(values, ray) for ray in range(count)])
        images: Tensor = values[x]
        own = None if bias is None or bias in rays else values[bias]
        result = _unmerged(target(images.flatten(0, 1), values[weight], own, *rest), images)
        if bias is not None and bias in rays:
            result = result + _channels(values[bias], True, len(out_shape))
        return result

    return run


def _stacked(parts: list[Tensor]) -> Tensor:
    """With a first axis, in the memory order of the parts."""
    if len(parts) == 1:
        return parts[0].unsqueeze(0)
    if parts[0].dim() == 4 and parts[0].is_contiguous(memory_format=torch.channels_last):
        return torch.stack([part.permute(0, 2, 3, 1) for part in parts]).permute(0, 1, 4, 2, 3)
    return torch.stack(parts)


def _patches(node: fx.Node, images: Tensor) -> tuple[Tensor, tuple[int, int]] | None:
    """What each position of a convolution sees, ``[N·positions, C·kernel]``, if that is small.

    All rays share it, so that a convolution of few channels is one product of matrices.
    """
    given = arguments(node)
    size = shape_of(given["weight"])
    if operation_name(node) != "conv2d" or given["groups"] != 1 or len(images.shape) != 4:
        return None
    if isinstance(given["padding"], str) or images.device.type != "cpu":
        return None
    n, _, height, width = shape_of(node)
    columns = size[1] * size[2] * size[3]
    bytes_needed = n * height * width * columns * images.element_size()
    if columns > _MOST_COLUMNS or bytes_needed > _PATCHES_BYTES:
        return None
    unfolded = F.unfold(images, size[2:], given["dilation"], given["padding"], given["stride"])
    return unfolded.mT.reshape(-1, columns).contiguous(), (height, width)


@_rule("conv2d", rules=_ONEDNN_RULES)
def _patches_by_onednn(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    x, weight = given["input"], given["weight"]
    if x in rays or weight not in rays or len(shape_of(x)) != len(shape_of(weight)):
        return None
    patches = _patches(node, shared[x])
    return None if patches is None else _by_patches(node, rays, *patches, by_onednn=True)


def _by_patches(
    node: fx.Node,
    rays: Set[fx.Node],
    patches: Tensor,
    positions: tuple[int, int],
    *,
    by_onednn: bool,
) -> Step:
    given = arguments(node)
    weight, bias = given["weight"], given["bias"]
    height, width = positions
    n = shape_of(node)[0]

    def run(values: Values) -> Tensor:
        w = values[weight].flatten(2)
        b = None if bias is None else values[bias]
        rows = patches.expand(len(w), -1, -1)
        if by_onednn:
            result = onednn.linear_of_rays(patches, w, b)
        elif b is None:
            result = torch.bmm(rows, w.mT)
        else:
            result = torch.baddbmm(b[:, None, :] if bias in rays else b, rows, w.mT)
        return result.view(len(w), n, height, width, -1).permute(0, 1, 4, 2, 3)

    return run


@_rule(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
)
def _per_image(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    spatial = int("".join(c for c in operation_name(node) if c.isdigit()))
    if len(shape_of(source)) != spatial + 2:
        return None
    target: Any = node.target
    rest, keywords = node.args[1:], node.kwargs

    def run(values: Values) -> Tensor:
        images: Tensor = values[source]
        result: Tensor = target(images.flatten(0, 1), *rest, **keywords)
        return _unmerged(result, images)

    return run


def _affine(normal: Tensor, weight: Any, bias: Any, shape: Callable[[Tensor], Tensor]) -> Tensor:
    """normal · weight + bias, either of which may be missing."""
    if weight is None:
        return normal if bias is None else normal + shape(bias)
    if bias is None:
        return normal * shape(weight)
    return torch.addcmul(shape(bias), normal, shape(weight))


def _channels(value: Tensor, is_ray: bool, rank: int) -> Tensor:
    """``[C]`` or ``[K, C]`` against ``[K, N, C, …]``."""
    tail = (1,) * (rank - 2)
    return value.view(len(value), 1, -1, *tail) if is_ray else value.view(1, 1, -1, *tail)


@_rule("batch_norm")
def _batch_norm(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    mean, variance = given["running_mean"], given["running_var"]
    if mean is None or variance is None or mean in rays or variance in rays or x not in rays:
        return None
    eps, rank = given["eps"], len(shape_of(x))

    def run(values: Values) -> Tensor:
        scale = (values[variance] + eps).rsqrt()
        shift = -values[mean] * scale
        scale_is_ray = shift_is_ray = False
        if weight is not None:
            scale, shift = scale * values[weight], shift * values[weight]
            scale_is_ray = shift_is_ray = weight in rays
        if bias is not None:
            shift = shift + values[bias]
            shift_is_ray = shift_is_ray or bias in rays
        return torch.addcmul(
            _channels(shift, shift_is_ray, rank), values[x], _channels(scale, scale_is_ray, rank)
        )

    return run


@_rule("layer_norm", "rms_norm")
def _layer_norm(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if x not in rays:
        return None
    rank, size, eps = len(shape_of(x)), given["normalized_shape"], given["eps"]
    plain: Any = F.layer_norm if operation_name(node) == "layer_norm" else F.rms_norm
    rest = (None, None, eps) if operation_name(node) == "layer_norm" else (None, eps)

    def run(values: Values) -> Tensor:
        def shaped(part: fx.Node | None) -> Tensor | None:
            if part is None:
                return None
            return _lift(values[part], rank) if part in rays else values[part]

        if weight not in rays and bias not in rays and operation_name(node) == "layer_norm":
            return F.layer_norm(values[x], size, shaped(weight), shaped(bias), eps)
        normal = plain(values[x], size, *rest)
        return _affine(normal, shaped(weight), shaped(bias), lambda value: value)

    return run


@_rule("group_norm")
def _group_norm(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if x not in rays:
        return None
    groups, eps, rank = given["num_groups"], given["eps"], len(shape_of(x))

    def run(values: Values) -> Tensor:
        images: Tensor = values[x]
        normal = F.group_norm(images.flatten(0, 1), groups, None, None, eps)
        normal = _unmerged(normal, images)

        def shaped(part: fx.Node | None) -> Tensor | None:
            return None if part is None else _channels(values[part], part in rays, rank)

        return _affine(normal, shaped(weight), shaped(bias), lambda value: value)

    return run


@_rule("embedding")
def _embedding(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    weight, index, shape = given["weight"], given["indices"], shape_of(node)
    if index in rays:
        return None
    return lambda values: values[weight].index_select(1, values[index].reshape(-1)).view(-1, *shape)


@_rule("scaled_dot_product_attention")
def _attention(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    parts = [given[name] for name in ("query", "key", "value")]
    mask = given["attn_mask"]
    if any(part not in rays or len(shape_of(part)) != 4 for part in parts) or mask in rays:
        return None
    options = {name: given[name] for name in ("dropout_p", "is_causal", "scale", "enable_gqa")}
    spread = mask is not None and len(shape_of(mask)) == 4 and shape_of(mask)[0] > 1

    def run(values: Values) -> Tensor:
        q, k, v = (values[part] for part in parts)
        m: Tensor | None = None if mask is None else values[mask]
        if spread and m is not None:
            m = m.expand(len(q), *m.shape).flatten(0, 1)
        heads = F.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=m, **options
        )
        return _unmerged(heads, q)

    return run


@_rule("cross_entropy_loss")
def _cross_entropy(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    x, target, reduction = given["self"], given["target"], given["reduction"]
    plain = given["weight"] is None and not given["label_smoothing"]
    classes = target not in rays and not target.meta["val"].is_floating_point()
    if not (plain and classes and x in rays and reduction in (_MEAN, _SUM)):
        return None
    if len(shape_of(x)) != 2:
        return None
    ignored = given["ignore_index"]

    def run(values: Values) -> Tensor:
        logits, labels = values[x], values[target]
        count = len(logits)
        each = F.cross_entropy(
            logits.flatten(0, 1), labels.repeat(count), reduction="none", ignore_index=ignored
        )
        total = each.view(count, -1).sum(1, dtype=torch.float64)
        return total / (labels != ignored).sum() if reduction == _MEAN else total

    return run


@_rule("mse_loss", "binary_cross_entropy_with_logits", "l1_loss")
def _elementwise_loss(node: fx.Node, rays: Set[fx.Node], shared: Values) -> Step | None:
    given = arguments(node)
    x, target, reduction = given["self"], given["target"], given["reduction"]
    name = operation_name(node)
    weighted = given.get("weight") is not None or given.get("pos_weight") is not None
    if x not in rays or target in rays or weighted or reduction not in (_MEAN, _SUM):
        return None
    if shape_of(x) != shape_of(target):
        return None

    def each(outputs: Tensor, wanted: Tensor) -> Tensor:
        if name == "mse_loss":
            return (outputs - wanted).square()
        if name == "l1_loss":
            return (outputs - wanted).abs()
        return F.binary_cross_entropy_with_logits(
            outputs, wanted.expand_as(outputs), reduction="none"
        )

    def run(values: Values) -> Tensor:
        losses = each(values[x], values[target]).flatten(1)
        total = losses.sum(1, dtype=torch.float64)
        return total / math.prod(shape_of(x)) if reduction == _MEAN else total

    return run


@dataclass(frozen=True)
class SummedLoss:
    """A last operation that sums a loss over examples, as the core can.

    Args:
        kind: its name there.
        outputs, target: nodes.
        mean: whether the sum is divided by its number of terms.
        ignore_index: of classes.
    """

    kind: str
    outputs: fx.Node
    target: fx.Node
    mean: bool
    ignore_index: int = -100

    def count(self, target: Tensor) -> float:
        """What the sum is divided by."""
        if not self.mean:
            return 1.0
        if self.kind == "cross_entropy":
            return float((target != self.ignore_index).sum())
        return float(target.numel())


_SUMMED = {
    "cross_entropy_loss": "cross_entropy",
    "mse_loss": "mse",
    "binary_cross_entropy_with_logits": "bce_with_logits",
}


def summed_loss(node: fx.Node, rays: Set[fx.Node]) -> SummedLoss | None:
    """The loss of ``node`` as the core sums it; ``None`` where it is another one."""
    kind = _SUMMED.get(operation_name(node))
    if kind is None:
        return None
    given = arguments(node)
    x, target, reduction = given["self"], given["target"], given["reduction"]
    weighted = given.get("weight") is not None or given.get("pos_weight") is not None
    if weighted or given.get("label_smoothing") or reduction not in (_MEAN, _SUM):
        return None
    if x not in rays or target in rays:
        return None
    wanted, dtype = target.meta["val"], x.meta["val"].dtype
    if kind == "cross_entropy":
        fits = wanted.dtype == torch.int64 and len(shape_of(x)) == 2
    else:
        fits = wanted.dtype == dtype and shape_of(x) == shape_of(target)
    if not fits or dtype not in (torch.float32, torch.float64):
        return None
    return SummedLoss(kind, x, target, reduction == _MEAN, given.get("ignore_index", -100))
