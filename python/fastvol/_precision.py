"""Products of float32 matrices as exact as float32, whatever PyTorch may do elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def products(*, tf32: bool) -> Iterator[None]:
    """Whether a GPU may round the operands of float32 products to tf32; restored afterwards.

    A radius that a rounded loss confirms is off by what all its evaluations share, which no spread
    of them tells; so only a search for where to begin may round.
    """
    with ExitStack() as stack:
        for where in (torch.backends.cuda.matmul, torch.backends.cudnn):
            stack.callback(_set(where, tf32=tf32))
        yield


def _set(where: Any, *, tf32: bool) -> Any:
    """Sets it by the interface that the caller has used; returns what undoes that."""
    with warnings.catch_warnings():
        # The older of the two is as good, and tells of the other.
        warnings.simplefilter("ignore")
        try:
            before: Any = where.allow_tf32
            name, value = "allow_tf32", tf32
        except RuntimeError:
            # PyTorch refuses to say where both interfaces have been used.
            parts = [getattr(where, part, None) for part in ("conv", "rnn")]
            undo = [
                _assigned(part, "fp32_precision", "tf32" if tf32 else "ieee")
                for part in (where, *parts)
                if part is not None
            ]
            return lambda: [one() for one in reversed(undo)]
        return _assigned(where, name, value, before)


def _assigned(where: Any, name: str, value: Any, before: Any = None) -> Any:
    before = getattr(where, name) if before is None else before
    if before != value:
        setattr(where, name, value)

    def undo() -> None:
        if getattr(where, name) != before:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                setattr(where, name, before)

    return undo
