"""Checks of single arguments; every error names the argument."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor


def is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    return value


def boolean(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def whole(value: Any, name: str, *, least: int, below: int | None = None) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    exact: Any = value  # typeshed's Real knows neither floor nor comparison
    try:
        result: int = math.floor(exact)
    except (OverflowError, ValueError):  # infinite, NaN
        raise ValueError(f"{name} must be a whole number, got {value}") from None
    if exact != result:
        raise ValueError(f"{name} must be a whole number, got {value}")
    if result < least or (below is not None and result >= below):
        bound = f"at least {least}" + ("" if below is None else f" and below {below}")
        raise ValueError(f"{name} must be {bound}, got {result}")
    return result


def positive(value: Any, name: str, *, most: float) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be 'auto' or a number, got {value!r}")
    number: Any = value
    if not 1e-15 <= number <= most:
        raise ValueError(f"{name} must lie between 1e-15 and {most}, got {number}")
    return float(number)


def numbers_of(value: Any, name: str) -> tuple[list[float], bool]:
    single = isinstance(value, numbers.Real) or (
        isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0
    )
    entries: list[Any] = [value] if single else []
    if not single:
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a number or a sequence, got {type(value).__name__}")
        entries = list(value)
        if not entries:
            raise ValueError(f"{name} is an empty sequence")
    result = []
    for entry in entries:
        # NumPy would drop an imaginary part with no more than a warning.
        if isinstance(entry, (bool, np.bool_, str, bytes, complex, np.complexfloating)):
            raise TypeError(f"{name} must be numbers, got {entry!r}")
        try:
            number = float(entry)
        except OverflowError as error:
            raise ValueError(f"{name} must be finite, got a whole number too large") from error
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be numbers, got {type(entry).__name__}") from error
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}")
        result.append(number)
    return result, single
