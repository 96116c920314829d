"""Draws the speeds on the CPU from their records: ``python -m benchmarks.cpu_figure``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from .record import RESULTS

RECORDS = ("cpu_table", "cpu_scaling")
# Okabe and Ito's colours: told apart by every eye; the hatching tells them apart in grey.
PEERS = {
    "bisection": ("#0072B2", "", "bisection by functional_call"),
    "sweep": ("#E69F00", "//", "sweep of 100 points"),
}
_OURS, _FLOOR = "#0072B2", "#D55E00"


def redraw(folder: Path = RESULTS) -> Path:
    """The figure of the records in ``folder``, beside them.

    Raises:
        FileNotFoundError: there is none.
    """
    records = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in RECORDS
        if (folder / f"{name}.json").is_file()
    }
    if not records:
        raise FileNotFoundError(f"none of {', '.join(RECORDS)} is in {folder.name}/")
    path = folder / "cpu_speed.png"
    draw(records, path)
    return path


def draw(records: Mapping[str, Any], target: Path | IO[bytes]) -> None:
    """Ratios of the works as bars, and below them the scaling in log-log.

    Raises:
        ImportError: there is no matplotlib.
    """
    # Not pyplot: a figure in a file needs no display and no global state.
    from matplotlib.figure import Figure

    works = records.get("cpu_table", {}).get("works", {})
    scaling = {
        name: records["cpu_scaling"][name]
        for name in ("images", "width", "directions")
        if name in records.get("cpu_scaling", {})
    }
    heights = [0.62 * len(works) + 1.4] * bool(works) + [3.9] * bool(scaling)
    if not heights:
        raise ValueError("there is nothing to draw: no record has a work or a scaling")
    figure = Figure(figsize=(11.0, sum(heights)), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if works:
        _bars(parts.pop(0), works)
    if scaling:
        _curves(parts.pop(0), scaling)
    figure.savefig(target, dpi=150, format="png")


def _bars(part: Any, works: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ax = part.subplots()
    ax.set_xscale("log")
    rows = list(works.values())
    for place, row in enumerate(rows):
        for offset, (peer, (color, hatch, _)) in zip((-0.2, 0.2), PEERS.items(), strict=True):
            y = place + offset
            ratio, own = row["rtol_1e-3"]["ratios"][peer], row["default"]["ratios"][peer]
            # A bar starts at 1, where nobody is ahead.
            ax.barh(
                y, ratio - 1, 0.36, left=1, color=color, alpha=0.75, hatch=hatch, edgecolor="white"
            )
            ax.plot(own, y, marker="o", color="white", markeredgecolor="black", markersize=5)
            ax.plot([row["goals"][peer]] * 2, [y - 0.2, y + 0.2], color="black", linewidth=2)
    # Room for a goal of 1.
    ax.set_xlim(left=min(0.9, ax.get_xlim()[0]))
    ax.axvline(1.0, color="0.5", linewidth=0.8)
    ax.set(xlabel="time of the peer / time of fastvol, a direction at rtol 1e-3")
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    handles: list[Any] = [
        Patch(facecolor=color, alpha=0.75, hatch=hatch, edgecolor="white", label=label)
        for color, hatch, label in PEERS.values()
    ]
    handles.append(Line2D([], [], color="black", linewidth=2, label="goal", marker="", ls="none"))
    handles[-1].set(marker="|", markersize=12, markeredgewidth=2)
    handles.append(
        Line2D(
            [],
            [],
            color="white",
            markeredgecolor="black",
            marker="o",
            linestyle="none",
            label="at the default tolerance",
        )
    )
    part.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    part.suptitle(_ratio_title(rows))


def _ratio_title(rows: list[Any]) -> str:
    def span(peer: str) -> str:
        ratios = [row["rtol_1e-3"]["ratios"][peer] for row in rows]
        low, high = f"{min(ratios):.2g}", f"{max(ratios):.2g}"
        return low if low == high else f"{low} to {high}"

    met = sum(
        row["rtol_1e-3"]["ratios"][peer] >= row["goals"][peer] for row in rows for peer in PEERS
    )
    return (
        f"A direction is {span('bisection')} times as fast as by bisection, {span('sweep')} times "
        f"as fast as by a sweep; {met} of {len(PEERS) * len(rows)} goals are met"
    )


def _curves(part: Any, scaling: Mapping[str, Any]) -> None:
    from matplotlib.ticker import NullFormatter

    axes = part.subplots(1, len(scaling), squeeze=False)[0]
    for ax, (name, found) in zip(axes, scaling.items(), strict=True):
        points, power = found["points"], found["exponent"]
        if name == "directions":
            longest = found["longest"]
            title = f"{longest['n']:,} directions: {longest['seconds']:.3g} s, ∝ n^{power:.2f}"
            ax.plot(*_xy(points, "n", "seconds"), color=_OURS, marker="o", label="whole call")
            ax.set(xlabel=f"directions n, {found['network']} MLP", ylabel="seconds")
        else:
            title = f"Time of a direction ∝ {name}^{power:.2f}"
            ax.plot(
                *_xy(points, name, "ms_per_direction"), color=_OURS, marker="o", label="fastvol"
            )
            ax.plot(
                *_xy(points, name, "ms_of_floor"),
                color=_FLOOR,
                marker="^",
                linestyle="--",
                label="one pass of matrix work",
            )
            ax.set(xlabel=f"{name}, {found['network']} MLP", ylabel="ms a direction")
        ax.set(xscale="log", yscale="log", title=title)
        ax.title.set_fontsize("medium")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(color="0.9", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize="small")


def _xy(points: list[Any], x: str, y: str) -> tuple[list[float], list[float]]:
    return [point[x] for point in points], [point[y] for point in points]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_figure", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args()
    print(redraw(options.results).name)


if __name__ == "__main__":
    main()
