"""Is the minimum that training finds in a small landscape the largest one there?

Networks trained on growing, nested training sets all lie below the threshold in the landscape of
the smallest. There every one of them is measured, along the same directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base import figures
from ..base.cache import Outcome
from ..base.figures import several
from ..base.laboratory import Basin, Laboratory, Probe, Run
from ..base.protocols import MNIST_SIZES, SMOKE, Family, anchor, grid, mnist_mlp
from ..base.published import published
from ..base.statistics import mean_of, over_seeds, ranking
from ..base.sweep import Tick, Unit
from ..base.volumes import Measurement, common_radius, describe, filled, versus

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """What is trained and measured.

    Args:
        family: networks; the landscape is that of its base.
        how: the measurement.
        published_directions: of the published protocol, which is evaluated beside fastvol on the
            networks of the first seed.
    """

    family: Family
    how: Measurement
    published_directions: int


SETTINGS = {
    "smoke": Settings(SMOKE, Measurement(300), 20),
    "small": Settings(
        mnist_mlp(grid(MNIST_SIZES, seeds=3, fewer={20000: 2, 60000: 1})), Measurement(2000), 500
    ),
    "paper": Settings(mnist_mlp(grid(MNIST_SIZES, seeds=10)), Measurement(10_000), 500),
}


def run(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """Trains, measures in the smallest landscape, ranks, and compares with the published grid."""
    family = settings.family
    runs = family.train(laboratory)
    cells = list(runs)
    basins = laboratory.measure(
        [
            Probe(runs[cell], runs[cell].training.sample.landscape(family.base), settings.how)
            for cell in cells
        ]
    )
    by_cell = dict(zip(cells, basins, strict=True))
    radius = common_radius([basin.volume for basin in basins])
    rows = []
    for (size, seed), basin in by_cell.items():
        row = {
            "size": size,
            "seed": seed,
            **basin.run.end,
            "loss": basin.loss,
            "published": describe(basin.volume),
            "anchor": anchor(basin, laboratory.pool(family.pool).name),
            "filled": None if radius is None else filled(basin.volume, radius),
        }
        there = by_cell[family.base, seed].volume
        if size > family.base and there is not None and basin.volume is not None:
            row["found_there_over_this"] = versus(there, basin.volume)
        rows.append(row)
    seeds = sorted({seed for _, seed in cells})
    return {
        "landscape": family.base,
        "title": family.title,
        "radius": radius,
        "rows": rows,
        "rankings": [_ranking(by_cell, seed) for seed in seeds],
        "grid": _grid(laboratory, settings, runs, by_cell, seeds[0]),
    }


def _ranking(by_cell: Mapping[tuple[int, int], Basin], seed: int) -> dict[str, Any]:
    mine = [
        (size, basin.volume)
        for (size, other), basin in by_cell.items()
        if other == seed and basin.volume is not None
    ]
    sizes, volumes = [size for size, _ in mine], [volume for _, volume in mine]
    if len(mine) < 2:
        return {"seed": seed, "sizes": sizes}
    return {
        "seed": seed,
        "sizes": sizes,
        "published": ranking(volumes, sizes, honest=False),
        "filled": ranking(volumes, sizes, honest=True),
    }


def _grid(
    laboratory: Laboratory,
    settings: Settings,
    runs: Mapping[tuple[int, int], Run],
    by_cell: Mapping[tuple[int, int], Basin],
    seed: int,
) -> list[dict[str, Any]]:
    """The published protocol on the same models as fastvol."""
    cells = [cell for cell in runs if cell[1] == seed and by_cell[cell].volume is not None]
    pool = settings.family.pool

    def unit(cell: tuple[int, int]) -> Unit:
        run, basin = runs[cell], by_cell[cell]

        def work(tick: Tick) -> Outcome:
            return Outcome(
                published(
                    laboratory.model(run),
                    laboratory.pool(pool),
                    laboratory.examples(basin.landscape, pool),
                    threshold=settings.how.threshold,
                    directions=settings.published_directions,
                    tick=tick,
                )
            )

        config = {
            "model": laboratory.config(run.training),
            "landscape": basin.landscape.describe(laboratory.pool(pool)),
            "threshold": settings.how.threshold,
            "directions": settings.published_directions,
        }
        return Unit("published", config, 1.0, work)

    outcomes = laboratory.sweep([unit(cell) for cell in cells], "published protocol")
    rows = []
    for cell, outcome in zip(cells, outcomes, strict=True):
        volume = by_cell[cell].volume
        assert volume is not None
        rows.append(
            {
                "size": cell[0],
                "seed": cell[1],
                **outcome.facts,
                "fastvol": volume.log_mean_power,
                "fastvol_n": volume.n,
            }
        )
    return rows


def title(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    ranked = [entry for entry in found["rankings"] if entry.get("filled")]
    if not ranked:
        return "No radius is reliable in all minima: their volumes cannot be ranked"
    chance = mean_of([entry["filled"]["probability_first_is_largest"] for entry in ranked])
    tau = mean_of([entry["filled"]["tau"] for entry in ranked])
    name = found["title"]
    verb = "is" if chance > 0.5 else "is not"
    return (
        f"In the {found['landscape']}-image landscape the minimum found there {verb} the largest "
        f"(probability {chance:.2f}, {several(len(ranked), 'seed')}); volume against training-set "
        f"size: Kendall's τ = {tau:+.2f} ({name})"
    )


def draw(found: Mapping[str, Any]) -> Figure:
    """φ(R) and the published quantity against the training set's size, and test accuracy."""
    figure, axes = figures.panels(3, title(found), width=3.7)
    filled_ax, published_ax, accuracy_ax = axes[0]
    sizes = sorted({row["size"] for row in found["rows"]})
    groups = [[row for row in found["rows"] if row["size"] == size] for size in sizes]
    shown: list[Mapping[str, Any]] = []
    if found["radius"] is not None:
        shown = [over_seeds([row["filled"] for row in group]) for group in groups]
        figures.series(filled_ax, sizes, shown, 0, f"R = {found['radius']:.3g}")
    published_means = [over_seeds([row["published"] for row in group]) for group in groups]
    figures.series(published_ax, sizes, published_means, 0, "fastvol")
    grid_rows = [row for row in found["grid"] if row["grid"] is not None]
    figures.plain(
        published_ax,
        [row["size"] for row in grid_rows],
        [row["grid"] for row in grid_rows],
        1,
        f"published protocol, seed {found['grid'][0]['seed']}" if grid_rows else None,
    )
    anchored = [row for row in found["rows"] if row["anchor"] is not None]
    if anchored:
        figures.plain(
            published_ax,
            [row["size"] for row in anchored],
            [row["anchor"]["published"] for row in anchored],
            2,
            "the paper, seed 1",
        )
    figures.plain(
        accuracy_ax,
        sizes,
        [100 * mean_of([row["test_accuracy"] for row in group]) for group in groups],
        0,
    )
    for ax in axes[0]:
        figures.log_axis(ax)
        ax.set_xlabel("images trained on")
    filled_ax.set_ylabel(f"φ(R) in the {found['landscape']}-image landscape, nats")
    published_ax.set_ylabel("log mean r^d, nats")
    accuracy_ax.set_ylabel("test accuracy, %")
    figures.explain(filled_ax, *shown)
    figures.explain(published_ax, *published_means)
    return figure
