"""How far a kernel may be from its definition: the one table that all tests of kernels use.

The bounds are relative to the largest entry of what is compared, and absolute below 1. They hold in
the interpreter, which rounds float32 to bfloat16 downwards, as well as on a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# A normal against its float64 definition, by the dtype it is computed in.
NORMAL = {torch.float32: 1e-5, torch.float64: 1e-14}
# One unit in the last place of a result that is rounded to a dtype.
ROUNDING = {
    torch.float32: 2**-23,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
    torch.float64: 2**-52,
}
# Each of the two operands of a product of matrices, which a matrix unit may cut off at the last
# place that it knows; and sums that it may round downwards.
PRODUCT = {
    "bf16": 2**-8,
    "tf32": 2**-10,
    "bf16x3": 2**-17,
    "tf32x3": 5e-6,
    "ieee": 2e-6,
    "fp32": 5e-6,
}


def point(dtype: torch.dtype) -> float:
    """θ₀ + c·s⊙z, relative to the largest of its entries."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    return 2 * NORMAL[working] + 2 * ROUNDING[dtype]


def layer(precision: str, dtype: torch.dtype) -> float:
    """A layer, relative to the largest of its entries."""
    return NORMAL[torch.float32] + 2 * PRODUCT[precision] + 2 * ROUNDING[dtype]


def assert_close(found: Tensor, definition: Tensor, tolerance: float) -> None:
    """Every entry within ``tolerance`` of the largest one of the definition, or of 1."""
    assert found.shape == definition.shape
    assert found.dtype == definition.dtype
    assert not found.isnan().any()
    found, definition = found.double().cpu(), definition.double().cpu()
    largest = max(1.0, float(definition.abs().max()))
    error = float((found - definition).abs().max())
    assert error <= tolerance * largest, f"{error:.3g} > {tolerance:.3g} · {largest:.3g}"


def assert_reduced(found: object, definition: object, d: int, dtype: torch.dtype) -> None:
    """‖z‖ or ⟨z, project⟩ of d coordinates; ``project`` has entries of about 1."""
    a, b = (np.asarray(torch.as_tensor(v).cpu(), dtype=np.float64) for v in (found, definition))
    assert a.shape == b.shape
    error = NORMAL[torch.float64 if dtype == torch.float64 else torch.float32]
    if dtype == torch.bfloat16:
        # A normal near the middle of two bfloat16 may go either way.
        error = ROUNDING[dtype] / d**0.5
    np.testing.assert_allclose(a, b, rtol=0, atol=4 * error * max(1.0, d**0.5))
