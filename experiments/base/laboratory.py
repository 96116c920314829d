"""What an experiment is handed: pools by name, training and measuring through the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastvol

from . import generated
from .cache import Cache, Outcome
from .errors import ExperimentError
from .images import SETS, load_images
from .networks import Net
from .pools import Pool
from .samples import Sample
from .sweep import Tick, Unit, sweep
from .training import Recipe, train
from .volumes import Measurement, measure

# Seconds a unit may take for each 10^9 multiplications, and at least: only the estimate of the time
# hangs on them.
_SECONDS_A_GIGA = 0.05
_STEP_SECONDS = 5e-4
_LOSSES_A_DIRECTION = 8


@dataclass(frozen=True)
class Training:
    """A network, how it is trained, and on what.

    Args:
        net, recipe, sample: see there.
        pool: name of the pool.
    """

    net: Net
    recipe: Recipe
    sample: Sample
    pool: str


@dataclass(frozen=True, eq=False)
class Run:
    """A training that is over.

    Args:
        training: what was asked for.
        epochs: that were kept, ascending; the last is the end.
        facts: of each kept epoch: train_loss, test_loss, test_accuracy.
        outcome: as the cache has it.
    """

    training: Training
    epochs: tuple[int, ...]
    facts: tuple[dict[str, float], ...]
    outcome: Outcome

    @property
    def end(self) -> dict[str, float]:
        """The facts of the last epoch."""
        return self.facts[-1]


@dataclass(frozen=True, eq=False)
class Basin:
    """A trained network's basin in one landscape.

    Args:
        run: the network.
        epoch: at which it was taken.
        landscape: the examples of the loss.
        how: what was measured.
        loss: the network's own loss there.
        volume: the result; ``None`` where the basin has vanished.
    """

    run: Run
    epoch: int
    landscape: Sample
    how: Measurement
    loss: float
    volume: fastvol.VolumeEstimate | None


@dataclass(frozen=True)
class Probe:
    """A basin to be measured: a run at an epoch (the last by default), in a landscape."""

    run: Run
    landscape: Sample
    how: Measurement
    epoch: int | None = None


class Laboratory:
    """Pools, training and measuring, all through one cache.

    Args:
        cache: where units of work are kept.
        data: ``"builtin"`` (digits and generated pictures stand in for the real data), ``"hub"``,
            or a folder; for text a file.
        device: of networks and data.
        quiet: no progress bars.
    """

    def __init__(
        self,
        cache: Cache,
        data: str = "builtin",
        device: str = "cpu",
        *,
        quiet: bool = False,
    ) -> None:
        self.cache = cache
        self.data = data
        self.device = _device(device)
        self.quiet = quiet
        self.outcomes: list[Outcome] = []
        self._pools: dict[str, Pool] = {}

    def pool(self, name: str, window: int = 0) -> Pool:
        """The pool of this name, loaded once.

        Args:
            name: ``"mnist"``, ``"cifar10"``, ``"digits"``, ``"spirals"``, ``"moons"``,
                ``"modular"`` or ``"text"``.
            window: characters of a window of text.

        Raises:
            ExperimentError: its data cannot be had.
        """
        if name not in self._pools:
            self._pools[name] = self._load(name, window)
        return self._pools[name]

    def _load(self, name: str, window: int) -> Pool:
        if name in SETS:
            if self.data == "builtin":
                return generated.digits() if name == "mnist" else generated.pictures()
            return load_images(name, self.data, self.cache.folder / "images")
        if name == "text":
            path = None if self.data in ("builtin", "hub") else self.data
            return generated.text(path, window)
        makers = {
            "digits": generated.digits,
            "spirals": generated.spirals,
            "moons": generated.moons,
            "modular": generated.modular,
        }
        return makers[name]()

    def sources(self) -> dict[str, dict[str, Any]]:
        """Of each pool that was used: where it comes from, its size and digest."""
        return {
            name: {"source": pool.source, "examples": len(pool), "digest": pool.digest}
            for name, pool in self._pools.items()
        }

    def sweep(self, units: Sequence[Unit], label: str) -> list[Outcome]:
        """Every unit's outcome, in order, from the cache or made now."""
        outcomes = sweep(self.cache, units, label, quiet=self.quiet)
        self.outcomes += outcomes
        return outcomes

    def train(self, trainings: Sequence[Training], label: str = "training") -> list[Run]:
        """Trains each, or takes it from the cache; in order."""
        outcomes = self.sweep([self._training_unit(training) for training in trainings], label)
        runs = []
        for training, outcome in zip(trainings, outcomes, strict=True):
            kept = outcome.facts["snapshots"]
            epochs = tuple(int(entry["epoch"]) for entry in kept)
            runs.append(Run(training, epochs, tuple(entry["facts"] for entry in kept), outcome))
        return runs

    def _training_unit(self, training: Training) -> Unit:
        net, recipe, sample = training.net, training.recipe, training.sample
        pool = self.pool(training.pool)

        def work(tick: Tick) -> Outcome:
            snapshots = train(net, recipe, sample, pool, self.device, tick)
            facts = {"snapshots": [{"epoch": s.epoch, "facts": s.facts} for s in snapshots]}
            tensors = {f"{s.epoch}/{name}": w for s in snapshots for name, w in s.weights.items()}
            return Outcome(facts, tensors)

        steps = recipe.epochs * math.ceil(sample.size / (recipe.batch or sample.size))
        flow = 1.2e-9 * recipe.epochs * sample.size * net.work(pool)
        cost = _SECONDS_A_GIGA * flow + _STEP_SECONDS * steps
        return Unit(
            "model", _training_config(training, pool), cost * (2 if recipe.sam else 1), work
        )

    def config(self, training: Training) -> dict[str, Any]:
        """JSON-ready: all that decides the outcome of a training."""
        return _training_config(training, self.pool(training.pool))

    def model(self, run: Run, epoch: int | None = None) -> nn.Module:
        """The network of a run at a kept epoch (the last by default), in eval mode."""
        tensors = run.outcome.tensors
        assert tensors is not None
        prefix = f"{run.epochs[-1] if epoch is None else epoch}/"
        model = run.training.net.build(self.pool(run.training.pool))
        weights = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        model.load_state_dict(weights, strict=False)
        return model.to(self.device).eval()

    def examples(self, sample: Sample, pool: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a sample, on the device."""
        inputs, targets = sample.examples(self.pool(pool))
        return inputs.to(self.device), targets.to(self.device)

    def measure(self, probes: Sequence[Probe], label: str = "measuring") -> list[Basin]:
        """Measures each, or takes it from the cache; in order."""
        outcomes = self.sweep([self._measuring_unit(probe) for probe in probes], label)
        return [
            Basin(
                probe.run,
                probe.epoch or probe.run.epochs[-1],
                probe.landscape,
                probe.how,
                float(outcome.facts["loss"]),
                outcome.volume,
            )
            for probe, outcome in zip(probes, outcomes, strict=True)
        ]

    def _measuring_unit(self, probe: Probe) -> Unit:
        training, how = probe.run.training, probe.how
        pool = self.pool(training.pool)
        epoch = probe.run.epochs[-1] if probe.epoch is None else probe.epoch

        def work(tick: Tick) -> Outcome:
            model = self.model(probe.run, epoch)
            return measure(model, pool, self.examples(probe.landscape, training.pool), how)

        config = {
            "model": _training_config(training, pool),
            "epoch": epoch,
            "landscape": probe.landscape.describe(pool),
            "how": how.describe(),
        }
        flow = 1e-9 * how.n * _LOSSES_A_DIRECTION * probe.landscape.size
        cost = _SECONDS_A_GIGA * flow * training.net.work(pool) + 4e-3 * how.n
        return Unit("volume", config, cost, work)


def _training_config(training: Training, pool: Pool) -> dict[str, Any]:
    return {
        "net": training.net.describe(),
        "recipe": training.recipe.describe(),
        "sample": training.sample.describe(pool),
    }


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ExperimentError(f"--device: {name} cannot be used here: {first}") from error
    return device
