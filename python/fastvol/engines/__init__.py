"""Engines evaluate the loss on many rays at once. One file each; this list names them."""

from __future__ import annotations

from ..errors import NotAvailableError
from .general import GeneralEngine, Plan, measure_plan, warn_of_single_rays
from .planning import choose_plan, open_engine
from .protocol import Capabilities, Dense, Engine, Indexed, LinearOperator, Losses, RayInfo

__all__ = [
    "Capabilities",
    "Dense",
    "Engine",
    "GeneralEngine",
    "Indexed",
    "LinearOperator",
    "Losses",
    "Plan",
    "RayInfo",
    "check_name",
    "choose_plan",
    "measure_plan",
    "open_engine",
    "warn_of_single_rays",
]

_LATER = ("inplace",)


def check_name(engine: str) -> None:
    """Refuses an ``engine=`` that this version does not have.

    Raises:
        ValueError: unknown. NotAvailableError: known by name only.
    """
    if engine in _LATER:
        raise NotAvailableError(
            f"engine={engine!r} is not part of this version; engine='auto' serves every module"
        )
    if engine not in ("auto", "general", "layered"):
        raise ValueError(
            f"engine must be one of 'auto', 'general', 'layered', 'inplace', got {engine!r}"
        )
