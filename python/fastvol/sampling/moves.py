r"""Markov moves of directions on the unit sphere that keep W(u)^β.

Geodesic Hamiltonian Monte Carlo (Byrne & Girolami 2013, Scand. J. Statist. 40, 825–845; on the
sphere Lan, Zhou & Shahbaba 2014): velocities v ~ N(0, I/d) tangent at u, geodesics are great
circles, and the force β∇log W / d is taken at one radius that is a constant of the level, so that
it depends on u alone. Volume and time reversal are kept whatever that force is; the end point is
accepted by its exact ray,

.. math:: \min\{1, \exp(\beta\,\Delta\log W - d\,\Delta\|v\|^2/2)\}.

The great-circle slice move (Habeck, Hasenpflug, Kodgirwar & Rudolf 2023, arXiv 2301.08056, the
elliptical slice sampler's bracket of Murray, Adams & MacKay 2010) needs no gradient: one loss a
trial says whether a ray reaches the radius that the slice asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._reference.search import Status
from .field import Level, Population, RayField

Float = npt.NDArray[np.float64]

_TARGET_ACCEPTANCE = 0.7
# A move of which fewer chains than this are accepted is made again with a shorter step.
_HOPELESS = 0.15
_MOST_RETRIES = 8
FORCES = ("plain", "refined", "smoothed")
# Relative difference of plain and refined forces from which on the refined one is taken.
_MISLED = 0.05
# A level whose β is so many times the last one's is far beyond it.
_FAR_BEYOND = 2.0
_FAR_LEAPFROGS = 16
_MANY_CAPPED = 0.25
# Steps of the search for the ends of the rays that the refined force makes.
_REFINEMENTS = 2
# Below these steps of the plain force another one is thought of; the smoothed one is on trial for
# so many moves.
_COMFORTABLE = {"refined": 0.15, "smoothed": 0.05}
_TRIALS = 8
_MOST_SHRINKS = 60
_PCN_ACCEPTANCE = 0.35


class Move(Protocol):
    """One step of every chain; it may adapt itself, between the levels and within."""

    name: str

    def start_level(self, population: Population, level: Level) -> None:
        """Told the population from which a level starts."""
        ...

    def step(self, field: RayField, state: Population, level: Level) -> Population:
        """The next states, one for each row of ``state``."""
        ...

    def report(self) -> dict[str, float]:
        """What the last level showed of itself."""
        ...


@dataclass
class Hamiltonian:
    """Geodesic Hamiltonian Monte Carlo.

    Three forces are at hand. The plain one; a refined one, taken nearer to the ends of the rays at
    the price of two losses, for where one radius for all misleads; a smoothed one, whose single
    large components are cut, for losses with kinks. While the plain one needs short steps the
    refined one is taken if it is another force there, else the smoothed one is tried, and kept if
    its steps are longer.

    Args:
        generator: of the velocities, on the rays' device.
        rng: of everything else.
        step_size: of the first leapfrog step, radians.
        most_leapfrogs: in one move.
        adapt: whether the step size follows the acceptance, and the force the step size.
        force: the first one; one of ``FORCES``.
    """

    generator: torch.Generator
    rng: np.random.Generator
    step_size: float = 0.4
    most_leapfrogs: int = 256
    adapt: bool = True
    force: str = "plain"
    name: str = "hamiltonian"

    _log_multiple: float = 0.0
    _beta: float = 0.0
    _far: bool = False
    _force_level: Level = field(default_factory=lambda: Level(0.0, -math.inf))
    _misled: bool | None = None
    # Of the forces that have been used.
    _sizes: dict[str, float] = field(default_factory=dict)
    # Moves by the smoothed one.
    _tried: int = 0
    _accepted: float = 0.0
    _moves: int = 0
    _capped: int = 0
    _leapfrogs: int = 0

    def start_level(self, population: Population, level: Level) -> None:
        """Takes the median end of the population's rays as the level's radius."""
        self._log_multiple = float(np.median(population.log_multiples))
        # Where many rays reach the cap the end of a path is far beyond the last level: a target
        # that is flat or nearly nothing. No leapfrog can follow its walls; those of the last level
        # it can, for a while.
        capped = float((population.status == Status.UNBOUNDED).mean()) > _MANY_CAPPED
        self._far = capped and 0.0 < _FAR_BEYOND * self._beta < level.beta
        self._force_level = replace(level, beta=self._beta) if self._far else level
        self._beta = level.beta
        self._accepted, self._moves, self._capped = 0.0, 0, 0
        self._misled = None
        self._sizes.setdefault("plain", self.step_size)
        self._sizes.setdefault(self.force, self.step_size)

    def step(self, field: RayField, state: Population, level: Level) -> Population:
        """One trajectory of about a quarter circle for every chain."""
        if self.adapt:
            self._choose_force(field, state)
        first, self._leapfrogs = self._sizes[self.force], 0
        for retry in range(_MOST_RETRIES):
            proposed, log_ratio = self._trajectory(field, state, level)
            rate = float(np.exp(log_ratio).mean())
            if not self.adapt:
                break
            # A step far too long, as the first one may be, would waste a whole level.
            change = math.exp(0.8 * (rate - _TARGET_ACCEPTANCE)) if rate > _HOPELESS else 0.4
            self._resize(change)
            if rate > _HOPELESS or self._leapfrogs >= self.most_leapfrogs:
                break
            self._change_force(field, state, retry, first)
        self._accepted += rate
        self._moves += 1
        self._tried += self.force == "smoothed"
        accepted = np.log(self.rng.uniform(size=len(state))) < log_ratio
        result = state.take(np.arange(len(state)))
        taken = np.flatnonzero(accepted)
        result.put(taken, proposed.take(taken))
        return result

    def _trajectory(
        self, field: RayField, state: Population, level: Level
    ) -> tuple[Population, Float]:
        """Where every chain ends, and the log probability with which it goes there."""
        d, q = field.dim, state.units
        # One number of steps for all chains: their gradients are one call.
        epsilon = self._sizes[self.force] * float(self.rng.uniform(0.85, 1.15))
        wanted = max(1, round(0.5 * math.pi * float(self.rng.uniform(0.7, 1.3)) / epsilon))
        steps = min(wanted, _FAR_LEAPFROGS if self._far else self.most_leapfrogs)
        self._capped += wanted > steps
        self._leapfrogs += steps
        v = torch.randn(q.shape, generator=self.generator, device=q.device, dtype=q.dtype)
        v /= math.sqrt(d)
        v -= (v * q).sum(dim=1, keepdim=True) * q
        before = _kinetic(v, d)
        force, guess = self._force(field, q)
        for _ in range(steps):
            v = v + (0.5 * epsilon) * force
            q, v = great_circle(q, v, epsilon)
            force, guess = self._force(field, q)
            v = v + (0.5 * epsilon) * force
        proposed = field.measure(q, guess)
        gained = field.log_target(proposed, level) - field.log_target(state, level)
        log_ratio = gained + before - _kinetic(v, d)
        return proposed, np.minimum(np.nan_to_num(log_ratio, nan=-math.inf, posinf=0.0), 0.0)

    def _force(self, field: RayField, q: Tensor) -> tuple[Tensor, Float]:
        return field.force(
            q,
            self._log_multiple,
            self._force_level,
            smoothed=self.force == "smoothed",
            refinements=_REFINEMENTS if self.force == "refined" else 0,
        )

    def _choose_force(self, field: RayField, state: Population) -> None:
        """Another one while the plain force needs short steps.

        The refined one where the plain one is misled; else the smoothed one, if its trial is a
        success.
        """
        plain, self.force = self._sizes["plain"], "plain"
        if plain > max(_COMFORTABLE.values()):
            return
        if self._is_misled(field, state):
            self._sizes.setdefault("refined", plain)
            self.force = "refined"
        elif plain <= _COMFORTABLE["smoothed"] and not self._far:
            smoothed = self._sizes.setdefault("smoothed", plain)
            # It is given up as soon as it needs the shorter steps.
            least = 0.7 if self._on_trial("smoothed") else 1.0
            self.force = "smoothed" if smoothed > least * plain else "plain"

    def _on_trial(self, name: str) -> bool:
        return name == "smoothed" and self._tried < _TRIALS

    def _resize(self, change: float) -> None:
        """Another step size for the force in use, and with it for those that are not on trial."""
        alone = self._on_trial(self.force)
        for name in [self.force] if alone else list(self._sizes):
            self._sizes[name] = min(max(self._sizes[name] * change, 1e-5), 1.5)

    def _change_force(self, field: RayField, state: Population, retry: int, first: float) -> None:
        """After a move in vain: drops a force on trial, or the plain one if that is misled."""
        if self._on_trial(self.force):
            self._tried = _TRIALS
            self.force = "plain"
        elif self.force == "plain" and retry >= 1 and self._is_misled(field, state):
            # Shorter steps do not help where the force itself is to blame.
            self._sizes["refined"] = max(first, self._sizes.get("refined", 0.0))
            self.force = "refined"

    def _is_misled(self, field: RayField, state: Population) -> bool:
        """Whether the plain force on this level is another one than at the ends of the rays."""
        if self._misled is None:
            plain, refined = (
                field.force(state.units, self._log_multiple, self._force_level, refinements=n)[0]
                for n in (0, _REFINEMENTS)
            )
            # Rays that end at a cap feel no force, and say nothing.
            self._misled = float((refined - plain).norm()) > _MISLED * float(refined.norm())
        return self._misled

    def report(self) -> dict[str, float]:
        """Acceptance, step size, force by its place in ``FORCES``, share of moves cut short."""
        moves = max(self._moves, 1)
        return {
            "acceptance": self._accepted / moves,
            "step_size": self._sizes[self.force],
            "force": float(FORCES.index(self.force)),
            "capped": self._capped / moves,
        }


@dataclass
class GreatCircleSlice:
    """A slice of W(u)^β on a random great circle through u, shrunk until it is met.

    Args:
        generator: of the circles, on the rays' device.
        rng: of everything else.
        repeats: slices in one move.
    """

    generator: torch.Generator
    rng: np.random.Generator
    repeats: int = 4
    name: str = "slice"

    _angle: float = 0.0
    _moves: int = 0
    _stuck: int = 0

    def start_level(self, population: Population, level: Level) -> None:
        """Nothing to prepare."""
        del population, level
        self._angle, self._moves, self._stuck = 0.0, 0, 0

    def step(self, field: RayField, state: Population, level: Level) -> Population:
        """``repeats`` slices for every chain."""
        for _ in range(self.repeats):
            state = self._slice(field, state, level)
        return state

    def _slice(self, field: RayField, state: Population, level: Level) -> Population:
        count = len(state)
        q = state.units
        h = torch.randn(q.shape, generator=self.generator, device=q.device, dtype=q.dtype)
        h -= (h * q).sum(dim=1, keepdim=True) * q
        h /= h.norm(dim=1, keepdim=True)
        height = field.log_target(state, level) + np.log(self.rng.uniform(size=count))
        angle = self.rng.uniform(0.0, 2.0 * math.pi, size=count)
        low, high = angle - 2.0 * math.pi, angle.copy()
        result = state.take(np.arange(count))
        waiting = np.arange(count)
        for _ in range(_MOST_SHRINKS):
            index = torch.from_numpy(waiting).to(q.device)
            theta = torch.as_tensor(angle[waiting], device=q.device, dtype=q.dtype)[:, None]
            trial = q[index] * theta.cos() + h[index] * theta.sin()
            trial = trial / trial.norm(dim=1, keepdim=True)
            rows = field.directions(trial)
            asked, met = field.reaches(rows, height[waiting], level)
            done = np.flatnonzero(met)
            if len(done):
                chosen = torch.from_numpy(done).to(q.device)
                result.put(
                    waiting[done], field.measure(trial[chosen], asked[done], rows.take(done))
                )
                self._angle += float(np.abs(np.sin(angle[waiting[done]])).sum())
                self._moves += len(done)
            waiting = waiting[~met]
            if not len(waiting):
                break
            shrunk = angle[waiting]
            low[waiting] = np.where(shrunk < 0, shrunk, low[waiting])
            high[waiting] = np.where(shrunk < 0, high[waiting], shrunk)
            angle[waiting] = self.rng.uniform(low[waiting], high[waiting])
        self._stuck += len(waiting)
        return result

    def report(self) -> dict[str, float]:
        """Mean sine of the angle moved, and the share of slices that were not met."""
        moves = max(self._moves + self._stuck, 1)
        return {"step_size": self._angle / moves, "stuck": self._stuck / moves}


@dataclass
class CrankNicolson:
    """Preconditioned Crank–Nicolson steps on z, u = z/‖z‖: z′ = √(1−s²) z + s ξ.

    They keep z ~ N(0, I), so their acceptance depends on what is known about u, not on d (Cotter,
    Roberts, Stuart & White 2013, Statist. Sci. 28, 424–446). A height below the density at u is
    drawn once a move; a step is accepted if the ray still reaches the radius that the height asks
    for, which one loss tells. The end of the ray is found once a move, from that radius.

    Args:
        generator: of ξ, on the rays' device.
        rng: of everything else.
        repeats: steps in one move.
        size: s of the first step.
    """

    generator: torch.Generator
    rng: np.random.Generator
    repeats: int = 4
    size: float = 0.9
    name: str = "crank-nicolson"

    _accepted: float = 0.0
    _steps: int = 0

    def start_level(self, population: Population, level: Level) -> None:
        """Nothing to prepare."""
        del population, level
        self._accepted, self._steps = 0.0, 0

    def step(self, field: RayField, state: Population, level: Level) -> Population:
        """``repeats`` steps for every chain, and a search of the rays that moved."""
        q = state.units
        count = len(state)
        length = torch.as_tensor(
            np.sqrt(self.rng.chisquare(field.dim, size=count)), device=q.device, dtype=q.dtype
        )
        z = q * length[:, None]
        height = field.log_target(state, level) + np.log(self.rng.uniform(size=count))
        moved = np.zeros(count, dtype=np.bool_)
        reached = np.zeros(count)
        for _ in range(self.repeats):
            noise = torch.randn(q.shape, generator=self.generator, device=q.device, dtype=q.dtype)
            trial = math.sqrt(1.0 - self.size**2) * z + self.size * noise
            rows = field.directions(trial / trial.norm(dim=1, keepdim=True))
            asked, accepted = field.reaches(rows, height, level)
            index = torch.from_numpy(np.flatnonzero(accepted)).to(q.device)
            z[index] = trial[index]
            moved |= accepted
            reached[accepted] = asked[accepted]
            rate = float(accepted.mean())
            self._accepted += rate
            self._steps += 1
            grown = self.size * math.exp(0.4 * (rate - _PCN_ACCEPTANCE))
            self.size = min(max(grown, 1e-4), 0.999)
        result = state.take(np.arange(count))
        taken = np.flatnonzero(moved)
        if len(taken):
            units = z[torch.from_numpy(taken).to(q.device)]
            units = units / units.norm(dim=1, keepdim=True)
            result.put(taken, field.measure(units, reached[taken]))
        return result

    def report(self) -> dict[str, float]:
        """Acceptance and the last s."""
        return {"acceptance": self._accepted / max(self._steps, 1), "step_size": self.size}


@dataclass
class Switching:
    """A move without gradients while its step is long, then one with them.

    Args:
        cheap: reports a ``step_size``.
        strong: takes over once that falls below ``least``.
        least: of the cheap move's step.
    """

    cheap: CrankNicolson
    strong: Hamiltonian
    least: float = 0.2
    name: str = "switching"

    _strong: bool = False

    def start_level(self, population: Population, level: Level) -> None:
        """Decides which of the two moves this level."""
        self._strong = self._strong or self.cheap.size < self.least
        self._current.start_level(population, level)

    def step(self, field: RayField, state: Population, level: Level) -> Population:
        """One move of the current kind."""
        return self._current.step(field, state, level)

    def report(self) -> dict[str, float]:
        """That of the current kind, and whether it takes gradients."""
        return {**self._current.report(), "gradients": float(self._strong)}

    @property
    def _current(self) -> CrankNicolson | Hamiltonian:
        return self.strong if self._strong else self.cheap


def great_circle(q: Tensor, v: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Position and velocity after ``time`` along the great circles through q with velocity v."""
    speed = v.norm(dim=1, keepdim=True).clamp(min=1e-30)
    angle = speed * time
    cosine, sine = angle.cos(), angle.sin()
    moved = q * cosine + v * (sine / speed)
    turned = v * cosine - q * (speed * sine)
    moved = moved / moved.norm(dim=1, keepdim=True)
    return moved, turned - (turned * moved).sum(dim=1, keepdim=True) * moved


def _kinetic(v: Tensor, d: int) -> Float:
    """d ‖v‖²/2, float64 ``[k]``."""
    squared: Float = v.to(torch.float64).square().sum(dim=1).cpu().numpy()
    return 0.5 * d * squared
