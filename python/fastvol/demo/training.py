"""The digits, the lies, the network, and its training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FastvolError

CLEAN_IMAGES = 300
POISON_IMAGES = 100
TRAINING_LOSS = 0.01

_CLASSES = 10
_MAX_STEPS = 5000


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, split into what is trained on truly, what falsely, and what is tested on.

    Args:
        clean: inputs float32 ``[CLEAN_IMAGES, 64]`` between 0 and 1, and their classes.
        poison: inputs ``[POISON_IMAGES, 64]``, and classes that are always wrong.
        test: all other images, and their classes.
    """

    clean: tuple[Tensor, Tensor]
    poison: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits(seed: int) -> Digits:
    """scikit-learn's 1,797 digits of 8 × 8 pixels, shuffled and split.

    Raises:
        FastvolError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise FastvolError("the demo needs scikit-learn: pip install 'fastvol[demo]'") from error
    images, classes = datasets.load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(classes)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    clean, poison, test = order.tensor_split((CLEAN_IMAGES, CLEAN_IMAGES + POISON_IMAGES))
    # An offset of 1 … C − 1 never gives the true class, and each wrong one with equal chance.
    offset = torch.randint(1, _CLASSES, (len(poison),), generator=generator)
    return Digits(
        clean=(inputs[clean], targets[clean]),
        poison=(inputs[poison], (targets[poison] + offset) % _CLASSES),
        test=(inputs[test], targets[test]),
    )


def network(seed: int) -> nn.Module:
    """The untrained network: two hidden layers, 6,570 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, _CLASSES)
        )


def train(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[int, float]:
    """Full-batch Adam up to the first step at which the training loss is TRAINING_LOSS or less.

    Returns:
        The number of steps, and the loss reached, in nats.

    Raises:
        FastvolError: it was not reached.
    """
    inputs, targets = data
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(_MAX_STEPS):
        loss = F.cross_entropy(model(inputs), targets)
        if loss.item() <= TRAINING_LOSS:
            return step, loss.item()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    raise FastvolError(f"the training loss is {loss.item():.3g} after {_MAX_STEPS} steps")


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of the images whose largest logit is the true class's."""
    inputs, targets = data
    with torch.no_grad():
        return float((model(inputs).argmax(dim=1) == targets).double().mean())
