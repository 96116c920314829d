"""Products of float32 matrices on a CPU by oneDNN, beside those that PyTorch chooses.

PyTorch gives them to the library it was built with, which on some processors leaves half of their
vector units idle. oneDNN comes with PyTorch too, for convolutions; its linear layers are reached by
the operation that PyTorch's own compiler uses. Which is faster, a measurement has to tell.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`linear` is another function than PyTorch's own."""
    return (
        dtype == torch.float32
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` without a gradient; of other dtypes, and under autocast, that itself."""
    alike = rows.dtype == weight.dtype == torch.float32
    if not alike or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
        return F.linear(rows, weight, bias)
    product: Any = torch.ops.mkldnn._linear_pointwise
    result: Tensor = product(rows, weight.contiguous(), bias, "none", [], "")
    return result


def linear_of_rays(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer on each of K rays, one after the other.

    Args:
        rows: ``[N, in]``, or ``[K, N, in]`` of the rays.
        weight: ``[K, out, in]``.
        bias: ``[out]``, ``[K, out]`` of the rays, or ``None``.

    Returns:
        ``[K, N, out]``.
    """
    count = len(weight)

    def one(ray: int) -> Tensor:
        own = bias[ray] if bias is not None and bias.dim() == 2 else bias
        return linear(rows[ray] if rows.dim() == 3 else rows, weight[ray], own)

    if count == 1:
        return one(0)[None]
    first = one(0)
    result = first.new_empty((count, *first.shape))
    result[0] = first
    for ray in range(1, count):
        result[ray] = one(ray)
    return result
