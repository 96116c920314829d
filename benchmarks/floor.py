"""The machine's own floor: the matrix products and convolutions of one forward pass, alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .peers import torch_threads
from .problems import Problem

_OPERATORS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class _MatrixWork(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that multiplies matrices, with its arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.addmm.default:
            _, a, b = args
            self.calls.append(lambda: torch.mm(a, b))
        elif func in _OPERATORS:
            self.calls.append(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


class Floor:
    """One pass of matrix work over the data, in the network's own precision.

    For an MLP these are ``torch.mm`` of the layers' inputs and weights. Nothing else of a forward
    pass is in it: no bias, activation, normalisation or loss.

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

    def milliseconds(self, at_least: float = 0.02) -> float:
        """The quickest pass of as many as fit into so many seconds, three at the least.

        With one thread or all, whichever is the quicker: on busy cores threads wait for each other.
        """
        return 1e3 * min(self._quickest(threads, at_least) for threads in self._threads)

    def _quickest(self, threads: int, at_least: float) -> float:
        best, passes = math.inf, 0
        with torch.no_grad(), torch_threads(threads):
            deadline = time.perf_counter() + at_least
            while passes < 3 or time.perf_counter() < deadline:
                began = time.perf_counter()
                for call in self._calls:
                    call()
                best = min(best, time.perf_counter() - began)
                passes += 1
        return best
