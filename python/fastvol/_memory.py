"""When memory runs out: fewer rays at once, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from ._problem import Problem
from .engines import Plan
from .errors import FastvolError

Results = TypeVar("Results")

# What PyTorch's allocators say where they raise no error of their own kind.
_SAYINGS = ("not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory")


class MemoryRanOutError(FastvolError):
    """Not even one ray fits."""


def within_memory(run: Callable[[Problem], Results], problem: Problem) -> Results:
    """What ``run`` returns; where memory runs out it runs again with half the lanes."""
    while True:
        try:
            return run(problem)
        except Exception as error:
            # Other processes would not know that this one begins again.
            alone = problem.work.alone
            if isinstance(error, MemoryRanOutError) or not ran_out(error) or not alone:
                raise
            plan = with_fewer_lanes(problem.plan, error, problem.work.kept_in)
        problem = replace(problem, plan=plan)


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a failed allocation."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _SAYINGS):
            return True
        error = error.__cause__
    return False


def with_fewer_lanes(plan: Plan, error: BaseException, kept: str) -> Plan:
    """The plan with half the lanes.

    Args:
        plan: that needed too much.
        error: that said so.
        kept: the folder with what is done, or "".

    Raises:
        MemoryRanOutError: there is one lane only.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if plan.lanes == 1:
        where = f"; what is done lies in {kept}, and the same call continues" if kept else ""
        raise MemoryRanOutError(
            "memory ran out with a single ray in flight (lanes=1): the model and one evaluation of "
            f"its loss do not fit, take smaller batches of data{where}. It was: {error}"
        ) from error
    lanes = plan.lanes // 2
    return replace(plan, lanes=lanes, chunk=min(plan.chunk, lanes))
