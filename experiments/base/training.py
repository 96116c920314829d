"""Trains one network: full-batch or mini-batch AdamW, sharpness-aware on request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExperimentError
from .losses import LOSSES, Loss
from .networks import Net
from .pools import Pool
from .samples import Sample

# Below so many multiplications a step, threads cost more in barriers than they save.
_WORTH_THREADS = 3e7
_EVALUATION_BATCH = 5000


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        epochs: at most.
        batch: examples of a step; ``None`` is all of them.
        rate, decay: of AdamW.
        final_rate: to which the rate falls along a cosine; ``None`` keeps it.
        sam: ρ of sharpness-aware minimisation (Foret et al. 2021); 0 is plain AdamW.
        stop_loss: end with the first epoch whose loss on the training set is at most this.
        keep: epochs whose weights are kept beside the last one's.
    """

    epochs: int
    batch: int | None = None
    rate: float = 1e-3
    decay: float = 0.01
    final_rate: float | None = None
    sam: float = 0.0
    stop_loss: float | None = None
    keep: tuple[int, ...] = ()

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"keep": list(self.keep)}


@dataclass(frozen=True)
class Snapshot:
    """A network at the end of an epoch.

    Args:
        epoch: how many were over.
        weights: by parameter name, on the CPU.
        facts: train_loss (mean over the training set), test_loss,
            test_accuracy.
    """

    epoch: int
    weights: dict[str, Tensor]
    facts: dict[str, float]


def train(
    net: Net,
    recipe: Recipe,
    sample: Sample,
    pool: Pool,
    device: torch.device,
    tick: Callable[[float], None],
) -> list[Snapshot]:
    """Trains ``net`` on ``sample``.

    Args:
        tick: called with the share of the epochs that are over.

    Returns:
        The kept epochs, the last one last.

    Raises:
        ExperimentError: the loss became not finite.
    """
    model = net.build(pool).to(device)
    inputs, targets = (part.to(device) for part in sample.examples(pool))
    tests = sample.tests(pool)
    if inputs.dim() == 4:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    loss_fn = LOSSES[pool.loss]
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, weight_decay=recipe.decay, fused=True
    )
    schedule = None
    steps = recipe.epochs * math.ceil(len(inputs) / (recipe.batch or len(inputs)))
    if recipe.final_rate is not None:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, recipe.final_rate)
    generator = torch.Generator().manual_seed(net.seed)
    snapshots: list[Snapshot] = []

    def keep(epoch: int) -> None:
        facts = evaluate(model, pool, (inputs, targets), tests, device)
        if not math.isfinite(facts["train_loss"]):
            raise ExperimentError(
                f"the training loss is {facts['train_loss']} after {epoch} epochs"
            )
        weights = {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in model.named_parameters()
        }
        snapshots.append(Snapshot(epoch, weights, facts))

    work = len(inputs) * sum(p.numel() for p in model.parameters())
    with _threads(None if work > _WORTH_THREADS else 1):
        epoch = 0
        while epoch < recipe.epochs:
            last = 0.0
            for rows in _batches(len(inputs), recipe.batch, generator):
                batch = (inputs, targets) if rows is None else (inputs[rows], targets[rows])
                last = _step(model, optimiser, loss_fn, batch, recipe)
                if schedule is not None:
                    schedule.step()
            epoch += 1
            tick(epoch / recipe.epochs)
            if epoch in recipe.keep and epoch < recipe.epochs:
                keep(epoch)
            # The loss of the last step was taken before it: the true one is asked for when near.
            if recipe.stop_loss is not None and last <= 1.5 * recipe.stop_loss:
                reached = mean_loss(model, loss_fn, inputs, targets)
                if reached <= recipe.stop_loss:
                    break
        keep(epoch)
    return snapshots


def _batches(count: int, batch: int | None, generator: torch.Generator) -> Iterator[Tensor | None]:
    if batch is None or batch >= count:
        yield None
        return
    yield from torch.randperm(count, generator=generator).split(batch)


def _step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    loss_fn: Loss,
    batch: tuple[Tensor, Tensor],
    recipe: Recipe,
) -> float:
    inputs, targets = batch
    optimiser.zero_grad()
    loss = loss_fn(model(inputs), targets)
    loss.backward()
    if recipe.sam:
        moved = _climb(model, recipe.sam)
        optimiser.zero_grad()
        loss_fn(model(inputs), targets).backward()
        with torch.no_grad():
            for parameter, step in moved:
                parameter.sub_(step)
    optimiser.step()
    return float(loss.detach())


def _climb(model: nn.Module, rho: float) -> list[tuple[Tensor, Tensor]]:
    """Moves the parameters by ρ along the gradient; what was added, to be taken off again."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters]
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm() + 1e-12
    moved = []
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert gradient is not None
            step = gradient * (rho / norm)
            parameter.add_(step)
            moved.append((parameter, step))
    return moved


@torch.no_grad()
def mean_loss(model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor) -> float:
    """Mean loss over the examples, in batches."""
    total = 0.0
    for first in range(0, len(inputs), _EVALUATION_BATCH):
        part = slice(first, first + _EVALUATION_BATCH)
        total += float(loss_fn(model(inputs[part]), targets[part])) * len(inputs[part])
    return total / len(inputs)


@torch.no_grad()
def running_losses(model: nn.Module, pool: Pool, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss over the first 1, 2, …, N examples, float64 ``[N]``."""
    loss_fn = LOSSES[pool.loss]
    losses = []
    for first in range(0, len(inputs), _EVALUATION_BATCH):
        part = slice(first, first + _EVALUATION_BATCH)
        each = loss_fn(model(inputs[part]), targets[part], reduction="none")  # type: ignore[call-arg]
        losses.append(each.flatten(1).mean(1) if each.dim() > 1 else each)
    every = torch.cat(losses).double().cpu()
    return every.cumsum(0) / torch.arange(1, len(every) + 1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    pool: Pool,
    examples: tuple[Tensor, Tensor],
    tests: tuple[Tensor, Tensor],
    device: torch.device,
) -> dict[str, float]:
    """Loss and accuracy on the training set and on the test set."""
    model.eval()
    loss_fn = LOSSES[pool.loss]
    facts = {"train_loss": mean_loss(model, loss_fn, *examples)}
    right, loss, count = 0.0, 0.0, 0
    inputs, labels = tests
    for first in range(0, len(labels), _EVALUATION_BATCH):
        part = slice(first, first + _EVALUATION_BATCH)
        given, truth = inputs[part].to(device), labels[part].to(device)
        outputs = model(given)
        right += float(pool.right(outputs, truth).double().mean()) * len(truth)
        loss += float(loss_fn(outputs, pool.targets(truth))) * len(truth)
        count += len(truth)
    model.train()
    facts["test_loss"] = loss / count if count else math.nan
    facts["test_accuracy"] = right / count if count else math.nan
    return facts


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
