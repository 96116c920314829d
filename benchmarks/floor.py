"""The machine's own floor: the matrix products and convolutions of one forward pass, alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastvol.engines.layered import onednn

from .peers import torch_threads
from .problems import Problem

_OPERATORS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class _MatrixWork(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that multiplies matrices, with its arguments: all ways to do it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[list[Callable[[], Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.addmm.default:
            _, a, b = args
            self.calls.append([lambda: torch.mm(a, b), *_by_onednn(a, b)])
        elif func in _OPERATORS:
            self.calls.append([lambda: func(*args, **kwargs)])
        return func(*args, **kwargs)


def _by_onednn(a: torch.Tensor, b: torch.Tensor) -> list[Callable[[], Any]]:
    if not onednn.is_available(a.dtype, a.device):
        return []
    weight = b.t().contiguous()
    return [lambda: onednn.linear(a, weight, None)]


class Floor:
    """One pass of matrix work over the data, in the network's own precision.

    For an MLP these are the products of the layers' inputs and weights, each by ``torch.mm`` or by
    oneDNN, whichever is the quicker. Nothing else of a forward pass is in it: no bias, activation,
    normalisation or loss.

    Args:
        problem: the network and its data.
        threads: the most that PyTorch may use.
    """

    def __init__(self, problem: Problem, threads: int) -> None:
        self._threads = sorted({1, threads})
        with torch.no_grad(), _MatrixWork() as work:
            problem.model(problem.inputs)
        if not work.calls:
            raise ValueError(f"{problem.name} has no matrix work that is known here")
        self._calls = work.calls

    def milliseconds(self, at_least: float = 0.02, *, torch_only: bool = False) -> float:
        """The quickest of as many passes as fit into so many seconds, three at the least.

        With one thread or all, whichever is the quicker: on busy cores threads wait for each other.

        Args:
            at_least: seconds for each number of threads.
            torch_only: whether every product is PyTorch's own.
        """
        ways = [call[:1] if torch_only else call for call in self._calls]
        return 1e3 * min(_quickest(ways, threads, at_least) for threads in self._threads)


def _quickest(calls: list[list[Callable[[], Any]]], threads: int, at_least: float) -> float:
    """Seconds of a pass, of every call its quickest way."""
    best = [[math.inf] * len(ways) for ways in calls]
    passes = 0
    with torch.no_grad(), torch_threads(threads):
        deadline = time.perf_counter() + at_least
        while passes < 3 or time.perf_counter() < deadline:
            for call, ways in enumerate(calls):
                for i, way in enumerate(ways):
                    began = time.perf_counter()
                    way()
                    best[call][i] = min(best[call][i], time.perf_counter() - began)
            passes += 1
    return sum(min(ways) for ways in best)
