r"""An estimate from Markov chains along a path of targets, and its error.

Every run gives, through the multistate bridge over its own states, the log mean of any weight over
the law of its directions. The main runs are combined by their sampling errors. To that error are
added, in quadrature, the spread of the runs and what too little mixing may cost: the difference to
a shorter run, carried on to the longer one as if it fell like 1/K, and half as much again,

.. math:: \tfrac32\,|\log Z_K - \log Z_{K'}|\,K' / (K - K').

Chains that mix too little find too small a volume; averaging more of them does not cure that,
longer ones do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._backend import formulas
from ._profile import Profile
from ._statistics import Summary, radius_errors
from ._table import pandas
from .measures import Gaussian, Lebesgue
from .result import (
    FORMAT_VERSION,
    Rays,
    VolumeEstimate,
    _check_level,
    _positive_vector,
    write_result,
)
from .sampling.bridge import Bridge, Mean
from .sampling.field import log_weight
from .sampling.tempering import Run

if TYPE_CHECKING:
    import pandas as pd

Float = npt.NDArray[np.float64]

# An interval of few runs is wider than the normal one.
_MIN_ESS = 30.0
_MIN_LENGTH = 12
_MOST_MEMORY = 0.4
_MAX_SHARE = 0.2
_MOST_ERROR = 1.0
_APART = 3.0
_GRID = 48
# Runs whose errors are smaller than this weigh alike.
_LEAST_ERROR = 0.01
_COLLAPSED = 1e-3
_STRETCH = 1e-4
_EVEN = 0.01
_UNBOUNDED_SHARE = 1e-3
_MOST_REENTRANT = 0.9


@dataclass(frozen=True)
class Combined:
    """What several runs say of one log mean.

    Attributes:
        log_mean: nats. stderr: all terms, nats.
        sampling: of the main runs together. spread: between them. drift: between run lengths.
        ess: smallest effective number of clusters of a main run.
        max_share: the largest share of one cluster.
        apart: whether two main runs differ by more than three of their errors.
    """

    log_mean: float
    stderr: float
    sampling: float
    spread: float
    drift: float
    ess: float
    max_share: float
    apart: bool

    @property
    def reliable(self) -> bool:
        """Whether enough chains carry the weight, the runs agree, and the error is small."""
        return (
            self.ess >= _MIN_ESS
            and self.max_share <= _MAX_SHARE
            and not self.apart
            and self.stderr <= _MOST_ERROR
        )

    def reasons(self) -> list[str]:
        """Plain sentences why not."""
        reasons = []
        if self.ess < _MIN_ESS:
            reasons.append(
                f"{self.ess:.3g} chains carry the weight, fewer than {_MIN_ESS:g}: the path does "
                "not reach its end with enough of them"
            )
        if self.max_share > _MAX_SHARE:
            reasons.append(f"one chain carries {self.max_share:.0%} of the weight")
        if self.apart:
            reasons.append(
                f"independent runs differ by more than {_APART:g} of their errors: the chains do "
                "not mix; raise n"
            )
        if self.stderr > _MOST_ERROR:
            reasons.append(
                f"the error, {self.stderr:.2g} nats (sampling {self.sampling:.2g}, spread "
                f"{self.spread:.2g}, mixing {self.drift:.2g}), is above {_MOST_ERROR:g}"
            )
        return reasons


def combine_runs(
    means: Sequence[tuple[float, float]],
    short: tuple[float, float] | None,
    lengths: tuple[int, int],
    spreads: Sequence[Mean],
) -> Combined:
    """The log mean of the main runs, and its error.

    Args:
        means: log mean and its sampling error of each main run, constants included.
        short: the same of the shorter run with the first one's law of directions.
        lengths: K of the main runs, and of the shorter one.
        spreads: what the main runs' bridges said.
    """
    values = np.array([value for value, _ in means])
    errors = np.array([error for _, error in means])
    finite = np.isfinite(errors) & np.isfinite(values)
    if not finite.all():
        return Combined(
            float(values.max()), math.inf, math.inf, math.inf, math.inf, 0.0, math.nan, True
        )
    shares = 1.0 / (np.square(errors) + _LEAST_ERROR**2)
    shares /= shares.sum()
    value = float(shares @ values)
    sampling = math.sqrt(float(np.square(shares) @ np.square(errors)))
    spread, apart = 0.0, False
    if len(values) > 1:
        spread = math.sqrt(float(shares @ np.square(values - value)) / (len(values) - 1))
        gaps = np.abs(values[:, None] - values[None])
        allowed = np.hypot(errors[:, None], errors[None])
        apart = bool((gaps > _APART * np.maximum(allowed, _LEAST_ERROR)).any())
    drift = 0.0
    if short is not None:
        long_k, short_k = lengths
        gap = abs(float(values[0]) - short[0]) if math.isfinite(short[0]) else math.inf
        drift = 1.5 * gap * short_k / max(long_k - short_k, 1)
    return Combined(
        log_mean=value,
        stderr=math.hypot(sampling, spread, drift),
        sampling=sampling,
        spread=spread,
        drift=drift,
        ess=min(mean.ess for mean in spreads),
        max_share=max(mean.max_share for mean in spreads),
        apart=apart,
    )


@dataclass(frozen=True, eq=False, repr=False)
class PathEstimate(VolumeEstimate):
    """A :class:`VolumeEstimate` whose directions are Markov chains along a path of targets.

    ``n`` counts states, ``log_radii`` and ``status`` are theirs, main runs first; ``ess`` is the
    effective number of chains; ``seeds`` is the seed. ``reliable`` also asks that the moves did not
    collapse, that independent runs agree, and that the error is below a nat.
    """

    _runs: tuple[Run, ...] = ()
    _short: Run | None = None
    _combined: Combined | None = None
    _extra_error: float = 0.0

    @property
    def by_chains(self) -> bool:
        """True."""
        return True

    @property
    def paired(self) -> bool:
        """False: chains do not come in pairs."""
        return False

    @cached_property
    def _bridges(self) -> list[Bridge]:
        runs = [*self._runs] + ([] if self._short is None else [self._short])
        return [bridge_of(run, self.measure, self.dim) for run in runs]

    def _at(self, log_scale: float, stretch: float = 0.0) -> Combined:
        """The log mean of W under a cap, or of a width."""
        return combined_at(
            self._runs, self._short, self._bridges, self.measure, self.dim, log_scale, stretch
        )

    def ci(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of ``log_volume``, nats: normal, from ``stderr``.

        It holds where ``reliable`` is true; else only its lower end means anything.

        Args:
            level: between 0 and 1.

        Raises:
            ValueError: ``level`` is out of range.
        """
        _check_level(level)
        if not math.isfinite(self.stderr):
            return -math.inf, math.inf
        reach = NormalDist().inv_cdf(0.5 * (1.0 + level)) * self.stderr
        high = self.log_volume + reach
        if isinstance(self.measure, Gaussian):
            high = max(min(high, 0.0), self.log_volume)
        return self.log_volume - reach, high

    def lower_bound(self, level: float = 0.95) -> float:
        """log V̂ − log(1/(1 − level)), nats, from the increments of the main runs alone.

        The product of a run's increments is an unbiased estimate of the volume whatever the chains'
        mixing (Dau & Chopin 2022), but for the choice of the path from the states themselves; so is
        the mean over runs, to which Markov's inequality applies. −inf where a run did not reach the
        path's end.

        Args:
            level: between 0 and 1.
        """
        _check_level(level)
        if not all(run.finished for run in self._runs):
            return -math.inf
        forward = np.array([run.log_mean for run in self._runs])
        top = float(forward.max())
        mean = top + math.log(float(np.exp(forward - top).mean()))
        shift = self.log_volume - self.statistics.log_mean
        mean += math.log1p(-min(max(self._rays.reentrant_share, 0.0), _MOST_REENTRANT))
        return mean + shift + math.log1p(-level) - self._extra_error

    @cached_property
    def reliable_radius(self) -> float:
        """The largest cap R (multiple of std) up to which the profile is reliable."""
        return self.profile().reliable_radius

    def profile(self, radii: npt.ArrayLike | None = None, *, level: float = 0.95) -> Profile:
        r"""φ(R) = log vol(S ∩ B_R) − log vol(B_R), or the log mass at c times the std.

        From the states of all levels together, so it reaches as far as the path does.

        Args:
            radii: caps R in metric coordinates (multiples of std for a Gaussian measure), positive;
                a grid over the states' radii by default.
            level: of the intervals.

        Raises:
            ValueError: ``radii`` holds a value that is not positive, or one beyond ``max_radius``.
        """
        _check_level(level)
        gaussian = isinstance(self.measure, Gaussian)
        scales = self._default_scales() if radii is None else _positive_vector(radii, "radii")
        if isinstance(self.measure, Lebesgue) and (scales > self.measure.max_radius).any():
            raise ValueError(
                f"radii must not exceed the measure's max_radius, {self.measure.max_radius}"
            )
        table = np.array([self._row(math.log(scale), level) for scale in scales])
        passed = table[:, 6] > 0
        order = np.argsort(scales, kind="stable")
        ascending = passed[order]
        if not (gaussian and self._offset_squared > 0):
            ascending = np.logical_and.accumulate(ascending)
        trusted = np.empty_like(passed)
        trusted[order] = ascending
        reach = float(scales[trusted].max()) if trusted.any() else 0.0
        if self.reliable and isinstance(self.measure, Lebesgue) and trusted.all():
            reach = self.measure.max_radius
        return Profile(
            kind=self.measure.kind,
            radius=scales,
            log_fraction=table[:, 0],
            stderr=table[:, 1],
            ci_low=table[:, 2],
            ci_high=table[:, 3],
            level=level,
            ess=table[:, 4],
            slope=table[:, 5],
            reliable=trusted,
            reliable_radius=reach,
        )

    def _default_scales(self) -> Float:
        lengths = np.concatenate([run.log_radii for run in self._runs])
        if isinstance(self.measure, Gaussian):
            # Where a law's typical radius was met, and the law itself.
            root = 0.5 * math.log(self.dim)
            low, high = float(lengths.min()) - root, float(lengths.max()) - root
            return np.union1d(np.exp(np.linspace(low, max(high, 0.0), _GRID)), 1.0)
        low = float(np.quantile(lengths, 1e-3)) - 0.1
        high = min(float(lengths.max()), math.log(self.measure.max_radius))
        return np.minimum(np.exp(np.linspace(low, high, _GRID)), self.measure.max_radius)

    def _row(self, log_scale: float, level: float) -> tuple[float, ...]:
        """value, stderr, low, high, ess, slope, passed."""
        combined = self._at(log_scale)
        slope = (self._at(log_scale, _STRETCH).log_mean - combined.log_mean) / _STRETCH
        constant = -0.5 * self._offset_squared * math.exp(-2.0 * log_scale)
        if isinstance(self.measure, Lebesgue):
            constant = math.log(self.dim) - self.dim * log_scale
        value = combined.log_mean + constant
        pilot = self.config["pilot"]
        inexact = radius_errors(
            max(slope, 0.0), max(pilot["rtol"], pilot["rounding"]), pilot["bias"]
        )
        stderr = math.hypot(
            combined.stderr,
            self._rays.reentrant_share,
            self._rays.reentrant_error,
            self._log_constant_error,
            *inexact,
        )
        z = NormalDist().inv_cdf(0.5 * (1.0 + level))
        high = max(min(value + z * stderr, 0.0), value)
        passed = combined.reliable and stderr <= _MOST_ERROR and self._mixes
        return value, stderr, value - z * stderr, high, combined.ess, slope, float(passed)

    @property
    def _mixes(self) -> bool:
        return not mixing_trouble(self._runs)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per state: run, level, chain, radius, log_radius, log_weight, status.

        Raises:
            FastvolError: pandas is not installed.
        """
        pd = pandas()
        scale = final_log_scale(self.measure)
        return pd.concat(
            [
                pd.DataFrame(
                    {
                        "run": index,
                        "level": run.level,
                        "chain": run.cluster,
                        "radius": np.exp(run.log_radii),
                        "log_radius": run.log_radii,
                        "log_weight": log_weight(
                            self.measure, self.dim, run.log_radii, run.shift, run.log_offset, scale
                        ),
                        "status": run.status,
                    }
                )
                for index, run in enumerate(self._runs)
            ],
            ignore_index=True,
        )

    def combine(self, other: VolumeEstimate) -> VolumeEstimate:
        """The runs of this estimate and of another one of the same config under another seed.

        Raises:
            TypeError: ``other`` is not an estimate of this kind.
            ValueError: the two differ in more than seed and n, or share a seed.
        """
        if not isinstance(other, PathEstimate):
            raise TypeError(f"other must be a PathEstimate, got {type(other).__name__}")
        differing = sorted(
            key
            for key in set(self.config) | set(other.config)
            if key not in ("seed", "n", "pilot", "preconditioner", "replicates")
            and self.config.get(key) != other.config.get(key)
        )
        if differing:
            raise ValueError(f"other answers another question: {', '.join(differing)} differ")
        shared = set(self.seeds) & set(other.seeds)
        if shared:
            raise ValueError(f"other has the same chains (seed {shared.pop()})")
        return assemble_paths(
            (*self._runs, *other._runs),
            self._short,
            measure=self.measure,
            dim=self.dim,
            log_abs_scale=self._log_abs_scale,
            offset_squared=self._offset_squared,
            seeds=self.seeds + other.seeds,
            config=self.config,
            plan=self.plan,
            provenance=self.provenance,
            n_loss=self.n_loss + other.n_loss,
            n_grad=self.n_grad + other.n_grad,
            seconds=self.seconds + other.seconds,
            reentrant=(
                max(self.reentrant_fraction, other.reentrant_fraction),
                max(self._rays.reentrant_error, other._rays.reentrant_error),
            ),
            log_constant_error=max(self._log_constant_error, other._log_constant_error),
        )

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes one safetensors file; see :meth:`VolumeEstimate.save`."""
        runs = [*self._runs] + ([] if self._short is None else [self._short])
        arrays = {
            f"{index}.{name}": column
            for index, run in enumerate(runs)
            for name, column in run.columns().items()
        }
        header = {
            "format_version": FORMAT_VERSION,
            "kind": "paths",
            "measure": self.measure.describe(),
            "dim": self.dim,
            "log_abs_scale": self._log_abs_scale,
            "offset_squared": self._offset_squared,
            "reentrant": [self.reentrant_fraction, self._rays.reentrant_error],
            "seeds": list(self.seeds),
            "config": self.config,
            "plan": self.plan,
            "provenance": self.provenance,
            "n_loss": self.n_loss,
            "n_grad": self.n_grad,
            "seconds": self.seconds,
            "log_constant_error": self._log_constant_error,
            "n_main": len(self._runs),
            "runs": [run.describe() for run in runs],
        }
        return write_result(path, arrays, header, self.measure)


def bridge_of(run: Run, measure: Lebesgue | Gaussian, dim: int) -> Bridge:
    """The multistate bridge over a run's states."""
    rows = np.zeros((len(run.levels), len(run.log_radii)))
    for row, level in zip(rows[1:], run.levels[1:], strict=True):
        row[:] = level.beta * log_weight(
            measure, dim, run.log_radii, run.shift, run.log_offset, level.log_scale
        )
    start = np.concatenate([[0.0], np.cumsum(run.log_increments)])
    return Bridge(rows, run.level, run.cluster, start)


def final_log_scale(measure: Lebesgue | Gaussian) -> float:
    """log R of the measure's cap; 0 for a normal law: the width asked for."""
    return math.log(measure.max_radius) if isinstance(measure, Lebesgue) else 0.0


def combined_at(
    runs: Sequence[Run],
    short: Run | None,
    bridges: Sequence[Bridge],
    measure: Lebesgue | Gaussian,
    dim: int,
    log_scale: float,
    stretch: float = 0.0,
) -> Combined:
    """The log mean of W under a cap or width, from all runs, constants of their laws included.

    With every log radius longer by ``stretch``.
    """
    everything = [*runs] + ([] if short is None else [short])
    means = [
        bridge.mean(
            log_weight(measure, dim, run.log_radii + stretch, run.shift, run.log_offset, log_scale)
        )
        for run, bridge in zip(everything, bridges, strict=True)
    ]
    values = [
        (mean.log_mean + run.log_constant, mean.stderr)
        for run, mean in zip(everything, means, strict=True)
    ]
    count = len(runs)
    lengths = (runs[0].length, 1 if short is None else short.length)
    return combine_runs(
        values[:count], None if short is None else values[count], lengths, means[:count]
    )


def mixing_trouble(runs: Sequence[Run]) -> list[str]:
    """Plain sentences about moves that collapsed."""
    troubles = []
    for run in runs:
        told = [report for report in run.reports if report]
        steps = [report["step_size"] for report in told if "step_size" in report]
        if steps and min(steps) < _COLLAPSED:
            troubles.append(f"the moves collapsed: their step fell to {min(steps):.1e}")
        capped = [report.get("capped", 0.0) for report in told]
        if capped and max(capped) > 0.5:
            troubles.append(
                "trajectories were cut short by the cap on leapfrog steps on "
                f"{sum(share > 0.5 for share in capped)} of {len(capped)} levels"
            )
        memory = [report.get("memory", 0.0) for report in told]
        if memory and max(memory[len(memory) // 2 :]) > _MOST_MEMORY:
            troubles.append(
                f"chains still lie where they started when a level ends (correlation up to "
                f"{max(memory[len(memory) // 2 :]):.2f}): raise n"
            )
        stuck = [report.get("stuck", 0.0) for report in told]
        if stuck and max(stuck) > 0.1:
            troubles.append("slices were not met: the loss is not a function of the point alone")
    return list(dict.fromkeys(troubles))


def assemble_paths(
    runs: Sequence[Run],
    short: Run | None,
    *,
    measure: Lebesgue | Gaussian,
    dim: int,
    log_abs_scale: float,
    offset_squared: float,
    seeds: tuple[int, ...],
    config: Mapping[str, Any],
    plan: Mapping[str, Any],
    provenance: Mapping[str, Any],
    n_loss: int,
    n_grad: int,
    seconds: float,
    reentrant: tuple[float, float] = (0.0, 0.0),
    log_constant_error: float = 0.0,
) -> PathEstimate:
    """The estimate that some runs give.

    Args:
        runs: the main ones. short: the shorter one, if there is one.
        measure, dim, log_abs_scale, offset_squared, seeds, config, plan, provenance, n_loss,
            n_grad, seconds: as for :func:`fastvol.result.assemble`.
        reentrant: share of the last level's states, checked at random, whose ray leaves the basin
            and re-enters it, and its standard error.
        log_constant_error: of the laws' log determinants, nats.
    """
    lebesgue = isinstance(measure, Lebesgue)
    everything = [*runs] + ([] if short is None else [short])
    bridges = [bridge_of(run, measure, dim) for run in everything]
    scale = final_log_scale(measure)
    combined = combined_at(runs, short, bridges, measure, dim, scale)
    kappa = _sensitivity(runs, short, bridges, measure, dim, scale)
    pilot = config["pilot"]
    inexact = radius_errors(kappa, max(pilot["rtol"], pilot["rounding"]), pilot["bias"])
    share, share_error = min(max(reentrant[0], 0.0), _MOST_REENTRANT), reentrant[1]
    extra = math.hypot(share_error, log_constant_error)
    stderr = math.hypot(combined.stderr, extra, *inexact)
    log_mean = combined.log_mean + math.log1p(-share)
    constant = 0.0
    if lebesgue:
        constant = formulas().log_ball_volume(dim) + math.log(dim)
    metric_volume = log_mean + constant - 0.5 * offset_squared

    trouble = mixing_trouble(runs)
    length = runs[0].length
    too_short = length < _MIN_LENGTH or (short is not None and length < 2 * short.length)
    # Where all weights are even there is nothing to mix.
    if too_short and combined.sampling > _EVEN:
        trouble.append(f"chains of {length} states a level are too short to tell whether they mix")
    trouble += [
        f"a run ended before the path did: {run.stopped}" for run in runs if not run.finished
    ]
    notes = combined.reasons() + trouble
    unbounded = _unbounded_share(runs, bridges, measure, dim, scale)
    reliable = combined.reliable and not trouble and stderr <= _MOST_ERROR
    if stderr > _MOST_ERROR and combined.stderr <= _MOST_ERROR:
        notes.append(f"the error, {stderr:.2g} nats, is above {_MOST_ERROR:g}")
    if unbounded > _UNBOUNDED_SHARE and lebesgue and math.isinf(scale):
        reliable = False
        notes.append(
            f"rays that never crossed the threshold up to the search's cap carry {unbounded:.0%} "
            "of the weight: the volume may be infinite; give the measure a max_radius"
        )
    if share > 0:
        notes.append(
            f"{share:.1%} of the last level's weight lies beyond the first crossing of rays that "
            "leave the basin and re-enter it, and is taken off"
        )
        if share > 0.5:
            reliable = False
    failed = sum(int((run.status == 3).sum()) for run in runs)
    if failed:
        notes.append(
            f"{failed} rays ran out of evaluations; they count with the radius known to be inside"
        )
    notes.extend(provenance.get("remarks", ()))
    log_radii = np.concatenate([run.log_radii for run in runs])
    status = np.concatenate([run.status for run in runs])
    counts = np.bincount(status, minlength=4)
    rays = Rays.empty(len(log_radii))
    rays.log_radii, rays.status = log_radii, status
    rays.shift = np.concatenate([run.shift for run in runs])
    rays.log_offset = np.concatenate([run.log_offset for run in runs])
    rays.reentrant_share, rays.reentrant_error = share, share_error
    return PathEstimate(
        log_volume=metric_volume + (log_abs_scale if lebesgue else 0.0),
        log_volume_metric=metric_volume,
        log_mean_power=log_mean + math.log(dim) if lebesgue else math.nan,
        stderr=stderr,
        reliable=reliable,
        warnings=tuple(dict.fromkeys(notes)),
        pareto_k=math.nan,
        ess=combined.ess,
        dim=dim,
        n=len(log_radii),
        log_radii=log_radii,
        status=status,
        n_unbounded=int(counts[1]),
        n_nonfinite=int(counts[2]),
        n_failed=int(counts[3]),
        reentrant_fraction=reentrant[0],
        n_loss=n_loss,
        n_grad=n_grad,
        seconds=seconds,
        seeds=seeds,
        measure=measure,
        config=dict(config),
        plan=dict(plan),
        provenance=dict(provenance),
        statistics=_summary(combined, log_mean, extra, reliable, notes),
        _rays=rays,
        _log_abs_scale=log_abs_scale,
        _offset_squared=offset_squared,
        _log_constant_error=log_constant_error,
        _runs=tuple(runs),
        _short=short,
        _combined=combined,
        _extra_error=math.hypot(extra, *inexact),
    )


def _summary(
    combined: Combined, log_mean: float, extra: float, reliable: bool, notes: Sequence[str]
) -> Summary:
    return Summary(
        n=int(combined.ess),
        log_mean=log_mean,
        sampling_stderr=combined.stderr,
        skewness=0.0,
        ess=combined.ess,
        max_share=combined.max_share,
        pareto_k=math.nan,
        n_half_max=0,
        bounded=False,
        constant=False,
        reliable=reliable,
        reasons=tuple(notes),
        extra_error=extra,
    )


def _sensitivity(
    runs: Sequence[Run],
    short: Run | None,
    bridges: Sequence[Bridge],
    measure: Lebesgue | Gaussian,
    dim: int,
    scale: float,
) -> float:
    """κ: nats by which the answer moves per unit of log radius."""
    if math.isinf(scale):
        return float(dim)
    here, longer = (
        combined_at(runs, short, bridges, measure, dim, scale, stretch).log_mean
        for stretch in (0.0, _STRETCH)
    )
    kappa = (longer - here) / _STRETCH
    return min(max(kappa, 0.0), float(dim)) if math.isfinite(kappa) else float(dim)


def _unbounded_share(
    runs: Sequence[Run],
    bridges: Sequence[Bridge],
    measure: Lebesgue | Gaussian,
    dim: int,
    scale: float,
) -> float:
    shares = []
    for run, bridge in zip(runs, bridges, strict=False):
        if not (run.status == 1).any():
            shares.append(0.0)
            continue
        weights = log_weight(measure, dim, run.log_radii, run.shift, run.log_offset, scale)
        closed = bridge.mean(np.where(run.status == 1, -math.inf, weights)).log_mean
        shares.append(-math.expm1(min(closed - bridge.mean(weights).log_mean, 0.0)))
    return max(shares)


def load_paths(
    header: Mapping[str, Any], arrays: Mapping[str, Any], measure: Lebesgue | Gaussian
) -> PathEstimate:
    """The estimate that :meth:`PathEstimate.save` wrote."""
    runs = []
    for index, told in enumerate(header["runs"]):
        start = f"{index}."
        columns = {
            name.removeprefix(start): arrays[name] for name in arrays if name.startswith(start)
        }
        runs.append(Run.rebuilt(told, columns))
    main = header["n_main"]
    kept = ("config", "plan", "provenance", "n_loss", "n_grad", "seconds", "dim")
    return assemble_paths(
        runs[:main],
        runs[main] if main < len(runs) else None,
        measure=measure,
        log_abs_scale=header["log_abs_scale"],
        offset_squared=header["offset_squared"],
        seeds=tuple(header["seeds"]),
        reentrant=tuple(header["reentrant"]),
        log_constant_error=header["log_constant_error"],
        **{name: header[name] for name in kept},
    )
