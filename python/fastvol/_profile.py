r"""The profile: what one set of radii says for every cap R, or every width of a normal law.

Notation: l_i = log of ray i's length, d = dim, x = log R. Under a cap the weight of a ray is
q_i = min(1, exp(d (l_i - x))), its share of a ball of radius R, and

.. math:: \phi(R) = \log |\det P| + \log \frac{1}{n} \sum_i q_i.

With the l_i sorted, all that the error and the gate need of the q_i follows from prefix sums of
exp(d l_i), exp(2 d l_i) and exp(3 d l_i), kept as logs: O(n log n) once, O(log n) a cap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ._statistics import (
    CONSTANT_SPREAD,
    HALF,
    Summary,
    interval,
    summarise,
    summary_from_moments,
    with_extra_error,
)

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_GRID = 128
_SCALE_GRID = 48
# First scan for the first cap at which the gate of paired or preconditioned rays fails.
_SCAN = 64
# log R is resolved to this.
_RESOLUTION = 1e-4


@dataclass(frozen=True, eq=False)
class Profile:
    r"""Filled fraction of the ball of radius R, or mass of a normal law of width c, with its error.

    Attributes:
        kind: ``"lebesgue"`` or ``"gaussian"``.
        radius: float64 ``[m]``, R in metric coordinates; for a Gaussian the multiple c of its std.
        log_fraction: float64 ``[m]``, nats: φ(R) = log vol(S ∩ B_R) − log vol(B_R); for a Gaussian
            the log mass.
        stderr: float64 ``[m]``, nats.
        ci_low, ci_high: float64 ``[m]``, nats: the ends of the interval.
        level: of that interval.
        ess: float64 ``[m]``, effective number of independent units.
        slope: float64 ``[m]``, nats by which ``log_fraction`` moves when every log radius moves by
            one; for ``"lebesgue"`` it is −dφ/d log R.
        reliable: bool ``[m]``: the gate passes there and at every smaller radius.
        reliable_radius: the largest such radius; 0 where there is none, inf where the uncapped
            volume itself is reliable.
    """

    kind: str
    radius: Array
    log_fraction: Array
    stderr: Array
    ci_low: Array
    ci_high: Array
    level: float
    ess: Array
    slope: Array
    reliable: Mask
    reliable_radius: float

    def to_dataframe(self) -> pd.DataFrame:
        """One row per radius.

        Returns:
            Columns radius, log_fraction, stderr, ci_low, ci_high, ess, slope, reliable.

        Raises:
            FastvolError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            from .errors import FastvolError

            raise FastvolError(
                "to_dataframe() needs pandas: pip install 'fastvol[table]'"
            ) from error
        names = (
            "radius", "log_fraction", "stderr", "ci_low", "ci_high", "ess", "slope", "reliable",
        )  # fmt: skip
        return pd.DataFrame({name: getattr(self, name) for name in names})


class _Rays(Protocol):
    """The rays of one run, under any cap."""

    top: float

    def at(self, x: float) -> tuple[Summary, float]:
        """The summary of the q_i at log R = x, and the slope."""
        ...


class _Single:
    """Single directions with P = I: everything from prefix sums."""

    def __init__(self, log_lengths: Array, dim: int) -> None:
        self._dim = dim
        self._sorted = np.sort(log_lengths)
        self.top = float(self._sorted[-1])
        # Relative to the longest, for precision; where every length is zero there is none.
        relative = dim * (self._sorted - max(self.top, -1e300))
        self._prefix = [
            np.concatenate([[-math.inf], np.logaddexp.accumulate(power * relative)])
            for power in (1, 2, 3)
        ]

    def at(self, x: float) -> tuple[Summary, float]:
        d, n = self._dim, self._sorted.size
        inner = min(x, self.top)
        below = int(np.searchsorted(self._sorted, inner, side="left"))
        cap = d * (inner - self.top)
        q1, q2, q3 = (
            math.exp(prefix[below] - power * cap)
            for power, prefix in zip((1, 2, 3), self._prefix, strict=True)
        )
        # Moments of what each ray lacks, 1 - q: the rays at the cap then cost no precision.
        lack = (below - q1) / n
        lack2 = (below - 2 * q1 + q2) / n
        lack3 = (below - 3 * q1 + 3 * q2 - q3) / n
        mean = 1.0 - lack
        variance = max(lack2 - lack * lack, 0.0)
        third = -(lack3 - 3 * lack * lack2 + 2 * lack**3)
        largest = math.sqrt(n)
        skewness = third / variance**1.5 if variance > 0 else 0.0
        constant = n > 1 and d * (inner - self._sorted[0]) <= CONSTANT_SPREAD
        half = inner + math.log(HALF) / d
        summary = summary_from_moments(
            n=n,
            log_mean=math.log(mean) + d * (inner - x),
            relative_variance=variance / mean**2,
            skewness=min(max(skewness, -largest), largest),
            max_share=1.0 / (n * mean),
            pareto_k=math.nan,
            n_half_max=n - int(np.searchsorted(self._sorted, half)),
            bounded=True,
            constant=constant,
            at_bound=d * (x - inner) <= CONSTANT_SPREAD,
        )
        return summary, float(d) if x > self.top else d * q1 / (n * mean)


class _Pairs:
    """Antithetic pairs with P = I: the pairs that count at a cap, summed directly."""

    def __init__(self, log_lengths: Array, dim: int) -> None:
        even = log_lengths.size - log_lengths.size % 2
        # The last of an odd number is a pair with itself.
        first = np.concatenate([log_lengths[0:even:2], log_lengths[even:]])
        second = np.concatenate([log_lengths[1:even:2], log_lengths[even:]])
        longer = np.maximum(first, second)
        order = np.argsort(longer)
        self._dim = dim
        self._longer = longer[order]
        self._shorter = np.minimum(first, second)[order]
        self.top = float(self._longer[-1])

    def at(self, x: float) -> tuple[Summary, float]:
        d, n = self._dim, self._longer.size
        inner = min(x, self.top)
        # The longest ray counts 1; pairs more than 45 nats below a 1/n of it do not change a digit.
        first = int(np.searchsorted(self._longer, inner - (45.0 + math.log(n)) / d))
        shorter, longer = (
            np.exp(d * np.minimum(lengths[first:] - inner, 0.0))
            for lengths in (self._shorter, self._longer)
        )
        units = 0.5 * (shorter + longer)
        mean = float(units.sum()) / n
        deviation = units - mean
        square = np.square(deviation)
        variance = (float(square.sum()) + first * mean**2) / n
        third = (float(square @ deviation) - first * mean**3) / n
        largest = float(units.max())
        constant = n > 1 and first == 0 and largest - float(units.min()) <= CONSTANT_SPREAD
        summary = summary_from_moments(
            n=n,
            log_mean=math.log(mean) + d * (inner - x),
            relative_variance=variance / mean**2,
            skewness=third / variance**1.5 if variance > 0 else 0.0,
            max_share=largest / (n * mean),
            pareto_k=math.nan,
            n_half_max=int(np.count_nonzero(units >= HALF * largest)),
            bounded=True,
            constant=constant,
            at_bound=largest >= 1.0 - CONSTANT_SPREAD and x <= self.top,
        )
        if x > self.top:
            return summary, float(d)
        capped = np.count_nonzero(self._shorter[first:] >= x) + np.count_nonzero(
            self._longer[first:] >= x
        )
        return summary, d * (1.0 - 0.5 * capped / (n * mean))


class _Preconditioned:
    """Rays with a preconditioner: a direction of norm ||v|| counts ||v||^-d times its share."""

    def __init__(self, log_lengths: Array, dim: int, log_norms: Array, *, paired: bool) -> None:
        self._lengths = log_lengths
        self._dim = dim
        self._paired = paired
        self._offset = -dim * log_norms
        self.top = float(log_lengths.max())

    def at(self, x: float) -> tuple[Summary, float]:
        log_q = self._dim * np.minimum(self._lengths - x, 0.0) + self._offset
        summary = summarise(log_q, bounded=True, paired=self._paired)
        weights = np.exp(log_q - log_q.max())
        uncapped = float(weights[self._lengths < x].sum() / weights.sum())
        return summary, self._dim * uncapped


def lebesgue_profile(
    log_radii: npt.ArrayLike,
    dim: int,
    *,
    radii: npt.ArrayLike | None = None,
    paired: bool = False,
    unbounded: npt.ArrayLike | None = None,
    max_radius: float = math.inf,
    level: float = 0.95,
    log_abs_det: float = 0.0,
    log_norms: npt.ArrayLike | None = None,
    log_radius_error: float = 0.0,
    extra_error: float = 0.0,
) -> Profile:
    r"""φ(R) = log vol(S ∩ B_R) − log vol(B_R), for every cap R at once, in nats.

    .. math:: \phi(R) = \log|\det P| + \log E[\min(\rho, R / \|v\|)^d] - d \log R

    Args:
        log_radii: ``[n]`` float64, log ρ per direction.
        dim: d >= 1.
        radii: ``[m]``, caps R > 0; by default a geometric grid over the radii met.
        paired: directions 2i and 2i+1 are one independent unit.
        unbounded: ``[n]`` bool, rays that never crossed: their radius is a lower bound, and no cap
            above the smallest of them is reliable.
        max_radius: the cap the rays were searched with.
        level: of the intervals.
        log_abs_det: log|det P|.
        log_norms: ``[n]``, log‖v‖ per direction; None is 0.
        log_radius_error: δ, error of a log radius; (slope·δ)²/2 is added in quadrature.
        extra_error: a further independent error, nats.

    Raises:
        ValueError: an argument has a wrong shape or range, or ``radii`` exceed ``max_radius``.
    """
    rays, lengths = _rays(log_radii, dim, paired, log_norms)
    if rays.top == -math.inf:
        raise ValueError("log_radii: every radius is zero")
    limit = _limit(lengths, unbounded, max_radius)
    reach = _reliable_log_radius(rays, lengths, limit)
    if radii is None:
        log_caps = _grid(lengths, rays.top if math.isinf(max_radius) else math.log(max_radius))
        caps = np.exp(log_caps)
    else:
        caps = np.atleast_1d(np.asarray(radii, dtype=np.float64))
        if caps.ndim != 1 or caps.size == 0 or not np.all((caps > 0) & (caps < math.inf)):
            raise ValueError("radii: must be a vector of positive finite numbers")
        if np.any(caps > max_radius * (1 + 1e-12)):
            raise ValueError(f"radii: must not exceed max_radius, {max_radius}")
        log_caps = np.log(caps)

    # Beyond the largest radius a cap bounds nothing, and the rule for unbounded weights applies.
    # Where that passes it does so for every cap: capping only evens the weights out.
    everywhere = False
    if limit > rays.top:
        offset = 0.0 if log_norms is None else -dim * np.asarray(log_norms)
        everywhere = summarise(dim * lengths + offset, bounded=False, paired=paired).reliable
    table = _Table(caps, level)
    for row, x in enumerate(log_caps):
        summary, slope = rays.at(float(x))
        summary = with_extra_error(summary, 0.5 * (slope * log_radius_error) ** 2, extra_error)
        trusted = everywhere or (summary.reliable and x <= reach + 1e-12)
        table.fill(row, summary, log_abs_det, slope, trusted)
    # A fraction is at most 1; with a preconditioner the estimate of it need not be.
    ceiling = log_norms is None and log_abs_det == 0
    return table.profile("lebesgue", math.exp(limit if everywhere else reach), ceiling=ceiling)


def reliable_radius(
    log_radii: npt.ArrayLike,
    dim: int,
    paired: bool = False,
    *,
    unbounded: npt.ArrayLike | None = None,
    max_radius: float = math.inf,
    log_norms: npt.ArrayLike | None = None,
) -> float:
    """R_n: the largest cap R at which the gate passes there and at every smaller one.

    For single directions with P = I all parts of the gate are monotone in R, so R_n is found by
    bisection, to 0.01 %. For pairs, or with a preconditioner, a scan of 64 caps finds the first
    that fails, and bisection goes on from there.

    Args:
        log_radii: ``[n]`` float64, log ρ per direction.
        dim: d >= 1.
        paired: directions 2i and 2i+1 are one independent unit.
        unbounded: ``[n]`` bool, rays that never crossed: their radius is a lower bound.
        max_radius: the cap the rays were searched with.
        log_norms: ``[n]``, log‖v‖ per direction; None is 0.

    Returns:
        R_n in metric coordinates: 0 where no cap passes, the largest radius met where all do.

    Raises:
        ValueError: an argument has a wrong shape or range.
    """
    rays, lengths = _rays(log_radii, dim, paired, log_norms)
    return math.exp(_reliable_log_radius(rays, lengths, _limit(lengths, unbounded, max_radius)))


def gaussian_profile(
    log_radii: npt.ArrayLike,
    dim: int,
    shift: npt.ArrayLike | None = None,
    *,
    scales: npt.ArrayLike | None = None,
    offset_squared: float = 0.0,
    log_offsets: npt.ArrayLike | None = None,
    paired: bool = False,
    unbounded: npt.ArrayLike | None = None,
    level: float = 0.95,
    extra_error: float = 0.0,
    log_radial_gaussian: Callable[[int, Array, Array | None], Array],
) -> Profile:
    r"""Log mass of the basin under the normal law with c times its standard deviation, in nats.

    .. math:: \log E[I_d(\rho / c, b / c)] - \|\mu\|^2 / (2 c^2)

    with I_d the radial integral. A scale is reliable if the gate passes there and at every smaller
    scale asked for.

    Args:
        log_radii: ``[n]`` float64, log ρ in units of the standard deviation at c = 1.
        dim: d >= 1.
        shift: ``[n]``, the linear term b at c = 1; None is 0.
        scales: ``[m]``, multiples c > 0; by default a geometric grid over those whose typical
            radius, c √d, was met.
        offset_squared: ‖μ‖², squared distance from the law's centre at c = 1.
        log_offsets: ``[n]``, added to each log weight; for a proposal other than the law itself.
        paired: directions 2i and 2i+1 are one independent unit.
        unbounded: ``[n]`` bool, rays that never crossed. A scale at which it matters where they end
            is not reliable.
        level: of the intervals.
        extra_error: an independent error, nats.
        log_radial_gaussian: ``(dim, radius[n], shift[n] | None) -> [n]``.

    Raises:
        ValueError: an argument has a wrong shape or range.
    """
    lengths = _vector(log_radii, "log_radii")
    n = lengths.size
    _check_dim(dim)
    b = None if shift is None else _vector(shift, "shift", n)
    offsets = None if log_offsets is None else _vector(log_offsets, "log_offsets", n)
    never = None if unbounded is None else np.asarray(unbounded, dtype=np.bool_)
    if scales is None:
        multiples = _default_scales(lengths, dim)
    else:
        multiples = np.atleast_1d(np.asarray(scales, dtype=np.float64))
        if (
            multiples.ndim != 1
            or multiples.size == 0
            or not np.all((multiples > 0) & (multiples < math.inf))
        ):
            raise ValueError("scales: must be a vector of positive finite numbers")

    plain = b is None and offsets is None

    def log_weights(c: float, at: Array) -> Array:
        with np.errstate(over="ignore"):
            radius = np.exp(at - math.log(c))
        values = log_radial_gaussian(dim, radius, None if b is None else b / c)
        return values if offsets is None else values + offsets

    def at_scale(c: float) -> tuple[Summary, bool, float]:
        weights = log_weights(c, lengths)
        # Off its centre the weights have a bound that no draw comes near: judge their tail.
        summary = summarise(weights, bounded=plain, paired=paired, log_bound=0.0 if plain else None)
        summary = with_extra_error(summary, extra_error)
        trusted = summary.reliable
        if trusted and never is not None and never.any():
            open_ended = log_weights(c, np.where(never, math.inf, lengths))
            gap = float(np.logaddexp.reduce(open_ended) - np.logaddexp.reduce(weights))
            trusted = gap <= max(1e-3, 0.1 * summary.stderr)
        edges = _log_edge(dim, lengths - math.log(c), None if b is None else b / c)
        edges = edges if offsets is None else edges + offsets
        top = float(weights.max())
        slope = math.nan
        if top > -math.inf:
            slope = float(np.exp(edges - top).sum() / np.exp(weights - top).sum())
        return summary, trusted, slope

    table = _Table(multiples, level)
    passed = np.zeros(multiples.size, dtype=np.bool_)
    for row, c in enumerate(multiples):
        summary, passed[row], slope = at_scale(float(c))
        table.fill(row, summary, -0.5 * offset_squared / c**2, slope, False)

    order = np.argsort(multiples, kind="stable")
    trusted = np.logical_and.accumulate(passed[order])
    table.reliable[order] = trusted
    count = int(np.count_nonzero(trusted))
    reach = 0.0
    if count:
        low = math.log(multiples[order[count - 1]])
        if count < multiples.size:
            high = math.log(multiples[order[count]])
            low = _bisect(lambda x: at_scale(math.exp(x))[1], low, high, (high - low) / 20)
        reach = math.exp(low)
    return table.profile("gaussian", reach, ceiling=True)


class _Table:
    """The columns of a profile while they are filled in."""

    def __init__(self, radius: Array, level: float) -> None:
        if not 0.0 < level < 1.0:
            raise ValueError(f"level: must lie between 0 and 1, got {level}")
        self._radius = radius
        self._level = level
        self._columns = np.full((6, radius.size), math.nan)
        self.reliable = np.zeros(radius.size, dtype=np.bool_)

    def fill(
        self, row: int, summary: Summary, log_constant: float, slope: float, reliable: bool
    ) -> None:
        low, high = interval(summary, self._level)
        self._columns[:, row] = (
            summary.log_mean + log_constant,
            summary.stderr,
            low + log_constant,
            high + log_constant,
            summary.ess,
            slope,
        )
        self.reliable[row] = reliable

    def profile(self, kind: str, reach: float, *, ceiling: bool) -> Profile:
        log_fraction, stderr, low, high, ess, slope = self._columns
        if ceiling:
            high = np.maximum(np.minimum(high, 0.0), log_fraction)
        return Profile(
            kind=kind,
            radius=self._radius,
            log_fraction=log_fraction,
            stderr=stderr,
            ci_low=low,
            ci_high=high,
            level=self._level,
            ess=ess,
            slope=slope,
            reliable=self.reliable,
            reliable_radius=reach,
        )


def _rays(
    log_radii: npt.ArrayLike, dim: int, paired: bool, log_norms: npt.ArrayLike | None
) -> tuple[_Rays, Array]:
    lengths = _vector(log_radii, "log_radii")
    _check_dim(dim)
    if log_norms is not None:
        norms = _vector(log_norms, "log_norms", lengths.size)
        lengths = lengths + norms
        return _Preconditioned(lengths, dim, norms, paired=paired), lengths
    return (_Pairs if paired else _Single)(lengths, dim), lengths


def _limit(lengths: Array, unbounded: npt.ArrayLike | None, max_radius: float) -> float:
    """Log of the largest cap that every ray was searched up to; inf without one."""
    if not max_radius > 0:
        raise ValueError(f"max_radius: must be positive, got {max_radius}")
    limit = math.log(max_radius) if max_radius < math.inf else math.inf
    if unbounded is None:
        return limit
    mask = np.asarray(unbounded, dtype=np.bool_)
    if mask.shape != lengths.shape:
        raise ValueError(f"unbounded: expected shape {lengths.shape}, got {mask.shape}")
    return min(limit, float(lengths[mask].min())) if mask.any() else limit


def _reliable_log_radius(rays: _Rays, lengths: Array, limit: float) -> float:
    """Log of R_n; -inf where no cap passes."""

    def passes(x: float) -> bool:
        return rays.at(x)[0].reliable

    low, high = float(lengths.min()), min(rays.top, limit)
    if high == -math.inf:
        return -math.inf
    # A ray of no length: the scan starts where only a negligible part of the rays lies below.
    low = max(low, float(np.quantile(lengths, 1e-3, method="higher")) - 50.0)
    low = min(low, high)
    if not passes(low):
        return -math.inf
    if isinstance(rays, _Single):
        return high if passes(high) else _bisect(passes, low, high, _RESOLUTION)
    previous = low
    for x in np.linspace(low, high, _SCAN)[1:]:
        if not passes(float(x)):
            return _bisect(passes, previous, float(x), _RESOLUTION)
        previous = float(x)
    return high


def _bisect(passes: Callable[[float], bool], low: float, high: float, width: float) -> float:
    """The upper end of where ``passes`` holds, from below, given that it holds at ``low`` only."""
    while high - low > width:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if passes(middle):
            low = middle
        else:
            high = middle
    return low


def _log_edge(dim: int, log_radii: Array, shift: Array | None) -> Array:
    """Log of d I / d log rho: the Gaussian integrand at the radius, times the radius."""
    log_normaliser = (0.5 * dim - 1.0) * math.log(2.0) + math.lgamma(0.5 * dim)
    # Beyond exp(300) nothing is left of the integrand.
    at = np.minimum(log_radii, 300.0)
    t = np.exp(at)
    linear = 0.0 if shift is None else shift * t
    return np.asarray(dim * at - 0.5 * t * t + linear - log_normaliser, dtype=np.float64)


def _grid(lengths: Array, high: float) -> Array:
    low = float(np.quantile(lengths[lengths > -math.inf], 1e-3)) if high > -math.inf else high
    # A tenth below: the profile starts where the ball is full.
    low = min(low, high) - 0.1
    return np.linspace(low, high, _GRID)


def _default_scales(lengths: Array, dim: int) -> Array:
    finite = lengths[np.isfinite(lengths)]
    if finite.size == 0:
        return np.ones(1)
    pad = math.log1p(3.0 / math.sqrt(dim))
    low = float(np.quantile(finite, 1e-3)) - 0.5 * math.log(dim) - pad
    high = float(finite.max()) - 0.5 * math.log(dim) + pad
    return np.exp(np.linspace(low, high, _SCALE_GRID))


def _vector(values: npt.ArrayLike, name: str, size: int | None = None) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or (size is not None and array.size != size):
        wanted = "a non-empty vector" if size is None else f"a vector of {size}"
        raise ValueError(f"{name}: expected {wanted}, got shape {array.shape}")
    if not np.all(array < math.inf):
        raise ValueError(f"{name}: nan and +inf are not allowed")
    return array


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim: must be at least 1, got {dim}")
