"""Which examples of a pool a network is trained on, or a landscape is made of.

A base is drawn without replacement, seeded; additional examples are one more draw from the rest, of
which every size takes a prefix. So landscapes of growing data are nested, and a landscape of the
base alone is common to all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import ExperimentError
from .pools import Pool


@dataclass(frozen=True)
class Sample:
    """A base, the first of the additional examples, and what is done to them.

    Args:
        seed: of the draw.
        base: examples of the base.
        additional: clean examples beyond it.
        poison: examples beyond the base with a label that is always wrong.
        noise: inputs from a normal law of the pool's mean and deviation, with uniform labels.
        imbalance: share of the base that has one of the labels 0 and 1, and then the additional
            examples are balanced; 0 leaves both as they come.
    """

    seed: int
    base: int
    additional: int = 0
    poison: int = 0
    noise: int = 0
    imbalance: float = 0.0

    @property
    def size(self) -> int:
        """Examples in all."""
        return self.base + self.additional + self.poison + self.noise

    def landscape(self, size: int) -> Sample:
        """The clean landscape of ``size`` examples: the base, then additional ones."""
        if size < self.base:
            raise ValueError(f"size is {size}, the base alone has {self.base}")
        return replace(self, additional=size - self.base, poison=0, noise=0)

    def order(self, pool: Pool) -> Tensor:
        """Indices of the pool, int64 ``[N]``: the base, then what follows it.

        Raises:
            ExperimentError: the pool has too few.
        """
        if self.base + self.additional + self.poison > len(pool):
            raise ExperimentError(
                f"{pool.name} has {len(pool)} examples, {self.size - self.noise} were asked for"
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(pool), generator=generator)
        if self.imbalance:
            return _imbalanced(order, pool.labels, self.base, self.imbalance)
        rest = order[self.base :]
        return torch.cat([order[: self.base], rest[torch.randperm(len(rest), generator=generator)]])

    def examples(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """Inputs ``[size, …]`` and targets for the pool's loss."""
        chosen = self.order(pool)[: self.base + self.additional + self.poison]
        inputs, labels = pool.inputs[chosen], pool.labels[chosen]
        generator = torch.Generator().manual_seed(2**32 + self.seed)
        if self.poison:
            # An offset of 1 … C − 1 never gives the true class, and each wrong one equally often.
            offset = torch.randint(1, pool.classes, (self.poison,), generator=generator)
            wrong = (labels[-self.poison :] + offset) % pool.classes
            labels = torch.cat([labels[: -self.poison], wrong])
        if self.noise:
            shape = (self.noise, *inputs.shape[1:])
            noise = torch.randn(shape, generator=generator)
            noise = pool.inputs.mean() + pool.inputs.std() * noise
            uniform = torch.randint(0, pool.classes, (self.noise,), generator=generator)
            inputs, labels = torch.cat([inputs, noise]), torch.cat([labels, uniform])
        return inputs, pool.targets(labels)

    def tests(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """Inputs and labels that test a network: the pool's own, else all that was not drawn."""
        if len(pool.test_labels):
            return pool.test_inputs, pool.test_labels
        left = self.order(pool)[self.base + self.additional + self.poison :]
        return pool.inputs[left], pool.labels[left]

    def describe(self, pool: Pool) -> dict[str, Any]:
        """JSON-ready: all that decides the examples."""
        return {
            "pool": pool.name,
            "pool_digest": pool.digest,
            "seed": self.seed,
            "base": self.base,
            "additional": self.additional,
            "poison": self.poison,
            "noise": self.noise,
            "imbalance": self.imbalance,
        }


def _imbalanced(order: Tensor, labels: Tensor, base: int, share: float) -> Tensor:
    favoured = labels[order] < 2
    many = round(share * base)
    few = base - many
    if int(favoured.sum()) < many:
        raise ExperimentError(f"there are fewer than {many} examples with the labels 0 and 1")
    chosen = torch.cat([favoured.nonzero()[:many, 0], (~favoured).nonzero()[:few, 0]])
    left = torch.ones(len(order), dtype=torch.bool)
    left[chosen] = False
    rest = order[left]
    # The k-th example of each class, for k = 0, 1, 2, …
    rank = torch.zeros(len(rest), dtype=torch.int64)
    for label in labels.unique():
        mine = labels[rest] == label
        rank[mine] = torch.arange(int(mine.sum()))
    return torch.cat([order[chosen], rest[torch.argsort(rank, stable=True)]])
