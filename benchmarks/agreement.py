"""Peers and fastvol on the very same directions: no ratio where their radii disagree."""

from __future__ import annotations

import math

import numpy as np
import torch

from fastvol import VolumeEstimate
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
    problem: Problem, loss_at: LossAt, result: VolumeEstimate, rtol: float, count: int
) -> dict[str, float]:
    """Compares the first ``count`` radii of ``result`` with the peers' on the same directions.

    A bisection must agree within the two tolerances, the sweep within its grid step.

    Returns:
        The largest deviations in log radius.

    Raises:
        DisagreementError: they do not.
    """
    # Both brackets hold the root: fastvol's point is within rtol of it, a midpoint within half.
    allowed = rtol / 2 + float(result.config["pilot"]["rtol"]) + _ROUNDING
    worst = {"bisection": 0.0, "sweep": 0.0}
    start = math.exp(float(np.median(result.log_radii)))
    for index in range(count):
        direction = fastvol_direction(problem, result.seed, index)
        ours = float(result.log_radii[index])
        found = peers.bisect(loss_at, direction, problem.threshold, start, rtol)
        off = abs(math.log(found.radius) - ours)
        worst["bisection"] = max(worst["bisection"], off)
        if off > allowed:
            raise DisagreementError(
                f"no ratio: on direction {index} bisection finds {found.radius:.6g}, fastvol "
                f"{math.exp(ours):.6g}; log radii may differ by {allowed:.2g}, they do by {off:.2g}"
            )
        swept = peers.sweep(loss_at, direction, problem.threshold)
        low, high = peers.sweep_cell(swept.radius, direction.norm)
        worst["sweep"] = max(worst["sweep"], abs(math.log(swept.radius) - ours))
        if not low * (1 - allowed) <= math.exp(ours) <= high * (1 + allowed):
            raise DisagreementError(
                f"no ratio: on direction {index} the sweep finds a crossing in [{low:.6g}, "
                f"{high:.6g}], fastvol at {math.exp(ours):.6g}"
            )
    return worst
