r"""Rays of given directions: their ends, their log weights, and the force on them.

A direction is a unit vector u; its ray is t·v, v = P u, and ends at t = ρ(u). With x = log(ρ‖v‖),
b = ⟨v, μ⟩/‖v‖ and a = ⟨u, m⟩ its log weight is, up to a constant (see ``fastvol._proposal``),

.. math::
    \log W(u) = d \min(x, \log R) - d \log\|v\|
    \quad\text{or}\quad
    \log W(u) = \log I_d(e^x, b) - d \log\|v\| - \log I_d(\infty, a).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._problem import Problem
from .._proposal import Directions, Proposal
from .._reference.search import Status
from ..measures import Gaussian, Lebesgue
from ..methods._search import Pilot, search_options
from ..result import log_weights, ray_offsets
from .division import Division
from .evaluation import STRIDE, Sheet

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

# Forces longer than this are shortened: a leapfrog step could not follow them.
_LONGEST_FORCE = 30.0
# A component of a smoothed force is at most this many times the mean one.
_SMOOTHED = 3.0
_STEP = 1e-4
# Nats over which a force rounds the corner that a cap makes.
_ROUNDED = 2.0


@dataclass(frozen=True)
class Level:
    """A target on a path: directions with density W(u)^β, W under a cap or width of its own.

    Args:
        beta: β.
        log_scale: log R of the cap, or log c of a normal law c times as wide; ``inf`` is no cap.
    """

    beta: float
    log_scale: float


@dataclass
class Population:
    """Some directions and what is known of their rays, one row each.

    Args:
        units: u, ``[k, d]`` in the working dtype.
        log_radii: x, float64 ``[k]``.
        status: how each ray ended, uint8 ``[k]``.
        shift: b ``[k]``.
        log_norm: log‖v‖ ``[k]``.
        log_offset: what the law of the directions adds to log W ``[k]``, nats.
    """

    units: Tensor
    log_radii: Float
    status: npt.NDArray[np.uint8]
    shift: Float
    log_norm: Float
    log_offset: Float

    def __len__(self) -> int:
        return len(self.log_radii)

    @property
    def log_multiples(self) -> Float:
        """log ρ ``[k]``."""
        return self.log_radii - self.log_norm

    def take(self, rows: Int) -> Population:
        """The rows ``rows``, copied."""
        index = torch.from_numpy(np.ascontiguousarray(rows)).to(self.units.device)
        columns: Any = (array[rows] for array in self._arrays())
        return Population(self.units[index], *columns)

    def put(self, rows: Int, other: Population) -> None:
        """Overwrites the rows ``rows``."""
        index = torch.from_numpy(np.ascontiguousarray(rows)).to(self.units.device)
        self.units[index] = other.units
        for own, new in zip(self._arrays(), other._arrays(), strict=True):
            own[rows] = new

    @classmethod
    def join(cls, parts: Sequence[Population]) -> Population:
        """All rows, in order."""
        columns: Any = map(np.concatenate, zip(*(part._arrays() for part in parts), strict=True))
        return cls(torch.cat([part.units for part in parts]), *columns)

    def _arrays(self) -> tuple[npt.NDArray[Any], ...]:
        return (
            self.log_radii,
            self.status,
            self.shift,
            self.log_norm,
            self.log_offset,
        )


class RayField:
    """The rays of one problem under one law of directions, at one threshold.

    Args:
        problem, threshold, pilot: of the run; the pilot's radii are in multiples of v.
        proposal: P and m; ``None`` is isotropic.
        lanes: the most rays evaluated together.
        parts: into how many they are divided, for as many processes.
    """

    def __init__(
        self,
        problem: Problem,
        threshold: float,
        pilot: Pilot,
        proposal: Proposal | None,
        lanes: int,
        parts: int = 1,
    ) -> None:
        self.problem = problem
        self.threshold = threshold
        self.pilot = pilot
        self.proposal = proposal
        self.dim = problem.dim
        self.lanes = lanes
        self.n_loss = 0
        self.n_grad = 0
        self._division = Division(problem, lanes, parts)
        self._loss0 = min(problem.loss0, threshold)
        self._log_gap = math.log(max(threshold - self._loss0, 1e-300))
        self._options = search_options(problem, pilot, threshold)

    def _answer(self, kind: str, v: Tensor, columns: dict[str, Float], **options: Any) -> Sheet:
        """What :meth:`Evaluator.answer` makes of some rays, and what it spends."""
        answer = self._division.answer(Sheet(columns, v, {"kind": kind, **options}))
        self.n_loss += answer.info["n_loss"]
        self.n_grad += answer.info["n_grad"]
        return answer

    def directions(self, units: Tensor) -> Directions:
        """v = P u and what goes with it."""
        if self.proposal is None:
            zeros = np.zeros(len(units))
            return Directions(units, zeros, zeros)
        return self.proposal.of_units(units)

    def isotropic(self, ids: Int, stream: int) -> Tensor:
        """Unit vectors from the counters (seed, stream, id), ``[k, d]``: the law at β = 0."""
        layout = self.problem.layout
        z = torch.empty((len(ids), self.dim), dtype=layout.dtype, device=layout.device)
        self.problem.backend.normals(
            z, self.problem.seed, stream, ids, threads=self.problem.plan.noise_threads
        )
        if self.proposal is not None and self.proposal.offset is not None:
            z += self.proposal.offset.to(z)
        units: Tensor = z / z.norm(dim=1, keepdim=True)
        return units

    def measure(
        self,
        units: Tensor,
        start: Float | None = None,
        rows: Directions | None = None,
    ) -> Population:
        """Finds the ends of some rays.

        Args:
            units: ``[k, d]``.
            start: log multiples to start from ``[k]``; the pilot's median by default.
            rows: their directions, where they are known.
        """
        rows = self.directions(units) if rows is None else rows
        count = len(units)
        cap = self.pilot.metric_log_cap
        if start is None:
            start = np.full(count, self.pilot.start_log_radius)
        options = dict(self._options)
        if count and math.isfinite(cap):
            options["log_cap"] = min(self.pilot.log_cap + 30.0, cap - float(rows.log_norm.min()))
        options["mode"] = "search"
        found = self._answer("search", rows.v, {"start": start}, options=options).columns
        log_radii, status = found["log_multiples"] + rows.log_norm, found["status"]
        beyond = log_radii >= cap
        log_radii[beyond], status[beyond] = cap, Status.UNBOUNDED
        return Population(
            units,
            log_radii,
            status,
            rows.shift(self.problem.offset),
            rows.log_norm,
            self.offsets(rows),
        )

    def offsets(self, rows: Directions) -> Float:
        """What the law of the directions adds to log W, nats ``[k]``."""
        if self.proposal is None:
            return np.zeros(len(rows.log_norm))
        return ray_offsets(self.dim, rows.log_norm, rows.proposal_shift)

    def first_crossings(self, population: Population) -> tuple[Float, Bool]:
        """Scans rays from inside for an earlier crossing: log lengths, and where one was found."""
        found = self._answer(
            "search",
            self.directions(population.units).v,
            {"start": population.log_multiples},
            options={**self._options, "mode": "scan"},
        ).columns
        reentrant = found["found"].astype(np.bool_)
        crossings = found["log_multiples"] + population.log_norm
        first = np.where(reentrant, crossings, population.log_radii)
        return first, reentrant

    def inside(self, rows: Directions, log_multiples: Float) -> Bool:
        """Whether the points at some multiples of v lie in the basin, one loss each."""
        answer = self._answer("losses", rows.v, {"log_multiples": log_multiples})
        losses: Float = answer.columns["losses"]
        return np.isfinite(losses) & (losses <= self.threshold)

    def reaches(self, rows: Directions, log_target: Float, level: Level) -> tuple[Float, Bool]:
        """Where rays have to reach for a level's log target, and whether they do: one loss each."""
        if self._shifted:
            log_target = log_target + self.offsets(rows) + self.dim * rows.log_norm
        asked = self.least_log_multiple(rows, log_target, level)
        met = np.isfinite(asked)
        possible = np.flatnonzero(met)
        if len(possible):
            met[possible] = self.inside(rows.take(possible), asked[possible])
        return asked, met

    def log_weight(
        self,
        log_radii: Float,
        shift: Float,
        log_offset: Float,
        log_scale: float,
    ) -> Float:
        """log W, nats ``[k]``, under the cap or width ``log_scale``."""
        return log_weight(self.problem.measure, self.dim, log_radii, shift, log_offset, log_scale)

    def log_density(self, population: Population, level: Level) -> Float:
        """β log W of a level, nats ``[k]``; 0 on the first."""
        if level.beta == 0:
            return np.zeros(len(population))
        return level.beta * self.log_weight(
            population.log_radii, population.shift, population.log_offset, level.log_scale
        )

    def log_target(self, population: Population, level: Level) -> Float:
        """Log density of a level on the sphere, nats ``[k]``: that of the directions' law included.

        A shifted law of directions has density I_d(∞, a) up to a constant.
        """
        density = self.log_density(population, level)
        if not self._shifted:
            return density
        return density - population.log_offset - self.dim * population.log_norm

    @property
    def _shifted(self) -> bool:
        return self.proposal is not None and self.proposal.offset is not None

    def least_log_multiple(self, rows: Directions, log_density: Float, level: Level) -> Float:
        """The log multiple of v from which on a level's density reaches ``log_density``, ``[k]``.

        +inf where it never does.
        """
        shift = rows.shift(self.problem.offset)
        offset = self.offsets(rows)
        wanted = log_density / level.beta

        def weight(log_multiple: Float) -> Float:
            return self.log_weight(log_multiple + rows.log_norm, shift, offset, level.log_scale)

        high = self._log_caps(rows, level)
        reachable = weight(high) >= wanted
        if isinstance(self.problem.measure, Lebesgue):
            low = (wanted - weight(-rows.log_norm - 1e3)) / self.dim - rows.log_norm - 1e3
            return np.where(reachable, np.minimum(low, high), math.inf)
        low = high - 40.0
        for _ in range(44):
            middle = 0.5 * (low + high)
            enough = weight(middle) >= wanted
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return np.where(reachable, high, math.inf)

    def _log_caps(self, rows: Directions, level: Level) -> Float:
        """Log multiples of v beyond which a level does not tell rays apart, ``[k]``."""
        if isinstance(self.problem.measure, Lebesgue) and math.isfinite(level.log_scale):
            return np.asarray(level.log_scale - rows.log_norm)
        if math.isfinite(self.pilot.metric_log_cap):
            return np.asarray(self.pilot.metric_log_cap - rows.log_norm)
        return np.full(len(rows.log_norm), self.pilot.log_cap + 2.0)

    def gradient(self, units: Tensor, log_multiples: Float) -> Tensor:
        """Pᵀ∇L at some multiples of v, ``[k, d]``; ∇ with respect to metric coordinates."""
        rows = self.directions(units)
        gradients = self._answer("gradients", rows.v, {"log_multiples": log_multiples}).vectors
        assert gradients is not None
        if self.proposal is not None:
            return self.proposal.preconditioner.rmatvec(gradients)
        return gradients

    def force(
        self,
        units: Tensor,
        log_multiple: float,
        level: Level,
        *,
        smoothed: bool = False,
        refinements: int = 0,
    ) -> tuple[Tensor, Float]:
        """The force β∇log W / d on some directions, tangent to the sphere, and a guess of log ρ.

        From the loss and its gradient at one multiple of v, the same for all, or near the end of
        each ray as a search of a fixed number of steps from there finds it: either way a function
        of u alone, so that a leapfrog step of it is reversible. Where the excess loss is
        homogeneous the force is exact without a search.

        Args:
            units: u ``[k, d]``.
            log_multiple: log of the common radius.
            level: the target.
            smoothed: cut single components that stick out, as they do near a kink of the loss.
            refinements: steps of that search, one loss each.

        Returns:
            force ``[k, d]`` in the working dtype; the end of the ray by extrapolation along it,
            float64 ``[k]``.
        """
        count, d = len(units), self.dim
        rows = self.directions(units)
        answer = self._answer(
            "gradients",
            rows.v,
            {"log_multiples": np.full(count, log_multiple), "caps": self._log_caps(rows, level)},
            steps=refinements,
            loss0=self._loss0,
            log_gap=self._log_gap,
            slope=self.pilot.slope,
        )
        start, losses, gradients = (
            answer.columns["log_multiples"],
            answer.columns["losses"],
            answer.vectors,
        )
        assert gradients is not None
        radius = np.exp(start)
        if self.proposal is not None:
            gradients = self.proposal.preconditioner.rmatvec(gradients)
        along_ray = (gradients * units).sum(dim=1, dtype=torch.float64)
        slope = along_ray.cpu().numpy()
        excess = losses - self._loss0
        with np.errstate(divide="ignore", invalid="ignore"):
            steepness = radius * slope / excess
            step = (self._log_gap - np.log(excess)) / steepness
        usable = (excess > 0) & (slope > 0) & np.isfinite(step)
        guess = start + np.where(usable, np.clip(np.nan_to_num(step), -STRIDE, STRIDE), 0.0)
        outward = (slope > 0) & np.isfinite(slope) & np.isfinite(losses)

        shift = rows.shift(self.problem.offset)
        x = guess + rows.log_norm
        kappa = self._slope_in_radius(x, shift, level)
        # ∇log ρ = −G/⟨G, u⟩, whose part along u is −1.
        inverse = np.divide(-kappa / d, slope, out=np.zeros(count), where=outward)
        force = gradients * _column(inverse, units)
        if self.proposal is not None:
            # (κ − d) ∇log‖v‖
            back = self.proposal.preconditioner.rmatvec(rows.v)
            squared = np.exp(-2.0 * rows.log_norm)
            force = force + back * _column((kappa / d - 1.0) * squared, units)
        mean = self.problem.offset
        if mean is not None:
            force = force + self._shift_force(units, rows, x, shift, mean, level)
        force = level.beta * force
        if self._shifted:
            force = force + self._law_force(rows, units, 1.0 - level.beta)
        force = torch.nan_to_num(force, nan=0.0, posinf=0.0, neginf=0.0)
        if smoothed:
            most = _SMOOTHED * force.abs().mean(dim=1, keepdim=True)
            force = torch.maximum(torch.minimum(force, most), -most)
        force = force - (force * units).sum(dim=1, keepdim=True) * units
        length = force.norm(dim=1, keepdim=True)
        return force * (_LONGEST_FORCE / length.clamp(min=_LONGEST_FORCE)), guess

    def _slope_in_radius(self, x: Float, shift: Float, level: Level) -> Float:
        """∂log W/∂x; a cap is rounded, over as many nats of the target as a leapfrog step moves."""
        if isinstance(self.problem.measure, Lebesgue):
            cap = level.log_scale
            if math.isinf(cap):
                return np.full(len(x), float(self.dim))
            beyond = level.beta * self.dim * (x - cap) / _ROUNDED
            return self.dim / (1.0 + np.exp(np.clip(beyond, -60.0, 60.0)))
        x = np.minimum(x, self.pilot.metric_log_cap)
        low, high = (
            self.log_weight(x + step, shift, 0.0 * x, level.log_scale)
            for step in (-0.5 * _STEP, 0.5 * _STEP)
        )
        return np.clip(np.nan_to_num((high - low) / _STEP), 0.0, float(self.dim))

    def _shift_force(
        self,
        units: Tensor,
        rows: Directions,
        x: Float,
        shift: Float,
        mean: Tensor,
        level: Level,
    ) -> Tensor:
        """The part of ∇log W / d that comes through b and a."""
        step = _STEP * max(1.0, 0.1 * math.sqrt(self.dim))

        def derivative(x: Float, b: Float, log_scale: float) -> Float:
            low, high = (
                self.log_weight(x, b + change, 0.0 * x, log_scale)
                for change in (-0.5 * step, 0.5 * step)
            )
            return np.nan_to_num((high - low) / step) / self.dim

        by_b = derivative(np.minimum(x, self.pilot.metric_log_cap), shift, level.log_scale)
        mean = mean.to(units)
        if self.proposal is None:
            return _column(by_b, units) * mean
        preconditioner = self.proposal.preconditioner
        inverse = np.exp(-rows.log_norm)
        force = _column(by_b * inverse, units) * preconditioner.rmatvec(mean[None])
        back = preconditioner.rmatvec(rows.v)
        return force - _column(by_b * shift * inverse**2, units) * back

    def _law_force(self, rows: Directions, units: Tensor, share: float) -> Tensor:
        """``share`` times ∇log I_d(∞, a) / d: what the shifted law of directions pulls with."""
        assert self.proposal is not None
        assert self.proposal.offset is not None
        step = _STEP * max(1.0, 0.1 * math.sqrt(self.dim))
        low, high = (
            ray_offsets(self.dim, np.zeros(len(units)), rows.proposal_shift + change)
            for change in (0.5 * step, -0.5 * step)
        )
        slope = (high - low) / step / self.dim
        return _column(share * slope, units) * self.proposal.offset.to(units)


def log_weight(
    measure: Lebesgue | Gaussian,
    dim: int,
    log_radii: Float,
    shift: Float,
    log_offset: Float,
    log_scale: float,
) -> Float:
    """log W of some rays, nats ``[k]``, under a cap exp(log_scale), or a normal law as wide.

    Args:
        measure: its kind decides what the scale is.
        dim: d.
        log_radii: log length of the rays ``[k]``; for a normal law in units of its std.
        shift, log_offset: as in :class:`Population`.
        log_scale: log R, or log c.
    """
    if isinstance(measure, Lebesgue):
        return dim * np.minimum(log_radii, log_scale) - math.log(dim) + log_offset
    weights, _ = log_weights(measure, dim, log_radii - log_scale, shift * math.exp(-log_scale))
    return weights + log_offset


def _column(values: Float, like: Tensor) -> Tensor:
    return torch.as_tensor(values, device=like.device, dtype=like.dtype)[:, None]
