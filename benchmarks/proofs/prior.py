"""The mass of all solutions under a normal law: closed forms, and a tiny net's plain draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor, nn

from fastvol._prior import prior_mass

from . import laplace

# Of these the law hits the first few often; the last few in a billion draws hardly once.
THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)
HITS_LEAST = 100
Z_MOST = 3.0
_BLOCK = 100_000


class _Weights(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d))


def run(short: bool) -> dict[str, Any]:
    """All of it. Raises AssertionError where a run is further off than it says."""
    return {"closed_forms": closed_forms(short), "tiny_net": tiny_net(short)}


def closed_forms(short: bool) -> list[dict[str, Any]]:
    """Balls by the chi-square law, and a shifted ellipsoid of condition 1e4 by Laplace inversion.

    All runs are counted, whether reliable or not.
    """
    seeds, n = (6, 5e4) if short else (20, 4e5)
    rows = []
    for d, log_mass in ((20, -10.0), (20, -20.0), (200, -20.0)):
        threshold = _chi_square_threshold(d, log_mass)
        rows.append(
            _judged(
                f"ball, d = {d}",
                float(scipy.stats.chi2.logcdf(threshold, d)),
                [
                    prior_mass(
                        _Weights(d),
                        lambda m: m.w.square().sum(),
                        n,
                        threshold=threshold,
                        std=1.0,
                        seed=seed,
                        progress=False,
                    )
                    for seed in range(seeds)
                ],
            )
        )
    d = 10
    curvatures = torch.logspace(-2.0, 2.0, d, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    offset = torch.full((d,), 0.5, dtype=torch.float64)
    exact = laplace.gaussian_mass_quadratic(curvatures, 1.0, 1.0, rotation @ offset)
    matrix = (curvatures.sqrt()[:, None] * rotation).float()
    shift = offset.float()
    rows.append(
        _judged(
            f"ellipsoid, d = {d}",
            exact,
            [
                prior_mass(
                    _Weights(d),
                    lambda m: (matrix @ (m.w - shift)).square().sum(),
                    n,
                    threshold=1.0,
                    std=1.0,
                    seed=seed,
                    progress=False,
                )
                for seed in range(seeds)
            ],
        )
    )
    return rows


def tiny_net(short: bool) -> dict[str, Any]:
    """A 2-2-1 tanh net on eight points, against plain draws where those hit 100 times or more."""
    total, seeds, n = (2_000_000, 3, 1e5) if short else (40_000_000, 10, 1e6)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2, generator=generator)
    y = (x[:, :1] * x[:, 1:]).sign()
    hits = _plain_hits(x, y, total)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    results = [
        prior_mass(
            net,
            nn.MSELoss(),
            n,
            data=(x, y),
            threshold=THRESHOLDS,
            std=1.0,
            seed=seed,
            progress=False,
        )
        for seed in range(seeds)
    ]
    rows = []
    before = 0.0
    for threshold, count in zip(THRESHOLDS, hits, strict=True):
        points = [result.at(threshold) for result in results]
        logs = np.array([point.log_mass for point in points])
        errors = np.array([point.stderr for point in points])
        log_mass = float(np.log(np.exp(logs - logs.max()).mean()) + logs.max())
        error = float(np.sqrt(np.square(errors).mean() / seeds))
        row: dict[str, Any] = {
            "threshold": threshold,
            "plain_hits": int(count),
            "log_mass": log_mass,
            "stderr": error,
            "stderr_of_one": float(errors.mean()),
            "sd_of_runs": float(logs.std(ddof=1)),
            "reliable": sum(point.reliable for point in points),
        }
        assert log_mass < before, row
        before = log_mass
        if count >= HITS_LEAST:
            log_plain, plain_error = math.log(count / total), math.sqrt(1 / count - 1 / total)
            row |= {"log_plain": log_plain, "plain_stderr": plain_error}
            row["z"] = (log_mass - log_plain) / math.hypot(error, plain_error)
            row["worst_z_of_one"] = float(
                np.abs((logs - log_plain) / np.hypot(errors, plain_error)).max()
            )
            assert abs(row["z"]) < Z_MOST, row
            assert row["worst_z_of_one"] < Z_MOST + 1.0, row
        rows.append(row)
    compared = sum("z" in row for row in rows)
    assert 3 <= compared < len(rows) - 1, rows
    return {"plain_draws": total, "n": n, "seeds": seeds, "thresholds": rows}


def _plain_hits(x: Tensor, y: Tensor, total: int) -> list[int]:
    """How many of so many draws from the law lie at or below each threshold."""
    generator = torch.Generator().manual_seed(2)
    hits = [0] * len(THRESHOLDS)
    for _ in range(total // _BLOCK):
        z = torch.randn(9, _BLOCK, generator=generator)
        inner = torch.einsum("hib,ni->hnb", z[:4].view(2, 2, _BLOCK), x)
        hidden = torch.tanh(inner + z[4:6, None])
        output = (hidden * z[6:8, None]).sum(dim=0) + z[8]
        losses = (output - y).square().mean(dim=0)
        for i, threshold in enumerate(THRESHOLDS):
            hits[i] += int((losses <= threshold).sum())
    return hits


def _judged(name: str, exact: float, results: list[Any]) -> dict[str, Any]:
    errors = np.array([result.log_mass - exact for result in results])
    stderr = np.array([result.stderr for result in results])
    z = errors / stderr
    row = {
        "case": name,
        "log_mass": exact,
        "n": results[0].n,
        "seeds": len(results),
        "mean_error": float(errors.mean()),
        "rms_error": float(np.sqrt(np.square(errors).mean())),
        "mean_stderr": float(stderr.mean()),
        "mean_z": float(z.mean()),
        "rms_z": float(np.sqrt(np.square(z).mean())),
        "worst_z": float(np.abs(z).max()),
        "reliable": sum(result.reliable for result in results),
        "n_loss": float(np.mean([result.n_loss for result in results])),
        "seconds": float(np.mean([result.seconds for result in results])),
    }
    assert abs(row["mean_z"]) < 4.0 / math.sqrt(len(z)), row
    assert np.square(z).sum() < scipy.stats.chi2.ppf(0.9999, len(z)), row
    return row


def _chi_square_threshold(d: int, log_mass: float) -> float:
    def gap(log_level: float) -> float:
        return float(scipy.stats.chi2.logcdf(math.exp(log_level), d)) - log_mass

    return math.exp(scipy.optimize.brentq(gap, -200.0, math.log(d)))
