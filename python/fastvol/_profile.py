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
    radius_errors,
    rounding_of,
    summarise,
    summary_from_moments,
    with_extra_error,
)
from ._table import pandas

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
# Halvings of the range of log c in which the largest reliable scale lies.
_SCALE_HALVINGS = 10


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
        reliable: bool ``[m]``: the gate passes there and at every smaller radius. For a normal law
            that is not centred at the minimum: the gate passes there.
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
        pd = pandas()
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
        rounding = rounding_of(d * inner)
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
            constant=d * (inner - self._sorted[0]) <= rounding,
            log_bound=0.0,
            at_bound=d * (x - inner) <= rounding,
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
        rounding = rounding_of(d * inner)
        summary = summary_from_moments(
            n=n,
            log_mean=math.log(mean) + d * (inner - x),
            relative_variance=variance / mean**2,
            skewness=third / variance**1.5 if variance > 0 else 0.0,
            max_share=largest / (n * mean),
            pareto_k=math.nan,
            n_half_max=int(np.count_nonzero(units >= HALF * largest)),
            bounded=True,
            constant=first == 0 and largest - float(units.min()) <= rounding * largest,
            log_bound=0.0,
            at_bound=largest >= 1.0 - CONSTANT_SPREAD and d * (x - inner) <= rounding,
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
        # ‖v‖^−d has no bound that draws come near: the tail is judged.
        summary = summarise(log_q, bounded=False, paired=self._paired)
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
    log_radius_bias: float = 0.0,
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
        log_radius_error: δ, error of a log radius; (slope·δ)²/2 is added in quadrature, and
            uncapped weights that differ by no more than 4·dim·δ count as constant.
        log_radius_bias: an error that all log radii may share; slope times it is added likewise.
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
        everywhere = summarise(
            dim * lengths + offset,
            bounded=False,
            paired=paired,
            resolution=4.0 * dim * log_radius_error,
        ).reliable
    table = _Table(caps, level)
    for row, x in enumerate(log_caps):
        summary, slope = rays.at(float(x))
        inexact = radius_errors(slope, log_radius_error, log_radius_bias)
        summary = with_extra_error(summary, *inexact, extra_error)
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


def lebesgue_slope(log_radii: npt.ArrayLike, dim: int, radius: float) -> float:
    """Nats by which φ(R) moves when every log radius moves by one: dim times the uncapped share.

    Args:
        log_radii: ``[n]`` float64, the largest finite.
        dim: d >= 1.
        radius: R > 0; inf is no cap.
    """
    lengths = _vector(log_radii, "log_radii")
    if radius == math.inf:
        return float(dim)
    log_q = dim * np.minimum(lengths - math.log(radius), 0.0)
    weights = np.exp(log_q - log_q.max())
    # A ray that ended at the cap lies there to rounding.
    uncapped = log_q < -rounding_of(dim * math.log(radius))
    return float(dim * weights[uncapped].sum() / weights.sum())


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
    log_radius_error: float = 0.0,
    log_radius_bias: float = 0.0,
    extra_error: float = 0.0,
    log_constant: float = 0.0,
    log_radial_gaussian: Callable[[int, Array, Array | None], Array],
) -> Profile:
    r"""Log mass of the basin under the normal law with c times its standard deviation, in nats.

    .. math:: \log E[I_d(\rho / c, b / c)] - \|\mu\|^2 / (2 c^2)

    with I_d the radial integral. Without ``shift`` a scale is reliable if the gate passes there and
    at every smaller scale asked for: a narrower law asks for less. With it a narrower law moves
    away from the minimum and is the harder one, so each scale is judged alone, and
    ``reliable_radius`` is the largest that passes.

    Args:
        log_radii: ``[n]`` float64, log ρ in units of the standard deviation at c = 1.
        dim: d >= 1.
        shift: ``[n]``, the linear term b at c = 1 of a law that is not centred at the minimum; None
            is 0.
        scales: ``[m]``, multiples c > 0; by default 1, and a geometric grid over those whose
            typical radius, c √d, was met.
        offset_squared: ‖μ‖², squared distance from the law's centre at c = 1.
        log_offsets: ``[n]``, added to each log weight; for a proposal other than the law itself.
        paired: directions 2i and 2i+1 are one independent unit.
        unbounded: ``[n]`` bool, rays that never crossed. A scale at which it matters where they end
            is not reliable.
        level: of the intervals.
        log_radius_error: δ, error of a log radius; (slope·δ)²/2 is added in quadrature, and weights
            that differ by no more than 4·slope·δ count as constant.
        log_radius_bias: an error that all log radii may share; slope times it is added likewise.
        extra_error: an independent error, nats.
        log_constant: added to every log mass, nats; log|det P| + ‖m‖²/2 of a proposal.
        log_radial_gaussian: ``(dim, radius[n], shift[n] | None) -> [n]``.

    Raises:
        ValueError: an argument has a wrong shape or range.
    """
    law = _NormalLaw(
        log_radii,
        dim,
        shift,
        log_offsets=log_offsets,
        paired=paired,
        unbounded=unbounded,
        log_radius_error=log_radius_error,
        log_radial_gaussian=log_radial_gaussian,
    )
    if scales is None:
        multiples = _default_scales(law.lengths, dim)
    else:
        multiples = np.atleast_1d(np.asarray(scales, dtype=np.float64))
        if (
            multiples.ndim != 1
            or multiples.size == 0
            or not np.all((multiples > 0) & (multiples < math.inf))
        ):
            raise ValueError("scales: must be a vector of positive finite numbers")

    table = _Table(multiples, level)
    passed = np.zeros(multiples.size, dtype=np.bool_)
    for row, c in enumerate(multiples):
        summary, passed[row], slope = law.at(float(c))
        if math.isfinite(slope):
            inexact = radius_errors(slope, log_radius_error, log_radius_bias)
            summary = with_extra_error(summary, *inexact, extra_error)
        table.fill(row, summary, log_constant - 0.5 * offset_squared / c**2, slope, False)

    order = np.argsort(multiples, kind="stable")
    ascending = passed[order]
    if shift is None:
        ascending = np.logical_and.accumulate(ascending)
    table.reliable[order] = ascending
    reach = 0.0
    if ascending.any():
        last = int(np.flatnonzero(ascending)[-1])
        low = math.log(multiples[order[last]])
        if last + 1 < multiples.size:
            high = math.log(multiples[order[last + 1]])
            low = _bisect(lambda x: law.at(math.exp(x))[1], low, high, (high - low) / 20)
        reach = math.exp(low)
    return table.profile("gaussian", reach, ceiling=True)


def gaussian_slope(
    log_radii: npt.ArrayLike,
    dim: int,
    shift: npt.ArrayLike | None = None,
    *,
    scale: float = 1.0,
    log_radial_gaussian: Callable[[int, Array, Array | None], Array],
) -> float:
    """Nats by which the log mass moves when every log radius moves by one; nan without any mass.

    Args:
        log_radii, dim, shift, log_radial_gaussian: as for :func:`gaussian_profile`.
        scale: c > 0.
    """
    law = _NormalLaw(
        log_radii,
        dim,
        shift,
        log_offsets=None,
        paired=False,
        unbounded=None,
        log_radius_error=0.0,
        log_radial_gaussian=log_radial_gaussian,
    )
    return law.slope(scale, law.log_weights(scale, law.lengths))


def gaussian_reliable_scale(
    log_radii: npt.ArrayLike,
    dim: int,
    shift: npt.ArrayLike | None = None,
    *,
    log_offsets: npt.ArrayLike | None = None,
    paired: bool = False,
    unbounded: npt.ArrayLike | None = None,
    log_radius_error: float = 0.0,
    largest: float = math.inf,
    log_radial_gaussian: Callable[[int, Array, Array | None], Array],
) -> float:
    """The largest multiple c of the standard deviation that is reliable, without a whole profile.

    At most 12 scales are looked at, from c = 1 on: up to the largest of the default grid of
    :func:`gaussian_profile`, or down to its smallest. Off the law's centre (``shift`` given)
    reliable scales need not reach down to 0, and the profile itself is asked.

    Args:
        log_radii, dim, shift, log_offsets, paired, unbounded, log_radius_error,
            log_radial_gaussian: as for :func:`gaussian_profile`.
        largest: scales above are of no interest; at least 1.

    Returns:
        c; 0 where no scale passes.

    Raises:
        ValueError: an argument has a wrong shape or range.
    """
    if not largest >= 1:
        raise ValueError(f"largest: must be at least 1, got {largest}")
    if shift is not None:
        reach = gaussian_profile(
            log_radii,
            dim,
            shift,
            log_offsets=log_offsets,
            paired=paired,
            unbounded=unbounded,
            log_radius_error=log_radius_error,
            log_radial_gaussian=log_radial_gaussian,
        ).reliable_radius
        return min(reach, largest)
    law = _NormalLaw(
        log_radii,
        dim,
        None,
        log_offsets=log_offsets,
        paired=paired,
        unbounded=unbounded,
        log_radius_error=log_radius_error,
        log_radial_gaussian=log_radial_gaussian,
    )

    def passes(log_c: float) -> bool:
        return law.at(math.exp(log_c))[1]

    scales = np.log(_default_scales(law.lengths, dim))
    if passes(0.0):
        low, high = 0.0, min(float(scales[-1]), math.log(largest))
        if high <= low or passes(high):
            return math.exp(max(low, high))
    else:
        # Where the grid does not reach below 1, a law that narrow lies within the basin.
        low, high = min(float(scales[0]), -1.0), 0.0
        if not passes(low):
            return 0.0
    # A little wider, so that rounding does not add a step.
    width = 1.001 * (high - low) / 2**_SCALE_HALVINGS
    return math.exp(_bisect(passes, low, high, width))


class _NormalLaw:
    """The rays of one run under a normal law of any width."""

    def __init__(
        self,
        log_radii: npt.ArrayLike,
        dim: int,
        shift: npt.ArrayLike | None,
        *,
        log_offsets: npt.ArrayLike | None,
        paired: bool,
        unbounded: npt.ArrayLike | None,
        log_radius_error: float,
        log_radial_gaussian: Callable[[int, Array, Array | None], Array],
    ) -> None:
        self.lengths = _vector(log_radii, "log_radii")
        n = self.lengths.size
        _check_dim(dim)
        self._dim = dim
        self._shift = None if shift is None else _vector(shift, "shift", n)
        self._offsets = None if log_offsets is None else _vector(log_offsets, "log_offsets", n)
        self._never = None if unbounded is None else np.asarray(unbounded, dtype=np.bool_)
        self._paired = paired
        self._log_radius_error = log_radius_error
        self._log_radial_gaussian = log_radial_gaussian

    def at(self, c: float) -> tuple[Summary, bool, float]:
        """At c: the summary of the weights, whether they can be trusted, and the slope."""
        weights = self.log_weights(c, self.lengths)
        slope = self.slope(c, weights)
        plain = self._shift is None and self._offsets is None
        # Off its centre the weights have a bound that no draw comes near: judge their tail.
        summary = summarise(
            weights,
            bounded=plain,
            paired=self._paired,
            log_bound=0.0 if plain else math.inf,
            resolution=4.0 * slope * self._log_radius_error if math.isfinite(slope) else 0.0,
        )
        trusted = summary.reliable
        if trusted and self._never is not None and self._never.any():
            open_ended = self.log_weights(c, np.where(self._never, math.inf, self.lengths))
            gap = float(np.logaddexp.reduce(open_ended) - np.logaddexp.reduce(weights))
            trusted = gap <= max(1e-3, 0.1 * summary.stderr)
        return summary, trusted, slope

    def log_weights(self, c: float, lengths: Array) -> Array:
        """Log weights at c of rays of these log lengths."""
        with np.errstate(over="ignore"):
            radius = np.exp(lengths - math.log(c))
        b = None if self._shift is None else self._shift / c
        values = np.asarray(self._log_radial_gaussian(self._dim, radius, b), dtype=np.float64)
        return values if self._offsets is None else values + self._offsets

    def slope(self, c: float, weights: Array) -> float:
        """Nats per unit of log radius at c, given the log weights there; nan if all are zero."""
        b = None if self._shift is None else self._shift / c
        edges = _log_edge(self._dim, self.lengths - math.log(c), b)
        edges = edges if self._offsets is None else edges + self._offsets
        top = float(weights.max())
        if top == -math.inf:
            return math.nan
        return float(np.exp(edges - top).sum() / np.exp(weights - top).sum())


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
    return np.union1d(np.exp(np.linspace(low, high, _SCALE_GRID)), 1.0)


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
