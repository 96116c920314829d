"""How many directions does a volume take, and what does plain Monte Carlo miss?

Every method against the number of directions: on bodies of known volume, on a trained network, and
on how steadily a few directions rank the minima of one landscape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import fastvol

from ..base import figures
from ..base.cache import Outcome
from ..base.laboratory import Laboratory, Probe
from ..base.protocols import DIGITS_MLP, SMOKE, Family, grid, mnist_mlp
from ..base.statistics import mean_of
from ..base.sweep import Tick, Unit
from ..base.training import Recipe
from ..base.volumes import Measurement, common_radius, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("radial", "preconditioned", "annealed")


@dataclass(frozen=True)
class Body:
    """A body of known volume: Σ |w_i / a_i|^power ≤ 1, log a_i evenly spread.

    Args:
        title: as people write it.
        dim: coordinates.
        power: 2 is an ellipsoid.
        longest: axis; the shortest is 1.
    """

    title: str
    dim: int
    power: int
    longest: float

    def log_axes(self) -> Tensor:
        """log a_i, float64 ``[dim]``."""
        return torch.linspace(0, math.log(self.longest), self.dim, dtype=torch.float64)

    def log_volume(self) -> float:
        """The truth, nats (Dirichlet's integral)."""
        p, d = self.power, self.dim
        unit = d * (math.log(2) + math.lgamma(1 + 1 / p)) - math.lgamma(1 + d / p)
        return unit + float(self.log_axes().sum())

    def model(self) -> nn.Module:
        """A module whose one parameter stands at the body's centre."""
        return _Point(self.dim)

    def loss(self, model: nn.Module) -> Tensor:
        """Σ |w_i / a_i|^power."""
        (point,) = model.parameters()
        return (point / self.log_axes().exp()).pow(self.power).sum()


class _Point(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(dim, dtype=torch.float64))


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        bodies: of known volume.
        directions: numbers of directions, for the bodies and the network.
        seeds: of the directions, for the bodies and the network.
        network: a trained network, by its one size and seed.
        std: of the normal law about its minimum whose mass is measured.
        family: minima that are ranked in the landscape of their base.
        ranked: numbers of directions that rank; the largest is the reference.
    """

    bodies: tuple[Body, ...]
    directions: tuple[int, ...]
    seeds: tuple[int, ...]
    network: Family
    std: float
    family: Family
    ranked: tuple[int, ...]


_NETWORK = Family("digits", "digits", DIGITS_MLP, Recipe(500, rate=5e-3), 200, ((200, (1,)),))

SETTINGS = {
    "smoke": Settings(
        (Body("quartic, d = 10", 10, 4, 10.0),),
        (60, 200),
        (0,),
        _NETWORK,
        0.1,
        SMOKE,
        (10, 30, 100, 300),
    ),
    "small": Settings(
        (
            Body("ellipsoid, d = 30", 30, 2, 10.0),
            Body("ellipsoid, d = 300", 300, 2, 100.0),
            Body("quartic, d = 100", 100, 4, 30.0),
        ),
        (100, 300, 1000, 3000),
        (0, 1),
        _NETWORK,
        0.1,
        mnist_mlp(grid((60, 600, 2000, 6000), seeds=1)),
        (10, 30, 100, 300, 1000, 2000),
    ),
    "paper": Settings(
        (
            Body("ellipsoid, d = 30", 30, 2, 10.0),
            Body("ellipsoid, d = 1000", 1000, 2, 1000.0),
            Body("quartic, d = 1000", 1000, 4, 100.0),
        ),
        (100, 300, 1000, 3000, 10_000, 30_000),
        (0, 1, 2, 3),
        _NETWORK,
        0.1,
        mnist_mlp(grid((60, 600, 2000, 6000, 20000, 60000), seeds=1)),
        (10, 30, 100, 300, 1000, 3000, 10_000, 30_000),
    ),
}


def run(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """Bodies, a network, and rankings."""
    return {
        "bodies": [_body(laboratory, settings, body) for body in settings.bodies],
        "network": _network(laboratory, settings),
        "ranking": _ranking(laboratory, settings),
    }


def _body(laboratory: Laboratory, settings: Settings, body: Body) -> dict[str, Any]:
    cells = [(m, n, s) for m in METHODS for n in settings.directions for s in settings.seeds]

    def unit(method: str, n: int, seed: int) -> Unit:
        def work(tick: Tick) -> Outcome:
            volume = fastvol.estimate(
                body.model(),
                body.loss,
                n=n,
                threshold=1.0,
                method=method,
                seed=seed,
                progress=False,
            )
            return Outcome({}, volume=volume)

        config = {
            "body": [body.dim, body.power, body.longest],
            "method": method,
            "n": n,
            "seed": seed,
            "fastvol": fastvol.__version__,
        }
        return Unit("body", config, float(n), work)

    outcomes = laboratory.sweep([unit(*cell) for cell in cells], body.title)
    truth = body.log_volume()
    rows = []
    for (method, n, seed), outcome in zip(cells, outcomes, strict=True):
        assert outcome.volume is not None
        row = describe(outcome.volume)
        row |= {"value": outcome.volume.log_volume - truth, "log_volume": outcome.volume.log_volume}
        rows.append({**row, "method": method, "n": n, "seed": seed})
    return {"title": body.title, "dim": body.dim, "truth": truth, "rows": rows}


def _network(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    (trained,) = settings.network.train(laboratory).values()
    cells = [(m, n, s) for m in METHODS for n in settings.directions for s in settings.seeds]
    basins = laboratory.measure(
        [
            Probe(
                trained,
                trained.training.sample,
                Measurement(n, method=method, std=settings.std, seed=seed),
            )
            for method, n, seed in cells
        ],
        "network",
    )
    rows = [
        {**describe(basin.volume), "method": method, "n": n, "seed": seed}
        for (method, n, seed), basin in zip(cells, basins, strict=True)
    ]
    return {"title": settings.network.title, "std": settings.std, **trained.end, "rows": rows}


def _ranking(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """How often disjoint sets of n directions rank as all of them do."""
    from scipy import stats

    family, most = settings.family, max(settings.ranked)
    runs = family.train(laboratory)
    basins = laboratory.measure(
        [
            Probe(run, run.training.sample.landscape(family.base), Measurement(most))
            for run in runs.values()
        ],
        "rankings",
    )
    volumes = [basin.volume for basin in basins if basin.volume is not None]
    radius = common_radius(volumes)
    dim = volumes[0].dim
    log_powers = dim * np.stack([volume.log_radii for volume in volumes])
    rows = []
    for name, cap in (("published", None), ("filled", radius)):
        if name == "filled" and cap is None:
            continue
        logs = log_powers if cap is None else np.minimum(log_powers - dim * math.log(cap), 0.0)
        whole = _log_means(logs)
        for n in settings.ranked:
            parts = [_log_means(logs[:, k : k + n]) for k in range(0, most - n + 1, n)]
            same = [float(part.argmax() == whole.argmax()) for part in parts]
            taus = [float(stats.kendalltau(part, whole).statistic) for part in parts]
            rows.append(
                {
                    "quantity": name,
                    "n": n,
                    "sets": len(parts),
                    "same_largest": float(np.mean(same)),
                    "tau": mean_of(taus),
                }
            )
    return {"title": family.title, "sizes": list(family.sizes), "radius": radius, "rows": rows}


def _log_means(logs: Any) -> Any:
    top = logs.max(1, keepdims=True)
    return np.log(np.exp(logs - top).mean(1)) + top[:, 0]


def title(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    body = found["bodies"][-1]
    most = max(row["n"] for row in body["rows"])

    def error(method: str) -> float:
        rows = [r for r in body["rows"] if r["method"] == method and r["n"] == most]
        return mean_of([r["value"] for r in rows])

    parts = ", ".join(f"{method} {error(method):+.1f}" for method in METHODS)
    known = [row for case in found["bodies"] for row in case["rows"] if row["reliable"]]
    off = sum(abs(row["value"]) > 3 * row["stderr"] + 0.05 for row in known)
    return (
        f"Errors with {most} directions ({body['title']}), nats: {parts}. Of "
        f"{figures.several(len(known), 'estimate')} that passed the gate {off} are off by more "
        "than 3 errors"
    )


def draw(found: Mapping[str, Any]) -> Figure:
    """Errors on the bodies, the mass of the network's basin, and the steadiness of rankings."""
    bodies = found["bodies"]
    figure, axes = figures.panels(len(bodies) + 2, title(found), width=3.4)
    for ax, body in zip(axes[0], bodies, strict=False):
        _by_method(ax, body["rows"])
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.set_yscale("symlog", linthresh=1)
        ax.set_title(body["title"])
        ax.set_ylabel("log volume − truth, nats")
    network_ax, ranking_ax = axes[0][len(bodies)], axes[0][len(bodies) + 1]
    network = found["network"]
    _by_method(network_ax, network["rows"])
    network_ax.set_title(f"{network['title']} network, normal law of std {network['std']:g}")
    network_ax.set_ylabel("log mass, nats")
    rows = found["ranking"]["rows"]
    for index, (name, words) in enumerate((("published", "log mean r^d"), ("filled", "φ(R)"))):
        mine = [row for row in rows if row["quantity"] == name]
        if mine:
            x = [row["n"] for row in mine]
            figures.plain(ranking_ax, x, [row["tau"] for row in mine], index, words)
    ranking_ax.set_title(f"{found['ranking']['title']}: ranking of the minima")
    ranking_ax.set_ylabel("Kendall's τ with the ranking of all directions")
    ranking_ax.legend()
    for ax in axes[0]:
        figures.log_axis(ax)
        ax.set_xlabel("directions n")
    entries = [row for body in bodies for row in body["rows"]] + network["rows"]
    figures.explain_below(figure, axes[0][:-1], entries=entries)
    return figure


def _by_method(ax: Any, rows: list[Mapping[str, Any]]) -> None:
    for index, method in enumerate(METHODS):
        mine = [row for row in rows if row["method"] == method]
        # Seeds stand side by side.
        x = [row["n"] * 1.08 ** (row["seed"] + 3 * (index - 1)) for row in mine]
        figures.series(ax, x, mine, index, method, line=False)
