r"""States under a normal law of all parameters, their losses, and the move between them.

States are z = (θ − mean) / std. The move is a preconditioned Crank–Nicolson step along every axis,

.. math:: z' = U(\sqrt{1 - s^2}\, U^T z + s\,\xi), \qquad \xi \sim N(0, I),

accepted where the loss is at or below a rung. It leaves N(0, I) invariant for any rotation U and
any steps 0 < s ≤ 1, so both may be learned from a population: s along an axis is in proportion to
the spread (Papaioannou, Betz, Zwirglmaier & Straub 2015, Prob. Eng. Mech. 41), and where a full
covariance can be had U are its eigenvectors. On the bodies of the tests the elliptical slice move,
along the same axes, has errors larger by a third for the same number of losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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

# Steps of several sizes suit regions of several widths: factors from this to 1.
_LEAST_FACTOR = 0.5
_LEAST_MULTIPLE, _MOST_MULTIPLE = 1e-6, 1e3
# A covariance is drawn to its diagonal as if so many states a coordinate had shown none.
_SHRINKAGE = 2.0
_LEAST_SPREAD = 1e-6


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
