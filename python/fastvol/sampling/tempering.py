r"""Along a path of targets, from isotropic directions to those that hold the volume.

A level resamples M ancestors from the states of the last one, in proportion to the ratio of the two
densities, and moves each K − 1 times; all M·K states are kept (waste-free sequential Monte Carlo,
Dau & Chopin 2022, J. R. Statist. Soc. B 84, 114–148). Two paths: a *tilt*, W(u)^β for β from 0 to
1, and a *ladder*, W under a cap R (or a width c) that grows; each level leaves a given share of
the effective sample size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .field import Level, Population, RayField
from .moves import Move

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

_ESS_SHARE = 0.5
_ARRAYS = ("level", "cluster", "log_radii", "shift", "log_offset", "status")


@dataclass
class Run:
    """The states of one run, in the order in which they were made.

    Args:
        levels: the path; the first has β = 0.
        log_increments: log mean of the density ratio over the states of each level but the last.
            Their sum estimates the log mean of the last level's density; its exponential is
            unbiased where the path is fixed beforehand.
        level, cluster: of each state, int64 ``[n]``; a cluster is a chain on one level.
        log_radii, shift, log_offset, status: of each state ``[n]``.
        reports: what the move said of each level.
        finished: whether the path's end was reached.
        stopped: why not.
        final: the states of the last level, with their directions.
        log_constant: log|det P| + ‖m‖²/2 of the law of the directions.
        chains, length: M and K.
        n_loss, n_grad: evaluations.
    """

    levels: list[Level] = field(default_factory=list)
    log_increments: list[float] = field(default_factory=list)
    level: Int = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    cluster: Int = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    log_radii: Float = field(default_factory=lambda: np.zeros(0))
    shift: Float = field(default_factory=lambda: np.zeros(0))
    log_offset: Float = field(default_factory=lambda: np.zeros(0))
    status: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    reports: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False
    stopped: str = ""
    final: Population | None = None
    log_constant: float = 0.0
    chains: int = 0
    length: int = 0
    n_loss: int = 0
    n_grad: int = 0

    @property
    def log_mean(self) -> float:
        """Log mean of the last level's density, by the increments alone, nats."""
        return float(sum(self.log_increments)) + self.log_constant

    def append(
        self,
        population: Population,
        level: Level,
        chains: int,
        report: dict[str, float],
    ) -> None:
        """Adds the states of a level; row i of ``population`` belongs to chain i mod ``chains``."""
        count = len(population)
        first = 0 if not self.levels else int(self.cluster.max()) + 1
        new = {
            "level": np.full(count, len(self.levels)),
            "cluster": np.arange(count) % chains + first,
            "log_radii": population.log_radii,
            "shift": population.shift,
            "log_offset": population.log_offset,
            "status": population.status,
        }
        for name in _ARRAYS:
            setattr(self, name, np.concatenate([getattr(self, name), new[name]]))
        self.levels.append(level)
        self.reports.append(report)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """What it knows of each state, by name."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def describe(self) -> dict[str, Any]:
        """Everything else, JSON-ready."""
        return {
            "levels": [[level.beta, level.log_scale] for level in self.levels],
            "log_increments": self.log_increments,
            "reports": self.reports,
            "finished": self.finished,
            "stopped": self.stopped,
            "log_constant": self.log_constant,
            "chains": self.chains,
            "length": self.length,
            "n_loss": self.n_loss,
            "n_grad": self.n_grad,
        }

    @classmethod
    def rebuilt(
        cls, description: Mapping[str, Any], columns: Mapping[str, npt.NDArray[Any]]
    ) -> Run:
        """The run of :meth:`describe` and :meth:`columns`, without its final states.

        Raises:
            ValueError: the columns differ in length.
        """
        told = dict(description)
        told["levels"] = [Level(*pair) for pair in told["levels"]]
        arrays: dict[str, Any] = {name: columns[name] for name in _ARRAYS}
        if len({len(array) for array in arrays.values()}) != 1:
            raise ValueError("the arrays of a run differ in length")
        return cls(**told, **arrays)


@dataclass
class Ancestors:
    """Where a level begins: enough to go on from, with the state of the move and its generators.

    Args:
        run: up to the last level; its ``finished`` tells whether this one is the last.
        state: the states that the chains start from.
        level: the target.
    """

    run: Run
    state: Population
    level: Level


Path = Callable[[RayField, Population, Level], tuple[Level, bool]]


def tilt(log_scale: float, ess_share: float = _ESS_SHARE) -> Path:
    """W^β, β growing to 1.

    Args:
        log_scale: of W; log R or log c.
        ess_share: left by each step.
    """

    def following(rays: RayField, population: Population, level: Level) -> tuple[Level, bool]:
        weights = rays.log_weight(
            population.log_radii, population.shift, population.log_offset, log_scale
        )
        step = _longest_step(lambda step: step * weights, 1.0 - level.beta, ess_share)
        last = step == 1.0 - level.beta
        return Level(1.0 if last else level.beta + step, log_scale), last

    return following


def ladder(log_scale: float, ess_share: float = _ESS_SHARE) -> Path:
    """W under a cap or width that grows to ``log_scale``; infinite where there is no cap."""

    def following(rays: RayField, population: Population, level: Level) -> tuple[Level, bool]:
        here = rays.log_density(population, level)

        def gained(scale: float) -> Float:
            return rays.log_density(population, Level(1.0, scale)) - here

        if _ess_share(gained(log_scale)) >= ess_share:
            return Level(1.0, log_scale), True
        low = level.log_scale
        if level.beta == 0:
            low = float(population.log_radii.min()) - 0.5 * math.log(rays.dim) - 5.0
        high = log_scale if math.isfinite(log_scale) else float(population.log_radii.max())
        step = _longest_step(lambda step: gained(low + step), high - low, ess_share)
        return Level(1.0, low + step), False

    return following


def _memory(first: torch.Tensor, last: torch.Tensor) -> float:
    """Correlation of where the chains of a level started with where they ended, 0 to 1.

    Over chains and coordinates, of the squares u_i²: which arms of a body a chain lies in. Signs
    matter less, since most losses hardly tell them.
    """
    if first.shape[1] < 2:
        return 0.0
    before, after = (
        (u.to(torch.float64).square() - u.to(torch.float64).square().mean(dim=0))
        for u in (first, last)
    )
    scale = float(before.norm() * after.norm())
    return max(float((before * after).sum()) / scale, 0.0) if scale > 0 else 1.0


def _ess_share(log_weight: Float) -> float:
    weights = np.exp(log_weight - log_weight.max())
    return float(weights.sum() ** 2 / np.square(weights).sum()) / len(weights)


def _longest_step(gained: Callable[[float], Float], most: float, ess_share: float) -> float:
    """The longest step up to ``most`` that leaves ``ess_share``."""
    if _ess_share(gained(most)) >= ess_share:
        return most
    low, high = math.log(most) - 60.0, math.log(most)
    for _ in range(60):
        middle = 0.5 * (low + high)
        passes = _ess_share(gained(math.exp(middle))) >= ess_share
        low, high = (middle, high) if passes else (low, middle)
    return math.exp(low)


def systematic(log_weight: Float, count: int, rng: np.random.Generator) -> Int:
    """Systematic resampling: ``count`` rows in proportion to exp(``log_weight``)."""
    weights = np.exp(log_weight - log_weight.max())
    edges = np.cumsum(weights) / weights.sum()
    points = (np.arange(count) + rng.uniform()) / count
    return np.minimum(np.searchsorted(edges, points), len(weights) - 1).astype(np.int64)


def temper(
    rays: RayField,
    path: Path,
    move: Move,
    *,
    chains: int,
    length: int,
    rng: np.random.Generator,
    stream: int,
    may_go_on: Callable[[Run], bool] = lambda run: True,
    keep: Callable[[Ancestors], None] = lambda ancestors: None,
    start: Ancestors | None = None,
) -> Run:
    """Carries a population along a path.

    Args:
        rays: the field.
        path: gives the next level.
        move: what moves the chains.
        chains: M.
        length: K, states of each chain on a level, its ancestor included.
        rng: of the resampling.
        stream: which family of counters makes the first directions.
        may_go_on: asked before each level; ``False`` stops the run.
        keep: told where each level begins, before the move is.
        start: goes on from there, the move and ``rng`` being in the state of that time.
    """
    resumed = start is not None
    if start is not None:
        run, state, level = start.run, start.state, start.level
        population = state
    else:
        run = Run(chains=chains, length=length)
        if rays.proposal is not None:
            run.log_constant = rays.proposal.log_constant
        level = Level(0.0, -math.inf)
    before = rays.n_loss - run.n_loss, rays.n_grad - run.n_grad
    if not resumed:
        count = chains * length
        population = Population.join(
            [
                rays.measure(rays.isotropic(np.arange(first, first + chains), stream))
                for first in range(0, count, chains)
            ]
        )
        # The first states are independent: every one is a cluster of its own.
        run.append(population, level, count, {})
    while resumed or not run.finished:
        if not resumed:
            if not np.isfinite(population.log_radii).all():
                run.stopped = "a ray of no length was met"
                break
            run.n_loss, run.n_grad = rays.n_loss - before[0], rays.n_grad - before[1]
            if not may_go_on(run):
                run.stopped = "the budget was spent"
                break
            following, run.finished = path(rays, population, level)
            gained = rays.log_density(population, following)
            if level.beta > 0:
                gained = gained - rays.log_density(population, level)
            top = float(gained.max())
            run.log_increments.append(top + math.log(float(np.exp(gained - top).mean())))
            state = population.take(systematic(gained, chains, rng))
            level = following
            keep(Ancestors(run, state, level))
        resumed = False
        move.start_level(state, level)
        parts = [state]
        for _ in range(length - 1):
            state = move.step(rays, state, level)
            parts.append(state)
        population = Population.join(parts)
        told = {**move.report(), "memory": _memory(parts[0].units, state.units)}
        run.append(population, level, chains, told)
    run.n_loss, run.n_grad = rays.n_loss - before[0], rays.n_grad - before[1]
    run.final = population
    return run


def generator_on(device: torch.device, rng: np.random.Generator) -> torch.Generator:
    """A generator on ``device``, seeded from ``rng``."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int(rng.integers(2**62)))
    return generator
