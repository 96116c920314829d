"""Engines evaluate the loss on many rays at once. One file each; this list names them."""

from __future__ import annotations

from .general import GeneralEngine, Plan, measure_plan, warn_of_single_rays
from .inplace import InPlaceEngine
from .planning import choose_plan, open_engine, plan_in_place, reason_to_write
from .protocol import Capabilities, Dense, Engine, Indexed, LinearOperator, Losses, RayInfo

__all__ = [
    "Capabilities",
    "Dense",
    "Engine",
    "GeneralEngine",
    "InPlaceEngine",
    "Indexed",
    "LinearOperator",
    "Losses",
    "Plan",
    "RayInfo",
    "check_name",
    "choose_plan",
    "measure_plan",
    "open_engine",
    "plan_in_place",
    "reason_to_write",
    "warn_of_single_rays",
]

_NAMES = ("auto", "general", "layered", "inplace")


def check_name(engine: str) -> None:
    """Refuses an unknown ``engine=``.

    Raises:
        ValueError: naming it.
    """
    if engine not in _NAMES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, _NAMES))}, got {engine!r}")
