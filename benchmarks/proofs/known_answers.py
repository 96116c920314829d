"""Volumes and masses in closed form, judged by their error or by z-score over seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.stats
import torch

import fastvol

from . import bodies

BALL_TOLERANCE = 1e-6


def run(short: bool) -> dict[str, Any]:
    """All known answers. Raises AssertionError where one is missed."""
    return {
        "ball": ball(short),
        "ball_gaussian_minimum": ball_gaussian(short),
        "ball_gaussian_origin": ball_gaussian_origin(short),
        "bodies": z_scores(short),
    }


def ball(short: bool) -> list[dict[str, Any]]:
    """An isotropic quadratic: every radius is the same, so the answer is exact."""
    rows = []
    for d in (1, 2, 3, 10, 100, 1000, 10**4, 10**5) + (() if short else (10**6,)):
        body = bodies.ball(d, radius=0.37)
        result = fastvol.estimate(
            body.model(), bodies.loss, n=256 if d < 10**5 else 128, threshold=1.0, rtol=1e-9
        )
        error = result.log_volume - body.log_volume
        rows.append({"d": d, "error": error, "stderr": result.stderr, "reliable": result.reliable})
        assert abs(error) <= BALL_TOLERANCE * max(1.0, abs(body.log_volume)), rows[-1]
        assert result.reliable, rows[-1]
    return rows


def ball_gaussian(short: bool) -> list[dict[str, Any]]:
    """The same under a normal law around the minimum: a chi-square probability."""
    rows = []
    for d in (1, 2, 10, 1000, 10**5) + (() if short else (10**6,)):
        for quantile in (0.9, 0.5, 1e-6, 1e-200):
            std = 0.05
            radius = std * math.sqrt(float(scipy.stats.chi2.ppf(quantile, d)))
            if not radius > 0:
                continue
            exact = float(scipy.stats.chi2.logcdf((radius / std) ** 2, d))
            result = fastvol.estimate(
                bodies.ball(d, radius).model(),
                bodies.loss,
                n=256 if d < 10**5 else 128,
                threshold=1.0,
                rtol=1e-10,
                measure=fastvol.Gaussian(std),
            )
            error = result.log_volume - exact
            rows.append({"d": d, "log_mass": exact, "error": error, "stderr": result.stderr})
            assert abs(error) <= BALL_TOLERANCE * max(1.0, abs(exact)), rows[-1]
    return rows


def ball_gaussian_origin(short: bool) -> list[dict[str, Any]]:
    """A ball away from the law's centre: the noncentral chi-square distribution."""
    rows = []
    seeds = 10 if short else 100
    for d, distance, radius in ((2, 1.0, 1.5), (5, 2.0, 2.0), (20, 1.5, 4.0), (100, 1.0, 9.0)):
        exact = float(scipy.stats.ncx2.logcdf(radius**2, d, distance**2))
        errors, z, passed = [], [], 0
        for seed in range(seeds):
            model = bodies.ball(d, radius).model()
            with torch.no_grad():
                model.w.fill_(distance / math.sqrt(d))
            center = model.w.detach().clone()
            result = fastvol.estimate(
                model,
                lambda m, center=center, radius=radius: ((m.w - center) / radius).square().sum(),
                n=2000,
                threshold=1.0,
                measure=fastvol.Gaussian(1.0, center="origin"),
                seed=seed,
            )
            passed += result.reliable
            errors.append(result.log_volume - exact)
            z.append(errors[-1] / result.stderr)
        row = {"d": d, "distance": distance, "log_mass": exact, "gate": passed / seeds}
        rows.append(_judge(row, errors, z, judged=passed >= 0.95 * seeds))
    assert sum(row["judged"] for row in rows) >= 2, rows
    return rows


def z_scores(short: bool) -> list[dict[str, Any]]:
    """Bodies without constant radius, d = 2 … 20; judged where the gate passes."""
    rows = []
    seeds, n = (8, 2000) if short else (100, 4000)
    for d in (2, 5, 10, 20):
        for body in (
            bodies.ellipsoid(d, 10.0),
            bodies.cube(d),
            bodies.l1_ball(d),
            bodies.simplex(d),
            bodies.star(d, 0.8 * math.sqrt(d)),
        ):
            model = body.model()
            errors, z, passed = [], [], 0
            for seed in range(seeds):
                result = fastvol.estimate(model, bodies.loss, n=n, threshold=1.0, seed=seed)
                passed += result.reliable
                errors.append(result.log_volume - body.log_volume)
                z.append(errors[-1] / result.stderr)
            row = {"body": body.name, "d": d, "n": n, "gate": passed / seeds}
            # All runs are counted, and only on bodies that nearly always pass.
            rows.append(_judge(row, errors, z, judged=passed >= 0.95 * seeds))
    return rows


def _judge(
    row: dict[str, Any], errors: list[float], z: list[float], judged: bool = True
) -> dict[str, Any]:
    score = np.array(z)
    row |= {
        "seeds": len(z),
        "mean_error": float(np.mean(errors)),
        "rms_error": float(np.sqrt(np.mean(np.square(errors)))),
        "mean_z": float(score.mean()),
        "sd_z": float(score.std(ddof=1)),
        "judged": judged,
    }
    if judged:
        # The mean of z has sd 1/√seeds, Σ z² is close to chi-square.
        assert abs(row["mean_z"]) < 4.0 / math.sqrt(len(z)) + 0.15, row
        assert 0.4 < row["sd_z"] < 1.6, row
    return row
