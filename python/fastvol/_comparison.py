r"""Which of two basins is larger, at a radius up to which both are known.

Lebesgue: the difference of :math:`\phi(R) = \log vol(S \cap B_R) - \log vol(B_R)` at the largest
R that is reliable in both, or of the whole log volumes where both are reliable without a cap.
Gaussian: the difference of log masses, at the largest multiple of the standard deviation up to 1.

Two runs along the same directions share much of their sampling error. Then the difference is taken
per direction, and its error is that of a bootstrap over units (Poisson counts, sums over at most
4,096 blocks of units: a resample of block sums has the variance of a resample of units up to the
noise of estimating it from 4,096 numbers, 1 %).

Errors of the radii, which runs do not share even along the same directions, are added in
quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._profile import (
    gaussian_profile,
    gaussian_reliable_scale,
    gaussian_slope,
    lebesgue_slope,
    reliable_radius,
)
from ._statistics import (
    CONSTANT_SPREAD,
    Summary,
    interval,
    radius_errors,
    summarise,
    unit_log_weights,
    with_extra_error,
)
from .measures import Gaussian, Lebesgue

if TYPE_CHECKING:
    from .result import VolumeEstimate

Array = npt.NDArray[np.float64]

_RESAMPLES = 2000
_BLOCKS = 4096
_CHUNK = 100
# Fewer units than this that differ do not tell how those differ that were not met.
_FEW = 10
# The probability is resolved up to this many standard errors.
_SURE = 8.0

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
        stderr: its standard error, nats. Where (nearly) all weights are at their bound, or all
            units agree, it allows for one unit in n that was not met.
        probability: that a is the larger: (1 + level) / 2 of the widest interval that excludes a
            tie, if a is estimated to be the larger; nan where nothing is jointly reliable.
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
    # Of a paired comparison: the bootstrap's error, the weight of one unit that was not met where
    # too few differ, and the errors of the radii.
    _sampling: float = 0.0
    _unseen: float = 0.0
    _inexact: float = 0.0

    def ci(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of ``log_ratio``, nats; (-inf, inf) where it is not reliable.

        Paired: normal; where hardly any unit differs, others may exist that n draws did not meet,
        with a probability below -log(1 - level) / n at this level. Independent: the two intervals
        combined, each side in quadrature (Zou and Donner 2008), which keeps their skewness.

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
            z = NormalDist().inv_cdf(0.5 * (1.0 + level))
            sampled = max(z * self._sampling, -math.log1p(-level) * self._unseen)
            reach = math.hypot(sampled, z * self._inexact)
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


def compare(a: VolumeEstimate, b: VolumeEstimate) -> Comparison:
    """Compares two estimates where both can be trusted.

    Runs of one seed, layout and configuration are compared direction by direction, which is more
    precise; if they differ in n, over the directions that both have.

    Args:
        a: an estimate.
        b: another one, of the same dimension, measure and (for Lebesgue) metric.

    Returns:
        The comparison. Where no radius is reliable in both it carries no probability.

    Raises:
        TypeError: ``a`` or ``b`` is not an estimate.
        ValueError: the two do not answer the same question; the message says why.
    """
    from ._backend import formulas
    from .result import VolumeEstimate, _log_radius_error

    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, VolumeEstimate):
            raise TypeError(f"{name} must be a VolumeEstimate, got {type(value).__name__}")
    kind = a.measure.kind
    if b.measure.kind != kind:
        raise ValueError(f"b has measure {b.measure.kind!r}, a has {kind!r}")
    if b.dim != a.dim:
        raise ValueError(f"b has dim {b.dim}, a has {a.dim}: volumes of unlike dimension")
    if isinstance(a.measure, Gaussian) and not _same(a.measure.describe(), b.measure.describe()):
        raise ValueError("b has another normal law than a: std and center must be the same")
    metrics = (a.config["metric"], b.config["metric"])
    if kind == "lebesgue" and not _same(*metrics):
        raise ValueError(f"b has metric {metrics[1]!r}, a has {metrics[0]!r}")

    if not (_isotropic(a) and _isotropic(b)):
        if _same_run(a, b):
            return _tie(a, kind)
        return _compare_profiles(a, b, kind)
    same = _same_directions(a, b)
    common = min(a.n, b.n) if same else None
    if common is not None and a.paired and a.n != b.n:
        common -= common % 2
    warnings = []
    if same and a.n != b.n:
        warnings.append(f"only the {common} directions that both have are used")
    caps = [
        result.measure.max_radius if isinstance(result.measure, Lebesgue) else math.inf
        for result in (a, b)
    ]
    return compare_arrays(
        a.log_radii[:common],
        b.log_radii[:common],
        a.dim,
        kind=kind,
        same_directions=same,
        same_run=_same_run(a, b),
        paired_a=a.paired,
        paired_b=b.paired,
        unbounded_a=a.status[:common] == 1,
        unbounded_b=b.status[:common] == 1,
        max_radius=min(caps),
        shift_a=None if a.shift is None else a.shift[:common],
        shift_b=None if b.shift is None else b.shift[:common],
        log_constant_a=_log_constant(a),
        log_constant_b=_log_constant(b),
        log_radius_error_a=_log_radius_error(a.config),
        log_radius_error_b=_log_radius_error(b.config),
        log_radius_bias_a=_log_radius_bias(a),
        log_radius_bias_b=_log_radius_bias(b),
        extra_error_a=a._reentrance,
        extra_error_b=b._reentrance,
        log_radial_gaussian=formulas().log_radial_gaussian,
        warnings=tuple(warnings),
    )


def _isotropic(result: VolumeEstimate) -> bool:
    """Whether the estimate is one of independent isotropic rays."""
    return "preconditioner" not in result.config and result.config["method"] == "radial"


def _reach(result: VolumeEstimate) -> float:
    """The largest R, or multiple of std up to 1, that is reliable; for a Gaussian off its centre
    1 or 0: a narrower law there is another question.
    """
    if result.reliable:
        return result.measure.max_radius if isinstance(result.measure, Lebesgue) else 1.0
    if isinstance(result.measure, Lebesgue):
        return result.reliable_radius
    return 0.0 if result._offset_squared > 0 else min(result.reliable_radius, 1.0)


def _tie(a: VolumeEstimate, kind: str) -> Comparison:
    """A run beside itself."""
    reach = _reach(a)
    known = reach > 0
    nan = math.nan
    return Comparison(
        kind=kind,
        radius=reach if known else nan,
        log_ratio=0.0 if known else nan,
        stderr=0.0 if known else nan,
        probability=0.5 if known else nan,
        paired=True,
        reliable=known,
        n_units=max(int(a.ess), 1),
    )


def _compare_profiles(a: VolumeEstimate, b: VolumeEstimate, kind: str) -> Comparison:
    """The difference of the profiles at the largest R that is reliable in both."""
    radius = min(_reach(a), _reach(b))
    n_units = max(int(min(a.ess, b.ess)), 1)
    if radius <= 0:
        nan = math.nan
        return Comparison(kind, nan, nan, nan, nan, False, False, n_units)
    whole = kind == "lebesgue" and math.isinf(radius)
    values = []
    for result in (a, b):
        if whole or (kind == "gaussian" and radius == 1):
            values.append((result.log_volume_metric, result.stderr))
        else:
            at = result.profile([radius])
            values.append((float(at.log_fraction[0]), float(at.stderr[0])))
    warnings: tuple[str, ...] = ()
    if kind == "gaussian" and radius < 1:
        warnings = (f"at the given std one of the two is not reliable; see {radius:.4g}",)
    stderr = math.hypot(values[0][1], values[1][1])
    comparison = Comparison(
        kind=kind,
        radius=radius,
        log_ratio=values[0][0] - values[1][0],
        stderr=stderr,
        probability=0.5,
        paired=False,
        reliable=True,
        n_units=n_units,
        warnings=warnings,
        _sampling=stderr,
    )
    return replace(comparison, probability=_probability(comparison))


def compare_arrays(
    log_radii_a: npt.ArrayLike,
    log_radii_b: npt.ArrayLike,
    dim: int,
    *,
    kind: str = "lebesgue",
    same_directions: bool = False,
    same_run: bool = False,
    paired_a: bool = False,
    paired_b: bool = False,
    unbounded_a: npt.ArrayLike | None = None,
    unbounded_b: npt.ArrayLike | None = None,
    max_radius: float = math.inf,
    shift_a: npt.ArrayLike | None = None,
    shift_b: npt.ArrayLike | None = None,
    log_constant_a: float = 0.0,
    log_constant_b: float = 0.0,
    log_radius_error_a: float = 0.0,
    log_radius_error_b: float = 0.0,
    log_radius_bias_a: float = 0.0,
    log_radius_bias_b: float = 0.0,
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
        same_run: the two are one run, so that nothing can differ.
        paired_a: directions 2i and 2i+1 of a are one independent unit.
        paired_b: likewise.
        unbounded_a: ``[n]`` bool, rays of a that never crossed.
        unbounded_b: likewise.
        max_radius: the smaller cap of the two searches.
        shift_a: ``[n]``, linear term of an off-centre Gaussian; None is 0.
        shift_b: likewise.
        log_constant_a: added to a's log mean where the whole measure is compared, nats.
        log_constant_b: likewise.
        log_radius_error_a: of each of a's log radii, see :func:`radius_errors`.
        log_radius_error_b: likewise.
        log_radius_bias_a: an error that all of a's log radii may share.
        log_radius_bias_b: likewise.
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
    deltas = (log_radius_error_a, log_radius_error_b)
    shifts = (shift_a, shift_b)
    if kind == "lebesgue":
        radius, weights = _lebesgue_weights(radii, dim, paired, unbounded, deltas, max_radius)
        whole = math.isinf(radius)
    elif kind == "gaussian":
        if log_radial_gaussian is None:
            raise ValueError("log_radial_gaussian: is needed for kind='gaussian'")
        radius, weights = _gaussian_weights(
            radii, dim, shifts, paired, unbounded, deltas, log_radial_gaussian
        )
        whole = radius == 1
    else:
        raise ValueError(f"kind: must be 'lebesgue' or 'gaussian', got {kind!r}")
    if kind == "gaussian" and radius < 1:
        warnings = (*warnings, f"at the given std one of the two is not reliable; see {radius:.4g}")

    n_units = (radii[0].size + 1) // 2 if paired_a else radii[0].size
    if weights is None:
        return Comparison(
            kind, math.nan, math.nan, math.nan, math.nan, same_directions, False, n_units, warnings
        )
    comparison = Comparison(
        kind=kind,
        radius=radius,
        log_ratio=0.0,
        stderr=0.0,
        probability=0.5,
        paired=same_directions,
        reliable=True,
        n_units=n_units,
        warnings=warnings,
    )
    if same_run:
        return comparison

    def summary_of(
        log_radii: Array,
        values: Array,
        shift: npt.ArrayLike | None,
        pairs: bool,
        delta: float,
        bias: float,
        error: float,
    ) -> Summary:
        if kind == "lebesgue":
            bounded = not whole
            slope = lebesgue_slope(log_radii, dim, radius)
        else:
            assert log_radial_gaussian is not None
            bounded = shift is None
            slope = gaussian_slope(
                log_radii, dim, shift, scale=radius, log_radial_gaussian=log_radial_gaussian
            )
        summary = summarise(
            values,
            bounded=bounded,
            paired=pairs,
            log_bound=0.0 if bounded else math.inf,
            # The gate has passed.
            need_pareto=False,
            resolution=4.0 * slope * delta,
        )
        return with_extra_error(summary, *radius_errors(slope, delta, bias), error)

    log_bias = (log_radius_bias_a, log_radius_bias_b)
    extra = (extra_error_a, extra_error_b)
    a, b = map(summary_of, radii, weights, shifts, paired, deltas, log_bias, extra)
    log_ratio = a.log_mean - b.log_mean
    if whole:
        log_ratio += log_constant_a - log_constant_b
    if same_directions:
        units = [unit_log_weights(values, paired=paired_a) for values in weights]
        sampling = _bootstrap(units[0], units[1])
        unseen = 0.0
        if a.at_bound and b.at_bound:
            blur = max(CONSTANT_SPREAD, min(4.0 * dim * max(deltas), 0.1))
            differing = np.count_nonzero(np.abs(np.exp(units[0]) - np.exp(units[1])) > blur)
            unseen = max(a.max_share, b.max_share) if differing < _FEW else 0.0
        inexact = math.hypot(a.extra_error, b.extra_error)
        comparison = replace(
            comparison,
            stderr=math.hypot(max(sampling, unseen), inexact),
            _sampling=sampling,
            _unseen=unseen,
            _inexact=inexact,
        )
    else:
        errors = [
            max(side.sampling_stderr, side.max_share if side.at_bound else 0.0) for side in (a, b)
        ]
        comparison = replace(
            comparison,
            stderr=math.hypot(*errors, a.extra_error, b.extra_error),
            _independent=(a, b),
        )
    comparison = replace(comparison, log_ratio=log_ratio)
    return replace(comparison, probability=_probability(comparison))


_Both = tuple[Array, Array]
_Masks = tuple[npt.ArrayLike | None, npt.ArrayLike | None]


def _lebesgue_weights(
    radii: _Both,
    dim: int,
    paired: tuple[bool, bool],
    unbounded: _Masks,
    deltas: tuple[float, float],
    max_radius: float,
) -> tuple[float, _Both | None]:
    """The joint radius, and the log weights under it; d log rho where it is infinite."""
    reach = []
    for log_radii, pairs, mask, delta in zip(radii, paired, unbounded, deltas, strict=True):
        open_ended = math.isinf(max_radius) and not (mask is not None and np.any(mask))
        if (
            open_ended
            and summarise(
                dim * log_radii, bounded=False, paired=pairs, resolution=4.0 * dim * delta
            ).reliable
        ):
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
    unbounded: _Masks,
    deltas: tuple[float, float],
    log_radial_gaussian: Callable[..., Array],
) -> tuple[float, _Both | None]:
    """The joint multiple of the standard deviation, at most 1, and the log weights there."""
    scale = 1.0
    for log_radii, shift, pairs, mask, delta in zip(
        radii, shifts, paired, unbounded, deltas, strict=True
    ):
        arguments: dict[str, Any] = {
            "paired": pairs,
            "unbounded": mask,
            "log_radius_error": delta,
            "log_radial_gaussian": log_radial_gaussian,
        }
        if shift is None:
            reach = gaussian_reliable_scale(log_radii, dim, largest=1.0, **arguments)
        else:
            given = gaussian_profile(log_radii, dim, shift, scales=[1.0], **arguments)
            reach = given.reliable_radius
        scale = min(scale, reach)
    # A narrower law about the origin is another question, not a smaller part of the same one.
    off_centre = any(shift is not None for shift in shifts)
    if scale == 0 or (off_centre and scale < 1):
        return math.nan, None
    values = []
    for log_radii, shift in zip(radii, shifts, strict=True):
        with np.errstate(over="ignore"):
            radius = np.exp(log_radii - math.log(scale))
        b = None if shift is None else np.asarray(shift, np.float64)
        values.append(np.asarray(log_radial_gaussian(dim, radius, b), np.float64))
    return scale, (values[0], values[1])


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


def _probability(comparison: Comparison) -> float:
    """That a is the larger: by the widest interval that still excludes a tie."""
    log_ratio = comparison.log_ratio
    if log_ratio == 0:
        return 0.5

    def excludes_a_tie(z: float) -> bool:
        low, high = comparison.ci(math.erf(z / math.sqrt(2.0)))
        return low > 0 if log_ratio > 0 else high < 0

    if excludes_a_tie(_SURE):
        return float(log_ratio > 0)
    low, high = 0.0, _SURE
    for _ in range(50):
        middle = 0.5 * (low + high)
        if excludes_a_tie(middle):
            low = middle
        else:
            high = middle
    return NormalDist().cdf(math.copysign(low, log_ratio))


def _same_directions(a: VolumeEstimate, b: VolumeEstimate) -> bool:
    if a.seeds != b.seeds:
        return False
    # Of combined runs only equal ones keep their directions at equal places.
    if len(a.seeds) > 1 and not _same(a.config["n"], b.config["n"]):
        return False
    return all(_same(a.config.get(key), b.config.get(key)) for key in _DIRECTION_KEYS)


def _same_run(a: VolumeEstimate, b: VolumeEstimate) -> bool:
    return a is b or (
        a.seeds == b.seeds
        and _same(a.config, b.config)
        and a._rays.reentrant_share == b._rays.reentrant_share
        and all(
            np.array_equal(left, right)
            for left, right in (
                (a.log_radii, b.log_radii),
                (a.status, b.status),
                (a._rays.shift, b._rays.shift),
            )
        )
    )


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(np.all(left == right))


def _log_radius_bias(result: VolumeEstimate) -> float:
    return float(result.config["pilot"].get("bias", 0.0))


def _log_constant(result: VolumeEstimate) -> float:
    """What the answer adds to the log mean of the rays' weights, nats, beside d alone."""
    constant = -0.5 * result._offset_squared
    if result._rays.reentrant_share > 0:
        weights, _ = result._rays.log_weights(result.measure, result.dim)
        raw = summarise(weights, bounded=True, paired=result.paired).log_mean
        constant += result.statistics.log_mean - raw
    return constant
