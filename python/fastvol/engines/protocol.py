"""The seam between methods and engines.

A ray is θ* + s ⊙ (t·v): v a direction in metric coordinates w, t ≥ 0 its radius, s the scale.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
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


class LossPart(NamedTuple):
    """One batch's share in the losses of some lanes, all on the engine's device.

    A loss is the sum over the parts of scale times the sum over the examples, each as
    :func:`fastvol._reference.threshold_step.threshold_step` has it; ``first`` begins a lane's sum,
    and after ``last`` all lanes have theirs.
    """

    outputs: Tensor
    target: Tensor | None
    kind: str
    scale: float
    lanes: slice
    first: bool
    last: bool
    ignore_index: int = -100


class OffDeviceError(Exception):
    """Why an engine's losses cannot stay on its device, in words."""


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


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine whose losses need not leave its device."""

    device: torch.device

    @property
    def bound_to(self) -> Hashable:
        """What :meth:`loss_parts` takes from the host: captured, it holds for no other value."""
        ...

    def arithmetic(self) -> AbstractContextManager[Any]:
        """The precision of the losses."""
        ...

    def resize(self, lanes: int) -> None:
        """Forgets all rays, and makes room for another number of them."""
        ...

    def load_async(self, lanes: Int | Tensor, rays: Rays) -> tuple[Tensor, Tensor] | None:
        """As :meth:`load`, without waiting: ‖z‖ and ⟨z, project⟩ stay on the device.

        The lanes may be known to the device only, int64 ``[k]`` there; then :meth:`prepare` follows
        at once. ``None`` where that cannot be, and nothing has been done.
        """
        ...

    def loss_parts(self, radii: Tensor, lanes: slice) -> Iterator[LossPart]:
        """The losses at ``radii`` (float64 ``[k]`` on the device) of the ``k`` lanes ``lanes``.

        Nothing is read by the host, so that it can be captured in a CUDA graph. The parts' lanes
        count from the first of ``lanes``; each must be used before the next is asked for. Called
        under ``no_grad`` and :meth:`arithmetic`. Of a lane that holds a ray of another kind than
        was loaded last, the losses mean nothing.

        Raises:
            OffDeviceError: the losses do not stay on the device.
        """
        ...

    def prepare(self, lanes: Int | Tensor) -> None:
        """Makes what is kept of the directions on some lanes, before :meth:`loss_parts`."""
        ...
