"""Where does "more data, smaller minimum" fail? Two spirals, and modular addition.

Each minimum is measured in the landscape of its own training set, over many seeds; and one kind of
run is followed along its training, past the epoch at which it generalises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base import figures
from ..base.figures import several
from ..base.laboratory import Laboratory, Probe, Training
from ..base.networks import Net
from ..base.protocols import (
    MODULAR_MLP,
    MODULAR_SIZES,
    SPIRALS_MLP,
    SPIRALS_SIZES,
    Family,
    grid,
)
from ..base.samples import Sample
from ..base.statistics import mean_of, over_seeds
from ..base.training import Recipe
from ..base.volumes import Measurement, common_radius, describe, filled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Case:
    """One task.

    Args:
        family: trained on growing data.
        how: the measurement.
    """

    family: Family
    how: Measurement


@dataclass(frozen=True)
class Grokking:
    """Runs that are followed along their training.

    Args:
        net, recipe: what is trained, and how; the recipe names the epochs that are kept.
        examples: of modular addition.
        seeds: of model and data.
        how: the measurement.
    """

    net: Net
    recipe: Recipe
    examples: int
    seeds: tuple[int, ...]
    how: Measurement


@dataclass(frozen=True)
class Settings:
    """Args:
    cases: tasks.
    grokking: runs along training.
    """

    cases: tuple[Case, ...]
    grokking: Grokking


def _spirals(sizes: tuple[int, ...], seeds: int, n: int, epochs: int = 1000) -> Case:
    family = Family(
        "two spirals", "spirals", SPIRALS_MLP, Recipe(epochs), sizes[0], grid(sizes, seeds)
    )
    return Case(family, Measurement(n))


def _modular(sizes: tuple[int, ...], seeds: int, n: int, epochs: int = 500) -> Case:
    family = Family(
        "modular addition", "modular", MODULAR_MLP, Recipe(epochs), sizes[0], grid(sizes, seeds)
    )
    return Case(family, Measurement(n, threshold=0.005))


_KEPT = (200, 400, 600, 800, 1000, 1500, 2000, 3000, 4000, 5000)

SETTINGS = {
    "smoke": Settings(
        (_spirals((20, 40), 2, 200, 300), _modular((94, 300), 1, 150, 100)),
        Grokking(
            MODULAR_MLP, Recipe(60, keep=(30,)), 400, (1,), Measurement(120, threshold=0.0105)
        ),
    ),
    "small": Settings(
        (_spirals(SPIRALS_SIZES, 10, 300), _modular((94, 940, 1881), 10, 200)),
        Grokking(
            MODULAR_MLP, Recipe(5000, keep=_KEPT), 2822, (1,), Measurement(120, threshold=0.005)
        ),
    ),
    "paper": Settings(
        (_spirals(SPIRALS_SIZES, 20, 10_000), _modular(MODULAR_SIZES, 10, 10_000)),
        Grokking(
            MODULAR_MLP,
            Recipe(5000, keep=_KEPT),
            2822,
            tuple(range(1, 11)),
            Measurement(5000, threshold=0.005),
        ),
    ),
}


def run(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """The two tasks over their seeds, and runs along training."""
    return {
        "cases": [_case(laboratory, case) for case in settings.cases],
        "grokking": _grokking(laboratory, settings.grokking),
    }


def _case(laboratory: Laboratory, case: Case) -> dict[str, Any]:
    from scipy import stats

    family = case.family
    runs = family.train(laboratory)
    basins = dict(
        zip(
            runs,
            laboratory.measure(
                [Probe(run, run.training.sample, case.how) for run in runs.values()],
                f"{family.title}: measuring",
            ),
            strict=True,
        )
    )
    radius = common_radius([basin.volume for basin in basins.values()])
    rows = [
        {
            "size": size,
            "seed": seed,
            **runs[size, seed].end,
            "published": describe(basin.volume),
            "filled": None if radius is None else filled(basin.volume, radius),
        }
        for (size, seed), basin in basins.items()
    ]
    agreement = []
    for seed in sorted({seed for _, seed in runs}):
        entry: dict[str, Any] = {"seed": seed}
        for name in ("published", "filled"):
            mine = [
                row
                for row in rows
                if row["seed"] == seed and row[name] is not None and not row[name]["vanished"]
            ]
            sizes, values = [r["size"] for r in mine], [r[name]["value"] for r in mine]
            enough = len(mine) > 1
            entry[name] = float(stats.kendalltau(sizes, values).statistic) if enough else None
        agreement.append(entry)
    return {"title": family.title, "radius": radius, "rows": rows, "agreement": agreement}


def _grokking(laboratory: Laboratory, settings: Grokking) -> dict[str, Any]:
    runs = laboratory.train(
        [
            Training(_seeded(settings.net, seed), settings.recipe, sample, "modular")
            for seed in settings.seeds
            for sample in (Sample(10 + seed, settings.examples),)
        ],
        "grokking: training",
    )
    probes = [
        Probe(run, run.training.sample, settings.how, epoch) for run in runs for epoch in run.epochs
    ]
    basins = laboratory.measure(probes, "grokking: measuring")
    radius = common_radius([basin.volume for basin in basins])
    rows = []
    for probe, basin in zip(probes, basins, strict=True):
        facts = dict(zip(probe.run.epochs, probe.run.facts, strict=True))[basin.epoch]
        rows.append(
            {
                "epoch": basin.epoch,
                "seed": probe.run.training.net.seed,
                **facts,
                "published": describe(basin.volume),
                "filled": None if radius is None else filled(basin.volume, radius),
            }
        )
    return {"examples": settings.examples, "radius": radius, "rows": rows}


def _seeded(net: Net, seed: int) -> Net:
    from dataclasses import replace

    return replace(net, seed=seed)


def title(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    parts = []
    for case in found["cases"]:
        taus = [entry["published"] for entry in case["agreement"]]
        taus = [tau for tau in taus if tau is not None]
        perfect = sum(tau < -1 + 1e-9 for tau in taus)
        parts.append(
            f"{case['title']}: more data, smaller minimum at every step in {perfect} of "
            f"{several(len(taus), 'seed')} (mean Kendall's τ {mean_of(taus):+.2f})"
        )
    rows = [row for row in found["grokking"]["rows"] if not row["published"]["vanished"]]
    last = max((row["epoch"] for row in found["grokking"]["rows"]), default=0)
    accuracy = mean_of(
        [row["test_accuracy"] for row in found["grokking"]["rows"] if row["epoch"] == last]
    )
    if rows:
        parts.append(f"after {last} epochs of modular addition test accuracy is {accuracy:.0%}")
    return "; ".join(parts)


def draw(found: Mapping[str, Any]) -> Figure:
    """The published quantity and φ(R) against the amount of data, and along training."""
    cases = found["cases"]
    figure, axes = figures.panels(len(cases) + 1, title(found), rows=2, width=3.9)
    for column, case in enumerate(cases):
        _growing(axes[0][column], case, "published", "log mean r^d, nats")
        radius = case["radius"]
        words = "φ(R)" if radius is None else f"φ(R = {radius:.3g}), nats"
        _growing(axes[1][column], case, "filled", words)
        axes[0][column].set_title(case["title"])
    grokking = found["grokking"]
    above, below = axes[0][-1], axes[1][-1]
    epochs = sorted({row["epoch"] for row in grokking["rows"]})
    groups = [[row for row in grokking["rows"] if row["epoch"] == epoch] for epoch in epochs]
    means = [over_seeds([row["published"] for row in group]) for group in groups]
    figures.series(above, epochs, means, 0)
    figures.explain(above, *means)
    above.set_title(f"modular addition, {grokking['examples']} examples")
    above.set_ylabel("log mean r^d, nats")
    accuracies = [100 * mean_of([row["test_accuracy"] for row in group]) for group in groups]
    figures.plain(below, epochs, accuracies, 1)
    below.set_ylabel("test accuracy, %")
    for ax in (above, below):
        ax.set_xlabel("epochs of training")
    return figure


def _growing(ax: Any, case: Mapping[str, Any], name: str, label: str) -> None:
    """Every seed in grey, their mean on top."""
    rows = [row for row in case["rows"] if row[name] is not None and not row[name]["vanished"]]
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed]
        ax.plot(
            [row["size"] for row in mine],
            [row[name]["value"] for row in mine],
            color="0.75",
            linewidth=0.8,
            zorder=0,
        )
    sizes = sorted({row["size"] for row in rows})
    means = [over_seeds([row[name] for row in rows if row["size"] == size]) for size in sizes]
    figures.series(ax, sizes, means, 0, "mean over seeds (each in grey)")
    figures.explain(ax, *means)
    figures.log_axis(ax)
    ax.set_xlabel("examples trained on, and of the landscape")
    ax.set_ylabel(label)
