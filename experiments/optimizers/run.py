"""Do sharpness-aware training, the batch size, or imbalanced classes change the minimum's size?

Three groups of trainings. Within a group all minima are measured in one landscape, along the same
directions, and compared with the group's first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..base import figures
from ..base.laboratory import Laboratory, Probe, Training
from ..base.networks import Net
from ..base.protocols import DIGITS_MLP, MNIST_MLP
from ..base.samples import Sample
from ..base.statistics import mean_of, over_seeds
from ..base.training import Recipe
from ..base.volumes import Measurement, common_radius, describe, filled, versus

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Arm:
    """One training, but for its seed.

    Args:
        series: the line it belongs to.
        x: its place along the group's axis.
        recipe: how it is trained.
        base, additional, imbalance: on what.
    """

    series: str
    x: float
    recipe: Recipe
    base: int
    additional: int = 0
    imbalance: float = 0.0


@dataclass(frozen=True)
class Group:
    """Trainings that are compared; the first is what the others are compared with.

    Args:
        title, axis: as people write them.
        arms: the trainings; the landscape is that of their common base.
        how: the measurement.
    """

    title: str
    axis: str
    arms: tuple[Arm, ...]
    how: Measurement


@dataclass(frozen=True)
class Settings:
    """Args:
    net: what is trained.
    groups: sharpness-aware training, batch size, imbalance.
    seeds: of model and data.
    """

    net: Net
    groups: tuple[Group, ...]
    seeds: tuple[int, ...]


def _groups(
    recipe: Recipe,
    base: int,
    sizes: tuple[int, ...],
    batches: tuple[int | None, ...],
    batched: int,
    uneven: int,
    more: tuple[int, ...],
    n: int,
) -> tuple[Group, ...]:
    sam = tuple(
        Arm(name, size, replace(recipe, sam=rho), base, size - base)
        for name, rho in (("AdamW", 0.0), ("SAM, ρ = 0.05", 0.05))
        for size in sizes
    )
    whole = tuple(
        Arm("AdamW", batch or batched, replace(recipe, batch=batch), batched) for batch in batches
    )
    imbalance = tuple(
        Arm(
            f"{share:.0%} of the base from two classes",
            uneven + count,
            recipe,
            uneven,
            count,
            share,
        )
        for share in (0.9,)
        for count in more
    ) + tuple(Arm("classes as they come", uneven + count, recipe, uneven, count) for count in more)
    how = Measurement(n)
    return (
        Group("sharpness-aware training", "images trained on", sam, how),
        Group("batch size", "images of a batch", whole, replace(how, threshold=0.01)),
        Group("class imbalance", "images trained on", imbalance, how),
    )


SETTINGS = {
    "smoke": Settings(
        DIGITS_MLP,
        _groups(Recipe(100, rate=1e-2), 60, (60, 180), (None, 50), 120, 100, (0, 100), 150),
        (1,),
    ),
    "small": Settings(
        MNIST_MLP,
        _groups(
            Recipe(500),
            60,
            (60, 600, 2000),
            (None, 400, 100),
            1200,
            600,
            (0, 1400),
            300,
        ),
        (1, 2),
    ),
    "paper": Settings(
        MNIST_MLP,
        _groups(
            Recipe(500),
            60,
            (60, 600, 2000, 6000, 20000, 60000),
            (None, 3000, 1000, 300, 100),
            6000,
            600,
            (0, 1400, 5400, 19400),
            5000,
        ),
        tuple(range(1, 6)),
    ),
}


def run(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """Trains, measures and compares, group by group."""
    return {
        "groups": [_group(laboratory, settings, group) for group in settings.groups],
    }


def _group(laboratory: Laboratory, settings: Settings, group: Group) -> dict[str, Any]:
    cells = [(arm, seed) for arm in group.arms for seed in settings.seeds]
    runs = laboratory.train(
        [
            Training(
                replace(settings.net, seed=seed),
                arm.recipe,
                Sample(10 + seed, arm.base, arm.additional, imbalance=arm.imbalance),
                "mnist",
            )
            for arm, seed in cells
        ],
        f"{group.title}: training",
    )
    basins = laboratory.measure(
        [
            Probe(run, run.training.sample.landscape(arm.base), group.how)
            for run, (arm, _) in zip(runs, cells, strict=True)
        ],
        f"{group.title}: measuring",
    )
    radius = common_radius([basin.volume for basin in basins])
    first = {
        seed: basin.volume
        for (arm, seed), basin in zip(cells, basins, strict=True)
        if arm is group.arms[0]
    }
    rows = []
    for (arm, seed), basin in zip(cells, basins, strict=True):
        row = {
            "series": arm.series,
            "x": arm.x,
            "seed": seed,
            **basin.run.end,
            "loss": basin.loss,
            "published": describe(basin.volume),
            "filled": None if radius is None else filled(basin.volume, radius),
        }
        other = first[seed]
        # Landscapes of unlike bases are unlike questions.
        alike = arm.imbalance == group.arms[0].imbalance
        if arm is not group.arms[0] and alike and basin.volume is not None and other is not None:
            row["over_first"] = versus(basin.volume, other)
        rows.append(row)
    return {
        "title": group.title,
        "axis": group.axis,
        "threshold": group.how.threshold,
        "radius": radius,
        "rows": rows,
    }


def title(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    sam, batch, imbalance = found["groups"]
    parts = [
        f"SAM changes φ(R) by {_nats(_gap(sam, 'SAM, ρ = 0.05', 'AdamW'))} at equal data",
        f"the smallest batch by {_nats(_ends(batch))} against the largest",
    ]
    uneven = imbalance["rows"][0]["series"]
    parts.append(
        f"balanced data added to an imbalanced base by {_nats(_growth(imbalance, uneven))}"
    )
    return ", ".join(parts)


def _nats(change: float) -> str:
    return "an unknown amount" if math.isnan(change) else f"{change:+.2f} nats"


def _value(group: Mapping[str, Any], series: str, x: float) -> float:
    values = [
        row["filled"]["value"]
        for row in group["rows"]
        if row["series"] == series
        and row["x"] == x
        and row["filled"] is not None
        and not row["filled"]["vanished"]
    ]
    return mean_of(values)


def _places(group: Mapping[str, Any]) -> list[float]:
    return sorted({row["x"] for row in group["rows"]})


def _gap(group: Mapping[str, Any], a: str, b: str) -> float:
    return mean_of([_value(group, a, x) - _value(group, b, x) for x in _places(group)])


def _ends(group: Mapping[str, Any]) -> float:
    places, series = _places(group), group["rows"][0]["series"]
    return _value(group, series, places[0]) - _value(group, series, places[-1])


def _growth(group: Mapping[str, Any], series: str) -> float:
    places = _places(group)
    return _value(group, series, places[-1]) - _value(group, series, places[0])


def draw(found: Mapping[str, Any]) -> Figure:
    """φ(R) above, test accuracy below, a column for each group."""
    groups = found["groups"]
    figure, axes = figures.panels(len(groups), title(found), rows=2, width=3.9)
    for column, group in enumerate(groups):
        above, below = axes[0][column], axes[1][column]
        shown: list[Mapping[str, Any]] = []
        names = list(dict.fromkeys(row["series"] for row in group["rows"]))
        for index, name in enumerate(names):
            mine = [row for row in group["rows"] if row["series"] == name]
            places = sorted({row["x"] for row in mine})
            cells = [[row for row in mine if row["x"] == x] for x in places]
            accuracy = [100 * mean_of([row["test_accuracy"] for row in cell]) for cell in cells]
            figures.plain(below, places, accuracy, index, name)
            if group["radius"] is not None:
                means = [over_seeds([row["filled"] for row in cell]) for cell in cells]
                figures.series(above, places, means, index, name)
                shown += means
        for ax in (above, below):
            figures.log_axis(ax)
            ax.set_xlabel(group["axis"])
        above.set_title(group["title"])
        reach = group["radius"]
        above.set_ylabel("φ(R), nats" if reach is None else f"φ(R = {reach:.3g}), nats")
        below.set_ylabel("test accuracy, %")
        figures.explain(above, *shown)
        below.legend()
    return figure
