"""Measures one network in one landscape, by fastvol's public API."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

import fastvol

from .cache import Outcome
from .losses import LOSSES
from .pools import Pool
from .training import mean_loss


@dataclass(frozen=True)
class Measurement:
    """What is measured, and how.

    Args:
        n: directions.
        threshold: the loss at which a basin ends.
        method: of ``fastvol.estimate``.
        metric: likewise; the published one is ``"filter"``.
        std: of a normal law whose mass in the basin is measured; ``None`` measures volume.
        center: of that law: ``"minimum"`` or ``"origin"``.
        seed: which directions. Equal seeds share them, so minima of one network are compared
            direction by direction.
    """

    n: int
    threshold: float = 0.1
    method: str = "radial"
    metric: str = "filter"
    std: float | None = None
    center: Literal["minimum", "origin"] = "minimum"
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """JSON-ready, with the version that measures."""
        return {**asdict(self), "fastvol": fastvol.__version__}


def measure(
    model: nn.Module, pool: Pool, landscape: tuple[Tensor, Tensor], how: Measurement
) -> Outcome:
    """The basin's volume; where the model's own loss is above the threshold it has *vanished*.

    Facts: ``loss`` (the model's own), ``vanished``, ``seconds``.
    """
    loss_fn = LOSSES[pool.loss]
    loss = mean_loss(model, loss_fn, *landscape)
    facts: dict[str, Any] = {"loss": loss, "vanished": not loss < how.threshold}
    if facts["vanished"]:
        return Outcome(facts)
    measure: fastvol.Lebesgue | fastvol.Gaussian = fastvol.Lebesgue()
    if how.std is not None:
        measure = fastvol.Gaussian(how.std, center=how.center)
    with unwarned():
        volume = fastvol.estimate(
            model,
            loss_fn,
            n=how.n,
            data=landscape,
            threshold=how.threshold,
            metric=how.metric,
            measure=measure,
            method=how.method,
            seed=how.seed,
            progress=False,
        )
    return Outcome({**facts, "seconds": volume.seconds}, volume=volume)


@contextmanager
def unwarned() -> Iterator[None]:
    """Without fastvol's warnings of slowness: a result's provenance says what fell back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastvol.FastvolWarning)
        yield


def describe(volume: fastvol.VolumeEstimate | None) -> dict[str, Any]:
    """What a table or a figure says of a volume, its error and whether it is reliable beside it.

    ``value`` is the published quantity log E[r^d], or the log mass under a normal law. Of a basin
    that has vanished only that is said.
    """
    if volume is None:
        return {"vanished": True}
    gaussian = isinstance(volume.measure, fastvol.Gaussian)
    value = volume.log_volume if gaussian else volume.log_mean_power
    return {
        "vanished": False,
        "value": value,
        "stderr": volume.stderr,
        "reliable": volume.reliable,
        "n": volume.n,
        "dim": volume.dim,
        "method": volume.method,
        "ess": volume.ess,
        "reliable_radius": volume.reliable_radius,
        "median_radius": float(np.exp(np.median(volume.log_radii))),
        "n_unbounded": volume.n_unbounded,
        "n_loss": volume.n_loss,
        "n_grad": volume.n_grad,
        "seconds": volume.seconds,
        "warnings": list(volume.warnings),
        "fell_back": list(volume.provenance["fell_back"]),
    }


def filled(volume: fastvol.VolumeEstimate | None, radius: float) -> dict[str, Any]:
    """φ(R) at one radius, its error, and whether it is reliable there."""
    if volume is None:
        return {"vanished": True}
    profile = volume.profile([radius])
    return {
        "vanished": False,
        "radius": radius,
        "value": float(profile.log_fraction[0]),
        "stderr": float(profile.stderr[0]),
        "reliable": bool(profile.reliable[0]),
    }


def versus(a: fastvol.VolumeEstimate, b: fastvol.VolumeEstimate) -> dict[str, Any]:
    """``fastvol.compare``: log of a's volume over b's, where both are reliable."""
    found = fastvol.compare(a, b)
    return {
        "radius": found.radius,
        "value": found.log_ratio,
        "stderr": found.stderr,
        "probability": found.probability,
        "reliable": found.reliable,
    }


def common_radius(volumes: Sequence[fastvol.VolumeEstimate | None]) -> float | None:
    """The largest radius that is reliable in all that are reliable anywhere; ``None`` without one.

    Where every one is reliable without a cap, twice the longest radius. Too few directions make an
    estimate reliable nowhere: it is left out, and flagged wherever it is asked for.
    """
    there = [volume for volume in volumes if volume is not None and volume.reliable_radius > 0]
    if not there:
        return None
    radius = min(volume.reliable_radius for volume in there)
    if math.isinf(radius):
        return 2.0 * math.exp(max(float(volume.log_radii.max()) for volume in there))
    return radius
