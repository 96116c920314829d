"""Does a language model's minimum shrink with data, too? A small GPT on windows of characters.

The embedding and the head are one matrix, which counts once. Every minimum is measured in the
landscape of the windows that all training sets share, and in that of its own training set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..base import figures
from ..base.figures import several
from ..base.laboratory import Laboratory, Probe, Training
from ..base.networks import Net
from ..base.protocols import Grid, grid
from ..base.samples import Sample
from ..base.statistics import mean_of, over_seeds
from ..base.training import Recipe
from ..base.volumes import Measurement, common_radius, describe, filled, versus

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """What is trained and measured.

    Args:
        net, recipe: the GPT, and how it is trained.
        window: characters of a window.
        sizes: windows trained on, and the seeds of each; the first is the base.
        thresholds: losses at which a basin ends, nats a character.
        n: directions.
    """

    net: Net
    recipe: Recipe
    window: int
    sizes: Grid
    thresholds: tuple[float, ...]
    n: int


def _gpt(width: int, layers: int, heads: int) -> Net:
    return Net("gpt", (width,), layers=layers, heads=heads)


SETTINGS = {
    "smoke": Settings(
        _gpt(16, 1, 2), Recipe(120, rate=2e-2), 16, grid((4, 12), seeds=1), (1.5,), 150
    ),
    "small": Settings(
        _gpt(64, 2, 4),
        Recipe(300, batch=64, rate=3e-3, final_rate=1e-5, decay=0.1),
        64,
        grid((10, 50, 250), seeds=2),
        (1.0, 0.5),
        200,
    ),
    "paper": Settings(
        _gpt(384, 6, 6),
        Recipe(800, batch=64, rate=1e-3, final_rate=1e-5, decay=0.1),
        256,
        grid((50, 250, 1000, 5000, 20000), seeds=3, fewer={5000: 1, 20000: 1}),
        (2.0, 1.0, 0.5, 0.2, 0.1, 0.05),
        500,
    ),
}


def run(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """Trains, and measures in both landscapes at every threshold."""
    laboratory.pool("text", settings.window)
    base = settings.sizes[0][0]
    cells = [(size, seed) for size, seeds in settings.sizes for seed in seeds]
    runs = laboratory.train(
        [
            Training(
                replace(settings.net, seed=seed),
                settings.recipe,
                Sample(10 + seed, base, size - base),
                "text",
            )
            for size, seed in cells
        ]
    )
    kinds = {"base": lambda size: base, "own": lambda size: size}
    places = [
        (kind, size, seed, threshold)
        for threshold in settings.thresholds
        for kind in kinds
        for size, seed in cells
    ]
    trained = dict(zip(cells, runs, strict=True))
    basins = laboratory.measure(
        [
            Probe(
                trained[size, seed],
                trained[size, seed].training.sample.landscape(kinds[kind](size)),
                Measurement(settings.n, threshold),
            )
            for kind, size, seed, threshold in places
        ]
    )
    found = dict(zip(places, basins, strict=True))
    rows = []
    radii = {}
    for threshold in settings.thresholds:
        for kind in kinds:
            mine = {place: b for place, b in found.items() if place[::3] == (kind, threshold)}
            radius = common_radius([basin.volume for basin in mine.values()])
            radii[f"{kind} {threshold:g}"] = radius
            for (_, size, seed, _), basin in mine.items():
                row = {
                    "landscape": kind,
                    "threshold": threshold,
                    "size": size,
                    "seed": seed,
                    **basin.run.end,
                    "loss": basin.loss,
                    "published": describe(basin.volume),
                    "filled": None if radius is None else filled(basin.volume, radius),
                }
                first = mine[kind, base, seed, threshold].volume
                if kind == "base" and size > base and first and basin.volume:
                    row["found_there_over_this"] = versus(first, basin.volume)
                rows.append(row)
    return {"window": settings.window, "base": base, "radii": radii, "rows": rows}


def title(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    pairs = [
        row["found_there_over_this"] for row in found["rows"] if "found_there_over_this" in row
    ]
    known = [pair for pair in pairs if pair["reliable"]]
    larger = sum(pair["probability"] > 0.95 for pair in known)
    smaller = sum(pair["probability"] < 0.05 for pair in known)
    gap = mean_of([pair["value"] for pair in known])
    if not known:
        return (
            f"In the landscape of {found['base']} windows of text no two minima are reliable at "
            "one radius"
        )
    return (
        f"In the landscape of {found['base']} windows of text the minimum found there is larger "
        f"than one from more data in {larger} of {several(len(pairs), 'pair')}, smaller in "
        f"{smaller} (on average {gap:+.2f} nats)"
    )


def draw(found: Mapping[str, Any]) -> Figure:
    """φ(R) in both landscapes and the test loss against the amount of text."""
    figure, axes = figures.panels(3, title(found), width=3.7)
    rows = found["rows"]
    thresholds = sorted({row["threshold"] for row in rows}, reverse=True)
    sizes = sorted({row["size"] for row in rows})
    for ax, kind in zip(axes[0], ("base", "own"), strict=False):
        shown: list[Mapping[str, Any]] = []
        for index, threshold in enumerate(thresholds):
            radius = found["radii"][f"{kind} {threshold:g}"]
            if radius is None:
                continue
            mine = [r for r in rows if (r["landscape"], r["threshold"]) == (kind, threshold)]
            means = [over_seeds([r["filled"] for r in mine if r["size"] == s]) for s in sizes]
            figures.series(ax, sizes, means, index, f"loss ≤ {threshold:g}, R = {radius:.3g}")
            shown += means
        where = (
            f"landscape of {found['base']} windows" if kind == "base" else "landscape of its own"
        )
        ax.set_title(where)
        ax.set_ylabel("log filled fraction φ(R), nats")
        figures.explain(ax, *shown)
    groups = [[row for row in rows if row["size"] == size] for size in sizes]
    for index, (key, words) in enumerate((("train_loss", "training"), ("test_loss", "test"))):
        losses = [mean_of([row[key] for row in group]) for group in groups]
        figures.plain(axes[0][2], sizes, losses, index, words)
    axes[0][2].set_ylabel("loss, nats a character")
    axes[0][2].legend()
    for ax in axes[0]:
        figures.log_axis(ax)
        ax.set_xlabel(f"windows of {found['window']} characters trained on")
    return figure
