"""What a layer gives at a radius, from what it gives at θ* and what it changes by, in one pass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS, activate
from .launch import launch, per_lane

_FIXED = triton.Config({"SIZE": 1024}, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["lanes"])
def scaled_add_kernel(
    out: tl.tensor,
    base: tl.tensor,
    change: tl.tensor,
    coefficient: tl.tensor,
    places: tl.tensor,
    count: tl.tensor,
    lanes: tl.tensor,
    HAS_PLACES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """One tile of one lane; lanes are innermost, so that they read the same base together."""
    lane = tl.program_id(0) % lanes
    index = (tl.program_id(0) // lanes) * SIZE + tl.arange(0, SIZE)
    inside = index < count
    if HAS_PLACES:
        change += tl.load(places + lane) * count
    else:
        change += lane.to(tl.int64) * count
    c = tl.load(coefficient + lane).to(tl.float32)
    start = tl.load(base + index, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(change + index, mask=inside, other=0.0).to(tl.float32)
    value = activate(start + c * step, ACTIVATION)
    tl.store(out + lane.to(tl.int64) * count + index, value.to(out.dtype.element_ty), mask=inside)


def scaled_add(
    base: Tensor,
    change: Tensor,
    coefficient: npt.NDArray[np.float64] | Tensor,
    *,
    places: Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`fastvol._reference.perturbed.scaled_add`; base and changes are contiguous."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {ACTIVATIONS}, got {activation!r}")
    if change.shape[1:] != base.shape or not (base.is_contiguous() and change.is_contiguous()):
        raise ValueError(
            f"change must be contiguous of shape [lanes, {', '.join(map(str, base.shape))}], as "
            f"base is, got {tuple(change.shape)}"
        )
    count = base.numel()
    if count >= 2**31:
        raise ValueError(f"base must have fewer than 2³¹ numbers, got {count}")
    c = per_lane(coefficient, torch.float64, base.device)
    lanes = len(c)
    out = torch.empty((lanes, *base.shape), dtype=dtype or base.dtype, device=base.device)
    launch(
        scaled_add_kernel,
        lambda meta: (lanes * triton.cdiv(count, meta["SIZE"]),),
        {
            "out": out,
            "base": base,
            "change": change,
            "coefficient": c,
            "places": c if places is None else places,
            "count": count,
            "lanes": lanes,
            "HAS_PLACES": places is not None,
            "ACTIVATION": activation,
        },
        fixed=_FIXED,
    )
    return out
