"""Activations in registers, for the kernels that apply one to what they have made."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "sigmoid")


@triton.jit
def activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """By exponentials and erf alone, which every backend of Triton has."""
    if ACTIVATION == "relu":
        # Not a maximum, which would hide a NaN.
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "tanh":
        e = tl.exp(-2.0 * tl.abs(x))
        t = (1.0 - e) / (1.0 + e)
        return tl.where(x < 0, -t, t)
    elif ACTIVATION == "silu":
        e = tl.exp(-tl.abs(x))
        return x * tl.where(x < 0, e, 1.0) / (1.0 + e)
    elif ACTIVATION == "sigmoid":
        e = tl.exp(-tl.abs(x))
        return tl.where(x < 0, e, 1.0) / (1.0 + e)
    else:
        return x
