"""Peers and fastvol on the very same directions: no ratio where their radii disagree."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from fastvol._reference import noise

from . import peers
from .peers import Direction, LossAt
from .problems import Problem

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


def check(
    problem: Problem,
    loss_at: LossAt,
    log_radii: npt.NDArray[np.float64],
    seed: int,
    rtol: float,
    *,
    sweep: bool = True,
) -> dict[str, float]:
    """Compares fastvol's radii with the peers' on the same directions.

    A bisection must agree within the two tolerances, the sweep within its grid step.

    Args:
        problem: what is measured.
        loss_at: evaluates it.
        log_radii: of fastvol's directions 0, 1, …, float64 ``[count]``.
        seed: of these directions.
        rtol: tolerance of both searches.
        sweep: whether the sweep is compared too, which costs 100 evaluations a direction.

    Returns:
        The largest deviations in log radius.

    Raises:
        DisagreementError: they do not agree.
    """
    # Both brackets hold the root: fastvol's point is within rtol of it, a midpoint within half.
    allowed = 1.5 * rtol + _ROUNDING
    start = math.exp(float(np.median(log_radii)))
    worst: dict[str, float] = {}
    for index, ours in enumerate(log_radii.tolist()):
        direction = fastvol_direction(problem, seed, index)
        found = peers.bisect(loss_at, direction, problem.threshold, start, rtol)
        off = abs(math.log(found.radius) - ours)
        worst["bisection"] = max(worst.get("bisection", 0.0), off)
        if off > allowed:
            raise DisagreementError(
                f"no ratio: on direction {index} bisection finds {found.radius:.6g}, fastvol "
                f"{math.exp(ours):.6g}; log radii may differ by {allowed:.2g}, they do by {off:.2g}"
            )
        if not sweep:
            continue
        swept = peers.sweep(loss_at, direction, problem.threshold)
        low, high = peers.sweep_cell(swept.radius, direction.norm)
        worst["sweep"] = max(worst.get("sweep", 0.0), abs(math.log(swept.radius) - ours))
        if not low * (1 - allowed) <= math.exp(ours) <= high * (1 + allowed):
            raise DisagreementError(
                f"no ratio: on direction {index} the sweep finds a crossing in [{low:.6g}, "
                f"{high:.6g}], fastvol at {math.exp(ours):.6g}"
            )
    return worst
