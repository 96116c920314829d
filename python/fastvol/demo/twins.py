"""Trains both networks and measures their basins."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._comparison import Comparison, compare
from .._estimate import estimate
from ..result import VolumeEstimate
from .training import accuracy, load_digits, network, train

THRESHOLD = 0.1


@dataclass(frozen=True)
class Twin:
    """One of the two networks, trained and measured.

    Args:
        training_images: how many images it was trained on.
        wrong_labels: how many of these were labelled wrongly.
        steps: optimiser steps until the training loss was reached.
        training_loss: mean cross-entropy on its own training set, nats.
        clean_loss: mean cross-entropy on the clean images, nats.
        test_accuracy: share of test images classified rightly.
        estimate: its basin in the landscape of the clean images.
    """

    training_images: int
    wrong_labels: int
    steps: int
    training_loss: float
    clean_loss: float
    test_accuracy: float
    estimate: VolumeEstimate

    @property
    def mean_log_radius(self) -> float:
        """Mean over the directions of log r, in metric coordinates."""
        return float(self.estimate.log_radii.mean())

    def filled(self, radius: float) -> tuple[float, float]:
        """φ(R) and its standard error, nats."""
        at = self.estimate.profile([radius])
        return float(at.log_fraction[0]), float(at.stderr[0])


@dataclass(frozen=True)
class Demo:
    """Both networks and what their comparison says."""

    clean: Twin
    poisoned: Twin
    comparison: Comparison
    threshold: float
    seed: int

    @property
    def radius(self) -> float | None:
        """The cap R at which they are compared; ``None`` where there is none, or none is needed."""
        radius = self.comparison.radius
        return radius if math.isfinite(radius) else None


def run(
    n: int = 4000,
    seed: int = 0,
    *,
    progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Trains both networks and measures their basins.

    Args:
        n: directions for each.
        seed: of the split of the data, the wrong labels, the initial parameters, the directions.
        progress: show progress bars on a terminal.
        say: is told in a sentence what is about to happen.

    Raises:
        FastvolError: scikit-learn is not installed, or a network did not reach the training loss.
    """
    with _single_thread():
        digits = load_digits(seed)
        start = network(seed)
        truth, lies = digits.clean, digits.poison
        both = (torch.cat([truth[0], lies[0]]), torch.cat([truth[1], lies[1]]))

        def twin(name: str, data: tuple[Tensor, Tensor]) -> Twin:
            say(f"{name}: training on {len(data[1])} images, then {n} directions")
            model = copy.deepcopy(start)
            steps, training_loss = train(model, data)
            result = estimate(
                model,
                F.cross_entropy,
                n,
                data=truth,
                threshold=THRESHOLD,
                metric="filter",
                seed=seed,
                progress=progress,
            )
            return Twin(
                training_images=len(data[1]),
                wrong_labels=len(data[1]) - len(truth[1]),
                steps=steps,
                training_loss=training_loss,
                clean_loss=result.config["loss0"],
                test_accuracy=accuracy(model, digits.test),
                estimate=result,
            )

        clean, poisoned = twin("clean network", truth), twin("poisoned twin", both)
        return Demo(clean, poisoned, compare(clean.estimate, poisoned.estimate), THRESHOLD, seed)


@contextmanager
def _single_thread() -> Iterator[None]:
    """One thread: layers of 64 units are too small to share; on a busy machine a second costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
