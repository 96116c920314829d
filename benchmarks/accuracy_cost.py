"""Accuracy against cost of every method: ``python -m benchmarks.accuracy_cost [--short]``.

Three bodies of known volume; the error in nats against L + 3G, a gradient counting as three
losses. Filled marks are runs that called themselves reliable.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .proofs import bodies
from .proofs.runs import each, seeded
from .record import RESULTS, record

GRADIENT_COST = 3
# Okabe and Ito's colours: told apart by every eye; the marks tell them apart in grey.
STYLES = {
    "radial": ("#000000", "o"),
    "preconditioned": ("#0072B2", "s"),
    "annealed": ("#D55E00", "^"),
    "splitting": ("#009E73", "D"),
}
TITLE = "Error against cost on bodies of known volume: filled where the run calls itself reliable"
# An exact answer has no place on a logarithmic axis.
LEAST_SHOWN = 1e-3


@dataclass(frozen=True)
class Case:
    """One curve's point: a body, a method, n."""

    body: str
    method: str
    n: float


def made(short: bool) -> dict[str, Callable[[], bodies.Body]]:
    """The bodies by the name of their panel."""
    d, wide = (20, 40) if short else (100, 200)
    axes = bodies.geometric(d, 1.0, 10.0 if short else 100.0)
    return {
        f"rotated ellipsoid, condition 1e4, d = {d}": lambda: bodies.rotated_ellipsoid(d, 1e4),
        f"singular minimum, d = {wide}": lambda: bodies.singular(wide),
        f"rotated l4 ball, axes 1–{axes[-1]:g}, d = {d}": lambda: bodies.lp_ball(
            d, 4.0, axes, rotation_seed=0
        ),
    }


def cases(short: bool) -> list[Case]:
    """Every method on every body."""
    sizes = (300, 3_000) if short else (100, 300, 1_000, 3_000, 10_000)
    return [Case(body, method, n) for n in sizes[::-1] for body in made(short) for method in STYLES]


def _case(index: int, short: bool) -> dict[str, Any]:
    case = cases(short)[index]
    body = made(short)[case.body]()
    row = seeded(
        f"{case.body}, {case.method}, n = {case.n:g}",
        body.model(),
        body.log_volume,
        range(1 if short else 3),
        method=case.method,
        n=case.n,
        threshold=1.0,
    )
    return row | {"panel": case.body, "cost": row["n_loss"] + GRADIENT_COST * row["n_grad"]}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a body, |error| against cost, both logarithmic."""
    # Not pyplot: a figure in a file needs no display and no global state.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter

    panels = list(dict.fromkeys(row["panel"] for row in rows))
    figure = Figure(figsize=(4.4 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for ax, panel in zip(axes, panels, strict=True):
        for method, (color, marker) in STYLES.items():
            chosen = [row for row in rows if row["panel"] == panel and row["method"] == method]
            chosen.sort(key=lambda row: row["cost"])
            typical = [np.median(np.abs(row["errors"])) for row in chosen]
            ax.plot(
                [row["cost"] for row in chosen],
                np.maximum(typical, LEAST_SHOWN),
                color=color,
                linewidth=1.5,
            )
            for row in chosen:
                for error, reliable in zip(row["errors"], row["reliable"], strict=True):
                    ax.plot(
                        row["cost"],
                        max(abs(error), LEAST_SHOWN),
                        marker=marker,
                        markersize=6,
                        color=color,
                        markerfacecolor=color if reliable else "white",
                        linestyle="none",
                    )
        ax.set(xscale="log", yscale="log", title=panel, xlabel="losses + 3 × gradients")
        ax.title.set_fontsize("medium")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(color="0.9", linewidth=0.6)
        ax.axhline(1.0, color="0.5", linewidth=0.8, linestyle=":")
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"|error| of log volume, nats (at least {LEAST_SHOWN:g})")
    handles = [
        Line2D([], [], color=color, marker=marker, label=method)
        for method, (color, marker) in STYLES.items()
    ]
    hollow = {"color": "0.4", "marker": "o", "linestyle": "none"}
    handles.append(Line2D([], [], **hollow, label="called reliable"))
    handles.append(Line2D([], [], **hollow, markerfacecolor="white", label="a lower bound only"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(TITLE)
    figure.savefig(path, dpi=150)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy_cost", description=__doc__)
    parser.add_argument("--short", action="store_true", help="smaller bodies, in a minute")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    rows = each(_case, len(cases(options.short)), options.short)
    payload = {"short": options.short, "gradient_cost": GRADIENT_COST, "cases": rows}
    path = record("accuracy_cost", payload, folder=options.results)
    draw(rows, path.with_suffix(".png"))
    print(path.name)


if __name__ == "__main__":
    main()
