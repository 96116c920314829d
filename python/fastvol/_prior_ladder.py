r"""Subset simulation under a normal law of all parameters (Au & Beck 2001, Prob. Eng. Mech. 16).

A ladder of losses τ₁ > τ₂ > … leads down to the threshold. The mass is the product of the
conditional probabilities of one rung given the one above, each the share of a population that lies
low enough. A population is all the states of M chains of length K (waste-free, Dau & Chopin 2022,
J. R. Statist. Soc. B 84), which start from states of the one before.

The rungs and all that a move goes by are fixed before a run, so that its estimate of the mass is
unbiased whether or not its chains mix. Its variance comes from its family tree (Lee & Whiteley
2018, Biometrika 105): chains are the particles, and too many pairs with a common ancestor a few
rungs up show what the chains remember.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._prior_moves import Axes, Moments, Prior, Walk, bounded

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

# The share of a population that the next rung keeps.
KEPT = 0.3
# A rung is left out where the next one still keeps this.
_LEAST_KEPT = 0.2
_ACCEPTANCE = 0.3
_PILOT_GAIN = 0.6
_LEVEL_GAIN = 1.5
# A covariance is taken whole up to this dimension.
_FULL_DIM = 256
_PILOT_CHAINS = 16
# A level that offers nothing lower is prolonged so often before it is called a plateau.
_PATIENCE = 8
STATE_BYTES = 256 << 20


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


def next_rung(losses: Float, threshold: float) -> float | None:
    """The loss that about :data:`KEPT` of a population lie at or below, and not all of it.

    Never below the threshold; ``None`` where all losses are one.
    """
    ordered = np.sort(losses)
    quantile = float(ordered[max(math.ceil(KEPT * len(ordered)) - 1, 0)])
    if quantile == ordered[-1]:
        # A plateau: the highest of what lies below it.
        below = ordered[ordered < quantile]
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
    states = min(states, max(STATE_BYTES // bytes_a_state, 2 * _PILOT_CHAINS))
    chains = min(_PILOT_CHAINS, states // 2)
    length = states // chains
    limit = prior.n_loss + most
    ids: Int | None = np.arange(len(losses))
    population = prior.like.new_empty((0, prior.dim))
    rung = math.inf

    def ended(*, plateau: bool, reached: bool) -> Ladder:
        return Ladder(tuple(rungs), tuple(multiples), tuple(found), plateau, reached, log_mass)

    while True:
        low = next_rung(losses, threshold)
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


def thinned(ladder: Ladder, levels: list[Level], threshold: float) -> Ladder:
    """The ladder without the rungs that a run showed to be needless.

    Args:
        ladder: of the run.
        levels: of the run; where it did not reach the end, the ladder stays as it is.
        threshold: where the ladder leads.
    """
    if len(levels) <= len(ladder.rungs):
        return ladder
    hits = (levels[-1].losses <= threshold).mean()
    if not hits:
        return ladder
    weights = [*(level.log_weight for level in levels), levels[-1].log_weight + math.log(hits)]
    kept, last = [], 0
    for index in range(len(ladder.rungs)):
        # Rung number i is that of level i + 1; the one after it is that of level i + 2, or the end.
        if weights[index + 2] - weights[last] < math.log(_LEAST_KEPT):
            kept.append(index)
            last = index + 1
    return replace(
        ladder,
        rungs=tuple(ladder.rungs[i] for i in kept),
        multiples=tuple(ladder.multiples[i] for i in kept),
        axes=tuple(ladder.axes[i] for i in kept),
    )


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
