"""What the table of speeds has a row for, and how fast each is meant to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from . import problems
from .data import Sources
from .problems import Problem


@dataclass(frozen=True)
class Work:
    """A row of the table.

    Args:
        name: in the table.
        build: makes the problem; ``build(sources, count=…)``.
        few: examples in the short form.
        bisection, sweep: the least ratio that is aimed at: time of the peer over that of fastvol.
        floor: the most passes of matrix work that a direction is meant to cost, if that is stated.
        hit_or_miss: whether hit-or-miss stands beside it.
    """

    name: str
    build: Callable[..., Problem]
    few: int
    bisection: float
    sweep: float
    floor: float | None = None
    hit_or_miss: bool = False

    def problem(self, sources: Sources, short: bool) -> Problem:
        """Trained, with its data."""
        return self.build(sources, count=self.few) if short else self.build(sources)


WORKS = {
    "mlp_60": Work("MLP, 60 images", partial(problems.mnist_mlp, count=60), 8, 12, 80, 2),
    "mlp_600": Work("MLP, 600 images", problems.mnist_mlp, 24, 12, 90, 2, hit_or_miss=True),
    "mlp_6000": Work("MLP, 6000 images", partial(problems.mnist_mlp, count=6000), 60, 10, 75, 2),
    "cnn": Work("CNN, 600 images", problems.mnist_cnn, 4, 6, 45, hit_or_miss=True),
    "resnet": Work("ResNet with BatchNorm, 200 images", problems.cifar_resnet, 2, 4, 30),
    "transformer": Work("transformer, 64 sequences", problems.transformer, 4, 3, 20),
    "row_reader": Work("untraceable row reader, 100 images", problems.row_reader, 4, 1, 7),
}
