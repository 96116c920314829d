"""Are some classes of solutions common though each member is small?

On small networks the prior mass of all solutions together is set against the mass of the basin that
training finds, times its symmetric copies. Solutions drawn from the prior are set against solutions
of gradient descent: their test accuracy at equal training loss, and whether they are of one class.

Copies of one star may overlap, so basin times copies may be more than all of them hold together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

import fastvol

from ..base import figures
from ..base.cache import Outcome
from ..base.laboratory import Basin, Laboratory, Probe, Run, Training
from ..base.losses import LOSSES
from ..base.networks import Net
from ..base.samples import Sample
from ..base.statistics import mean_of
from ..base.sweep import Tick, Unit
from ..base.training import Recipe, evaluate
from ..base.volumes import Measurement, describe, unwarned
from .classes import aligned, components, joined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POOL, _INPUTS = "moons", 2


@dataclass(frozen=True)
class Settings:
    """What is trained and measured.

    Args:
        units: hidden units, tanh.
        std: of the prior, which is also the initialisation.
        threshold: the loss below which parameters are solutions.
        sizes: of the training sets.
        seeds: of gradient descent, from draws of the prior.
        rate, epochs: of AdamW without decay.
        prior_n: losses that the prior mass may take.
        method, n: by which a basin is measured, and its directions.
    """

    units: int
    std: float
    threshold: float
    sizes: tuple[int, ...]
    seeds: int
    rate: float
    epochs: int
    prior_n: float
    method: str
    n: int

    @property
    def net(self) -> Net:
        """The network."""
        return Net("mlp", (self.units,), activation="tanh", init_std=self.std)


SETTINGS = {
    "smoke": Settings(3, 1.0, 0.2, (4, 8), 2, 2e-2, 800, 2e4, "preconditioned", 1000),
    "small": Settings(
        6, 1.0, 0.1, (4, 8, 16, 32), 10, 1e-2, 10_000, 1e6, "preconditioned", 200_000
    ),
    "paper": Settings(
        8, 1.0, 0.1, (4, 8, 16, 32, 64), 30, 1e-2, 20_000, 2e7, "preconditioned", 1_000_000
    ),
}


def run(laboratory: Laboratory, settings: Settings) -> dict[str, Any]:
    """Size by size: the prior, gradient descent, and what they share."""
    laboratory.pool(_POOL)
    return {"rows": [_size(laboratory, settings, size) for size in settings.sizes]}


def _size(laboratory: Laboratory, settings: Settings, size: int) -> dict[str, Any]:
    seeds = range(1, settings.seeds + 1)

    def descend(stop: float, label: str) -> list[Run]:
        recipe = Recipe(settings.epochs, rate=settings.rate, decay=0.0, stop_loss=stop)
        return laboratory.train(
            [
                Training(replace(settings.net, seed=seed), recipe, Sample(10, size), _POOL)
                for seed in seeds
            ],
            f"{size} points: {label}",
        )

    # A star about a point that has only just passed the threshold is thin: its centre is deeper.
    arrivals = descend(settings.threshold, "arriving")
    settled = [
        run
        for run in descend(0.05 * settings.threshold, "settling")
        if run.end["train_loss"] < settings.threshold
    ]
    (outcome,) = laboratory.sweep([_prior_unit(laboratory, settings, size)], f"{size}: prior")
    how = Measurement(
        settings.n, settings.threshold, settings.method, std=settings.std, center="origin"
    )
    basins = laboratory.measure(
        [Probe(run, run.training.sample, how) for run in settled], f"{size}: basins"
    )
    found = [_vouched(basin) for basin in basins]
    log_copies = float(fastvol.symmetry_log_count(settings.net.build(laboratory.pool(_POOL))))
    prior = outcome.facts["prior"]
    assert outcome.tensors is not None
    arrived = [run.end for run in arrivals if run.end["train_loss"] <= settings.threshold]
    row: dict[str, Any] = {
        "size": size,
        "prior": prior,
        "prior_solutions": outcome.facts["solutions"],
        "descent": {
            "runs": settings.seeds,
            "arrived": len(arrived),
            "test_accuracies": [end["test_accuracy"] for end in arrived],
            "train_losses": [end["train_loss"] for end in arrived],
        },
        "basins": found,
        "log_copies": log_copies,
        "classes": _classes(laboratory, settings, size, outcome.tensors["solutions"], settled),
    }
    if found:
        largest = max(found, key=lambda entry: float(entry["value"]))
        row["largest_basin"] = largest
        row["largest_times_copies"] = {
            **largest,
            "value": largest["value"] + log_copies,
            "bound": None,
        }
    return row


def _vouched(basin: Basin) -> dict[str, Any]:
    """The basin's mass; where it is not reliable what it exceeds with 95 % confidence.

    Few heavy rays can put an estimate above the truth, and the largest of several all the more.
    """
    entry = describe(basin.volume)
    if basin.volume is None or basin.volume.reliable:
        return entry
    bound = basin.volume.lower_bound(0.95)
    return {**entry, "estimate": entry["value"], "value": bound}


def _prior_unit(laboratory: Laboratory, settings: Settings, size: int) -> Unit:
    pool = laboratory.pool(_POOL)
    sample = Sample(10, size)

    def work(tick: Tick) -> Outcome:
        model = settings.net.build(pool).to(laboratory.device)
        examples = laboratory.examples(sample, _POOL)
        with unwarned():
            mass = fastvol.prior_mass(
                model,
                LOSSES[pool.loss],
                settings.prior_n,
                data=examples,
                threshold=settings.threshold,
                std=settings.std,
                progress=False,
            )
        solutions = []
        for index in range(len(mass.solutions)):
            model.load_state_dict(mass.solution(index), strict=False)
            tests = sample.tests(pool)
            solutions.append(evaluate(model, pool, examples, tests, laboratory.device))
        prior = {
            "value": mass.log_mass,
            "stderr": mass.stderr,
            "reliable": mass.reliable,
            "bound": "upper" if mass.bound else None,
            "dim": mass.dim,
            "n_loss": mass.n_loss,
            "warnings": list(mass.warnings),
        }
        facts = {"prior": prior, "solutions": solutions}
        return Outcome(facts, {"solutions": mass.solutions.cpu().contiguous()})

    config = {
        "net": settings.net.describe(),
        "sample": sample.describe(pool),
        "threshold": settings.threshold,
        "std": settings.std,
        "n": settings.prior_n,
        "fastvol": fastvol.__version__,
    }
    return Unit("prior", config, settings.prior_n, work)


def _classes(
    laboratory: Laboratory,
    settings: Settings,
    size: int,
    solutions: Tensor,
    settled: Sequence[Run],
) -> dict[str, Any]:
    """Which solutions are joined by a straight line below the threshold, up to symmetry."""
    pool = laboratory.pool(_POOL)
    inputs, targets = Sample(10, size).examples(pool)
    model = settings.net.build(pool)
    losses = _batched(model, pool.loss, inputs, targets)
    descended = [
        parameters_to_vector(laboratory.model(run).cpu().parameters()).detach() for run in settled
    ]

    def link(a: Tensor, b: Tensor) -> bool:
        return joined(aligned(a, b, settings.units, _INPUTS), b, losses, settings.threshold)

    drawn = list(solutions)
    links = torch.eye(len(drawn), dtype=torch.bool)
    for i, a in enumerate(drawn):
        for j in range(i):
            links[i, j] = links[j, i] = link(a, drawn[j])
    reached = [any(link(a, b) for b in descended) for a in drawn]
    sizes = components(links)
    return {
        "drawn": len(drawn),
        "class_sizes": sizes,
        "share_of_largest_class": sizes[0] / len(drawn) if drawn else None,
        "share_joined_to_descent": sum(reached) / len(drawn) if drawn else None,
    }


def _batched(model: nn.Module, loss: str, inputs: Tensor, targets: Tensor) -> Any:
    """Losses of many flat parameter vectors ``[k, d]`` at once."""
    weights = dict(model.named_parameters())
    sizes = [weight.numel() for weight in weights.values()]

    @torch.no_grad()
    def losses(points: Tensor) -> Tensor:
        parts = points.split(sizes, 1)
        stacked = {
            name: part.reshape(-1, *weight.shape)
            for (name, weight), part in zip(weights.items(), parts, strict=True)
        }

        def one(given: dict[str, Tensor]) -> Tensor:
            return LOSSES[loss](functional_call(model, given, inputs), targets)

        return torch.func.vmap(one)(stacked)

    return losses


def title(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    rows = [row for row in found["rows"] if row["prior_solutions"] and "largest_basin" in row]
    if not rows:
        return "No size has solutions both of the prior and of gradient descent"
    last = rows[-1]
    prior = mean_of([end["test_accuracy"] for end in last["prior_solutions"]])
    descent = mean_of(last["descent"]["test_accuracies"])
    share = last["classes"]["share_of_largest_class"]
    also = last["classes"]["share_joined_to_descent"]
    return (
        f"At {last['size']} points solutions of the prior have test accuracy {prior:.1%}, of "
        f"gradient descent {descent:.1%}; {share:.0%} of the prior's are of one class up to "
        f"symmetry, and {also:.0%} are joined to what descent finds"
    )


def draw(found: Mapping[str, Any]) -> Figure:
    """Masses, test accuracies and shares of classes against the amount of data."""
    figure, axes = figures.panels(3, title(found), width=3.9)
    masses, accuracies, shares = axes[0]
    rows = found["rows"]
    sizes = [row["size"] for row in rows]
    lines = [
        ("all solutions, prior mass", [row["prior"] for row in rows]),
        ("largest basin found × copies", [row.get("largest_times_copies", {}) for row in rows]),
        ("largest basin found", [row.get("largest_basin", {}) for row in rows]),
    ]
    for index, (label, entries) in enumerate(lines):
        figures.series(masses, sizes, entries, index, label)
    marks = [entry for _, entries in lines for entry in entries]
    figures.explain_below(figure, [masses], entries=marks)
    masses.set_ylabel("log mass under the prior, nats")

    pairs = (
        ("drawn from the prior", lambda row: [e["test_accuracy"] for e in row["prior_solutions"]]),
        ("gradient descent", lambda row: row["descent"]["test_accuracies"]),
    )
    for index, (label, values) in enumerate(pairs):
        there = [(row["size"], [100 * v for v in values(row)]) for row in rows if values(row)]
        figures.plain(
            accuracies, [s for s, _ in there], [mean_of(v) for _, v in there], index, label
        )
        for size, each in there:
            accuracies.plot(
                [size * (1 + 0.03 * index)] * len(each),
                each,
                "_",
                color=figures.COLORS[index],
                alpha=0.5,
            )
    accuracies.set_ylabel("test accuracy at the same training loss, %")
    accuracies.legend()

    classes = [row["classes"] for row in rows]
    for index, (key, label) in enumerate(
        (
            ("share_of_largest_class", "prior solutions in the largest class"),
            ("share_joined_to_descent", "prior solutions joined to descent's"),
        )
    ):
        there = [
            (s, 100 * c[key]) for s, c in zip(sizes, classes, strict=True) if c[key] is not None
        ]
        figures.plain(shares, [s for s, _ in there], [v for _, v in there], index, label)
    shares.set_ylim(0, 105)
    shares.set_ylabel("share, %")
    shares.legend()
    for ax in axes[0]:
        figures.log_axis(ax)
        ax.set_xlabel("points trained on")
    return figure
