r"""Subset simulation under a normal law of all parameters (Au & Beck 2001, Prob. Eng. Mech. 16).

A ladder of losses τ₁ > τ₂ > … leads down to the threshold. The mass is the product of the
conditional probabilities of one rung given the one above, each the share of a population that lies
low enough. A population is all the states of M chains of length K (waste-free, Dau & Chopin 2022,
J. R. Statist. Soc. B 84), which start from states of the one before.

The move works on z = (θ − mean) / std with a preconditioned Crank–Nicolson step along every axis,

.. math:: z' = U(\sqrt{1 - s^2}\, U^T z + s\,\xi), \qquad \xi \sim N(0, I),

accepted where the loss is at or below the rung. It leaves N(0, I) invariant for any rotation U and
any steps 0 < s ≤ 1, so both may be learned from the population above: s along an axis is in
proportion to the population's spread (Papaioannou, Betz, Zwirglmaier & Straub 2015), and where a
full covariance can be had U are its eigenvectors.

The rungs and all that a move goes by are fixed before a run, so that its estimate of the mass is
unbiased whether or not its chains mix. Its variance comes from its family tree (Lee & Whiteley
2018, Biometrika 105): chains are the particles, and too many pairs with a common ancestor a few
rungs up show what the chains remember.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._backend import Backend
from ._layout import ParameterLayout
from ._objective import Objective
from .engines import Dense, GeneralEngine, Plan

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

# The share of a population that the next rung keeps.
KEPT = 0.3
_ACCEPTANCE = 0.3
_PILOT_GAIN = 0.6
_LEVEL_GAIN = 1.5
# Steps of several sizes suit regions of several widths: factors from this to 1.
_LEAST_FACTOR = 0.3
_LEAST_MULTIPLE, _MOST_MULTIPLE = 1e-6, 1e3
# A covariance is taken whole up to this dimension, as if so many
# states a coordinate had shown none.
_FULL_DIM = 256
_SHRINKAGE = 2.0
_LEAST_SPREAD = 1e-6
_PILOT_CHAINS = 32
# A level that offers nothing lower is prolonged so often before it is called a plateau.
_PATIENCE = 8
_STATE_BYTES = 512 << 20


class PriorEngine(GeneralEngine):
    """The general engine around the law's mean, so that rays lose no digits to θ*."""

    def __init__(
        self,
        objective: Objective,
        layout: ParameterLayout,
        mean: Tensor,
        std: Tensor,
        plan: Plan,
        backend: Backend,
    ) -> None:
        super().__init__(objective, layout, std, plan, backend)
        self._theta0 = mean.to(layout.device, layout.dtype)

    def points(self, z: Tensor) -> Tensor:
        """θ of some states ``[k, d]``, as :meth:`loss` sees them."""
        return torch.addcmul(self._theta0, self._scaled(z), torch.ones_like(z[:, :1]))


@dataclass
class Prior:
    """The loss on states z, and the noise: every vector is a function of (seed, stream, index).

    Args:
        engine, backend: evaluate the loss, make the noise.
        seed: of all noise.
        like: a tensor of the right dtype and device.
        noise_threads: threads that make the noise.
        on_losses: told after every call how many losses it took.
    """

    engine: PriorEngine
    backend: Backend
    seed: int
    like: Tensor
    noise_threads: int
    on_losses: Callable[[int], None]
    n_loss: int = 0

    @property
    def dim(self) -> int:
        """Coordinates that move."""
        return self.engine.dim

    def normals(self, stream: int, ids: Int) -> Tensor:
        """Standard normal vectors ``[k, d]``."""
        out = torch.empty((len(ids), self.dim), device=self.like.device, dtype=self.like.dtype)
        self.backend.normals(out, self.seed, stream, ids, threads=self.noise_threads)
        return out

    def losses(self, z: Tensor) -> Float:
        """float64 ``[k]``; what is not finite counts as infinite."""
        parts = []
        for first in range(0, len(z), self.engine.lanes):
            part = z[first : first + self.engine.lanes]
            lanes = np.arange(len(part))
            self.engine.load(lanes, Dense(part))
            parts.append(self.engine.loss(np.ones(len(part)), lanes).values)
        self.n_loss += len(z)
        self.on_losses(len(z))
        values = np.concatenate(parts)
        return np.where(np.isfinite(values), values, math.inf)

    def draw_losses(self, stream: int, count: int) -> Float:
        """Losses of the first ``count`` plain draws of a stream."""
        step = self.engine.lanes
        return np.concatenate(
            [
                self.losses(self.normals(stream, np.arange(first, min(first + step, count))))
                for first in range(0, count, step)
            ]
        )


@dataclass(frozen=True)
class Axes:
    """Rotation U ``[d, d]`` (``None``: the coordinates), and the spread along its columns.

    ``spread`` is ``[d]``, or ``[chains, d]`` where each chain has its own.
    """

    rotation: Tensor | None
    spread: Tensor


@dataclass
class Moments:
    """Sums over states, for the axes and the spread along them.

    Args:
        dim: d.
        like: a tensor on the right device.
        full: whether to keep the whole second moment.
    """

    dim: int
    like: Tensor
    full: bool

    def __post_init__(self) -> None:
        self._first = torch.zeros(self.dim, device=self.like.device, dtype=torch.float64)
        self._second = self._first.new_zeros((self.dim,) * (2 if self.full else 1))
        self._count = 0

    def add(self, z: Tensor) -> None:
        """Adds states ``[k, d]``."""
        exact = z.to(torch.float64)
        self._first += exact.sum(dim=0)
        self._second += exact.T @ exact if self.full else exact.square().sum(dim=0)
        self._count += len(z)

    def axes(self) -> Axes:
        """What a move goes by; a whole second moment of few states is drawn to its diagonal."""
        if self._count < 2:
            return Axes(None, torch.ones_like(self._first).to(self.like))
        mean = self._first / self._count
        if not self.full or self._count < 2 * self.dim:
            second = self._second.diagonal() if self.full else self._second
            variance = second / self._count - mean.square()
            # Few states give a rough variance; the law's own counts as two of them.
            return Axes(None, _spread((self._count * variance + 2.0) / (self._count + 2.0), self))
        covariance = self._second / self._count - torch.outer(mean, mean)
        share = _SHRINKAGE * self.dim / (self._count + _SHRINKAGE * self.dim)
        diagonal = covariance.diagonal().clone()
        covariance *= 1.0 - share
        covariance.diagonal().copy_(diagonal)
        values, vectors = torch.linalg.eigh(covariance)
        return Axes(vectors.to(self.like), _spread(values, self))


def _spread(variance: Tensor, moments: Moments) -> Tensor:
    return variance.clamp(min=_LEAST_SPREAD**2).sqrt().to(moments.like)


@dataclass
class Walk:
    """The Crank–Nicolson move of one level.

    Args:
        prior: loss and noise.
        stream: of the noise.
        axes: along which it steps.
        multiple: s over the spread, before the random factor.
        rng: of the factors.
    """

    prior: Prior
    stream: int
    axes: Axes
    multiple: float
    rng: np.random.Generator
    next_id: int = 0

    def step(self, z: Tensor, losses: Float, rung: float) -> Bool:
        """One step of every chain, in place; which ones moved."""
        count = len(z)
        noise = self.prior.normals(self.stream, np.arange(self.next_id, self.next_id + count))
        self.next_id += count
        factors = np.exp(self.rng.uniform(math.log(_LEAST_FACTOR), 0.0, size=(count, 1)))
        s = torch.as_tensor(self.multiple * factors).to(z) * self.axes.spread
        s.clamp_(max=1.0)
        # Two products, for 1 - s² would lose a small s.
        keep = ((1.0 - s) * (1.0 + s)).sqrt_()
        if self.axes.rotation is None:
            trial = keep * z + s * noise
        else:
            trial = (keep * (z @ self.axes.rotation) + s * noise) @ self.axes.rotation.T
        values = self.prior.losses(trial)
        accepted: Bool = values <= rung
        index = torch.from_numpy(np.flatnonzero(accepted)).to(z.device)
        z[index] = trial[index]
        losses[accepted] = values[accepted]
        return accepted

    def grow(self, gap: float) -> None:
        """Multiplies the step by e^gap."""
        self.multiple = bounded(self.multiple * math.exp(gap))


def bounded(multiple: float) -> float:
    """A step within what makes sense."""
    return min(max(multiple, _LEAST_MULTIPLE), _MOST_MULTIPLE)


@dataclass(frozen=True)
class Ladder:
    """The rungs, from a pilot.

    Attributes:
        rungs: losses, descending; the threshold is not one of them.
        multiples: the steps that suited each.
        axes: of the populations at or below each.
        plateau: whether no state was found below the last rung.
        reached: whether states at or below the threshold were found.
        log_mass: rough, of the threshold or of the last rung.
    """

    rungs: tuple[float, ...]
    multiples: tuple[float, ...]
    axes: tuple[Axes, ...]
    plateau: bool
    reached: bool
    log_mass: float


def next_rung(losses: Float, rung: float, threshold: float) -> float | None:
    """The loss that about :data:`KEPT` of a population lie at or below, strictly below ``rung``.

    Never below the threshold; ``None`` where the population has nothing below ``rung``.
    """
    ordered = np.sort(losses)
    quantile = float(ordered[max(math.ceil(KEPT * len(ordered)) - 1, 0)])
    if quantile >= rung or quantile == math.inf:
        # A plateau: the highest of what lies below it.
        below = ordered[ordered < rung]
        if not len(below):
            return None
        quantile = float(below[-1])
    return max(quantile, threshold)


def make_ladder(
    prior: Prior, losses: Float, threshold: float, states: int, most: int, rng: np.random.Generator
) -> Ladder:
    """A small run that chooses its rungs as it goes.

    Args:
        prior: loss and noise; stream 0 holds the plain draws.
        losses: of those draws, ``[n0]``.
        threshold: where the ladder leads.
        states: in a population.
        most: losses that may be spent.
        rng: of choices.
    """
    rungs: list[float] = []
    multiples: list[float] = []
    found: list[Axes] = []
    log_mass, multiple = 0.0, 1.0
    bytes_a_state = prior.dim * prior.like.element_size()
    states = min(states, max(_STATE_BYTES // bytes_a_state, 2 * _PILOT_CHAINS))
    chains = min(_PILOT_CHAINS, states // 2)
    length = states // chains
    limit = prior.n_loss + most
    ids: Int | None = np.arange(len(losses))
    population = prior.like.new_empty((0, prior.dim))
    rung = math.inf

    def ended(*, plateau: bool, reached: bool) -> Ladder:
        return Ladder(tuple(rungs), tuple(multiples), tuple(found), plateau, reached, log_mass)

    while True:
        low = next_rung(losses, rung, threshold)
        if low is None or low <= threshold:
            hit = float(np.mean(losses <= threshold))
            log_mass += math.log(hit) if hit else 0.0
            return ended(plateau=low is None and not hit, reached=hit > 0)
        if prior.n_loss >= limit:
            return ended(plateau=False, reached=False)
        kept = np.flatnonzero(losses <= low)
        log_mass += math.log(len(kept) / len(losses))
        # The plain draws are not held, but made anew.
        chosen = rng.permutation(kept)[:states]
        source = prior.normals(0, chosen) if ids is not None else population[_index(chosen, prior)]
        group = chosen % chains < chains // 2
        ids = None
        spreads, starts = [], np.empty(chains, dtype=np.int64)
        for side, rows in ((True, slice(chains // 2)), (False, slice(chains // 2, chains))):
            own, other = np.flatnonzero(group == side), np.flatnonzero(group != side)
            starts[rows] = np.resize(own if len(own) else other, len(starts[rows]))
            # A half that went by its own spread would freeze where it is narrow by chance.
            moments = Moments(prior.dim, prior.like, full=False)
            moments.add(source[_index(other, prior)])
            spreads.append(moments.axes().spread.expand(len(starts[rows]), -1))
        z = source[_index(starts, prior)].clone()
        current = losses[chosen][starts]
        rung = low
        rungs.append(rung)
        axes = Axes(None, torch.cat(spreads))
        walk = Walk(prior, 3 + len(rungs), axes, multiple, rng)
        collected, values = [z.clone()], [current.copy()]
        for step in range(1, length * _PATIENCE):
            if step >= length and (min(map(np.min, values)) < rung or prior.n_loss >= limit):
                break
            rate = float(walk.step(z, current, rung).mean())
            walk.grow(_PILOT_GAIN * (rate - _ACCEPTANCE))
            if step < length:
                collected.append(z.clone())
                values.append(current.copy())
            elif (current < rung).any():
                collected[-1], values[-1] = z.clone(), current.copy()
        multiple = walk.multiple
        multiples.append(multiple)
        population, losses = torch.cat(collected), np.concatenate(values)
        moments = Moments(prior.dim, prior.like, full=False)
        moments.add(population)
        found.append(moments.axes())


def _index(rows: Int, prior: Prior) -> Tensor:
    return torch.from_numpy(rows).to(prior.like.device)


class Reservoir:
    """A uniform choice, without replacement, among all states that are kept.

    Args:
        size: states held, at most.
        dim, like: of a state.
        rng: of the choice.
    """

    def __init__(self, size: int, dim: int, like: Tensor, rng: np.random.Generator) -> None:
        self._keys = np.full(size, math.inf)
        self._losses = np.full(size, math.inf)
        self._chains = np.zeros(size, dtype=np.int64)
        self._states = torch.empty((size, dim), device=like.device, dtype=like.dtype)
        self._rng = rng
        self.offered = 0

    def offer(self, z: Tensor, losses: Float, kept: Bool) -> None:
        """One state of every chain ``[chains, d]``, and which of them are kept."""
        size = len(self._keys)
        both = np.concatenate([self._keys, np.where(kept, self._rng.random(len(kept)), math.inf)])
        # The smallest keys of all that came are a uniform choice; stable, so that inf moves none.
        stays = np.zeros(len(both), dtype=np.bool_)
        stays[np.argsort(both, kind="stable")[:size]] = True
        slots, rows = np.flatnonzero(~stays[:size]), np.flatnonzero(stays[size:])
        if len(rows):
            device = self._states.device
            self._states[torch.from_numpy(slots).to(device)] = z[torch.from_numpy(rows).to(device)]
            self._losses[slots] = losses[rows]
            self._chains[slots] = rows
            self._keys[slots] = both[size + rows]
        self.offered += int(kept.sum())

    def draw(self, count: int) -> tuple[Tensor, Float, Int]:
        """``count`` of the kept states, with replacement: states, losses, and their chains."""
        held = self._rng.permutation(np.flatnonzero(np.isfinite(self._keys)))
        # Which of all that were kept; the distinct ones are a uniform choice, as those held are.
        _, distinct = np.unique(self._rng.integers(self.offered, size=count), return_inverse=True)
        rows = held[distinct]
        states = self._states[torch.from_numpy(rows).to(self._states.device)]
        return states, self._losses[rows], self._chains[rows]

    def all(self) -> Tensor:
        """The states held."""
        rows = np.flatnonzero(np.isfinite(self._keys))
        return self._states[torch.from_numpy(rows).to(self._states.device)]


@dataclass(frozen=True)
class Level:
    """One population.

    Attributes:
        rung: all losses are at or below it; infinite for the plain draws.
        losses: float64 ``[chains, length]``.
        parents: int64 ``[chains]``: the chain of the level above that each started from.
        log_weight: log mass of the rung by this run, nats.
        acceptance, multiple: of the move; nan for the plain draws.
    """

    rung: float
    losses: Float
    parents: Int
    log_weight: float
    acceptance: float
    multiple: float


def run_ladder(
    prior: Prior,
    ladder: Ladder,
    threshold: float,
    *,
    chains: int,
    length: int,
    stream: int,
    rng: np.random.Generator,
    learn: bool = False,
) -> tuple[list[Level], Tensor, Ladder]:
    """One run down a fixed ladder.

    Args:
        prior: loss and noise.
        ladder: its rungs.
        threshold: where the run ends.
        chains, length: M and K.
        stream: streams from this one on are used for the run's noise.
        rng: of choices.
        learn: whether to learn the axes.

    Returns:
        The levels, fewer where the run found nothing below a rung; states ``[k, d]`` at or below
        the threshold; and the ladder with what this run learned of the moves, for another run: one
        that went by its own states would be tied to them.
    """
    full = learn and prior.dim <= _FULL_DIM
    levels: list[Level] = []
    learned: list[Axes] = []
    tuned: list[float] = []
    z, current = prior.like.new_empty((0, prior.dim)), np.zeros(0)
    parents = np.arange(chains)
    correction, weight, rung = 1.0, 0.0, math.inf
    for depth, target in enumerate((*ladder.rungs, threshold)):
        reservoir = Reservoir(chains, prior.dim, prior.like, rng)
        moments = Moments(prior.dim, prior.like, full=full)
        losses = np.empty((chains, length))
        walk, accepted = None, 0.0
        if depth:
            multiple = bounded(correction * ladder.multiples[depth - 1])
            walk = Walk(prior, stream + depth, ladder.axes[depth - 1], multiple, rng)
        for step in range(length):
            if walk is None:
                z = prior.normals(stream, np.arange(step * chains, (step + 1) * chains))
                current = prior.losses(z)
            elif step:
                accepted += float(walk.step(z, current, rung).mean())
            losses[:, step] = current
            reservoir.offer(z, current, current <= target)
            if learn and walk:
                moments.add(z)
        acceptance = accepted / (length - 1) if walk else math.nan
        multiple = walk.multiple if walk else math.nan
        levels.append(Level(rung, losses, parents, weight, acceptance, multiple))
        if walk:
            gap = _LEVEL_GAIN * (acceptance - _ACCEPTANCE)
            tuned.append(bounded(walk.multiple * math.exp(gap)))
            # From level to level only: within one it would tie the move to its own states.
            correction *= math.exp(gap)
            learned.append(moments.axes() if learn else ladder.axes[depth - 1])
        if not reservoir.offered:
            break
        weight += math.log(reservoir.offered / losses.size)
        z, current, parents = reservoir.draw(chains)
        rung = target
    # Rungs that this run did not come to keep what was known of them.
    known = len(learned)
    ladder = replace(
        ladder,
        multiples=(*tuned, *ladder.multiples[known:]),
        axes=(*learned, *ladder.axes[known:]),
    )
    done = len(levels) == len(ladder.rungs) + 1
    return levels, reservoir.all() if done else z[:0], ladder
