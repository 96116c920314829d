"""What does growing data do to the landscape, as a picture?

The loss on the plane through three minima, for landscapes of growing data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..base import figures
from ..base.cache import Outcome
from ..base.laboratory import Laboratory, Run
from ..base.losses import LOSSES
from ..base.protocols import SMOKE, Family, grid, mnist_mlp
from ..base.sweep import Tick, Unit
from ..base.training import mean_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Beyond the triangle of the minima, in units of its sides.
_MARGIN = 0.5


@dataclass(frozen=True)
class Settings:
    """What is trained and drawn.

    Args:
        family: three training sets, one seed: equal initialisation and base.
        landscapes: sizes, ascending.
        points: of the grid along each axis.
        threshold: the loss at which a basin ends.
    """

    family: Family
    landscapes: tuple[int, ...]
    points: int
    threshold: float = 0.1


SETTINGS = {
    "smoke": Settings(SMOKE, (60, 240, 960), 15),
    "small": Settings(mnist_mlp(grid((60, 600, 6000), seeds=1)), (60, 600, 6000), 41),
    "paper": Settings(mnist_mlp(grid((60, 2000, 60000), seeds=1)), (60, 2000, 60000), 101),
}


def run(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """Trains, and evaluates the loss on the plane."""
    runs = list(settings.family.train(laboratory).values())
    outcomes = laboratory.sweep(
        [_slice(laboratory, settings, runs, size) for size in settings.landscapes], "slices"
    )
    cells = []
    for size, outcome in zip(settings.landscapes, outcomes, strict=True):
        assert outcome.tensors is not None
        cells.append(
            {
                "landscape": size,
                "losses": outcome.tensors["losses"].tolist(),
                **outcome.facts,
            }
        )
    return {
        "title": settings.family.title,
        "threshold": settings.threshold,
        "minima": [{"size": run.training.sample.size, **run.end} for run in runs],
        "slices": cells,
    }


def _slice(laboratory: Laboratory, settings: Settings, runs: list[Run], size: int) -> Unit:
    pool = laboratory.pool(settings.family.pool)
    landscape = runs[0].training.sample.landscape(size)

    def work(tick: Tick) -> Outcome:
        model = laboratory.model(runs[0])
        points = torch.stack([_flat(laboratory.model(run)) for run in runs])
        origin, across, up, places = plane(points)
        xs, ys = (_axis(places[:, k], settings.points) for k in (0, 1))
        inputs, targets = laboratory.examples(landscape, settings.family.pool)

        def loss_at(point: Tensor) -> float:
            vector_to_parameters(point, model.parameters())
            return mean_loss(model, LOSSES[pool.loss], inputs, targets)

        losses = torch.zeros(len(ys), len(xs))
        for row, y in enumerate(ys.tolist()):
            for column, x in enumerate(xs.tolist()):
                losses[row, column] = loss_at(origin + x * across + y * up)
            tick((row + 1) / len(ys))
        at_minima = [loss_at(point) for point in points]
        inside = (losses < settings.threshold).double().mean()
        facts = {
            "x": xs.tolist(),
            "y": ys.tolist(),
            "places": places.tolist(),
            "losses_of_minima": at_minima,
            "share_below_threshold": float(inside),
        }
        return Outcome(facts, {"losses": losses})

    config = {
        "models": [laboratory.config(run.training) for run in runs],
        "landscape": landscape.describe(pool),
        "points": settings.points,
        "threshold": settings.threshold,
        "margin": _MARGIN,
    }
    return Unit("slice", config, float(size), work)


def plane(points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plane through three points: origin, two orthonormal directions, and their places on it.

    Args:
        points: ``[3, d]``.
    """
    origin = points[0]
    across = points[1] - origin
    across = across / across.norm()
    up = points[2] - origin
    up = up - (up @ across) * across
    up = up / up.norm()
    places = torch.stack([(points - origin) @ across, (points - origin) @ up], 1)
    return origin, across, up, places


def _axis(places: Tensor, count: int) -> Tensor:
    low, high = float(places.min()), float(places.max())
    margin = _MARGIN * (high - low)
    return torch.linspace(low - margin, high + margin, count)


def _flat(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach().clone()


def title(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    shares = [
        f"{100 * cell['share_below_threshold']:.0f} % at {cell['landscape']}"
        for cell in found["slices"]
    ]
    last = found["slices"][-1]
    left = sum(loss < found["threshold"] for loss in last["losses_of_minima"])
    return (
        f"Below the threshold lies {', '.join(shares)} images of the plane through three minima; "
        f"at {last['landscape']} images {left} of the {len(last['losses_of_minima'])} minima "
        f"{'is' if left == 1 else 'are'} left ({found['title']})"
    )


def draw(found: Mapping[str, Any]) -> Figure:
    """The loss on the plane for each landscape: contours, the threshold, and the three minima."""
    import numpy as np

    slices = found["slices"]
    figure, axes = figures.panels(len(slices), title(found), width=3.7)
    levels = np.geomspace(0.01, 10.0, 13)
    filled = None
    for ax, cell in zip(axes[0], slices, strict=True):
        losses = np.clip(
            np.array(cell["losses"], dtype=float), 1.0001 * levels[0], 0.9999 * levels[-1]
        )
        filled = ax.contourf(
            cell["x"], cell["y"], losses, levels=levels, norm="log", cmap="cividis_r"
        )
        ax.contour(
            cell["x"],
            cell["y"],
            losses,
            levels=[found["threshold"]],
            colors=figures.COLORS[1],
            linewidths=2,
        )
        for index, (place, minimum) in enumerate(zip(cell["places"], found["minima"], strict=True)):
            inside = cell["losses_of_minima"][index] < found["threshold"]
            ax.plot(
                *place,
                figures.MARKERS[index],
                color="black",
                markerfacecolor="black" if inside else "white",
                markersize=8,
                label=f"from {minimum['size']} images",
            )
        ax.grid(visible=False)
        ax.set_title(f"landscape of {cell['landscape']} images")
        ax.set_xlabel("distance in the plane")
    axes[0][0].set_ylabel("distance in the plane")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if filled is not None:
        bar = figure.colorbar(filled, ax=axes[0].tolist(), label="loss", shrink=0.9)
        bar.set_ticks([0.01, 0.1, 1.0, 10.0], labels=["0.01", "0.1", "1", "10"])
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        title=f"filled: below the threshold {found['threshold']:g} (line)",
    )
    return figure
