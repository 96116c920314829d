"""The result of a run: what was measured, how far it can be trusted, and every radius."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ._backend import formulas
from ._profile import (
    Profile,
    gaussian_profile,
    gaussian_reliable_scale,
    lebesgue_profile,
    reliable_radius,
)
from ._statistics import (
    Summary,
    interval,
    lower_bound,
    radius_errors,
    summarise,
    with_extra_error,
)
from ._table import pandas
from .errors import FastvolError
from .measures import STD_PREFIX, Gaussian, Lebesgue, measure_from

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

FORMAT_VERSION = 2
# Nats: an error of the search itself beyond this makes an estimate unreliable.
_MOST_EXTRA_ERROR = 0.5
# What re-entrance may take off the weight by way of correction; its error says the rest.
_MOST_REENTRANT = 0.9

# Config entries that may differ between results that are combined.
_FREE_CONFIG = ("seed", "n", "pilot")
_RAY_ARRAYS = ("log_radii", "status", "shift", "log_offset", "audited", "sampled", "reentrant")
_STATUS_NAMES = ("converged", "unbounded", "nonfinite", "failed")


@dataclass
class Rays:
    """One entry per direction, filled in while a run goes on.

    Args:
        log_radii: float64 ``[n]``.
        status: uint8 ``[n]``: 0 converged, 1 unbounded, 2 bounded by a non-finite loss, 3 failed.
        shift: float64 ``[n]``: ⟨v, μ⟩/‖v‖ for a law with offset μ, else 0.
        log_offset: float64 ``[n]``, nats: what the law of the directions adds to each log weight;
            0 where they are isotropic. See :func:`ray_offsets`.
        audited: scanned for an earlier crossing.
        sampled: audited by chance, not for its weight.
        reentrant: an earlier crossing was found.
        reentrant_share: share of the weight that unaudited rays carry too much, by the random ones.
        reentrant_error: its standard error.
    """

    log_radii: Float
    status: npt.NDArray[np.uint8]
    shift: Float
    log_offset: Float
    audited: Bool
    sampled: Bool
    reentrant: Bool
    reentrant_share: float = 0.0
    reentrant_error: float = 0.0

    @classmethod
    def empty(cls, n: int) -> Rays:
        """Room for ``n`` directions."""

        def no() -> Bool:
            return np.zeros(n, dtype=np.bool_)

        status = np.zeros(n, dtype=np.uint8)
        return cls(np.zeros(n), status, np.zeros(n), np.zeros(n), no(), no(), no())

    @property
    def n(self) -> int:
        """Directions."""
        return len(self.log_radii)

    def log_weights(
        self, measure: Lebesgue | Gaussian, dim: int, ids: npt.NDArray[np.int64] | None = None
    ) -> tuple[Float, float]:
        """Log weights of the rays ``ids`` (all by default), and the constant of their log mean."""
        chosen = slice(None) if ids is None else ids
        weights, constant = log_weights(measure, dim, self.log_radii[chosen], self.shift[chosen])
        return weights + self.log_offset[chosen], constant

    def take(self, rows: npt.NDArray[np.int64]) -> Rays:
        """Some of the directions, copied."""
        arrays: dict[str, Any] = {name: getattr(self, name)[rows] for name in _RAY_ARRAYS}
        return Rays(**arrays)

    @classmethod
    def join(cls, a: Rays, b: Rays) -> Rays:
        """The directions of ``a``, then those of ``b``."""
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(a, name), getattr(b, name)]) for name in _RAY_ARRAYS
        }
        n = a.n + b.n
        return cls(
            **arrays,
            reentrant_share=(a.n * a.reentrant_share + b.n * b.reentrant_share) / n,
            reentrant_error=math.hypot(a.n * a.reentrant_error, b.n * b.reentrant_error) / n,
        )


def log_weights(
    measure: Lebesgue | Gaussian, dim: int, log_radii: Float, shift: Float
) -> tuple[Float, float]:
    """Log weight of each ray, and the constant that makes their log mean the answer.

    Lebesgue: the log radial integral d·log ρ − log d, and the log area of the unit sphere.
    Gaussian: the log radial integral, and 0 (the term −‖μ‖²/2 of an offset is the caller's).
    """
    core = formulas()
    if isinstance(measure, Lebesgue):
        weights = core.log_radial_lebesgue(dim, np.exp(log_radii))
        return weights, core.log_ball_volume(dim) + math.log(dim)
    return core.log_radial_gaussian(dim, np.exp(log_radii), shift), 0.0


def ray_offsets(dim: int, log_norm: Float, proposal_shift: Float) -> Float:
    """What a preconditioned law of directions adds to a log weight, nats, ``[k]``.

    −d log‖v‖ − log I_d(∞, a), see ``fastvol._proposal``.

    Args:
        dim: d.
        log_norm: log‖v‖ ``[k]``.
        proposal_shift: a = ⟨u, m⟩ ``[k]``; zeros without a shift.
    """
    offsets: Float = -dim * log_norm
    if proposal_shift.any():
        whole = np.full(len(log_norm), math.inf)
        offsets = offsets - formulas().log_radial_gaussian(dim, whole, proposal_shift)
    return offsets


@dataclass(frozen=True, eq=False, repr=False)
class VolumeEstimate:
    r"""A basin's log volume, or log mass under a normal law, with its error and every radius.

    Attributes:
        log_volume: in parameter coordinates θ, nats. For a Gaussian measure the log mass.
        log_volume_metric: in metric coordinates w = (θ − θ*)/s; equal to ``log_volume`` for a
            Gaussian measure, which does not depend on the metric.
        log_mean_power: log E[r^d] in metric coordinates, without any constant: the quantity of
            "Sharp Minima Can Generalize" (arXiv 2511.04808). NaN for a Gaussian measure.
        stderr: standard error of ``log_volume``, nats: sampling, search tolerance, re-entrance.
        reliable: whether the gate passed; if not, ``log_volume`` is only a lower bound.
        warnings: plain sentences about what to keep in mind.
        pareto_k: Pareto shape of the weights' tail (NaN where the weights are bounded).
        ess: effective number of independent units.
        dim: d, the number of parameters that moved.
        n: directions.
        log_radii: log of the radius per direction, float64 ``[n]``; in metric coordinates, and for
            a Gaussian measure in units of its standard deviation.
        status: per direction, uint8 ``[n]``: 0 converged, 1 unbounded (no crossing up to the cap:
            the measure's own, where it has one, else the search's, ``config["pilot"]["log_cap"]``),
            2 bounded by a loss that is not finite, 3 failed (out of evaluations).
        n_unbounded, n_nonfinite, n_failed: their counts.
        reentrant_fraction: share of randomly checked rays that leave the basin and re-enter it.
        n_loss, n_grad: evaluations of the loss, and of its gradient, one ray each.
        seconds: of the whole call up to this result.
        seed: of the directions (the first one, after ``combine``).
        config: everything the numbers depend on. plan: how the run was carried out; pass it to
            ``estimate(plan=…)`` for a bitwise repeat. provenance: versions, device, what fell back.
    """

    log_volume: float
    log_volume_metric: float
    log_mean_power: float
    stderr: float
    reliable: bool
    warnings: tuple[str, ...]
    pareto_k: float
    ess: float
    dim: int
    n: int
    log_radii: Float
    status: npt.NDArray[np.uint8]
    n_unbounded: int
    n_nonfinite: int
    n_failed: int
    reentrant_fraction: float
    n_loss: int
    n_grad: int
    seconds: float
    seeds: tuple[int, ...]
    measure: Lebesgue | Gaussian
    config: dict[str, Any]
    plan: dict[str, Any]
    provenance: dict[str, Any]
    statistics: Summary
    _rays: Rays
    _log_abs_scale: float
    _offset_squared: float
    # log|det P| + ‖m‖²/2 of a preconditioned law of directions, and its error.
    _log_constant: float = 0.0
    _log_constant_error: float = 0.0

    @property
    def seed(self) -> int:
        """The seed of the directions (the first one, after :meth:`combine`)."""
        return self.seeds[0]

    @property
    def shift(self) -> Float | None:
        """Per ray the linear term of an off-centre normal law, float64 ``[n]``; else ``None``."""
        return self._rays.shift if self._offset_squared > 0 else None

    @property
    def preconditioned(self) -> bool:
        """Whether the directions were drawn from another law than the isotropic one."""
        return "preconditioner" in self.config

    @property
    def _law_offsets(self) -> Float | None:
        return self._rays.log_offset if self.preconditioned else None

    @property
    def _log_norms(self) -> Float | None:
        """log‖v‖ per ray, under Lebesgue measure."""
        return -self._rays.log_offset / self.dim if self.preconditioned else None

    @property
    def _log_multiples(self) -> Float:
        """log ρ per ray: its log length in multiples of v."""
        norms = self._log_norms
        return self.log_radii if norms is None else self.log_radii - norms

    @property
    def method(self) -> str:
        """The method that made this estimate."""
        return str(self.config["method"])

    @property
    def by_chains(self) -> bool:
        """Whether the directions are Markov chains, not independent draws."""
        return False

    @property
    def paired(self) -> bool:
        """Whether directions come in ± pairs, which are the independent units then."""
        return bool(self.config["antithetic"])

    def ci(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of ``log_volume``, nats.

        It holds where ``reliable`` is true; else only its lower end means anything.

        Args:
            level: between 0 and 1.

        Raises:
            ValueError: ``level`` is out of range.
        """
        _check_level(level)
        shift = self.log_volume - self.statistics.log_mean
        if not math.isfinite(self.statistics.log_mean):
            return -math.inf, math.inf
        low, high = interval(self.statistics, level)
        return low + shift, high + shift

    def lower_bound(self, level: float = 0.95) -> float:
        """log V̂ − log(1/(1 − level)), nats: below the truth with probability ``level``.

        By Markov's inequality for the mean of independent non-negative weights, whatever their
        tail; it does not need ``reliable``. The search's own error is taken off as well.

        Args:
            level: between 0 and 1.
        """
        _check_level(level)
        shift = self.log_volume - self.statistics.log_mean
        return lower_bound(self.statistics, level) + shift - self.statistics.extra_error

    @property
    def _reentrance(self) -> float:
        """What re-entrant rays may cost at a cap, nats: the whole's correction and its error.

        At a smaller cap fewer of them matter, so a profile is not corrected.
        """
        return math.hypot(self._rays.reentrant_share, self._rays.reentrant_error)

    @cached_property
    def reliable_radius(self) -> float:
        """R_n: the largest cap R at which the gate passes there and at every smaller one.

        In metric coordinates; infinite where the estimate itself is reliable, 0 where no cap is.
        For a Gaussian measure the largest reliable multiple of its standard deviation.
        """
        if isinstance(self.measure, Gaussian):
            return gaussian_reliable_scale(
                self.log_radii,
                self.dim,
                self.shift,
                paired=self.paired,
                unbounded=self.status == 1,
                log_offsets=self._law_offsets,
                log_radius_error=_log_radius_error(self.config),
                log_radial_gaussian=formulas().log_radial_gaussian,
            )
        if self.reliable:
            return self.measure.max_radius
        radius = reliable_radius(
            self._log_multiples,
            self.dim,
            paired=self.paired,
            unbounded=self.status == 1,
            max_radius=self.measure.max_radius,
            log_norms=self._log_norms,
        )
        return min(radius, self.measure.max_radius)

    def profile(self, radii: npt.ArrayLike | None = None, *, level: float = 0.95) -> Profile:
        r"""φ(R) = log vol(S ∩ B_R) − log vol(B_R) from the same radii, for every cap R at once.

        For a Gaussian measure: the log mass as a function of a multiple of its standard deviation.

        Args:
            radii: caps R in metric coordinates (multiples of std for a Gaussian measure), positive;
                a grid over the observed radii by default.
            level: of the intervals.

        Raises:
            ValueError: ``radii`` holds a value that is not positive, or one beyond ``max_radius``.
        """
        _check_level(level)
        chosen = None
        if radii is not None:
            chosen = _positive_vector(radii, "radii")
        if isinstance(self.measure, Gaussian):
            return gaussian_profile(
                self.log_radii,
                self.dim,
                self.shift,
                scales=chosen,
                offset_squared=self._offset_squared,
                paired=self.paired,
                unbounded=self.status == 1,
                level=level,
                log_radius_error=_log_radius_error(self.config),
                log_radius_bias=float(self.config["pilot"]["bias"]),
                log_offsets=self._law_offsets,
                log_constant=self._log_constant,
                extra_error=math.hypot(self._reentrance, self._log_constant_error),
                log_radial_gaussian=formulas().log_radial_gaussian,
            )
        if chosen is not None and (chosen > self.measure.max_radius).any():
            raise ValueError(
                f"radii must not exceed the measure's max_radius, {self.measure.max_radius}"
            )
        return lebesgue_profile(
            self._log_multiples,
            self.dim,
            radii=chosen,
            paired=self.paired,
            unbounded=self.status == 1,
            max_radius=self.measure.max_radius,
            level=level,
            log_radius_error=_log_radius_error(self.config),
            log_radius_bias=float(self.config["pilot"]["bias"]),
            log_abs_det=self._log_constant,
            log_norms=self._log_norms,
            extra_error=math.hypot(self._reentrance, self._log_constant_error),
        )

    def summary(self) -> str:
        """The result in words."""
        from ._report import summary

        return summary(self)

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """Draws the profile with its interval and reliable radius; needs matplotlib.

        Args:
            ax: where to draw; a new figure by default.
            label: for the legend.
        """
        from .plotting import plot_profile

        return plot_profile(self, ax, label=label)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per direction: seed, direction, radius, log_radius, log_weight, status.

        Raises:
            FastvolError: pandas is not installed.
        """
        pd = pandas()
        weights, constant = self._rays.log_weights(self.measure, self.dim)
        constant += self._log_constant
        return pd.DataFrame(
            {
                "seed": np.repeat(np.array(self.seeds, dtype=np.uint64), self._counts()),
                "direction": np.concatenate([np.arange(count) for count in self._counts()]),
                "radius": np.exp(self.log_radii),
                "log_radius": self.log_radii,
                "log_weight": weights + constant - 0.5 * self._offset_squared,
                "status": pd.Categorical.from_codes(
                    self.status.astype(np.int64), categories=list(_STATUS_NAMES)
                ),
                "audited": self._rays.audited,
                "reentrant": self._rays.reentrant,
            }
        )

    def _counts(self) -> list[int]:
        return list(self.config["n"]) if isinstance(self.config["n"], list) else [self.n]

    def combine(self, other: VolumeEstimate) -> VolumeEstimate:
        """This estimate with the directions of another one of the same config under other seeds.

        Raises:
            TypeError: ``other`` is not a VolumeEstimate.
            ValueError: the two differ in more than their seed and n, or share a seed.
        """
        if not isinstance(other, VolumeEstimate):
            raise TypeError(f"other must be a VolumeEstimate, got {type(other).__name__}")
        differing = sorted(
            key
            for key in set(self.config) | set(other.config)
            if key not in _FREE_CONFIG and self.config.get(key) != other.config.get(key)
        )
        if differing:
            raise ValueError(f"other answers another question: {', '.join(differing)} differ")
        shared = set(self.seeds) & set(other.seeds)
        if shared:
            raise ValueError(
                f"other has the same directions (seed {shared.pop()}); combine runs with different "
                "seeds, or raise n"
            )
        if self.paired and self.n % 2:
            raise ValueError("an odd n cannot be combined: its last direction has lost its pair")
        config = dict(self.config)
        config["n"] = self._counts() + other._counts()
        config["pilot"] = {**self.config["pilot"]}
        for name in ("rtol", "rounding", "bias"):
            config["pilot"][name] = max(self.config["pilot"][name], other.config["pilot"][name])
        return assemble(
            Rays.join(self._rays, other._rays),
            measure=self.measure,
            dim=self.dim,
            log_abs_scale=self._log_abs_scale,
            offset_squared=self._offset_squared,
            log_constant=self._log_constant,
            log_constant_error=self._log_constant_error,
            seeds=self.seeds + other.seeds,
            config=config,
            plan=self.plan,
            provenance={**self.provenance, "combined": len(self.seeds) + len(other.seeds)},
            n_loss=self.n_loss + other.n_loss,
            n_grad=self.n_grad + other.n_grad,
            seconds=self.seconds + other.seconds,
        )

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes one safetensors file: the arrays, and everything else as JSON in its header.

        The file is written aside and renamed, so an interrupted save leaves none.

        Returns:
            The path.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such folder, or ``path`` is one.
        """
        rays = self._rays
        arrays = {name: getattr(rays, name) for name in _RAY_ARRAYS}
        header = {
            "format_version": FORMAT_VERSION,
            "kind": "rays",
            "measure": self.measure.describe(),
            "dim": self.dim,
            "log_abs_scale": self._log_abs_scale,
            "offset_squared": self._offset_squared,
            "log_constant": self._log_constant,
            "log_constant_error": self._log_constant_error,
            "reentrant_share": rays.reentrant_share,
            "reentrant_error": rays.reentrant_error,
            "seeds": list(self.seeds),
            "config": self.config,
            "plan": self.plan,
            "provenance": self.provenance,
            "n_loss": self.n_loss,
            "n_grad": self.n_grad,
            "seconds": self.seconds,
        }
        return write_result(path, arrays, header, self.measure)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> VolumeEstimate:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FastvolError: it is not a result, is damaged, or has a newer format.
        """
        from safetensors import SafetensorError, safe_open

        if not _path(path).is_file():
            raise FileNotFoundError(f"path: there is no file {path}")
        try:
            with safe_open(path, framework="np") as file:
                header = json.loads((file.metadata() or {})["fastvol"])
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version = header["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"it has format version {version}; this version reads {FORMAT_VERSION}"
                )
            tensors = {
                name: torch.from_numpy(array)
                for name, array in stored.items()
                if name.partition(".")[0] == STD_PREFIX
            }
            measure = measure_from(header["measure"], tensors)
            if header["kind"] == "paths":
                from ._path_estimate import load_paths

                return load_paths(header, stored, measure)
            arrays = {name: stored[name] for name in stored if name not in tensors}
            _check_arrays(arrays, header["dim"])
            kept = ("config", "plan", "provenance", "n_loss", "n_grad", "seconds", "dim")
            return assemble(
                Rays(
                    **arrays,
                    reentrant_share=header["reentrant_share"],
                    reentrant_error=header["reentrant_error"],
                ),
                measure=measure,
                log_abs_scale=header["log_abs_scale"],
                offset_squared=header["offset_squared"],
                log_constant=header["log_constant"],
                log_constant_error=header["log_constant_error"],
                seeds=tuple(header["seeds"]),
                **{name: header[name] for name in kept},
            )
        except (SafetensorError, FastvolError, LookupError, TypeError, ValueError) as error:
            raise FastvolError(
                f"path: {path} is not a result that this version can read: {error}"
            ) from error

    def __repr__(self) -> str:
        from ._report import one_line

        return one_line(self)


def write_result(
    path: str | PathLike[str],
    arrays: Mapping[str, npt.NDArray[Any]],
    header: Mapping[str, Any],
    measure: Lebesgue | Gaussian,
) -> Path:
    """Writes arrays, the measure's tensors, and a JSON header; aside first, and renamed."""
    from safetensors.numpy import save_file

    target = _path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {target.parent}")
    if target.is_dir():
        raise IsADirectoryError(f"path: {target} is a folder")
    columns = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if isinstance(measure, Gaussian):
        columns |= {name: t.numpy() for name, t in measure.tensors().items()}
    aside = target.with_name(target.name + ".part")
    try:
        save_file(columns, aside, metadata={"fastvol": json.dumps(header)})
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def assemble(
    rays: Rays,
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
    log_constant: float = 0.0,
    log_constant_error: float = 0.0,
) -> VolumeEstimate:
    """The estimate that some rays give.

    Args:
        rays: all directions.
        measure: the measure.
        dim: d.
        log_abs_scale: Σ log s of the metric.
        offset_squared: ‖μ‖² of an off-centre normal law.
        seeds, config, plan, provenance, n_loss, n_grad, seconds: as in the result; what
            ``provenance["remarks"]`` says is among the warnings.
        log_constant, log_constant_error: of the law of the directions, nats.
    """
    capped = isinstance(measure, Gaussian) or math.isfinite(measure.max_radius)
    weights, constant = rays.log_weights(measure, dim)
    # Off its centre a normal law's weights have a bound, e^(b²/2), that no draw comes near, and so
    # may those of another law of directions: their tail is what has to be judged.
    bounded = capped and offset_squared == 0 and "preconditioner" not in config
    lebesgue = isinstance(measure, Lebesgue)
    delta = _log_radius_error(config)
    kappa = sensitivity(measure, dim, rays)
    statistics = summarise(
        weights,
        bounded=bounded,
        paired=bool(config["antithetic"]),
        log_bound=_log_bound(measure, dim) if bounded else math.inf,
        resolution=4.0 * delta * (dim if lebesgue else kappa),
    )
    share = min(max(rays.reentrant_share, 0.0), _MOST_REENTRANT)
    statistics = replace(statistics, log_mean=statistics.log_mean + math.log1p(-share))
    metric_volume = statistics.log_mean + constant + log_constant - 0.5 * offset_squared
    counts = np.bincount(rays.status, minlength=len(_STATUS_NAMES))
    n_unbounded, n_nonfinite, n_failed = (int(count) for count in counts[1:4])
    tolerance_error = math.hypot(*radius_errors(kappa, delta, float(config["pilot"]["bias"])))
    sampling_error = statistics.stderr
    statistics = with_extra_error(
        statistics, tolerance_error, rays.reentrant_error, log_constant_error
    )
    checked = rays.sampled if rays.sampled.any() else rays.audited
    reentrant_fraction = float(rays.reentrant[checked].mean()) if checked.any() else 0.0

    remarks = [*statistics.reasons, *provenance.get("remarks", ())]
    reliable = statistics.reliable
    if n_unbounded and not capped:
        reliable = False
        remarks.append(
            f"{n_unbounded} of {rays.n} rays never crossed the threshold up to the search's cap "
            f"(radius {math.exp(config['pilot']['log_cap']):.3g}): the volume may be infinite"
        )
    if n_failed:
        remarks.append(
            f"{n_failed} rays ran out of evaluations; they count with the radius known to be inside"
        )
    if rays.reentrant.any():
        remarks.append(
            f"{int(rays.reentrant.sum())} audited rays leave the basin and re-enter it "
            f"({reentrant_fraction:.1%} of those checked at random); their first crossing counts. "
            "first_crossing=True checks every ray"
        )
    if tolerance_error > max(0.1, sampling_error):
        remarks.append(
            f"the radii are known to {delta:.1e} only, which at d = {dim} may cost "
            f"{tolerance_error:.2g} nats"
        )
    if math.hypot(tolerance_error, rays.reentrant_error) > _MOST_EXTRA_ERROR:
        reliable = False
    return VolumeEstimate(
        log_volume=metric_volume + (log_abs_scale if lebesgue else 0.0),
        log_volume_metric=metric_volume,
        log_mean_power=statistics.log_mean + math.log(dim) + log_constant if lebesgue else math.nan,
        stderr=statistics.stderr,
        reliable=reliable,
        warnings=tuple(remarks),
        pareto_k=statistics.pareto_k,
        ess=statistics.ess,
        dim=dim,
        n=rays.n,
        log_radii=_frozen(rays.log_radii),
        status=_frozen(rays.status),
        n_unbounded=n_unbounded,
        n_nonfinite=n_nonfinite,
        n_failed=n_failed,
        reentrant_fraction=reentrant_fraction,
        n_loss=n_loss,
        n_grad=n_grad,
        seconds=seconds,
        seeds=seeds,
        measure=measure,
        config=dict(config),
        plan=dict(plan),
        provenance=dict(provenance),
        statistics=statistics,
        _rays=rays,
        _log_abs_scale=log_abs_scale,
        _offset_squared=offset_squared,
        _log_constant=log_constant,
        _log_constant_error=log_constant_error,
    )


def _log_bound(measure: Lebesgue | Gaussian, dim: int) -> float:
    """The log weight of a ray that ends at the cap, or holds all of a centred normal law's mass."""
    if isinstance(measure, Gaussian):
        return 0.0
    return dim * math.log(measure.max_radius) - math.log(dim)


def _log_radius_error(config: Mapping[str, Any]) -> float:
    """δ: what a log radius may be off by, through the search's tolerance or the loss's rounding."""
    return float(max(config["pilot"]["rtol"], config["pilot"]["rounding"]))


def sensitivity(measure: Lebesgue | Gaussian, dim: int, rays: Rays) -> float:
    """κ: nats by which the answer moves per unit of log radius.

    d for an uncapped volume; under a cap d times the weighted share of rays that end inside it.
    """
    weights, _ = rays.log_weights(measure, dim)
    if isinstance(measure, Lebesgue):
        derivative = np.where(rays.status == 1, 0.0, float(dim))
    else:
        step = 1e-5
        further, _ = log_weights(measure, dim, rays.log_radii + step, rays.shift)
        derivative = np.nan_to_num((further + rays.log_offset - weights) / step, posinf=float(dim))
    top = weights.max()
    if not math.isfinite(top):
        return float(dim)
    share = np.exp(weights - top)
    return float(share @ derivative / share.sum())


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array


def _check_arrays(arrays: Mapping[str, npt.NDArray[Any]], dim: Any) -> None:
    """Refuses, with a ValueError, arrays that no run has written."""
    if type(dim) is not int or dim < 1:
        raise ValueError(f"dim is {dim!r}")
    expected = Rays.empty(1)
    if set(arrays) != set(_RAY_ARRAYS):
        raise ValueError(f"it holds the arrays {sorted(arrays)}, not {sorted(_RAY_ARRAYS)}")
    n = arrays["log_radii"].size
    for name, array in arrays.items():
        if array.dtype != getattr(expected, name).dtype or array.shape != (n,) or n == 0:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    finite = all(np.isfinite(arrays[name]).all() for name in ("shift", "log_offset"))
    if not (arrays["log_radii"] < math.inf).all() or not finite:
        raise ValueError("a radius is not a number")
    if (arrays["status"] >= len(_STATUS_NAMES)).any():
        raise ValueError("a status is unknown")


def _positive_vector(values: npt.ArrayLike, name: str) -> Float:
    try:
        if np.iscomplexobj(values):
            raise TypeError("they are complex")
        vector = np.atleast_1d(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be positive numbers: {error}") from error
    if vector.ndim != 1 or not len(vector) or not ((vector > 0) & (vector < math.inf)).all():
        raise ValueError(f"{name} must be a vector of positive, finite numbers")
    return vector


def _path(path: Any) -> Path:
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}")
    return Path(path)


def _check_level(level: float) -> None:
    if not isinstance(level, (int, float)) or isinstance(level, bool) or not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level!r}")
