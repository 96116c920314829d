"""What a card can do at the most, measured: copying, products of matrices, integers."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from fastvol._precision import products

# Integer operations of a normal number, of four of which ten rounds of Philox make the words.
_OPERATIONS = 20
# 32-bit integer operations of a multiprocessor in a cycle, from Ampere on.
_INTEGERS = 64


def seconds(function: Callable[[], Any], device: torch.device, *, repeats: int = 10) -> float:
    """The least time of a call, after two that do not count."""
    for _ in range(2):
        function()
    best = math.inf
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = _event(), _event()
            start.record()
            function()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            function()
            best = min(best, time.perf_counter() - began)
    return best


def kernel_seconds(
    function: Callable[[], Any], device: torch.device, *, repeats: int = 5, calls: int = 10
) -> float:
    """The least time of a call among ``calls`` that follow each other on the card at once.

    They are captured in a CUDA graph, as the rounds of a run are: what the host needs to launch a
    kernel is not of the kernel. Where they cannot be captured, and on a CPU, :func:`seconds`.

    Args:
        function: its tensors are on the device, and it waits for nothing.
        device: the card.
        repeats: of the calls together.
        calls: in the graph.
    """
    if device.type != "cuda":
        return seconds(function, device, repeats=repeats)
    for _ in range(2):
        function()
    current = torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
    except RuntimeError as error:
        print(f"not captured, so with the host's part: {str(error).splitlines()[0]}")
        return seconds(function, device, repeats=repeats)
    finally:
        # A capture that fails leaves its own stream behind.
        torch.cuda.set_stream(current)
    return seconds(graph.replay, device, repeats=repeats) / calls


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second, read and written, of copying float32 ``[size]``."""
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, precision: str, size: int) -> float:
    """Operations a second of a square product: ``"bf16"``, ``"tf32"`` or ``"fp32"``."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    with products(tf32=precision == "tf32"):
        return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), device)


def normals_bound(device: torch.device) -> float:
    """Normals a second that the card's integer units allow; NaN where its clock is not told."""
    if device.type != "cuda":
        return math.nan
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        clock = 1e6 * float(told.splitlines()[device.index or 0])
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError):
        return math.nan
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return units * _INTEGERS * clock / _OPERATIONS
