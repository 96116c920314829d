"""Opens the folder of ``checkpoint=``: the identity of a call, and the plan it goes on with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import _backend
from ._backend import Backend
from ._layout import ParameterLayout
from ._running import read_plan
from .engines import Plan
from .errors import FastvolError, FastvolWarning


def plan_of_folder(
    stored: Mapping[str, Any],
    layout: ParameterLayout,
    *,
    engine: str,
    backend: str,
    lanes: int | None,
) -> tuple[Plan | None, Backend]:
    """The plan that a folder was made with, as far as this call and this machine allow.

    Args:
        stored: its description.
        layout: the moved parameters.
        engine, backend: names, or ``"auto"``. lanes: if the caller fixed them.

    Returns:
        The plan, or ``None`` where another one has to be measured: then radii agree within the
        run's tolerance, not bit for bit. And the backend.
    """
    told = dict(stored)
    cores = os.cpu_count() or 1
    for name in ("threads", "noise_threads"):
        if isinstance(told.get(name), int):
            told[name] = min(told[name], cores)
    try:
        chosen = _backend.select(told["backend"] if backend == "auto" else backend)
        if engine not in ("auto", told["engine"]) or chosen.name != told["backend"]:
            return None, chosen
        plan = read_plan(told, chosen, layout, None)
    except (LookupError, ValueError) as error:
        warnings.warn(
            f"checkpoint: the folder's plan cannot be carried out here ({error}); another one is "
            "measured, and radii agree within rtol",
            FastvolWarning,
            stacklevel=3,
        )
        return None, _backend.select(backend)
    if lanes is not None and lanes != plan.lanes:
        plan = replace(plan, lanes=lanes, chunk=min(plan.chunk, lanes))
    return plan, chosen


def check_block(plan: Plan, stored: Mapping[str, Any]) -> None:
    """Refuses a plan whose blocks are not the folder's."""
    if plan.block != stored.get("block"):
        raise FastvolError(
            f"checkpoint: the plan has blocks of {plan.block} directions, the folder's have "
            f"{stored.get('block')}"
        )
