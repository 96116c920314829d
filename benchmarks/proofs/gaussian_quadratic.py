"""Gaussian mass of a rotated quadratic far out in the tail, against its Laplace transform."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastvol

from . import bodies
from .laplace import gaussian_mass_quadratic
from .runs import each, seeded

ERROR_MOST = 0.05
CONDITION = 1e6
RAYS = 5_000
# The largest curvature at which the law lies within the basin, about, and steeper ones.
STEEPNESS = (1.0, 30.0, 1e3, 1e6)


def run(short: bool) -> dict[str, Any]:
    """Both centres, four curvature scales. Raises AssertionError where one is missed."""
    rows = each(_case, len(_cases(short)), short)
    for row in rows:
        assert row["met"], row
    return {"condition": CONDITION, "rays": RAYS, "error_most": ERROR_MOST, "cases": rows}


def _cases(short: bool) -> list[tuple[int, str, float]]:
    return [
        (d, center, steepness)
        for d in ((50,) if short else (200, 1000))
        for center in ("minimum", "origin")
        for steepness in STEEPNESS
    ]


def _case(index: int, short: bool) -> dict[str, Any]:
    d, center, steepness = _cases(short)[index]
    rotation = bodies.random_rotation(d)
    curvatures = bodies.geometric(d, 1.0 / CONDITION, 1.0)
    # L = 1 at the mean of the law, times the steepness.
    curvatures = curvatures * (steepness / float(curvatures.sum()))
    stands = torch.zeros(d, dtype=torch.float64)
    if center == "origin":
        # As far out as the law's own draws.
        stands = torch.from_numpy(np.random.default_rng(5).standard_normal(d))
    model = bodies.ball(d).model()
    with torch.no_grad():
        model.w.copy_(stands)

    def loss(m: bodies.BodyModel) -> Tensor:
        return (curvatures * ((m.w - stands) @ rotation).square()).sum()

    exact = gaussian_mass_quadratic(curvatures, 1.0, 1.0, offset=-(stands @ rotation))
    row = seeded(
        f"centre {center}, steepness {steepness:g}",
        model,
        exact,
        range(2 if short else 10),
        loss=loss,
        method="preconditioned",
        preconditioner="hessian",
        measure=fastvol.Gaussian(1.0, center=center),
        n=RAYS,
        threshold=1.0,
    )
    row["met"] = row["max_abs_error"] <= ERROR_MOST
    return row
