"""What fastvol raises and warns with."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class FastvolError(Exception):
    """An input or a run that cannot give an answer; the message names the argument to change."""


class NotAvailableError(FastvolError, NotImplementedError):
    """An argument of :func:`fastvol.estimate` that this version knows by name but cannot serve."""


class FastvolWarning(UserWarning):
    """The run goes on, but not in the way, or with the trust, that the caller may expect."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a run: the message says how much is done, and where it lies.

    ``except KeyboardInterrupt`` catches it.

    Attributes:
        n_done, n: directions settled, and asked for, at the threshold that was being worked on.
        checkpoint: the folder that holds them, or ``None``.
    """

    def __init__(self, message: str, n_done: int = 0, n: int = 0, checkpoint: str | None = None):
        super().__init__(message)
        self.n_done = n_done
        self.n = n
        self.checkpoint = checkpoint


def warn(text: str) -> None:
    """Gives a :class:`FastvolWarning` at the line of the caller's own code that led here."""
    package = __name__.partition(".")[0]
    frame: FrameType | None = sys._getframe()
    level = outermost = 1
    while frame is not None:
        # Between two of this package's there may be some of PyTorch's.
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            outermost = level
        frame, level = frame.f_back, level + 1
    warnings.warn(text, FastvolWarning, stacklevel=outermost + 1)
