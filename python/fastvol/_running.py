"""What surrounds a run: PyTorch's threads, its advice, and a plan that the caller brings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ._backend import Backend
from ._layout import ParameterLayout
from .engines import Plan


def read_plan(plan: Any, backend: Backend, layout: ParameterLayout, lanes: int | None) -> Plan:
    if not isinstance(plan, Mapping):
        raise TypeError(f"plan must be the plan of a result, got {type(plan).__name__}")
    read = Plan.from_description(plan)
    if lanes is not None and lanes != read.lanes:
        raise ValueError(f"plan has {read.lanes} lanes, and lanes={lanes} was asked for")
    own = {"backend": backend.name, "dtype": str(layout.dtype).removeprefix("torch.")}
    for name, value in own.items():
        if getattr(read, name) != value:
            raise ValueError(
                f"plan was made with {name} {getattr(read, name)!r}, this run has {value!r}"
            )
    return read


class Threads:
    """PyTorch's thread count as a given plan asks, and as it was afterwards."""

    def __init__(self, plan: Plan | None) -> None:
        self._wanted = None if plan is None else plan.threads

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        if self._wanted is not None and self._wanted != self._before:
            torch.set_num_threads(self._wanted)

    def __exit__(self, *exception: object) -> None:
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Without PyTorch's advice on operators that vmap runs one ray at a time: that is measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield
