"""Peers and fastvol on the very same directions: no ratio where their radii disagree."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from fastvol._reference import noise

from . import peers
from .peers import Direction, LossAt
from .problems import Problem

Float = npt.NDArray[np.float64]

# What the two ways of rounding θ* + c·s·z in float32 may do to a log radius.
_ROUNDING = 1e-5


class DisagreementError(AssertionError):
    """A peer's radius is not fastvol's."""


def fastvol_direction(problem: Problem, seed: int, index: int) -> Direction:
    """Direction ``index`` of fastvol, as tensors by parameter name, filter-normalised."""
    row = torch.empty((1, problem.dim))
    norm, _ = noise.normals(row, seed, 0, np.array([index]))
    parts, start = {}, 0
    for name, scale in problem.scale().items():
        parts[name] = row[0, start : start + scale.numel()].view_as(scale) * scale
        start += scale.numel()
    return Direction(parts, float(norm[0]))


@dataclass
class Agreement:
    """How well radii agree on the same directions.

    Args:
        compared: directions.
        reentrant: of them, rays that cross the threshold more than once, where a bracket may hold
            another crossing than the first.
        largest: deviation in log radius on the others, by peer.
    """

    compared: int = 0
    reentrant: int = 0
    largest: dict[str, float] = field(default_factory=dict)


def check(
    problem: Problem,
    loss_at: LossAt,
    log_radii: Float,
    seed: int,
    rtol: float,
    *,
    first_crossings: Callable[[], Float],
    sweep: bool = True,
) -> Agreement:
    """Compares fastvol's radii with the peers' on the same directions.

    A bisection must agree within the two tolerances, the sweep within its grid step. Where the
    sweep's own losses cross the threshold more than once, fastvol's first crossing is compared with
    the sweep's instead.

    Args:
        problem: what is measured.
        loss_at: evaluates it.
        log_radii: of fastvol's directions 0, 1, …, before the audit, float64 ``[count]``.
        seed: of these directions.
        rtol: tolerance of both searches.
        first_crossings: fastvol's log radii of them with every ray scanned; called where needed.
        sweep: whether the sweep is compared too, which costs 100 evaluations a direction.

    Raises:
        DisagreementError: they do not agree.
    """
    # Both brackets hold the root: fastvol's point is within rtol of it, a midpoint within half.
    allowed = 1.5 * rtol + _ROUNDING
    start = math.exp(float(np.median(log_radii)))
    agreement = Agreement()
    for index, ours in enumerate(log_radii.tolist()):
        agreement.compared += 1
        direction = fastvol_direction(problem, seed, index)
        found = peers.bisect(loss_at, direction, problem.threshold, start, rtol)
        off = {"bisection": abs(math.log(found.radius) - ours)}
        trouble = None
        if off["bisection"] > allowed:
            trouble = (
                f"bisection finds {found.radius:.6g}, fastvol {math.exp(ours):.6g}; log radii may "
                f"differ by {allowed:.2g}, they do by {off['bisection']:.2g}"
            )
        if sweep:
            cell = _sweep(problem, loss_at, direction)
            off["sweep"] = abs(math.log(cell[1]) - ours)
            trouble = trouble or _outside(cell, ours, allowed)
        if trouble is None:
            for peer, value in off.items():
                agreement.largest[peer] = max(agreement.largest.get(peer, 0.0), value)
            continue
        if _crosses_once(problem, loss_at, direction):
            raise DisagreementError(f"no ratio: on direction {index} {trouble}")
        agreement.reentrant += 1
        first = float(first_crossings()[index])
        trouble = _outside(_sweep(problem, loss_at, direction), first, allowed)
        if trouble is not None:
            raise DisagreementError(f"no ratio: on direction {index}, all rays scanned, {trouble}")
    return agreement


def _sweep(problem: Problem, loss_at: LossAt, direction: Direction) -> tuple[float, float]:
    radius = peers.sweep(loss_at, direction, problem.threshold).radius
    return peers.sweep_cell(radius, direction.norm)


def _outside(cell: tuple[float, float], log_radius: float, allowed: float) -> str | None:
    """What is wrong with a radius that does not lie between the sweep's two points."""
    low, high = cell
    if low * (1 - allowed) <= math.exp(log_radius) <= high * (1 + allowed):
        return None
    return (
        f"the sweep finds a crossing in [{low:.6g}, {high:.6g}], fastvol at "
        f"{math.exp(log_radius):.6g}"
    )


def _crosses_once(problem: Problem, loss_at: LossAt, direction: Direction) -> bool:
    """Whether no point of the sweep beyond the first outside is inside again."""
    outside = [loss_at(direction, c) > problem.threshold for c in peers.COEFFICIENTS]
    return outside == sorted(outside)
