"""Layers whose weights lie on rays, W + c·s⊙Z: what the fused kernels must reproduce.

The definitions: each makes the weights of all lanes at once, in the plainest way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from .noise import coordinates

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: npt.NDArray[np.float64],
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64],
    *,
    offset: int = 0,
    bias_offset: int | None = None,
    scale: Tensor | None = None,
    bias_scale: Tensor | None = None,
    antithetic: bool = False,
    activation: str | None = None,
    precision: str = "tf32",
    base: Tensor | None = None,
    base_activation: str | None = None,
    places: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """act(x·(W + c·s⊙Z)ᵀ + b + c·s_b⊙z_b) of each lane, ``[k, n, out]`` in the dtype of x.

    Args:
        x: ``[n, in]``, shared by the lanes, or ``[k, n, in]``.
        weight: W ``[out, in]``.
        bias: b ``[out]``, or ``None`` for a layer without.
        coefficient: c, float64 ``[k]``.
        seed: 64-bit key.
        stream: which of the independent families of directions.
        ids: direction indices ``[k]``.
        offset: where W begins in a direction; row after row.
        bias_offset: where b begins; after W unless given.
        scale: s ``[out, in]``, or one number a row ``[out]``, or ``None`` for ones.
        bias_scale: s_b ``[out]``, or ``None`` for ones.
        antithetic: directions 2i and 2i+1 are ± vector i.
        activation: one of :data:`ACTIVATIONS`, or ``None``.
        precision: of the operands of the product. ``"bf16"`` rounds x and the perturbed weights;
            the others (``"tf32"``; ``"bf16x3"``, which keeps 16 bits of each; ``"tf32x3"``,
            ``"ieee"`` and ``"fp32"``, the faster of these two) only let the kernels round them, and
            are computed in the dtype of x here, at least in float32.
        base: ``[n, in]``: then x ``[l, n, in]`` is what the layer's inputs change by, and it sees
            act(base + c·x).
        base_activation: that act, one of :data:`ACTIVATIONS`, or ``None``.
        places: int64 ``[k]``, which lane of x each lane reads; one after the other by default.
        dtype: of the result, that of x by default.
    """
    if places is not None:
        x = x[places]
    if base is not None:
        c = torch.as_tensor(coefficient).to(device=x.device, dtype=_working(x).dtype)
        x = _activated(base + c[:, None, None] * x, base_activation)
    change, shift = _changes(
        weight.shape,
        seed,
        stream,
        ids,
        bias is not None,
        offset,
        bias_offset,
        scale,
        bias_scale,
        antithetic,
        _working(x),
    )
    weights, biases = _on_rays(weight, bias, coefficient, change, shift)
    return _activated(_linear(x, weights, biases, precision), activation).to(dtype or x.dtype)


def direction_linear(
    x: Tensor,
    outputs: int,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64],
    *,
    bias: bool = False,
    offset: int = 0,
    bias_offset: int | None = None,
    scale: Tensor | None = None,
    bias_scale: Tensor | None = None,
    antithetic: bool = False,
    precision: str = "tf32",
    out: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """x·(s⊙Z)ᵀ of each lane, plus s_b⊙z_b with ``bias``: ``[k, n, out]`` in the dtype of x.

    What a linear layer changes by along a direction, from which every radius follows.

    Args:
        x, seed, stream, ids, offset, bias_offset: as for :func:`perturbed_linear`.
        outputs: of the layer.
        bias: whether the layer has one.
        scale, bias_scale, antithetic, precision: as for :func:`perturbed_linear`.
        out: ``[l, n, out]`` to write to and return, instead of a new tensor.
        places: int64 ``[k]``, which lane of ``out`` each lane writes; by default all, in order.
    """
    shape = torch.Size((outputs, x.shape[-1]))
    change, shift = _changes(
        shape,
        seed,
        stream,
        ids,
        bias,
        offset,
        bias_offset,
        scale,
        bias_scale,
        antithetic,
        _working(x),
    )
    return _placed(_linear(x, change, shift, precision).to(x.dtype), out, places)


def perturbed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: npt.NDArray[np.float64],
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64],
    *,
    offset: int = 0,
    bias_offset: int | None = None,
    scale: Tensor | None = None,
    bias_scale: Tensor | None = None,
    antithetic: bool = False,
    activation: str | None = None,
    precision: str = "tf32",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution whose weights lie on rays: ``[k, n, out, height, width]`` in the dtype of x.

    Args:
        x: ``[n, in, height, width]``, shared by the lanes, or ``[k, n, in, height, width]``.
        weight: W ``[out, in / groups, kernel height, kernel width]``.
        bias, coefficient, seed, stream, ids: as for :func:`perturbed_linear`.
        offset, bias_offset, bias_scale, antithetic, activation, precision: likewise.
        scale: s in the shape of W, or one number a filter ``[out]``, or ``None`` for ones.
        stride, padding, dilation, groups: as for :func:`torch.nn.functional.conv2d`.
    """
    change, shift = _changes(
        weight.shape,
        seed,
        stream,
        ids,
        bias is not None,
        offset,
        bias_offset,
        scale,
        bias_scale,
        antithetic,
        _working(x),
    )
    weights, biases = _on_rays(weight, bias, coefficient, change, shift)
    result = _conv2d(x, weights, biases, precision, stride, padding, dilation, groups)
    return _activated(result, activation).to(x.dtype)


def direction_conv2d(
    x: Tensor,
    shape: Sequence[int],
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64],
    *,
    bias: bool = False,
    offset: int = 0,
    bias_offset: int | None = None,
    scale: Tensor | None = None,
    bias_scale: Tensor | None = None,
    antithetic: bool = False,
    precision: str = "tf32",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    out: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """What a convolution changes by along a direction: ``[k, n, out, height, width]``.

    Args:
        x, scale, stride, padding, dilation, groups: as for :func:`perturbed_conv2d`.
        shape: of the weights.
        seed, stream, ids, bias, offset, bias_offset: as for :func:`direction_linear`.
        bias_scale, antithetic, precision, out, places: likewise.
    """
    change, shift = _changes(
        torch.Size(shape),
        seed,
        stream,
        ids,
        bias,
        offset,
        bias_offset,
        scale,
        bias_scale,
        antithetic,
        _working(x),
    )
    result = _conv2d(x, change, shift, precision, stride, padding, dilation, groups)
    return _placed(result.to(x.dtype), out, places)


def scaled_add(
    base: Tensor,
    change: Tensor,
    coefficient: npt.NDArray[np.float64] | Tensor,
    *,
    places: Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """act(base + c·change) of each lane, ``[k, …]``: what a layer makes of shared data at a radius.

    Args:
        base: ``[…]``, what it makes of them at θ*.
        change: ``[l, …]``, of some directions.
        coefficient: c, ``[k]``.
        places: int64 ``[k]``, which of the changes each lane reads; one after the other by default.
        activation: one of :data:`ACTIVATIONS`, or ``None``.
        dtype: of the result, that of base by default.
    """
    if places is not None:
        change = change[places]
    working = _working(base)
    c = torch.as_tensor(coefficient).to(working).view(-1, *(1,) * base.dim())
    total = base.to(working.dtype) + c * change[: len(c)].to(working.dtype)
    return _activated(total, activation).to(dtype or base.dtype)


def _placed(result: Tensor, out: Tensor | None, places: Tensor | None) -> Tensor:
    if out is None:
        return result
    if places is None:
        return out.copy_(result)
    return out.index_copy_(0, places, result)


def _working(x: Tensor) -> Tensor:
    """An empty tensor of the dtype and on the device that a layer on x computes with."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(0, dtype=dtype, device=x.device)


def _changes(
    shape: torch.Size,
    seed: int,
    stream: int,
    ids: npt.NDArray[np.int64],
    has_bias: bool,
    offset: int,
    bias_offset: int | None,
    scale: Tensor | None,
    bias_scale: Tensor | None,
    antithetic: bool,
    like: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """s⊙Z ``[k, *shape]`` and s_b⊙z_b ``[k, out]``."""

    def noise(start: int, count: int) -> Tensor:
        z = coordinates(seed, stream, ids, start, start + count, antithetic, like.device)
        return z.to(like.dtype)

    change = noise(offset, shape.numel()).view(-1, *shape)
    if scale is not None:
        per_row = scale.dim() == 1 and len(shape) > 1
        rows = scale.view(-1, *(1,) * (len(shape) - 1)) if per_row else scale
        change = change * rows.to(like.dtype)
    if not has_bias:
        return change, None
    start = offset + shape.numel() if bias_offset is None else bias_offset
    shift = noise(start, shape[0])
    return change, shift if bias_scale is None else shift * bias_scale.to(like.dtype)


def _on_rays(
    weight: Tensor,
    bias: Tensor | None,
    coefficient: npt.NDArray[np.float64],
    change: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    c = torch.as_tensor(coefficient).to(change)
    weights = weight.to(change.dtype) + c.view(-1, *(1,) * weight.dim()) * change
    if bias is None or shift is None:
        return weights, None
    return weights, bias.to(change.dtype) + c[:, None] * shift


def _rounded(x: Tensor, like: Tensor, precision: str) -> Tensor:
    return x.to(torch.bfloat16).to(like.dtype) if precision == "bf16" else x.to(like.dtype)


def _linear(x: Tensor, weights: Tensor, biases: Tensor | None, precision: str) -> Tensor:
    rows = _rounded(x, weights, precision)
    result = torch.matmul(rows, _rounded(weights, weights, precision).mT)
    return result if biases is None else result + biases[:, None, :]


def _conv2d(
    x: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    precision: str,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
) -> Tensor:
    images = _rounded(x, weights, precision)
    filters = _rounded(weights, weights, precision)
    shared = x.dim() == 4
    return torch.stack(
        [
            F.conv2d(
                images if shared else images[lane],
                filters[lane],
                None if biases is None else biases[lane],
                stride,
                padding,
                dilation,
                groups,
            )
            for lane in range(len(filters))
        ]
    )


def _activated(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else ACTIVATIONS[activation](x)
