"""Figures of results. Axes in, Axes out; matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import FastvolError
from .measures import Gaussian

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .result import VolumeEstimate


def plot_profile(
    result: VolumeEstimate, ax: Axes | None = None, *, label: str | None = None, **line: Any
) -> Axes:
    """φ(R) with its 95 % interval: solid where reliable, dashed (a lower bound) beyond.

    Args:
        result: the estimate.
        ax: where to draw; a new figure by default.
        label: for the legend.
        line: passed on to ``Axes.plot`` (``color=…``).

    Returns:
        The Axes drawn on.

    Raises:
        FastvolError: matplotlib is not installed.
    """
    ax = _axes(ax)
    profile = result.profile()
    trusted = profile.reliable
    (solid,) = ax.plot(
        np.where(trusted, profile.radius, np.nan), profile.log_fraction, label=label, **line
    )
    color = solid.get_color()
    # The dashed part starts where the solid one ends.
    beyond = ~trusted
    beyond[:-1] |= beyond[1:]
    ax.plot(
        np.where(beyond, profile.radius, np.nan),
        profile.log_fraction,
        color=color,
        linestyle="--",
        linewidth=1,
    )
    ax.fill_between(
        profile.radius,
        profile.ci_low,
        profile.ci_high,
        where=trusted,
        color=color,
        alpha=0.2,
        linewidth=0,
    )
    reach = profile.reliable_radius
    if 0 < reach < math.inf:
        at = result.profile([reach])
        ax.plot(reach, at.log_fraction[0], marker="o", color=color)
    ax.set_xscale("log")
    if isinstance(result.measure, Gaussian):
        ax.set_xlabel("multiple of std")
        ax.set_ylabel("log mass, nats")
    else:
        ax.set_xlabel("radius R")
        ax.set_ylabel("log filled fraction φ(R), nats")
    return ax


def plot_radii(
    result: VolumeEstimate, ax: Axes | None = None, *, label: str | None = None, **style: Any
) -> Axes:
    """Histogram of the radii.

    Args:
        result: the estimate.
        ax: where to draw; a new figure by default.
        label: for the legend.
        style: passed on to ``Axes.hist``.

    Raises:
        FastvolError: matplotlib is not installed.
    """
    ax = _axes(ax)
    crossed = result.status != 1
    options = {"bins": 60, "histtype": "stepfilled", "alpha": 0.5, "density": True, **style}
    ax.hist(np.exp(result.log_radii[crossed]), label=label, **options)
    ax.set_xlabel("radius of a direction")
    ax.set_ylabel("density")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise FastvolError("plots need matplotlib: pip install 'fastvol[plot]'") from error
    return pyplot.subplots()[1]
