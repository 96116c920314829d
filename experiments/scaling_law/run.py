"""Is volume a predictable function of the amount of data, and does the law survive honest numbers?

Each minimum is measured in the landscape of its own training set. The published quantity, φ(R) at a
radius reliable in all of them, and the mass of a normal law at a width reliable in all of them are
fitted as straight lines against the log of the training set's size, network by network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base import figures
from ..base.figures import several
from ..base.laboratory import Basin, Laboratory, Probe
from ..base.networks import Net
from ..base.protocols import (
    CIFAR_SIZES,
    MNIST_SIZES,
    SMOKE,
    Family,
    anchor,
    cifar_cnn,
    cifar_mlp,
    grid,
    mnist_cnn,
    mnist_mlp,
)
from ..base.statistics import over_seeds, straight_line
from ..base.training import Recipe
from ..base.volumes import Measurement, common_radius, describe, filled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = ("published", "filled", "mass")


# Fewer directions pass the gate nowhere: then only the published quantity is measured.
_FEWEST_RELIABLE = 200


@dataclass(frozen=True)
class Case:
    """One network on one data set.

    Args:
        family: trained on growing data.
        directions: for each size of the grid.
        std: of the normal law about the minimum whose mass is measured; any width above those that
            turn out reliable will do.
        threshold: the loss at which a basin ends.
    """

    family: Family
    directions: tuple[int, ...]
    std: float = 0.1
    threshold: float = 0.1


@dataclass(frozen=True)
class Settings:
    """Args:
    cases: networks and data sets.
    """

    cases: tuple[Case, ...]


_PICTURES = Family(
    "pictures, CNN",
    "cifar10",
    Net("cnn", (8,), (4,)),
    Recipe(60, rate=2e-2),
    50,
    grid((50, 100, 200), seeds=1),
)

SETTINGS = {
    "smoke": Settings((Case(SMOKE, (250, 250, 200)), Case(_PICTURES, (120, 120, 120)))),
    "small": Settings(
        (
            Case(
                mnist_mlp(grid(MNIST_SIZES, seeds=2, fewer={20000: 1, 60000: 1})),
                (1000, 1000, 300, 200, 50, 50),
            ),
            Case(mnist_cnn(grid((60, 120, 240, 480), seeds=1)), (200, 200, 200, 50)),
            Case(
                cifar_mlp(grid((50, 200, 500, 2000), seeds=2, fewer={2000: 1})),
                (400, 300, 200, 50),
            ),
            Case(cifar_cnn(grid((50, 100, 200), seeds=1)), (200, 200, 200)),
        )
    ),
    "paper": Settings(
        (
            Case(
                mnist_mlp(grid(MNIST_SIZES, seeds=10)), (10_000, 10_000, 10_000, 5000, 2000, 1000)
            ),
            Case(mnist_cnn(grid(MNIST_SIZES[:-1], seeds=10)), (5000, 5000, 2000, 1000, 500)),
            Case(cifar_mlp(grid(CIFAR_SIZES, seeds=10)), (10_000, 10_000, 5000, 2000, 1000, 500)),
            Case(cifar_cnn(grid(CIFAR_SIZES[:-1], seeds=10)), (5000, 5000, 2000, 1000, 500)),
        )
    ),
}


def run(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """Trains, measures, and fits, network by network; then compares the exponents."""
    cases = [_measured(laboratory, case) for case in settings.cases]
    return {"cases": cases, "differences": _differences(cases)}


def _measured(laboratory: Laboratory, case: Case) -> dict[str, Any]:
    family = case.family
    runs = family.train(laboratory)

    directions = dict(zip(family.sizes, case.directions, strict=True))

    def measured(std: float | None, what: str) -> dict[tuple[int, int], Basin]:
        probes = {
            (size, seed): Probe(
                run, run.training.sample, Measurement(directions[size], case.threshold, std=std)
            )
            for (size, seed), run in runs.items()
            if std is None or directions[size] >= _FEWEST_RELIABLE
        }
        label = f"{family.title}: {what}"
        return dict(zip(probes, laboratory.measure(list(probes.values()), label), strict=True))

    volumes, masses = measured(None, "volume"), measured(case.std, "mass")
    radius = common_radius([basin.volume for basin in volumes.values()])
    multiple = common_radius([basin.volume for basin in masses.values()])
    rows = [
        {
            "size": size,
            "seed": seed,
            **runs[size, seed].end,
            "loss": basin.loss,
            "published": describe(basin.volume),
            "anchor": anchor(basin, laboratory.pool(family.pool).name),
            "filled": None if radius is None else filled(basin.volume, radius),
            "mass": (
                None
                if multiple is None or (size, seed) not in masses
                else filled(masses[size, seed].volume, multiple)
            ),
        }
        for (size, seed), basin in volumes.items()
    ]
    dim = next((b.volume.dim for b in volumes.values() if b.volume is not None), 0)
    return {
        "title": family.title,
        "dim": dim,
        "radius": radius,
        "std": None if multiple is None else multiple * case.std,
        "rows": rows,
        "fits": {name: _fit(rows, name) for name in QUANTITIES},
    }


def _fit(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A straight line against log N over all seeds, without what vanished.

    The published quantity is a lower bound at every size; of the other two only what is reliable
    is fitted.
    """
    left = _fitted(rows, name)
    x, y = [math.log(row["size"]) for row in left], [row[name]["value"] for row in left]
    return straight_line(x, y)


def _fitted(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    present = [row for row in rows if row[name] is not None and not row[name]["vanished"]]
    return present if name == "published" else [row for row in present if row[name]["reliable"]]


def _differences(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the exponent of the typical radius, slope / d, differs between networks."""
    found = []
    for index, a in enumerate(cases):
        for b in cases[index + 1 :]:
            fits = a["fits"]["published"], b["fits"]["published"]
            if any("slope_low" not in fit for fit in fits):
                continue
            slopes = [fit["slope"] / case["dim"] for fit, case in zip(fits, (a, b), strict=True)]
            halves = [
                (fit["slope_high"] - fit["slope_low"]) / 2 / case["dim"]
                for fit, case in zip(fits, (a, b), strict=True)
            ]
            found.append(
                {
                    "a": a["title"],
                    "b": b["title"],
                    "difference": slopes[0] - slopes[1],
                    "half_interval": math.hypot(*halves),
                    "differ": abs(slopes[0] - slopes[1]) > math.hypot(*halves),
                }
            )
    return found


def title(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    parts = []
    for case in found["cases"]:
        fit = case["fits"]["published"]
        slope = figures.number(fit.get("slope"))
        if slope is None:
            continue
        exponent = slope / case["dim"]
        half = (fit["slope_high"] - fit["slope_low"]) / 2 / case["dim"]
        honest = case["fits"]["filled"]
        r2 = figures.number(honest.get("r_squared"))
        also = "not measurable" if r2 is None else f"{r2:.2f}"
        parts.append(
            f"{case['title']} r ∝ N^({exponent:.2f} ± {half:.2f}), R² {fit['r_squared']:.2f}, "
            f"of φ(R) {also}"
        )
    differ = sum(entry["differ"] for entry in found["differences"])
    pairs = several(len(found["differences"]), "pair")
    return f"{'; '.join(parts)}. Exponents differ in {differ} of {pairs} of networks"


def draw(found: Mapping[str, Any]) -> Figure:
    """The three quantities against the amount of data, with their fits, and the residuals."""
    figure, axes = figures.panels(3, title(found), rows=2, width=3.7)
    labels = {
        "published": "log mean r^d / d, nats",
        "filled": "log filled fraction φ(R), nats",
        "mass": "log mass of the normal law, nats",
    }
    for column, (name, label) in enumerate(labels.items()):
        above, below = axes[0][column], axes[1][column]
        shown: list[Mapping[str, Any]] = []
        for index, case in enumerate(found["cases"]):
            shown += _panel(above, below, case, name, index)
        for ax in (above, below):
            figures.log_axis(ax)
            ax.set_xlabel("examples trained on, and of the landscape")
        above.set_ylabel(label)
        below.set_ylabel("residual of the fit, nats" + (" / d" if name == "published" else ""))
        below.axhline(0, color="0.5", linewidth=0.8)
        figures.explain(above, *shown)
        if name != "published":
            _look_at_the_reliable(above, shown)
    return figure


def _look_at_the_reliable(ax: Any, shown: list[Mapping[str, Any]]) -> None:
    """A bound of minus many thousand nats says nothing, and would flatten all that does."""
    values = [entry["value"] for entry in shown if entry["reliable"]]
    if values:
        span = max(max(values) - min(values), 0.1)
        # Room for the legend below.
        ax.set_ylim(min(values) - 0.9 * span, max(values) + 0.15 * span)


def _panel(
    above: Any, below: Any, case: Mapping[str, Any], name: str, index: int
) -> list[Mapping[str, Any]]:
    rows = [row for row in case["rows"] if row[name] is not None and not row[name]["vanished"]]
    if not rows:
        return []
    unit = case["dim"] if name == "published" else 1
    where = {
        "published": "",
        "filled": f", R = {case['radius'] or 0:.3g}",
        "mass": f", std {case['std'] or 0:.2g}",
    }
    sizes = sorted({row["size"] for row in rows})
    means = []
    for size in sizes:
        mean = over_seeds([row[name] for row in rows if row["size"] == size])
        means.append({**mean, "value": mean["value"] / unit, "stderr": mean["stderr"] / unit})
    figures.series(above, sizes, means, index, case["title"] + where[name], line=False)
    fit = case["fits"][name]
    color = figures.COLORS[index % len(figures.COLORS)]
    if figures.number(fit.get("slope")) is not None:
        line = [(fit["intercept"] + fit["slope"] * math.log(size)) / unit for size in sizes]
        above.plot(sizes, line, color=color, linewidth=1.0)
        below.plot(
            [row["size"] for row in _fitted(case["rows"], name)],
            [residual / unit for residual in fit["residuals"]],
            figures.MARKERS[index % len(figures.MARKERS)],
            color=color,
            markersize=4,
        )
    return means
