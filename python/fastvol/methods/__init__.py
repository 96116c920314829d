"""Estimators of the basin's volume. One file each; this list names them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from .._problem import Problem
from ..errors import NotAvailableError
from ..result import VolumeEstimate

Method = Callable[[Problem], list[VolumeEstimate]]

# Name to module; the module's ``run`` is the method. "auto" takes the cheapest that there is.
_METHODS = {"auto": ".radial", "radial": ".radial"}
_LATER = ("preconditioned", "annealed", "splitting")


def get(name: str) -> Method:
    """The method by name.

    Raises:
        ValueError: unknown. NotAvailableError: known by name only.
    """
    if name in _LATER:
        raise NotAvailableError(
            f"method={name!r} is not part of this version; method='radial' gives the profile up to "
            "its reliable radius, and a lower bound beyond"
        )
    if name not in _METHODS:
        raise ValueError(f"method must be one of {[*_METHODS, *_LATER]}, got {name!r}")
    method: Method = import_module(_METHODS[name], __name__).run
    return method
