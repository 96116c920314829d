"""Does more data shrink every minimum, and at which amount do the small-data ones vanish?

Every minimum is measured in nested landscapes of growing data, those of its own training set and
beyond it, up to the size at which its own loss passes the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base import figures
from ..base.cache import Outcome
from ..base.figures import several
from ..base.laboratory import Laboratory, Probe, Run
from ..base.protocols import MNIST_SIZES, SMOKE, Family, grid, mnist_mlp
from ..base.statistics import mean_of, over_seeds
from ..base.sweep import Tick, Unit
from ..base.training import running_losses
from ..base.volumes import Measurement, common_radius, describe, filled, versus

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """What is trained and measured.

    Args:
        family: networks.
        landscapes: sizes.
        how: the measurement.
    """

    family: Family
    landscapes: tuple[int, ...]
    how: Measurement


_LANDSCAPES = (60, 80, 120, 200, 400, 600, 1000, 2000, 6000, 20000, 60000)

SETTINGS = {
    "smoke": Settings(SMOKE, (60, 80, 120, 240, 960), Measurement(300)),
    "small": Settings(
        mnist_mlp(grid(MNIST_SIZES, seeds=2, fewer={20000: 1, 60000: 1})),
        (60, 80, 120, 240, 600, 2000, 6000),
        Measurement(300),
    ),
    "paper": Settings(mnist_mlp(grid(MNIST_SIZES, seeds=10)), _LANDSCAPES, Measurement(10_000)),
}


def run(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """Trains, finds where each minimum vanishes, and measures it up to there."""
    family = settings.family
    runs = family.train(laboratory)
    cells = list(runs)
    ends = laboratory.sweep(
        [_vanishing(laboratory, settings, runs[cell]) for cell in cells], "where they vanish"
    )
    vanishes = {cell: outcome.facts["vanishes"] for cell, outcome in zip(cells, ends, strict=True)}
    probes = {
        (*cell, size): Probe(run, run.training.sample.landscape(size), settings.how)
        for cell, run in runs.items()
        for size in settings.landscapes
        if vanishes[cell] is None or size < vanishes[cell]
    }
    basins = dict(zip(probes, laboratory.measure(list(probes.values())), strict=True))
    radius = common_radius([basin.volume for basin in basins.values()])
    rows = [
        {
            "size": size,
            "seed": seed,
            "landscape": landscape,
            "loss": basin.loss,
            "published": describe(basin.volume),
            "filled": None if radius is None else filled(basin.volume, radius),
        }
        for (size, seed, landscape), basin in basins.items()
    ]
    minima = []
    for cell in cells:
        mine = [basin.volume for place, basin in basins.items() if place[:2] == cell]
        entry = {"size": cell[0], "seed": cell[1], "vanishes": vanishes[cell], **runs[cell].end}
        if len(mine) > 1 and mine[0] is not None and mine[-1] is not None:
            entry["first_over_last"] = versus(mine[0], mine[-1])
        minima.append(entry)
    return {
        "title": family.title,
        "threshold": settings.how.threshold,
        "radius": radius,
        "minima": minima,
        "rows": rows,
    }


def _vanishing(laboratory: Laboratory, settings: Settings, run: Run) -> Unit:
    """The least landscape, beyond the base, in which the minimum's own loss is too high."""
    training, threshold = run.training, settings.how.threshold
    pool = laboratory.pool(training.pool)
    largest = training.sample.landscape(max(settings.landscapes))

    def work(tick: Tick) -> Outcome:
        losses = running_losses(
            laboratory.model(run), pool, *laboratory.examples(largest, training.pool)
        )
        above = (losses[training.sample.base - 1 :] >= threshold).nonzero()
        first = int(above[0]) + training.sample.base if len(above) else None
        return Outcome({"vanishes": first, "loss_at_the_largest": float(losses[-1])})

    config = {
        "model": laboratory.config(training),
        "landscape": largest.describe(pool),
        "threshold": threshold,
    }
    return Unit("vanishing", config, 1.0, work)


def title(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    shrinkage = [m["first_over_last"] for m in found["minima"] if "first_over_last" in m]
    known = [entry for entry in shrinkage if entry["reliable"]]
    smaller = sum(entry["probability"] > 0.95 for entry in known)
    larger = sum(entry["probability"] < 0.05 for entry in known)
    smallest = min(entry["size"] for entry in found["minima"])
    ends = [entry["vanishes"] for entry in found["minima"] if entry["size"] == smallest]
    gone = mean_of(ends)
    first = (
        f"Of {several(len(shrinkage), 'minimum', 'minima')} {smaller} shrink from the smallest "
        f"landscape to the largest they survive, {larger} grow (probability over 0.95)"
    )
    if math.isnan(gone):
        return f"{first}; those from {smallest} images do not vanish ({found['title']})"
    return (
        f"{first}; those from {smallest} images vanish at {gone:.0f} images "
        f"(mean of {several(len(ends), 'seed')}, {found['title']})"
    )


def draw(found: Mapping[str, Any]) -> Figure:
    """φ(R) and the published quantity of every minimum against the landscape's size."""
    figure, axes = figures.panels(2, title(found), width=4.8)
    shown: dict[str, list[Mapping[str, Any]]] = {"filled": [], "published": []}
    sizes = sorted({entry["size"] for entry in found["minima"]})
    for index, size in enumerate(sizes):
        for ax, key in zip(axes[0], shown, strict=True):
            mine = [row for row in found["rows"] if row["size"] == size and row[key]]
            landscapes = sorted({row["landscape"] for row in mine})
            means = [
                over_seeds([row[key] for row in mine if row["landscape"] == landscape])
                for landscape in landscapes
            ]
            figures.series(ax, landscapes, means, index, f"{size} images")
            shown[key] += means
            for entry in found["minima"]:
                if entry["size"] == size and entry["vanishes"]:
                    ax.axvline(
                        entry["vanishes"],
                        ymax=0.06,
                        color=figures.COLORS[index % len(figures.COLORS)],
                        linewidth=2.5,
                    )
    for ax in axes[0]:
        figures.log_axis(ax)
        ax.set_xlabel("images of the landscape (tick: the minimum vanishes)")
    marks = [*shown["filled"], *shown["published"]]
    figures.explain_below(figure, axes[0], entries=marks, title="trained on")
    radius = found["radius"]
    axes[0][0].set_ylabel(
        "φ(R), nats" if radius is None else f"log filled fraction φ(R = {radius:.3g}), nats"
    )
    axes[0][1].set_ylabel("log mean r^d, nats")
    return figure
