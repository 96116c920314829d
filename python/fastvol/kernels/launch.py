"""How kernels are launched: with fixed parameters, or the fastest of a few that are tried once.

Fixed ones are the default: a sum is then made in the same order in every run on every card. With
tuning on, each kernel keeps the fastest parameters per bucket of sizes for the life of the process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

_tuning = False


def set_tuning(on: bool) -> None:
    """Whether kernels try several launch parameters; never in the interpreter."""
    global _tuning
    _tuning = on


def interpreted(kernel: Any) -> bool:
    """Whether a kernel was made to run in Triton's interpreter, on tensors of any device."""
    return not isinstance(kernel, triton.JITFunction)


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]],
    arguments: Mapping[str, Any],
    *,
    fixed: triton.Config,
    candidates: Sequence[triton.Config] = (),
    key: Sequence[str] = (),
) -> None:
    """Runs a kernel on the device and in the stream of its first tensor.

    Args:
        kernel: made by ``triton.jit``.
        grid: the number of programs, given the launch parameters.
        arguments: all but the launch parameters, by name.
        fixed: the launch parameters where nothing is tuned.
        candidates: what tuning tries beside them; nothing: this kernel is never tuned.
        key: the integer arguments that tuning looks at, by buckets that the caller makes.
    """
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    if interpreted(kernel):
        kernel[grid](**arguments, **fixed.kwargs)
        return
    if first.device.type == "cpu":
        raise ValueError(
            f"the kernels run on a GPU, and got tensors on {first.device}; use the functions of "
            "the same names in fastvol._reference"
        )
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        if _tuning and candidates:
            _tuned(kernel, (fixed, *candidates), tuple(key))[grid](**arguments)
        else:
            kernel[grid](
                **arguments,
                **fixed.kwargs,
                num_warps=fixed.num_warps,
                num_stages=fixed.num_stages,
            )


@functools.cache
def _tuned(kernel: Any, configs: tuple[triton.Config, ...], key: tuple[str, ...]) -> Any:
    return triton.autotune(configs=list(configs), key=list(key))(kernel)


def bucket(size: int) -> int:
    """The next power of two: sizes that share one are tuned together."""
    return 1 << max(size - 1, 0).bit_length()


def signed_word(value: int) -> int:
    """The int32 with the low 32 bits of a number: one type of argument whatever the value."""
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >= 1 << 31 else low


def per_lane(values: npt.NDArray[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number a lane, contiguous on the device; a tensor that is there already is not copied."""
    if not isinstance(values, Tensor):
        numpy_dtype = np.float64 if dtype == torch.float64 else np.int64
        values = torch.from_numpy(np.ascontiguousarray(values, dtype=numpy_dtype))
    return values.to(device=device, dtype=dtype).contiguous()


def on_host(values: npt.NDArray[Any] | Tensor) -> npt.NDArray[Any]:
    """One number a lane, as the reference takes them."""
    return values.cpu().numpy() if isinstance(values, Tensor) else values
