"""Opens the folder of ``checkpoint=``: the identity of a call, and the plan it goes on with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from . import _backend
from ._backend import Backend
from ._layout import ParameterLayout
from ._running import read_plan
from ._work import Work
from .checkpoints import Folder, Identity
from .engines import Plan
from .errors import FastvolError, warn


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
    told = _with_own_cores(stored)
    try:
        chosen = _backend.select(told["backend"] if backend == "auto" else backend)
        if engine not in ("auto", told["engine"]) or chosen.name != told["backend"]:
            return None, chosen
        plan = read_plan(told, chosen, layout, None)
    except (LookupError, ValueError) as error:
        warn(
            f"checkpoint: the folder's plan cannot be carried out here ({error}); another one is "
            "measured, and radii agree within rtol",
        )
        return None, _backend.select(backend)
    if lanes is not None and lanes != plan.lanes:
        plan = replace(plan, lanes=lanes, chunk=min(plan.chunk, lanes))
    return plan, chosen


def agree(
    work: Work,
    checkpoint: Any,
    identity: Identity | None,
    loss0: float,
    plan_for: Callable[[Mapping[str, Any] | None, float], Plan],
    told: Mapping[str, Any],
) -> tuple[float, Plan]:
    """L(θ*) and the plan of a run: those of its folder, and the same on every process.

    Args:
        work: of the call. checkpoint: as it was given.
        identity: of the call; ``None`` where there is neither a folder nor another process.
        loss0: L(θ*) as it was computed here.
        plan_for: makes the plan, from the folder's and L(θ*).
        told: for people who look into the folder.

    Raises:
        FastvolError: the folder belongs to another run, or the processes do not make one call.
    """
    if identity is None:
        return loss0, plan_for(None, loss0)
    plan: Plan | None = None

    def begin() -> dict[str, Any]:
        nonlocal loss0, plan
        manifest = stored = None
        if work.folder is not None and work.folder.manifest is not None:
            work.folder.verify(identity)
            # Thresholds may depend on its last digit.
            loss0 = work.folder.manifest["identity"]["losses"][0]
            stored = work.folder.plan
        plan = plan_for(stored, loss0)
        if work.folder is not None:
            if stored is None:
                work.folder.create(identity, plan.describe(), told)
            _check_block(plan, work.folder.plan)
            manifest = work.folder.manifest
        return {
            "identity": identity.describe(),
            "loss0": loss0,
            "plan": plan.describe(),
            "manifest": manifest,
        }

    message = work.told(begin)
    differing = [] if work.leads else identity.differences(message["identity"], "rank 0")
    # Those that hold a module together also end together.
    if work.group.any(bool(differing)):
        raise FastvolError(
            "all processes of a group have to make the same call, and "
            + ("this one's " + "; its ".join(differing) if differing else "another one's differs")
        )
    if plan is not None:
        return loss0, plan
    if message["manifest"] is not None and work.group.alone:
        # Another machine may not see it, or have one of its own, which is none of this run's.
        with contextlib.suppress(FileNotFoundError, FastvolError):
            folder = Folder(checkpoint, owner=False)
            if folder.manifest == message["manifest"]:
                work.folder = folder
    return message["loss0"], Plan.from_description(_with_own_cores(message["plan"]))


def _with_own_cores(stored: Mapping[str, Any]) -> dict[str, Any]:
    told = dict(stored)
    cores = os.cpu_count() or 1
    for name in ("threads", "noise_threads", "workers"):
        if isinstance(told.get(name), int):
            told[name] = min(told[name], cores)
    return told


def _check_block(plan: Plan, stored: Mapping[str, Any]) -> None:
    """Refuses a plan whose blocks are not the folder's."""
    if plan.block != stored.get("block"):
        raise FastvolError(
            f"checkpoint: the plan has blocks of {plan.block} directions, the folder's have "
            f"{stored.get('block')}"
        )
