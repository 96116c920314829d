r"""Error, interval and trust of a mean whose terms are known by their logarithms.

Notation: w_i >= 0 the weight of unit i, n units, theta = log E[w], estimated by the log of the
mean. The units are independent: single directions, or antithetic pairs averaged.

The interval. T = (estimate - theta) / stderr is not normal at the n where people stop: its law is
skewed. To order n^(-1/2), for the log of a mean of weights with coefficient of variation c and
skewness g,

.. math:: P(T \le x) = \Phi(x) + n^{-1/2} \{(g/3 - c/2) x^2 + g/6\} \phi(x),

which is the expansion for a studentised mean (Johnson, J. Am. Statist. Assoc. 73, 1978) less the
term c x^2 / 2 that the logarithm takes away. Hall (J. R. Statist. Soc. B 54, 1992, "On the removal
of skewness by transformation") gives the cubic, monotone transformation of T that is normal to this
order; ``interval`` inverts it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib import import_module
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MIN_ESS = 100.0
MAX_SHARE = 0.05
MAX_PARETO_K = 0.5
MIN_HALF_MAX = 100
# "More than half": a pair of which one ray is at the cap carries a little more than half of what a
# pair at the cap does, by an amount that may underflow.
HALF = 0.5 * (1.0 - 1e-9)

# Log weights that agree to this, or to 256 units of rounding, are one number: radii are rounded,
# and d times the rounding of a log radius is 2e-8 nats at d = 1e8.
CONSTANT_SPREAD = 1e-7
# exp underflows at -745; ratios of excesses have to survive as well.
_UNDERFLOW = 600.0
# However coarse the search, weights that differ by more than this are not called one number.
_MAX_BLUR = 0.1


@dataclass(frozen=True)
class Summary:
    """What n independent weights say about the log of their mean.

    Attributes:
        n: independent units.
        log_mean: log of the mean weight, nats; -inf where every weight is zero.
        sampling_stderr: standard error of ``log_mean`` by the delta method, nats. inf where n = 1
            or every weight is zero.
        extra_error: further independent errors of ``log_mean``, nats.
        skewness: of the weights.
        ess: effective sample size, (sum w)^2 / sum w^2.
        max_share: largest weight over the sum of all.
        pareto_k: Pareto shape of the upper tail (PSIS); inf where the tail underflows, ties or is
            too short to fit; nan where it says nothing (bounded or constant weights) or was not
            asked for.
        n_half_max: units with more than half of the largest weight.
        bounded: whether the weights have a bound that is known beforehand.
        constant: whether they are all equal, as far as they are known.
        reliable: whether the gate passed.
        reasons: plain sentences why it did not.
        log_bound: log of a bound that no weight, and so not their mean, can exceed; inf where none
            was given.
        at_bound: whether the largest weight is at that bound.
    """

    n: int
    log_mean: float
    sampling_stderr: float
    skewness: float
    ess: float
    max_share: float
    pareto_k: float
    n_half_max: int
    bounded: bool
    constant: bool
    reliable: bool
    reasons: tuple[str, ...]
    log_bound: float = math.inf
    at_bound: bool = False
    extra_error: float = 0.0

    @property
    def stderr(self) -> float:
        """Standard error of ``log_mean``, all terms in quadrature, nats."""
        return math.hypot(self.sampling_stderr, self.extra_error)


def summarise(
    log_weights: npt.ArrayLike,
    *,
    bounded: bool,
    paired: bool = False,
    need_pareto: bool = True,
    log_bound: float = math.inf,
    resolution: float = 0.0,
) -> Summary:
    """Mean, error and gate of some weights.

    The gate is a conjunction over independent units: effective sample size of at least 100, largest
    share of at most 5 %, and for unbounded weights a Pareto shape below 0.5, for bounded ones at
    least 100 units with more than half of the largest weight. The last two rules are left out for a
    constant weight, which has no tail: what spread it has is that of rounding or of the search.

    Args:
        log_weights: [n] float64, natural logs; -inf is a weight of zero.
        bounded: whether the weights are bounded by construction (finite cap, Gaussian mass).
        paired: entries 2i and 2i+1 are one unit, their mean; the last of an odd number stands
            alone.
        need_pareto: False leaves the fit of the tail out; unbounded weights then stay unreliable.
        log_bound: log of the bound, where the weights can reach it.
        resolution: nats by which the search blurs a log weight; a smaller spread than this (or than
            0.1, if that is less) tells nothing about the weights' tail. It stays in the error.

    Returns:
        The summary. All weights zero is legal: ``log_mean`` is -inf, and not reliable.

    Raises:
        ValueError: ``log_weights`` is empty, not one-dimensional, or holds nan or +inf.
    """
    units = unit_log_weights(log_weights, paired=paired)
    n = units.size
    log_max = float(units.max())
    if log_max == -math.inf:
        return Summary(
            n=n,
            log_mean=-math.inf,
            sampling_stderr=math.inf,
            skewness=0.0,
            ess=0.0,
            max_share=math.nan,
            pareto_k=math.nan,
            n_half_max=0,
            bounded=bounded,
            constant=False,
            reliable=False,
            reasons=("every weight is zero",),
            log_bound=log_bound,
        )
    spread = log_max - float(units.min())
    rounding = rounding_of(log_max)
    blur = max(rounding, min(resolution, _MAX_BLUR))

    weights = np.exp(units - log_max)
    mean = float(weights.mean())
    deviation = weights - mean
    variance = float(np.square(deviation).mean())
    third = float(np.square(deviation) @ deviation) / n
    pareto_k = math.nan
    if need_pareto and not bounded and spread > blur:
        pareto_k = pareto_shape(units)
    return summary_from_moments(
        n=n,
        log_mean=log_max + math.log(mean),
        relative_variance=variance / mean**2,
        skewness=third / variance**1.5 if variance > 0 else 0.0,
        max_share=1.0 / (n * mean),
        pareto_k=pareto_k,
        n_half_max=int(np.count_nonzero(weights >= HALF)),
        bounded=bounded,
        constant=spread <= rounding,
        blurred=spread <= blur,
        log_bound=log_bound,
        at_bound=log_bound - log_max <= blur,
    )


def rounding_of(log_weight: float) -> float:
    """Nats by which equal log weights of this size may differ through rounding alone."""
    return max(CONSTANT_SPREAD, 256 * float(np.finfo(np.float64).eps) * abs(log_weight))


def summary_from_moments(
    *,
    n: int,
    log_mean: float,
    relative_variance: float,
    skewness: float,
    max_share: float,
    pareto_k: float,
    n_half_max: int,
    bounded: bool,
    constant: bool,
    blurred: bool = False,
    log_bound: float = math.inf,
    at_bound: bool = False,
) -> Summary:
    """The summary of n units from their moments; ``relative_variance`` is var(w) / mean(w)^2.

    ``constant`` units are equal to rounding and have no sampling error; ``blurred`` ones differ by
    no more than the search may make them, and keep it.
    """
    constant = constant and n > 1
    if constant:
        relative_variance, skewness = 0.0, 0.0
    constant |= blurred and n > 1
    ess = n / (1.0 + relative_variance)
    reasons = _refusals(n, ess, max_share, pareto_k, n_half_max, bounded, constant)
    return Summary(
        n=n,
        log_mean=log_mean,
        sampling_stderr=math.sqrt(relative_variance / (n - 1)) if n > 1 else math.inf,
        skewness=skewness,
        ess=ess,
        max_share=max_share,
        pareto_k=pareto_k,
        n_half_max=n_half_max,
        bounded=bounded,
        constant=constant,
        reliable=not reasons,
        reasons=reasons,
        log_bound=log_bound,
        at_bound=at_bound,
    )


def _refusals(
    n: int,
    ess: float,
    max_share: float,
    pareto_k: float,
    n_half_max: int,
    bounded: bool,
    constant: bool,
) -> tuple[str, ...]:
    if n == 1:
        return ("one unit has no error estimate",)
    reasons = []
    if not ess >= MIN_ESS:
        reasons.append(f"the effective sample size is {ess:.3g} of {n} units, below {MIN_ESS:g}")
    if not max_share <= MAX_SHARE:
        reasons.append(
            f"one unit carries {max_share:.1%} of the total weight, more than {MAX_SHARE:.0%}"
        )
    if constant:
        return tuple(reasons)
    if bounded:
        if n_half_max < MIN_HALF_MAX:
            reasons.append(
                f"{n_half_max} units carry more than half the largest weight, fewer than "
                f"{MIN_HALF_MAX}"
            )
    elif math.isnan(pareto_k):
        reasons.append("the tail of the weights was not examined")
    elif not pareto_k < MAX_PARETO_K:
        reasons.append(
            "the largest weights cannot be told from an infinite tail"
            if math.isinf(pareto_k)
            else f"the weights' tail is too heavy: Pareto k is {pareto_k:.2f}, not below "
            f"{MAX_PARETO_K}"
        )
    return tuple(reasons)


def unit_log_weights(log_weights: npt.ArrayLike, *, paired: bool) -> Array:
    """Log weights of independent units: as they are, or the log mean of each pair (2i, 2i + 1).

    Raises:
        ValueError: ``log_weights`` is empty, not one-dimensional, or holds nan or +inf.
    """
    values = np.asarray(log_weights, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"log_weights: expected a non-empty vector, got shape {values.shape}")
    # The largest entry is nan if any is.
    if not values.max() < math.inf:
        raise ValueError("log_weights: nan and +inf are not log weights")
    if not paired:
        return values
    even = values.size - values.size % 2
    units = np.logaddexp(values[0:even:2], values[1:even:2]) - math.log(2.0)
    return np.concatenate([units, values[even:]])


def pareto_shape(log_weights: Array) -> float:
    """Shape k of the generalised Pareto law fitted to the largest 3 sqrt(n) weights.

    Source: Pareto smoothed importance sampling (Vehtari et al., arXiv 1507.02646), as arviz-stats
    has it. Where the fit would divide by an underflown or zero excess the library's number is
    meaningless (0.016 was seen at d = 6,570 with an effective sample of 1): such a tail counts as
    infinite.

    Args:
        log_weights: [n] float64, one per independent unit, the largest finite.

    Returns:
        k; inf where the tail underflows, ties or holds fewer than 5 weights.
    """
    n = log_weights.size
    length = int(3.0 * math.sqrt(n)) if n > 225 else n // 5
    if length < 5:
        return math.inf
    # The library takes a fifth of what it is given at the most, and some copies of it.
    count = min(n, 5 * length + 10)
    upper = np.partition(log_weights, n - count)[n - count :] if 2 * count < n else log_weights
    # Only the tail counts, so what lies far below it may be moved to a finite value.
    relative = np.maximum(upper - upper.max(), -10.0 * _UNDERFLOW)
    first = relative.size - length - 1
    tail = np.sort(np.partition(relative, first)[first:])
    if tail[0] < -_UNDERFLOW:
        return math.inf
    excess = np.exp(tail[1:]) - math.exp(tail[0])
    quarter = excess[int(length / 4 + 0.5) - 1]
    if quarter <= 0 or np.count_nonzero(np.diff(tail[1:])) < (length - 1) // 2:
        return math.inf

    array_stats: Any = import_module("arviz_stats.base").array_stats
    # It fits 3 sqrt(size / r_eff) of them; what is added keeps whole roots of n whole.
    r_eff = 1.0 if relative.size == n else relative.size / n * (1.0 - 1e-12)
    # The library takes log likelihoods, minus the log ratios.
    with np.errstate(all="ignore"):
        _, fitted = array_stats.psislw(-relative, r_eff=r_eff)
    k = float(fitted)
    return k if math.isfinite(k) else math.inf


def with_extra_error(summary: Summary, *errors: float) -> Summary:
    """The summary with further independent errors of its log mean, added in quadrature.

    Args:
        summary: of the weights.
        errors: nats, >= 0; such as (kappa delta)^2 / 2 for radii known to delta.

    Raises:
        ValueError: an error is negative or nan.
    """
    if not all(error >= 0 for error in errors):
        raise ValueError(f"errors: must be non-negative, got {errors}")
    return replace(summary, extra_error=math.hypot(summary.extra_error, *errors))


def radius_errors(
    slope: float, log_radius_error: float, log_radius_bias: float = 0.0
) -> tuple[float, float]:
    """What inexact radii do to a log mean, nats, as independent errors.

    Args:
        slope: kappa >= 0, nats by which the log mean moves when every log radius moves by one.
        log_radius_error: delta, an error of each log radius that has no preferred sign; what is
            left of it in the mean is of second order, (kappa delta)^2 / 2.
        log_radius_bias: an error that all log radii may share; it counts to first order.
    """
    return 0.5 * (slope * log_radius_error) ** 2, slope * log_radius_bias


def interval(
    summary: Summary, level: float = 0.95, *, extra_error: float = 0.0
) -> tuple[float, float]:
    """Confidence interval of the log mean, nats; it holds where ``summary.reliable`` is true.

    Hall's transformation (see the module) for the sampling error; further errors widen each side in
    quadrature. The interval always contains ``log_mean`` and grows with ``level``.

    Where nearly every weight is at its bound, units below it may exist that n draws did not meet;
    their probability is below -log(1 - level) / n at this level (the "rule of three"), and the
    lower end allows for that much. The upper end never exceeds the bound.

    Args:
        summary: of the weights.
        level: between 0 and 1.
        extra_error: a further independent error, nats.

    Returns:
        (low, high); (-inf, inf) where there is no error estimate.

    Raises:
        ValueError: ``level`` is not between 0 and 1.
    """
    _check_level(level)
    centre = summary.log_mean
    if not math.isfinite(centre) or not math.isfinite(summary.sampling_stderr):
        return -math.inf, math.inf
    z = NormalDist().inv_cdf(0.5 * (1.0 + level))
    below = summary.sampling_stderr * max(0.0, _untransform(z, summary))
    above = summary.sampling_stderr * max(0.0, -_untransform(-z, summary))
    if summary.at_bound:
        below = max(below, -math.log1p(-level) * summary.max_share)
    further = z * math.hypot(summary.extra_error, extra_error)
    # Rounding may have carried the mean itself beyond its bound.
    ceiling = max(centre, summary.log_bound)
    return centre - math.hypot(below, further), min(centre + math.hypot(above, further), ceiling)


def _untransform(z: float, summary: Summary) -> float:
    """The value of T whose Hall transform is z."""
    root = math.sqrt(summary.n)
    variation = summary.sampling_stderr * root
    quadratic = (summary.skewness / 3.0 - variation / 2.0) / root
    constant = summary.skewness / 6.0 / root
    moved = z - constant
    if abs(quadratic) < 1e-6:
        return moved
    return (float(np.cbrt(1.0 + 3.0 * quadratic * moved)) - 1.0) / quadratic


def lower_bound(summary: Summary, level: float = 0.95) -> float:
    """Lower confidence bound of the log mean, nats: log_mean - log(1 / (1 - level)).

    By Markov's inequality the mean of independent non-negative weights exceeds 1 / (1 - level)
    times its expectation with probability at most 1 - level: for every tail and every n, gate or no
    gate.

    Raises:
        ValueError: ``level`` is not between 0 and 1.
    """
    _check_level(level)
    return summary.log_mean + math.log1p(-level)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: must lie between 0 and 1, got {level}")
