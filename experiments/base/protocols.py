"""The published networks and training sets, which several experiments share.

Model seed k goes with data seed 10 + k. A grid lists, for each size of the training set, the seeds
that are trained at it: the largest sizes cost most and may have fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .laboratory import Laboratory, Run, Training
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
