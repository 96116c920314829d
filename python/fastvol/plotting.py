"""Figures of results. Axes in, Axes out; matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import FastvolError
from .measures import Gaussian

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .result import VolumeEstimate

_REACH, _BOUND = "reliable radius", "lower bound only"
# What the marks mean stands in the legend once, however many results share the Axes.
_MARKS: dict[str, dict[str, Any]] = {
    _REACH: {"linestyle": "", "marker": "o"},
    _BOUND: {"linestyle": "--"},
}


def plot_profile(
    result: VolumeEstimate,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    radii: npt.ArrayLike | None = None,
    level: float = 0.95,
    **line: Any,
) -> Axes:
    """φ(R) in nats with its interval: solid where reliable, dashed (a lower bound) beyond.

    The dot is the reliable radius. For a Gaussian measure: the log mass against the multiple of the
    measure's standard deviation.

    Args:
        result: the estimate.
        ax: where to draw; a new figure by default.
        label: for the legend.
        radii: float64 ``[m]``, caps R > 0 as :meth:`VolumeEstimate.profile` takes them, drawn in
            ascending order.
        level: of the interval.
        line: passed on to ``Axes.plot`` (``color=…``).

    Returns:
        The Axes drawn on.

    Raises:
        ValueError: ``radii`` or ``level`` is out of range.
        FastvolError: matplotlib is not installed.
    """
    ax = _axes(ax)
    caps = None if radii is None else np.sort(np.atleast_1d(np.asarray(radii, dtype=np.float64)))
    profile = result.profile(caps, level=level)
    trusted = profile.reliable
    (solid,) = ax.plot(
        np.where(trusted, profile.radius, np.nan), profile.log_fraction, label=label, **line
    )
    color = solid.get_color()
    # The dashed part starts where the solid one ends.
    beyond = ~trusted
    beyond[:-1] |= beyond[1:]
    marks = []
    if beyond.any():
        marks.append(_BOUND)
        ax.plot(
            np.where(beyond, profile.radius, np.nan),
            profile.log_fraction,
            color=color,
            linestyle="--",
            linewidth=0.8 * solid.get_linewidth(),
        )
    ax.fill_between(
        profile.radius,
        profile.ci_low,
        profile.ci_high,
        where=trusted & np.isfinite(profile.ci_low) & np.isfinite(profile.ci_high),
        color=color,
        alpha=0.25,
        linewidth=0,
    )
    reach = result.reliable_radius
    if 0 < reach < math.inf:
        marks.insert(0, _REACH)
        at = result.profile([reach])
        ax.plot(reach, at.log_fraction[0], marker="o", markeredgecolor="white", color=color)
    _log_axis(ax)
    if isinstance(result.measure, Gaussian):
        ax.set_xlabel("multiple of std")
        ax.set_ylabel("log mass, nats")
    else:
        ax.set_xlabel("radius R, metric coordinates")
        ax.set_ylabel("log filled fraction φ(R), nats")
    _explain(ax, *marks)
    return ax


def plot_radii(
    result: VolumeEstimate, ax: Axes | None = None, *, label: str | None = None, **style: Any
) -> Axes:
    """Histogram of the radii on a log axis, as a density of the log radius (per nat).

    Rays that never crossed the threshold have no radius; they are left out and counted in the
    legend.

    Args:
        result: the estimate.
        ax: where to draw; a new figure by default.
        label: for the legend.
        style: passed on to ``Axes.hist``; ``bins`` is a number of bins, equal in the log radius, or
            a rule of ``numpy.histogram_bin_edges``.

    Returns:
        The Axes drawn on.

    Raises:
        FastvolError: matplotlib is not installed.
    """
    ax = _axes(ax)
    options = {"histtype": "stepfilled", "alpha": 0.6, **style}
    bins = options.pop("bins", "auto")
    log_radii = result.log_radii[(result.status != 1) & np.isfinite(result.log_radii)]
    if result.n_unbounded:
        left_out = f"{result.n_unbounded} of {result.n} inside up to the cap"
        label = left_out if label is None else f"{label} ({left_out})"
    edges = np.histogram_bin_edges(log_radii, bins)
    counts, _ = np.histogram(log_radii, edges)
    density = counts / (np.diff(edges) * max(counts.sum(), 1))
    ax.hist(np.exp(edges[:-1]), np.exp(edges), weights=density, label=label, **options)
    _log_axis(ax)
    gaussian = isinstance(result.measure, Gaussian)
    coordinates = "multiples of std" if gaussian else "metric coordinates"
    ax.set_xlabel(f"radius of a direction, {coordinates}")
    ax.set_ylabel("density of the log radius")
    if label is not None:
        ax.legend(frameon=False)
    return ax


def _log_axis(ax: Axes) -> None:
    """A log axis whose labels read 0.5, 1, 2; radii seldom span more than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.set_xscale("log")
    low, high = ax.get_xlim()
    if high < 1e3 * low:
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())


def _explain(ax: Axes, *marks: str) -> None:
    """Draws the legend: the labelled lines, then what the marks mean."""
    present = ax.get_legend_handles_labels()[1]
    for name in marks:
        if name not in present:
            ax.plot([], [], color="0.35", label=name, **_MARKS[name])
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] in _MARKS)
    if order:
        ax.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise FastvolError("plots need matplotlib: pip install 'fastvol[plot]'") from error
    return pyplot.subplots()[1]
