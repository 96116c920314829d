"""One style for all figures: legible in print, and to those who see no red or green.

A number that passed fastvol's gate is a filled mark with its error bar; one that did not is an open
mark with an arrow upward: a lower bound.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ExperimentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours in an order that also falls in grey, and a mark for each.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "legend.title_fontsize": 8.0,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "pdf.fonttype": 42,
    "savefig.dpi": 160,
}
_CHARACTERS_AN_INCH = 11.0
_SOURCE = "fastvol results sha256"


def check() -> None:
    """Makes sure, before the work, that figures can be drawn.

    Raises:
        ExperimentError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ExperimentError(
            f"figures need matplotlib ({error}): pip install 'fastvol[experiments]'"
        ) from error


def panels(columns: int, title: str, *, rows: int = 1, width: float = 4.3) -> tuple[Figure, Any]:
    """A figure with its finding above, and its Axes as an array ``[rows, columns]``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 3.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    finding = textwrap.wrap(title, round(_CHARACTERS_AN_INCH * columns * width))
    figure.suptitle("\n".join(finding), fontsize=10.5)
    return figure, axes


def log_axis(ax: Axes) -> None:
    """A logarithmic x-axis whose labels read 50, 100, 200."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.set_xscale("log")
    low, high = ax.get_xlim()
    decades = math.log10(high / low)
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0)
    if decades < 3.3:
        ax.xaxis.set_major_locator(LogLocator(subs=subs if decades < 2.2 else (1.0, 3.0)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def series(
    ax: Axes,
    x: Sequence[float],
    values: Sequence[Mapping[str, Any]],
    index: int,
    label: str | None = None,
    *,
    line: bool = True,
) -> None:
    """One line of volumes: entries with value, stderr and reliable; vanished ones leave a gap.

    Args:
        ax: where.
        x: of each entry.
        values: as ``volumes.describe`` and ``volumes.filled`` make them; one that is not
            reliable is a lower bound unless its ``bound`` is ``"upper"`` or ``None``.
        index: which colour, mark and line.
        label: for the legend.
        line: whether the marks are joined.
    """
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    shown = [(at, v) for at, v in zip(x, values, strict=True) if number(v.get("value")) is not None]
    if line and shown:
        ax.plot(
            [at for at, _ in shown],
            [v["value"] for _, v in shown],
            color=color,
            linestyle=LINES[index % len(LINES)],
            linewidth=1.0,
            zorder=1,
        )
    for reliable in (True, False):
        chosen = [(at, v) for at, v in shown if bool(v["reliable"]) is reliable]
        if not chosen:
            continue
        places = [at for at, _ in chosen]
        heights = [v["value"] for _, v in chosen]
        if reliable:
            errors = [1.96 * (number(v["stderr"]) or 0.0) for _, v in chosen]
            ax.errorbar(
                places, heights, yerr=errors, fmt=marker, color=color, capsize=2.5, zorder=2
            )
        else:
            ax.plot(places, heights, marker, color=color, markerfacecolor="white", zorder=2)
            for at, v in chosen:
                if v.get("bound", "lower") is None:
                    continue
                ax.annotate(
                    "",
                    xy=(at, v["value"]),
                    xytext=(0, -13 if v.get("bound", "lower") == "upper" else 13),
                    textcoords="offset points",
                    arrowprops={"arrowstyle": "<-", "color": color, "linewidth": 0.9},
                )
    if label is not None:
        ax.plot(
            [], [], color=color, marker=marker, linestyle=LINES[index % len(LINES)], label=label
        )


def plain(
    ax: Axes, x: Sequence[float], y: Sequence[float], index: int, label: str | None = None
) -> None:
    """A line of numbers that carry no error of their own."""
    ax.plot(
        x,
        y,
        color=COLORS[index % len(COLORS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=LINES[index % len(LINES)],
        label=label,
    )


def explain(ax: Axes, *entries: Mapping[str, Any], **options: Any) -> None:
    """The legend: the lines, then what a filled and an open mark mean, as far as they occur."""
    _explain_marks(ax, entries)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**options)


def explain_below(
    figure: Figure, axes: Sequence[Axes], *, entries: Iterable[Mapping[str, Any]], **options: Any
) -> None:
    """As :func:`explain`, one legend under panels that are filled to the rim.

    Args:
        figure: of the panels.
        axes: whose lines and marks it explains; what several of them have stands there once.
        entries: that the panels show.
        options: of the legend.
    """
    _explain_marks(axes[0], entries)
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = min(len(handles), max(2, round(figure.get_figwidth() / 1.9)))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, **options
    )


def _explain_marks(ax: Axes, entries: Iterable[Mapping[str, Any]]) -> None:
    shown = [entry for entry in entries if number(entry.get("value")) is not None]
    doubtful = {entry.get("bound", "lower") for entry in shown if not entry["reliable"]}
    if any(entry["reliable"] for entry in shown):
        ax.plot([], [], "o", color="0.4", label="reliable, with 95 % interval")
    words = {"lower": "↑ lower bound only", "upper": "↓ upper bound only", None: "not reliable"}
    if doubtful:
        label = ", ".join(words[bound] for bound in words if bound in doubtful)
        ax.plot([], [], "o", color="0.4", markerfacecolor="white", label=label)


def several(count: int, one: str, many: str | None = None) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def number(value: Any) -> float | None:
    """A finite number, or ``None``: results hold null for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(value)


@contextmanager
def style() -> Iterator[None]:
    """The one style, while a figure is drawn and saved."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def save(figure: Figure, stem: Path, source: str) -> list[Path]:
    """Writes ``<stem>.png`` and ``<stem>.pdf``, which name the results they are drawn from.

    Args:
        figure: it.
        stem: path without suffix.
        source: SHA-256 of the results' file.
    """
    paths = []
    for suffix, note in (
        (".png", {_SOURCE: source}),
        (".pdf", {"Keywords": f"{_SOURCE} {source}"}),
    ):
        path = stem.with_suffix(suffix)
        figure.savefig(path, metadata=note)
        paths.append(path)
    return paths


def source_of(path: Path) -> str | None:
    """SHA-256 of the results that a PNG was drawn from, as it says itself."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(_SOURCE)
