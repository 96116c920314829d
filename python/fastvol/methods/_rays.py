"""A run of independent rays, whatever the law of their directions."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .._problem import Problem, Progress
from .._proposal import Proposal
from ..engines import Engine
from ..result import Rays, VolumeEstimate, assemble
from ._audit import audit
from ._screen import choose_screen
from ._search import Pilot, RayLoss, make_pilot, pilot_source, scan, settle


def run_threshold(
    problem: Problem,
    engine: Engine,
    threshold: float,
    bar: Any,
    *,
    method: str,
    proposal: Proposal | None = None,
    pilot: Pilot | None = None,
    n_loss: int = 0,
    n_grad: int = 0,
    notes: tuple[str, ...] = (),
) -> VolumeEstimate:
    """The estimate from ``problem.n`` rays at one threshold.

    Args:
        problem, engine, threshold: of the run.
        bar: progress, in directions.
        method: its name, for the config.
        proposal: the law of the directions; ``None`` is isotropic.
        pilot: of this law; made here by default.
        n_loss, n_grad: evaluations that were spent on the proposal and its pilot.
        notes: further sentences for the result's warnings.
    """
    began = time.perf_counter()
    rays = Rays.empty(problem.n)
    pilot_loss = pilot_source(problem, engine, proposal)
    if pilot is None:
        pilot, _ = make_pilot(problem, pilot_loss, threshold)
    problem, screen, screen_loss = choose_screen(problem, engine, pilot, threshold, proposal)
    loss = RayLoss(problem, engine, 0, proposal)
    constant_of_law = 0.0 if proposal is None else proposal.log_constant

    n, block = problem.n, problem.plan.block
    running = problem.backend.LogMeanExp()
    for first in range(0, n, block):
        ids = np.arange(first, min(first + block, n))
        start = None if screen is None else screen.starts(ids)
        rays.log_radii[ids], rays.status[ids] = settle(problem, loss, pilot, threshold, ids, start)
        rays.shift[ids] = loss.shift
        rays.log_offset[ids] = loss.offsets()
        if problem.first_crossing:
            scan(problem, loss, pilot, threshold, rays, ids)
        weights, constant = rays.log_weights(problem.measure, problem.dim, ids)
        running.update(weights)
        log_volume = running.log_mean + constant + constant_of_law - 0.5 * problem.offset_squared
        bar.set_postfix_str(f"{log_volume:.4g} ± {running.stderr:.2g} nats", refresh=False)
        bar.update(len(ids))
        for callback in problem.callbacks:
            callback(
                Progress(
                    n_done=int(ids[-1]) + 1,
                    n=n,
                    threshold=threshold,
                    log_radii=rays.log_radii[: ids[-1] + 1].copy(),
                    log_volume_metric=log_volume,
                    stderr=running.stderr,
                    seconds=time.perf_counter() - problem.began,
                )
            )
    search_loss = loss.n_loss
    if problem.first_crossing:
        rays.audited[:] = True
    else:
        audit(problem, loss, pilot, threshold, rays, search_loss)

    if screen is not None:
        screen_loss += screen.n_loss
    now = time.perf_counter()
    config = {
        **problem.config,
        "threshold": threshold,
        "method": method,
        "pilot": pilot.describe(),
    }
    if proposal is not None:
        config["preconditioner"] = proposal.describe()
    provenance = {
        **problem.provenance,
        "engine_seconds": pilot_loss.seconds
        + loss.seconds
        + (0.0 if screen is None else screen.seconds),
        "run_seconds": now - began,
        "remarks": list(notes),
    }
    return assemble(
        rays,
        measure=problem.measure,
        dim=problem.dim,
        log_abs_scale=problem.log_abs_scale,
        offset_squared=problem.offset_squared,
        log_constant=constant_of_law,
        log_constant_error=0.0 if proposal is None else proposal.log_constant_error,
        seeds=(problem.seed,),
        config=config,
        plan=problem.plan.describe(),
        provenance=provenance,
        n_loss=n_loss + pilot_loss.n_loss + screen_loss + loss.n_loss,
        n_grad=n_grad,
        seconds=now - problem.began,
    )
