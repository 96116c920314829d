r"""Which of two basins is larger, at a radius up to which both are known.

Lebesgue: the difference of :math:`\phi(R) = \log vol(S \cap B_R) - \log vol(B_R)` at the largest
R that is reliable in both, or of the whole log volumes where both are reliable without a cap.
Gaussian: the difference of log masses, at the largest multiple of the standard deviation up to 1.

Two runs along the same directions share much of their sampling error. Then the difference is taken
per direction, and its error is that of a bootstrap over units (Poisson counts, sums over at most
4,096 blocks of units: a resample of block sums has the variance of a resample of units up to the
noise of estimating it from 4,096 numbers, 1 %).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from ._profile import reliable_radius
from ._statistics import Summary, interval, summarise, unit_log_weights, with_extra_error

Array = npt.NDArray[np.float64]

_RESAMPLES = 2000
_BLOCKS = 4096
_CHUNK = 100
# Smallest multiple of the standard deviation tried, and the number of steps down to it.
_SMALLEST_SCALE = 1e-3
_SCALE_STEPS = 40

# What must agree, beside the seed, for direction i of one run to be direction i of the other.
_DIRECTION_KEYS = ("layout", "antithetic", "noise", "metric", "preconditioner", "method")


@dataclass(frozen=True)
class Comparison:
    """How much larger basin a is than basin b, in nats, and how sure that is.

    Attributes:
        kind: ``"lebesgue"`` or ``"gaussian"``.
        radius: R in metric coordinates, inf for whole volumes; for a Gaussian the multiple of its
            standard deviation. nan where nothing is jointly reliable.
        log_ratio: log of a's volume over b's within R (of a's mass over b's), nats; nan likewise.
        stderr: its standard error, nats.
        probability: that a is the larger, given the normal law of the error; nan where nothing is
            jointly reliable.
        paired: whether the two were compared direction by direction.
        reliable: whether both are reliable at this radius.
        n_units: independent units, of a where the two differ.
        warnings: plain sentences about what to keep in mind.
    """

    kind: str
    radius: float
    log_ratio: float
    stderr: float
    probability: float
    paired: bool
    reliable: bool
    n_units: int
    warnings: tuple[str, ...] = ()
    _independent: tuple[Summary, Summary] | None = None

    def ci(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of ``log_ratio``, nats; (-inf, inf) where it is not reliable.

        Paired: normal. Independent: the two intervals combined, each side in quadrature (Zou and
        Donner 2008), which keeps their skewness.

        Args:
            level: between 0 and 1.

        Raises:
            ValueError: ``level`` is out of range.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level: must lie between 0 and 1, got {level}")
        if not self.reliable:
            return -math.inf, math.inf
        if self._independent is None:
            reach = NormalDist().inv_cdf(0.5 * (1.0 + level)) * self.stderr
            return self.log_ratio - reach, self.log_ratio + reach
        a, b = self._independent
        (low_a, high_a), (low_b, high_b) = interval(a, level), interval(b, level)
        below = math.hypot(a.log_mean - low_a, high_b - b.log_mean)
        above = math.hypot(high_a - a.log_mean, b.log_mean - low_b)
        return self.log_ratio - below, self.log_ratio + above

    def summary(self) -> str:
        """The comparison in words."""
        notes = "".join(f"\nnote: {warning}" for warning in self.warnings)
        if not self.reliable:
            what = "radius" if self.kind == "lebesgue" else "width of the normal law"
            return (
                f"a and b cannot be compared: there is no {what} at which both estimates are "
                "reliable. More directions reach further." + notes
            )
        if self.kind == "gaussian":
            where = "" if self.radius == 1 else f" at {self.radius:.4g} times the given std"
            thing = f"log mass of a minus that of b{where}"
        elif math.isinf(self.radius):
            thing = "log volume of a minus that of b"
        else:
            thing = f"log volume of a minus that of b, both within radius {self.radius:.4g}"
        low, high = self.ci()
        how = (
            f"compared direction by direction over {self.n_units} units"
            if self.paired
            else "compared with independent errors"
        )
        return (
            f"{thing}: {self.log_ratio:+.4g} ± {self.stderr:.2g} nats "
            f"(95 % interval {low:+.4g} to {high:+.4g}), {how}\n"
            f"probability that a is the larger: {self.probability:.4g}" + notes
        )


def compare(a: Any, b: Any) -> Comparison:
    """Compares two estimates where both can be trusted.

    Runs of one seed, layout and configuration are compared direction by direction, which is more
    precise; if they differ in n, over the directions that both have.

    Args:
        a: a ``VolumeEstimate``.
        b: another one, of the same dimension, measure and (for Lebesgue) metric.

    Returns:
        The comparison. Where no radius is reliable in both it carries no probability.

    Raises:
        TypeError: ``a`` or ``b`` is not an estimate.
        ValueError: the two do not answer the same question; the message says why.
    """
    for name, value in (("a", a), ("b", b)):
        if not all(hasattr(value, field) for field in ("log_radii", "dim", "measure", "config")):
            raise TypeError(f"{name} must be a VolumeEstimate, got {type(value).__name__}")
    kind = str(a.measure.kind)
    if b.measure.kind != kind:
        raise ValueError(f"b has measure {b.measure.kind!r}, a has {kind!r}")
    if b.dim != a.dim:
        raise ValueError(f"b has dim {b.dim}, a has {a.dim}: volumes of unlike dimension")
    if kind == "gaussian" and not _same(_law(a.measure), _law(b.measure)):
        raise ValueError("b has another normal law than a: std and center must be the same")
    if kind == "lebesgue" and not _same(a.config.get("metric"), b.config.get("metric")):
        raise ValueError(
            f"b has metric {b.config.get('metric')!r}, a has {a.config.get('metric')!r}"
        )

    same = _same_directions(a, b)
    n_a, n_b = len(a.log_radii), len(b.log_radii)
    common = min(n_a, n_b) if same else None
    paired = (bool(a.config.get("antithetic")), bool(b.config.get("antithetic")))
    if common is not None and paired[0] and n_a != n_b:
        common -= common % 2
    warnings = []
    if same and n_a != n_b:
        warnings.append(f"only the {common} directions that both have are used")
    caps = [float(getattr(result.measure, "max_radius", math.inf)) for result in (a, b)]
    constants, log_radial = (0.0, 0.0), None
    if kind == "gaussian":
        from ._backend import formulas

        log_radial = formulas().log_radial_gaussian
        constants = (_log_constant(a, log_radial), _log_constant(b, log_radial))
    return compare_arrays(
        a.log_radii[:common],
        b.log_radii[:common],
        a.dim,
        kind=kind,
        same_directions=same,
        paired_a=paired[0],
        paired_b=paired[1],
        unbounded_a=np.asarray(a.status[:common]) == 1,
        unbounded_b=np.asarray(b.status[:common]) == 1,
        max_radius=min(caps),
        shift_a=None if a.shift is None else a.shift[:common],
        shift_b=None if b.shift is None else b.shift[:common],
        log_constant_a=constants[0],
        log_constant_b=constants[1],
        log_radial_gaussian=log_radial,
        warnings=tuple(warnings),
    )


def compare_arrays(
    log_radii_a: npt.ArrayLike,
    log_radii_b: npt.ArrayLike,
    dim: int,
    *,
    kind: str = "lebesgue",
    same_directions: bool = False,
    paired_a: bool = False,
    paired_b: bool = False,
    unbounded_a: npt.ArrayLike | None = None,
    unbounded_b: npt.ArrayLike | None = None,
    max_radius: float = math.inf,
    shift_a: npt.ArrayLike | None = None,
    shift_b: npt.ArrayLike | None = None,
    log_constant_a: float = 0.0,
    log_constant_b: float = 0.0,
    extra_error_a: float = 0.0,
    extra_error_b: float = 0.0,
    log_radial_gaussian: Callable[..., Array] | None = None,
    warnings: tuple[str, ...] = (),
) -> Comparison:
    """:func:`compare` over plain arrays; each argument ending in _a has its like ending in _b.

    Args:
        log_radii_a: ``[n]`` float64; for a Gaussian in units of its standard deviation.
        log_radii_b: likewise.
        dim: d >= 1.
        kind: ``"lebesgue"`` or ``"gaussian"``.
        same_directions: entry i of both belongs to one direction.
        paired_a: directions 2i and 2i+1 of a are one independent unit.
        paired_b: likewise.
        unbounded_a: ``[n]`` bool, rays of a that never crossed.
        unbounded_b: likewise.
        max_radius: the smaller cap of the two searches.
        shift_a: ``[n]``, linear term of an off-centre Gaussian; None is 0.
        shift_b: likewise.
        log_constant_a: added to a's log mean, nats.
        log_constant_b: likewise.
        extra_error_a: further independent error of a's log mean, nats.
        extra_error_b: likewise.
        log_radial_gaussian: for a Gaussian.
        warnings: handed on.

    Raises:
        ValueError: shapes do not fit, or ``kind`` is unknown.
    """
    radii = (np.asarray(log_radii_a, np.float64), np.asarray(log_radii_b, np.float64))
    paired = (paired_a, paired_b)
    unbounded = (unbounded_a, unbounded_b)
    if same_directions and (radii[0].shape != radii[1].shape or paired_a != paired_b):
        raise ValueError("log_radii_b: the same directions must have the shape and pairing of a's")
    if kind == "lebesgue":
        radius, weights = _lebesgue_weights(radii, dim, paired, unbounded, max_radius)
    elif kind == "gaussian":
        if log_radial_gaussian is None:
            raise ValueError("log_radial_gaussian: is needed for kind='gaussian'")
        radius, weights = _gaussian_weights(
            radii, dim, (shift_a, shift_b), paired, log_radial_gaussian
        )
    else:
        raise ValueError(f"kind: must be 'lebesgue' or 'gaussian', got {kind!r}")
    if kind == "gaussian" and radius < 1:
        warnings = (*warnings, f"at the given std one of the two is not reliable; see {radius:.4g}")

    n_units = (radii[0].size + 1) // 2 if paired_a else radii[0].size
    if weights is None:
        return Comparison(
            kind, math.nan, math.nan, math.nan, math.nan, same_directions, False, n_units, warnings
        )
    bounded = math.isfinite(radius)
    a, b = (
        with_extra_error(
            summarise(values, bounded=bounded, paired=pairs, log_bound=bound, need_pareto=False),
            error,
        )
        for values, pairs, error, bound in zip(
            weights,
            paired,
            (extra_error_a, extra_error_b),
            (0.0 if kind == "lebesgue" and bounded else None,) * 2,
            strict=True,
        )
    )
    log_ratio = (a.log_mean + log_constant_a) - (b.log_mean + log_constant_b)
    if np.array_equal(weights[0], weights[1]):
        stderr = 0.0
    elif same_directions:
        sampling = _bootstrap(*(unit_log_weights(w, paired=paired_a) for w in weights))
        stderr = math.hypot(sampling, a.extra_error, b.extra_error)
    else:
        stderr = math.hypot(a.stderr, b.stderr)
    return Comparison(
        kind=kind,
        radius=radius,
        log_ratio=log_ratio,
        stderr=stderr,
        probability=_probability(log_ratio, stderr),
        paired=same_directions,
        reliable=True,
        n_units=n_units,
        warnings=warnings,
        _independent=None if same_directions else (a, b),
    )


_Both = tuple[Array, Array]


def _lebesgue_weights(
    radii: _Both,
    dim: int,
    paired: tuple[bool, bool],
    unbounded: tuple[npt.ArrayLike | None, npt.ArrayLike | None],
    max_radius: float,
) -> tuple[float, _Both | None]:
    """The joint radius, and the log weights under it; d log rho where it is infinite."""
    reach = []
    for log_radii, pairs, mask in zip(radii, paired, unbounded, strict=True):
        open_ended = math.isinf(max_radius) and not np.any(np.asarray(mask, np.bool_))
        if mask is None:
            open_ended = math.isinf(max_radius)
        if open_ended and summarise(dim * log_radii, bounded=False, paired=pairs).reliable:
            reach.append(math.inf)
        else:
            reach.append(
                reliable_radius(log_radii, dim, pairs, unbounded=mask, max_radius=max_radius)
            )
    radius = min(reach)
    if radius == 0:
        return radius, None
    if math.isinf(radius):
        return radius, (dim * radii[0], dim * radii[1])
    x = math.log(radius)
    capped = (dim * np.minimum(log_radii - x, 0.0) for log_radii in radii)
    return radius, (next(capped), next(capped))


def _gaussian_weights(
    radii: _Both,
    dim: int,
    shifts: tuple[npt.ArrayLike | None, npt.ArrayLike | None],
    paired: tuple[bool, bool],
    log_radial_gaussian: Callable[..., Array],
) -> tuple[float, _Both | None]:
    """The joint multiple of the standard deviation, at most 1, and the log weights there."""

    def at(log_scale: float) -> tuple[_Both, bool]:
        values = []
        for log_radii, shift in zip(radii, shifts, strict=True):
            with np.errstate(over="ignore"):
                radius = np.exp(log_radii - log_scale)
            b = None if shift is None else np.asarray(shift, np.float64) * math.exp(-log_scale)
            values.append(np.asarray(log_radial_gaussian(dim, radius, b), np.float64))
        both = all(
            summarise(value, bounded=True, paired=pairs).reliable
            for value, pairs in zip(values, paired, strict=True)
        )
        return (values[0], values[1]), both

    weights, passes = at(0.0)
    if passes:
        return 1.0, weights
    # A narrower law about the origin is another question, not a smaller part of the same one.
    if shifts[0] is not None or shifts[1] is not None:
        return math.nan, None
    step = math.log(_SMALLEST_SCALE) / _SCALE_STEPS
    for k in range(1, _SCALE_STEPS + 1):
        weights, passes = at(k * step)
        if passes:
            break
    else:
        return math.nan, None
    low, high = k * step, (k - 1) * step
    for _ in range(6):
        middle = 0.5 * (low + high)
        further, passes = at(middle)
        if passes:
            low, weights = middle, further
        else:
            high = middle
    return math.exp(low), weights


def _bootstrap(log_units_a: Array, log_units_b: Array) -> float:
    """Standard error of log mean a - log mean b, resampling units, [n] each."""
    sums = np.stack(
        [_block_sums(np.exp(units - units.max())) for units in (log_units_a, log_units_b)], axis=1
    )
    rng = np.random.default_rng(0)
    draws = np.empty(_RESAMPLES)
    for first in range(0, _RESAMPLES, _CHUNK):
        counts = rng.poisson(1.0, size=(_CHUNK, sums.shape[0])).astype(np.float64)
        totals = np.log(counts @ sums)
        draws[first : first + _CHUNK] = totals[:, 0] - totals[:, 1]
    return float(draws.std(ddof=1))


def _block_sums(weights: Array) -> Array:
    blocks = min(weights.size, _BLOCKS)
    edges = np.arange(blocks) * weights.size // blocks
    return np.asarray(np.add.reduceat(weights, edges))


def _probability(log_ratio: float, stderr: float) -> float:
    if stderr > 0:
        return NormalDist().cdf(log_ratio / stderr)
    return 0.5 if log_ratio == 0 else float(log_ratio > 0)


def _same_directions(a: Any, b: Any) -> bool:
    def seeds(result: Any) -> Any:
        return getattr(result, "seeds", None) or (result.config.get("seed"),)

    if not _same(seeds(a), seeds(b)):
        return False
    # Of combined runs only equal ones keep their directions at equal places.
    if len(seeds(a)) > 1 and not _same(a.config.get("n"), b.config.get("n")):
        return False
    return all(_same(a.config.get(key), b.config.get(key)) for key in _DIRECTION_KEYS)


def _law(measure: Any) -> Any:
    describe = getattr(measure, "describe", None)
    return describe() if describe is not None else (measure.std, measure.center)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(np.all(left == right))


def _log_constant(result: Any, log_radial_gaussian: Callable[..., Array]) -> float:
    """What an off-centre law adds to the log mean of the radial integrals, nats."""
    if result.shift is None:
        return 0.0
    weights = log_radial_gaussian(result.dim, np.exp(result.log_radii), result.shift)
    paired = bool(result.config.get("antithetic"))
    return float(result.log_volume) - summarise(weights, bounded=True, paired=paired).log_mean
