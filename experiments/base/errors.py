"""The one error that a user is told about without a traceback."""

from __future__ import annotations


class ExperimentError(Exception):
    """Something the user can mend: the message names what came and what would have worked."""
