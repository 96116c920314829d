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
    volumes: Sequence[fastvol.VolumeEstimate], sizes: Sequence[float], *, honest: bool
) -> dict[str, Any] | None:
    """How minima rank in one landscape, by bootstrap over their common directions.

    Args:
        volumes: of runs along the same directions, by plain rays.
        sizes: training-set size of each.
        honest: compare every two minima by φ(R) at the largest radius reliable in both; else by the
            published quantity, which is carried by the longest ray.

    Returns:
        ``None`` where no two can be compared. Else probability_first_is_largest, and of the rank
        agreement (Kendall's τ between volume and training-set size; −1 where more data always means
        smaller, ties count as neither): tau, tau_low, tau_high (95 %), probability_perfect; pairs
        that were compared, of possible ones.
    """
    count, n = len(volumes), min(volume.n for volume in volumes)
    log_powers = np.stack([v.dim * np.asarray(v.log_radii[:n]) for v in volumes])
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(n, 1 / n), _RESAMPLES).astype(np.float64)
    # The first row is the sample itself.
    counts = np.concatenate([np.ones((1, n)), counts])
    signs: dict[tuple[int, int], Float] = {}
    for i in range(count):
        for j in range(i):
            cap = min(volumes[i].reliable_radius, volumes[j].reliable_radius)
            if honest and cap <= 0:
                continue
            pair = log_powers[[i, j]]
            if honest and math.isfinite(cap):
                pair = np.minimum(pair - volumes[i].dim * math.log(cap), 0.0)
            weights = np.exp(pair - pair.max())
            means = counts @ weights.T
            signs[i, j] = np.sign(means[:, 0] - means[:, 1])
    if not signs:
        return None
    first = [signs[pair] for pair in signs if pair[1] == 0]
    largest = np.all([sign < 0 for sign in first], axis=0)[1:] if first else np.zeros(1)
    taus = np.mean([sign * np.sign(sizes[i] - sizes[j]) for (i, j), sign in signs.items()], axis=0)
    low, high = np.quantile(taus[1:], [0.025, 0.975])
    return {
        "probability_first_is_largest": float(np.mean(largest)),
        "tau": float(taus[0]),
        "tau_low": float(low),
        "tau_high": float(high),
        "probability_perfect": float((taus[1:] < -1 + 1e-9).mean()),
        "pairs": len(signs),
        "possible_pairs": count * (count - 1) // 2,
        "resamples": _RESAMPLES,
    }


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
