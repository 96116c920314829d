"""What fastvol raises and warns with."""

from __future__ import annotations


class FastvolError(Exception):
    """An input or a run that cannot give an answer; the message names the argument to change."""


class NotAvailableError(FastvolError, NotImplementedError):
    """An argument of :func:`fastvol.estimate` that this version knows by name but cannot serve."""


class FastvolWarning(UserWarning):
    """The run goes on, but not in the way, or with the trust, that the caller may expect."""
