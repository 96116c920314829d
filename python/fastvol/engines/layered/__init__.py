"""The layered engine: the loss as a list of operations, each on many rays at once."""

from __future__ import annotations

from . import onednn
from .engine import LayeredEngine
from .tracing import UntraceableError

__all__ = ["LayeredEngine", "UntraceableError", "onednn"]
