"""A checked call: what every method is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._backend import Backend
from ._bars import progress_bar
from ._layout import ParameterLayout
from ._objective import Objective
from ._scale import Scale
from ._work import Work
from .engines import Engine, Plan, open_engine
from .errors import warn
from .measures import Gaussian, Lebesgue

Result = TypeVar("Result")

# A method that keeps directions keeps at least so many; up to this size together they are held.
_FEW_DIRECTIONS, _DIRECTIONS_BYTES = 32, 1 << 30


@dataclass(frozen=True)
class Progress:
    """What a callback of :func:`fastvol.estimate` is told after each block of directions, or run.

    Args:
        n_done, n: directions settled, and asked for; for chains the states of one run, twice.
        threshold: the threshold that is being worked on.
        log_radii: of the directions settled so far, float64 ``[n_done]``; read-only, and a copy has
            to be made of what is to outlast the callback: the audit may correct it.
        log_volume_metric, stderr: the estimate from them, in metric coordinates, nats; before the
            audit, and without the verdict on its reliability; a run of chains has no error alone.
        seconds: since the run began.
    """

    n_done: int
    n: int
    threshold: float
    log_radii: npt.NDArray[np.float64]
    log_volume_metric: float
    stderr: float
    seconds: float


def typical_radius(scale: Scale) -> float:
    """A radius to start from when nothing is known: a tenth of the parameters' own length."""
    length = scale.length
    usable = length > 0 and math.isfinite(length)
    return 0.1 * (length if usable else math.sqrt(scale.dim))


@dataclass(frozen=True)
class Problem:
    """One call of :func:`fastvol.estimate`, validated.

    Args:
        objective: the loss over the data.
        layout: the moved parameters.
        measure: how space is weighted.
        metric_scale: s of the metric.
        ray_scale: the coordinates in which rays are isotropic: the metric's, or the normal law's
            own standard deviations.
        typical_radius: see :func:`typical_radius`.
        loss0: L(θ*).
        thresholds: τ, one per result.
        n: directions.
        seed, antithetic, noise: what direction i is.
        preconditioner: as it was given to :func:`fastvol.estimate`.
        replicates: main runs of a method that samples by chains.
        rtol: the relative tolerance of a radius, or ``None`` to let the pilot choose.
        first_crossing: whether every ray is scanned for an earlier crossing.
        plan: how the run is carried out.
        backend: who computes.
        config: JSON-ready, everything above that the numbers depend on.
        provenance: JSON-ready, where and with what it ran.
        progress: whether to show a progress bar.
        callbacks: called with a :class:`Progress` after each block.
        began: ``time.perf_counter()`` at the start of the call.
        work: where the pieces of the run come from and go to.
        elsewhere: the same problem on further devices, for independent rays.
    """

    objective: Objective
    layout: ParameterLayout
    measure: Lebesgue | Gaussian
    metric_scale: Scale
    ray_scale: Scale
    typical_radius: float
    loss0: float
    thresholds: tuple[float, ...]
    n: int
    seed: int
    antithetic: bool
    noise: str
    preconditioner: Any
    replicates: int
    rtol: float | None
    first_crossing: bool
    plan: Plan
    backend: Backend
    config: dict[str, Any]
    provenance: dict[str, Any]
    progress: bool
    callbacks: Sequence[Callable[[Progress], Any]]
    began: float
    work: Work = field(default_factory=Work)
    elsewhere: tuple[Problem, ...] = ()

    def over_thresholds(self, one: Callable[[float], Result]) -> list[Result]:
        """One result per threshold; after an interrupt those up to the one it came in."""
        results: list[Result] = []
        for threshold in self.thresholds:
            try:
                results.append(one(threshold))
            except KeyboardInterrupt:
                if self.work.on_interrupt != "return" or not results or not self.work.alone:
                    raise
                self.work.interrupted = True
            if self.work.interrupted:
                break
        if len(results) < len(self.thresholds):
            warn(
                f"interrupted: {len(results)} of {len(self.thresholds)} thresholds have a result",
            )
        return results

    @cached_property
    def dim(self) -> int:
        """d: coordinates that move."""
        return self.ray_scale.dim

    @cached_property
    def offset(self) -> Tensor | None:
        """μ = (centre − θ*) / std for a normal law centred at the origin, else ``None``."""
        if not self.is_centred_elsewhere:
            return None
        return -self.layout.flatten().to("cpu", torch.float64) / self.ray_scale.flat

    @property
    def is_centred_elsewhere(self) -> bool:
        """Whether the measure is a normal law around the origin."""
        return isinstance(self.measure, Gaussian) and self.measure.center == "origin"

    @property
    def holds_directions(self) -> bool:
        """Whether some directions can be held in memory, as most methods need."""
        few = _FEW_DIRECTIONS * self.dim * torch.finfo(self.layout.dtype).bits // 8
        return not self.layout.is_sharded and (
            self.plan.engine != "inplace" or few <= _DIRECTIONS_BYTES
        )

    @property
    def offset_squared(self) -> float:
        """‖μ‖², 0 without an offset."""
        if not self.is_centred_elsewhere:
            return 0.0
        if not self.holds_directions:
            return self.ray_scale.length**2
        assert self.offset is not None
        return float(self.offset.square().sum())

    @cached_property
    def log_abs_scale(self) -> float:
        """Σ log s of the metric."""
        return self.metric_scale.log_sum

    @property
    def log_constant(self) -> float:
        """What makes a log mean weight the answer in metric coordinates, nats."""
        if isinstance(self.measure, Gaussian):
            return -0.5 * self.offset_squared
        return self.backend.log_ball_volume(self.dim) + math.log(self.dim)

    def engine(self, lanes: int | None = None, *, objective: Objective | None = None) -> Engine:
        """A new engine over this problem's rays.

        Args:
            lanes: the plan's own number by default.
            objective: another loss, the problem's own by default.
        """
        plan = self.plan
        if lanes is not None:
            plan = replace(plan, lanes=lanes, chunk=min(plan.chunk, lanes))
        return open_engine(
            objective or self.objective,
            self.layout,
            self.ray_scale,
            plan,
            self.backend,
            None if plan.engine == "inplace" else self.offset,
            toward_origin=self.is_centred_elsewhere,
            rowspace=self.noise == "rowspace",
        )

    def bar(
        self, *, unit: str = "direction", total: int | None = None
    ) -> AbstractContextManager[Any]:
        """A progress bar over directions times thresholds; silent where there is no terminal.

        Args:
            unit: what is counted.
            total: how many of it for each threshold; the directions by default.
        """
        each = self.n if total is None else total
        return progress_bar(each * len(self.thresholds), unit, shown=self.progress)
