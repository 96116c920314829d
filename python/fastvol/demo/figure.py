"""The demo's outcome as a picture."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path

import numpy as np

from ..errors import FastvolError
from ..plotting import plot_profile, plot_radii
from .twins import Demo, Twin
from .words import title

# Okabe and Ito's blue and vermilion: told apart by every eye, and in grey.
_BLUE, _VERMILION = "#0072B2", "#D55E00"


def check_figure(path: str | PathLike[str]) -> None:
    """Makes sure, before the work, that :func:`draw` will know how to write the file.

    Raises:
        FastvolError: matplotlib is not installed.
        ValueError: the file's suffix is not one of a picture.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise FastvolError(
            "the demo's figure needs matplotlib: pip install 'fastvol[demo]'"
        ) from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower().lstrip(".") not in kinds:
        raise ValueError(f"--output: {path} must end in one of {', '.join(sorted(kinds))}")


def draw(demo: Demo, path: str | PathLike[str]) -> None:
    """The figure: both profiles, and how the radii are distributed.

    Args:
        demo: what :func:`run` returned.
        path: where it goes; the suffix says what kind of picture it is.

    Raises:
        FastvolError: matplotlib is not installed. ValueError: see :func:`check_figure`.
    """
    check_figure(path)
    # Not pyplot: a figure in a file needs no display and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    twins = ((demo.clean, _BLUE), (demo.poisoned, _VERMILION))
    # Both curves start where both balls are still full.
    low = 0.9 * math.exp(min(float(twin.estimate.log_radii.min()) for twin, _ in twins))
    for twin, color in twins:
        result = twin.estimate
        caps = np.geomspace(low, math.exp(float(result.log_radii.max())), 200)
        plot_profile(result, left, radii=caps, label=_label(twin), color=color, linewidth=2)
        plot_radii(result, right, label=_label(twin), color=color)
    radius = demo.radius
    if radius is not None:
        for ax in (left, right):
            ax.axvline(
                radius,
                color="0.35",
                linewidth=1,
                linestyle=":",
                zorder=0,
                label=f"compared at R = {radius:#.3g}",
            )
    left.set_title("how full a ball of radius R is")
    right.set_title("where the rays leave the basin")
    handles, labels = left.get_legend_handles_labels()
    # The networks, then what the marks mean.
    names = [_label(twin) for twin, _ in twins]
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in names)
    for ax in (left, right):
        ax.get_legend().remove()
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.suptitle(title(demo), fontsize=12)
    figure.savefig(path, dpi=150)


def _label(twin: Twin) -> str:
    lies = f"{twin.wrong_labels} wrong labels" if twin.wrong_labels else "true labels only"
    return f"{lies}: test accuracy {twin.test_accuracy:.0%}"
