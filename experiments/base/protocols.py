"""The published networks and training sets, which several experiments share.

Model seed k goes with data seed 10 + k. A grid lists, for each size of the training set, the seeds
that are trained at it: the largest sizes cost most and may have fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .laboratory import Basin, Laboratory, Run, Training
from .networks import Net
from .samples import Sample
from .training import Recipe

Grid = tuple[tuple[int, tuple[int, ...]], ...]

MNIST_MLP = Net("mlp", (256, 128))
MNIST_CNN = Net("cnn", (128,), (32, 64))
CIFAR_MLP = Net("mlp", (512, 256))
CIFAR_CNN = Net("cnn", (512, 256), (32, 64, 128))
DIGITS_MLP = Net("mlp", (32,))
SPIRALS_MLP = Net("mlp", (32,) * 5)
MODULAR_MLP = Net("mlp", (250,))

MNIST_SIZES = (60, 600, 2000, 6000, 20000, 60000)
CIFAR_SIZES = (50, 500, 2000, 5000, 20000, 50000)
SPIRALS_SIZES = (20, 50, 100, 200, 400, 800)
MODULAR_SIZES = (94, 940, 1881, 3763, 5645)


# log mean r^d of the MNIST MLP of model seed 1 at threshold 0.1, with 500 directions on the
# published grid: by size of the landscape and of the training set (result files of arXiv
# 2511.04808).
_ANCHOR_SEED, _ANCHOR_DIRECTIONS, _ANCHOR_THRESHOLD = 1, 500, 0.1
_ANCHORS = {
    60: (922978, 892617, 843233, 788134, 767783, 725000),
    600: (860524, 825484, 767825, 725041, 652822),
    2000: (807227, 767825, 701457, 652734),
    6000: (747447, 678632, 652380),
    20000: (678459, 652144),
    60000: (651907,),
}


def anchor(basin: Basin, pool: str) -> dict[str, Any] | None:
    """The published number of this very basin beside fastvol's, where there is one.

    Args:
        basin: measured by plain rays.
        pool: name of the pool as it was loaded: digits stand for MNIST in the short forms.

    Returns:
        published and fastvol (nats, the latter over as many of the first directions as were
        published, if there are so many), directions, relative (fastvol over published, less 1).
    """
    training, size = basin.run.training, basin.run.training.sample.size
    landscape, volume = basin.landscape.size, basin.volume
    known = replace(training.net, seed=0) == MNIST_MLP and training.recipe == Recipe(500)
    if not known or pool != "mnist" or volume is None or training.net.seed != _ANCHOR_SEED:
        return None
    if basin.how.threshold != _ANCHOR_THRESHOLD or landscape not in _ANCHORS:
        return None
    sizes = [each for each in MNIST_SIZES if each >= landscape]
    if size not in sizes:
        return None
    published = float(_ANCHORS[landscape][sizes.index(size)])
    powers = volume.dim * volume.log_radii[:_ANCHOR_DIRECTIONS]
    top = float(powers.max())
    mine = top + math.log(float(np.exp(powers - top).mean()))
    return {
        "published": published,
        "fastvol": mine,
        "directions": len(powers),
        "relative": mine / published - 1,
    }


@dataclass(frozen=True)
class Family:
    """One network trained on nested training sets of growing size.

    Args:
        title: as people write it.
        pool: what the examples are drawn from.
        net, recipe: what is trained, and how.
        base: examples that all training sets share.
        grid: sizes, and the seeds of each.
    """

    title: str
    pool: str
    net: Net
    recipe: Recipe
    base: int
    grid: Grid

    def trainings(self) -> list[Training]:
        """One for each size and seed: equal initialisation and base for all sizes of a seed."""
        return [
            Training(
                replace(self.net, seed=seed),
                self.recipe,
                Sample(10 + seed, self.base, size - self.base),
                self.pool,
            )
            for size, seeds in self.grid
            for seed in seeds
        ]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the training sets, ascending."""
        return tuple(size for size, _ in self.grid)

    def train(self, laboratory: Laboratory) -> dict[tuple[int, int], Run]:
        """The runs by size and seed."""
        runs = laboratory.train(self.trainings(), f"{self.title}: training")
        return {(run.training.sample.size, run.training.net.seed): run for run in runs}


def grid(sizes: tuple[int, ...], seeds: int, fewer: dict[int, int] | None = None) -> Grid:
    """Seeds 1, 2, … at every size; ``fewer`` says how many where it is not ``seeds``."""
    counts = fewer or {}
    return tuple((size, tuple(range(1, 1 + counts.get(size, seeds)))) for size in sizes)


SMOKE = Family(
    "digits", "mnist", DIGITS_MLP, Recipe(200, rate=5e-3), 60, grid((60, 240, 960), seeds=1)
)


def mnist_mlp(sizes: Grid) -> Family:
    """784-256-128-10, 500 epochs of the whole batch."""
    return Family("MNIST, MLP", "mnist", MNIST_MLP, Recipe(500), 60, sizes)


def mnist_cnn(sizes: Grid) -> Family:
    """Two convolutions, 200 epochs of the whole batch."""
    return Family("MNIST, CNN", "mnist", MNIST_CNN, Recipe(200), 60, sizes)


def cifar_mlp(sizes: Grid) -> Family:
    """3072-512-256-10, 400 epochs of the whole batch."""
    return Family("CIFAR-10, MLP", "cifar10", CIFAR_MLP, Recipe(400), 50, sizes)


def cifar_cnn(sizes: Grid) -> Family:
    """Three convolutions, 200 epochs of batches of 1024."""
    return Family("CIFAR-10, CNN", "cifar10", CIFAR_CNN, Recipe(200, batch=1024), 50, sizes)
