"""The seam between methods and engines.

A ray is θ* + s ⊙ (t·v): v a direction in metric coordinates w, t ≥ 0 its radius, s the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


class LinearOperator(Protocol):
    """A preconditioner P on metric coordinates."""

    def matvec(self, rows: Tensor) -> Tensor:
        """P applied to every row: ``[k, d] -> [k, d]``."""
        ...


@dataclass(frozen=True)
class Indexed:
    """Rays made from counters: v = P z/‖z‖ with z the normal vector (seed, stream, id).

    Args:
        seed: 64-bit key.
        ids: direction indices, int64 ``[k]``.
        stream: 0 for a run's own directions.
        antithetic: ids 2i and 2i+1 are ± one vector.
        preconditioner: P, or ``None`` for the identity.
    """

    seed: int
    ids: Int
    stream: int = 0
    antithetic: bool = False
    preconditioner: LinearOperator | None = None


@dataclass(frozen=True)
class Dense:
    """Rays given outright: v = P x with x a row of ``directions`` ``[k, d]``, not normalised."""

    directions: Tensor
    preconditioner: LinearOperator | None = None


Rays = Indexed | Dense


class RayInfo(NamedTuple):
    """What loading a direction tells: ‖z‖ (‖x‖ for dense rays) and ⟨z, project⟩, ``[k]`` each."""

    norm: Float
    dot: Float


class Losses(NamedTuple):
    """Losses float64 ``[k]``; where ``outside`` is set the entry is a lower bound above τ."""

    values: Float
    outside: Bool | None = None


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do."""

    gradients: bool
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]


class Engine(Protocol):
    """The loss, and its gradient, on up to ``lanes`` rays at once."""

    lanes: int
    capabilities: Capabilities

    def load(self, lanes: Int, rays: Rays) -> RayInfo:
        """Puts one ray on each of ``lanes`` (int64 ``[k]``); they stay until replaced."""
        ...

    def loss(self, radii: Float, lanes: Int | None = None, *, limit: float = math.inf) -> Losses:
        """The loss at ``radii`` (float64 ``[k]``) on ``lanes`` (all of them by default).

        Of a loss that is known to exceed ``limit`` the engine need not know more.
        """
        ...

    def loss_and_grad(self, radii: Float, lanes: Int | None = None) -> tuple[Float, Tensor]:
        """Losses ``[k]`` and gradients ``[k, d]`` with respect to metric coordinates w."""
        ...
