"""Estimators of the basin's volume. One file each; this list names them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from .._problem import Problem
from ..result import VolumeEstimate

Method = Callable[[Problem], list[VolumeEstimate]]

# Name to module; the module's ``run`` is the method. "auto" takes the cheapest that there is.
_METHODS = {
    "auto": ".auto",
    "radial": ".radial",
    "preconditioned": ".preconditioned",
    "annealed": ".annealed",
    "splitting": ".splitting",
}


def get(name: str) -> Method:
    """The method by name.

    Raises:
        ValueError: unknown.
    """
    if name not in _METHODS:
        raise ValueError(f"method must be one of {[*_METHODS]}, got {name!r}")
    method: Method = import_module(_METHODS[name], __name__).run
    return method
