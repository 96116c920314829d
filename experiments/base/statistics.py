"""Numbers over seeds, fits of a law, and rankings from common directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import fastvol

Float = npt.NDArray[np.float64]

_RESAMPLES = 2000


def over_seeds(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of one quantity over seeds: value, its standard error, and reliable if all are.

    The error adds that between seeds (by their spread) to the mean of their own. Basins that have
    vanished are left out, and counted.
    """
    left = [entry for entry in entries if not entry.get("vanished", False)]
    summary: dict[str, Any] = {"seeds": len(entries), "vanished": not left, "left": len(left)}
    if not left:
        return summary
    values = np.array([_number(entry["value"]) for entry in left])
    own = np.array([_number(entry["stderr"]) for entry in left])
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    stderr = math.sqrt(float(np.square(own).mean()) / len(left) + spread**2 / len(left))
    return {
        **summary,
        "value": float(values.mean()),
        "spread": spread,
        "stderr": stderr,
        "reliable": all(bool(entry["reliable"]) for entry in left),
    }


def mean_of(values: Sequence[float | None]) -> float:
    """The mean of the finite ones, not a number where there is none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def straight_line(x: Sequence[float], y: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """Least squares y = intercept + slope · x, and a t-interval of the slope.

    Returns:
        slope, slope_low, slope_high, intercept, r_squared, residuals (in order), points.
    """
    from scipy import stats

    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(xs) < 3 or np.ptp(xs) == 0:
        return {"slope": math.nan, "points": len(xs)}
    fit = stats.linregress(xs, ys)
    half = float(stats.t.ppf(0.5 + level / 2, len(xs) - 2)) * float(fit.stderr)
    residuals = ys - (fit.intercept + fit.slope * xs)
    return {
        "slope": float(fit.slope),
        "slope_low": float(fit.slope) - half,
        "slope_high": float(fit.slope) + half,
        "intercept": float(fit.intercept),
        "r_squared": float(fit.rvalue**2),
        "residual_deviation": float(residuals.std(ddof=2)) if len(xs) > 2 else math.nan,
        "residuals": residuals.tolist(),
        "points": len(xs),
    }


def ranking(
    volumes: Sequence[fastvol.VolumeEstimate], sizes: Sequence[float], radius: float | None
) -> dict[str, Any]:
    """How minima rank in one landscape, by bootstrap over their common directions.

    Args:
        volumes: of runs along the same directions, by plain rays.
        sizes: training-set size of each.
        radius: of the balls that are compared; ``None`` compares the published quantity, which is
            carried by the longest ray.

    Returns:
        probability_first_is_largest, and of the rank agreement (Kendall's τ between volume and
        training-set size; −1 where more data always means smaller): tau, tau_low, tau_high,
        probability_perfect.
    """
    from scipy import stats

    logs = np.stack([volume.log_radii for volume in volumes])
    if radius is not None:
        logs = np.minimum(logs - math.log(radius), 0.0)
    logs = logs * volumes[0].dim
    weights = np.exp(logs - logs.max(1, keepdims=True))
    rng = np.random.default_rng(0)
    counts = rng.multinomial(logs.shape[1], np.full(logs.shape[1], 1 / logs.shape[1]), _RESAMPLES)
    with np.errstate(divide="ignore"):
        drawn = np.log(counts @ weights.T) + logs.max(1)
    found = np.log(weights.sum(1)) + logs.max(1)
    taus = np.array([stats.kendalltau(sizes, row).statistic for row in drawn])
    low, high = np.nanquantile(taus, [0.025, 0.975])
    return {
        "probability_first_is_largest": float((drawn.argmax(1) == 0).mean()),
        "tau": float(stats.kendalltau(sizes, found).statistic),
        "tau_low": float(low),
        "tau_high": float(high),
        "probability_perfect": float((taus < -1 + 1e-9).mean()),
        "radius": radius,
        "resamples": _RESAMPLES,
    }


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
