"""Are minima that fit wrong labels smaller, though they fit the clean data as well?

Networks are trained on the same clean base with more and more additional examples whose label is
wrong, and every minimum is measured in the landscape of the clean base alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..base import figures
from ..base.laboratory import Laboratory, Probe, Training
from ..base.networks import Net
from ..base.protocols import MNIST_MLP, SPIRALS_MLP
from ..base.samples import Sample
from ..base.statistics import mean_of, over_seeds
from ..base.training import Recipe
from ..base.volumes import Measurement, common_radius, describe, filled, versus

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Case:
    """One data set.

    Args:
        pool: its name.
        title: as people write it.
        net, recipe: what is trained on it, and how.
        base: clean examples.
        poison: numbers of wrongly labelled ones.
    """

    pool: str
    title: str
    net: Net
    recipe: Recipe
    base: int
    poison: tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """Args:
    cases: data sets.
    seeds: of model and data; seed k draws the data with 10 + k.
    how: the measurement.
    """

    cases: tuple[Case, ...]
    seeds: tuple[int, ...]
    how: Measurement


_DIGITS_NET = Net("mlp", (64, 32))

_SPIRALS = Case("spirals", "spirals", SPIRALS_MLP, Recipe(3000, rate=2e-3), 200, (0, 5, 10, 20, 40))
_DIGITS = Case("digits", "digits", _DIGITS_NET, Recipe(1000, rate=3e-3), 600, (0, 30, 60, 150, 300))

SETTINGS = {
    "smoke": Settings(
        cases=(
            Case("spirals", "spirals", SPIRALS_MLP, Recipe(800, rate=5e-3), 60, (0, 10)),
            Case("digits", "digits", _DIGITS_NET, Recipe(400, rate=5e-3), 200, (0, 25, 50)),
        ),
        seeds=(0,),
        how=Measurement(300),
    ),
    "small": Settings(
        cases=(
            _SPIRALS,
            _DIGITS,
            Case("mnist", "MNIST", MNIST_MLP, Recipe(500), 1000, (0, 17, 83, 167, 333)),
        ),
        seeds=(0, 1, 2),
        how=Measurement(400),
    ),
    "paper": Settings(
        cases=(
            _SPIRALS,
            _DIGITS,
            Case("mnist", "MNIST", MNIST_MLP, Recipe(500), 6000, (0, 100, 500, 1000, 2000)),
        ),
        seeds=tuple(range(10)),
        how=Measurement(10_000),
    ),
}


def run(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """Trains, measures, and compares."""
    return {"cases": [_case(laboratory, settings, case) for case in settings.cases]}


def _case(laboratory: Laboratory, settings: Settings, case: Case) -> dict[str, Any]:
    grid = [(poison, seed) for poison in case.poison for seed in settings.seeds]
    runs = laboratory.train(
        [
            Training(
                replace(case.net, seed=seed),
                case.recipe,
                Sample(10 + seed, case.base, poison=poison),
                case.pool,
            )
            for poison, seed in grid
        ],
        f"{case.title}: training",
    )
    basins = laboratory.measure(
        [Probe(run, run.training.sample.landscape(case.base), settings.how) for run in runs],
        f"{case.title}: measuring",
    )
    radius = common_radius([basin.volume for basin in basins])
    by_cell = dict(zip(grid, basins, strict=True))
    rows = []
    for (poison, seed), basin in by_cell.items():
        clean = by_cell[case.poison[0], seed].volume
        row = {
            "poison": poison,
            "seed": seed,
            **basin.run.end,
            "clean_loss": basin.loss,
            "published": describe(basin.volume),
            "filled": None if radius is None else filled(basin.volume, radius),
        }
        if poison and clean is not None and basin.volume is not None:
            row["clean_over_poisoned"] = versus(clean, basin.volume)
        rows.append(row)
    return {"title": case.title, "base": case.base, "radius": radius, "rows": rows}


def title(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    parts, sure, pairs = [], 0, 0
    for case in found["cases"]:
        most = max(row["poison"] for row in case["rows"])
        ratios = [
            row["clean_over_poisoned"]
            for row in case["rows"]
            if row["poison"] == most and "clean_over_poisoned" in row
        ]
        known = [ratio for ratio in ratios if ratio["reliable"]]
        gap = mean_of([ratio["value"] for ratio in known])
        sure += sum(ratio["probability"] > 0.95 for ratio in known)
        pairs += len(ratios)
        if known:
            parts.append(f"{case['title']} {gap:+.1f} nats")
    if not parts:
        return "Clean and poisoned minima cannot be told apart at a radius reliable in both"
    return (
        f"The clean minimum is the larger with over 95 % probability in {sure} of {pairs} pairs "
        f"(most poison, at a radius reliable in both: {', '.join(parts)})"
    )


def draw(found: Mapping[str, Any]) -> Figure:
    """φ(R), the published quantity and test accuracy against the amount of poison."""
    cases = found["cases"]
    figure, axes = figures.panels(3, title(found), width=3.7)
    filled_ax, published_ax, accuracy_ax = axes[0]
    shown: list[Mapping[str, Any]] = []
    published: list[Mapping[str, Any]] = []
    for index, case in enumerate(cases):
        amounts = sorted({row["poison"] for row in case["rows"]})
        groups = [[row for row in case["rows"] if row["poison"] == amount] for amount in amounts]
        x = [100 * amount / case["base"] for amount in amounts]
        label = f"{case['title']}, {case['base']} clean"
        if case["radius"] is not None:
            label = f"{label}, R = {case['radius']:.3g}"
            means = [over_seeds([row["filled"] for row in group]) for group in groups]
            figures.series(filled_ax, x, means, index, label)
            shown += means
        per_parameter = [
            _per_parameter(over_seeds([row["published"] for row in group]), group)
            for group in groups
        ]
        figures.series(published_ax, x, per_parameter, index, label)
        published += per_parameter
        figures.plain(
            accuracy_ax,
            x,
            [100 * mean_of([row["test_accuracy"] for row in group]) for group in groups],
            index,
            label,
        )
    for ax in axes[0]:
        ax.set_xlabel("wrong labels, % of the clean base")
    filled_ax.set_ylabel("log filled fraction φ(R), nats")
    published_ax.set_ylabel("log mean r^d / d, nats")
    accuracy_ax.set_ylabel("test accuracy, %")
    figures.explain_below(figure, axes[0], entries=[*shown, *published])
    return figure


def _per_parameter(entry: dict[str, Any], group: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The published quantity over d: networks of different sizes share an axis."""
    if entry["vanished"]:
        return entry
    dim = next(row["published"]["dim"] for row in group if not row["published"]["vanished"])
    return {**entry, "value": entry["value"] / dim, "stderr": entry["stderr"] / dim}
