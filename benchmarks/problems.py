"""The trained networks that every benchmark measures, with their data, loss and threshold.

All random numbers come from generators of their own: building a problem leaves the global one
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data, networks
from .data import CLASSES, Data, Sources

# The published protocol's. Training ends at a hundredth of it, or a small part of it.
THRESHOLD = 0.1
_TRAINED = 1e-3
_STEPS = 2000
_VOCABULARY, _LENGTH = 64, 32
_GENERATED = Sources()


@dataclass(frozen=True)
class Problem:
    """A trained network, its data and its loss: everything that peers and fastvol share.

    Args:
        name: what it is called in tables.
        model: in ``eval()`` mode, float32, on the CPU.
        inputs: ``[examples, ...]``, float32, or int64 where they are tokens.
        targets: int64 ``[examples]``.
        threshold: where the basin ends, nats of cross-entropy.
        source: where the examples come from, in words.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    threshold: float
    source: str

    @property
    def dim(self) -> int:
        """d, the number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def scale(self) -> dict[str, Tensor]:
        """The filter metric by parameter: norm of each output row or filter, 1 for 1-D ones.

        In float64, rounded once, so that it is the scale that fastvol uses.
        """
        scale = {}
        for name, parameter in self.model.named_parameters():
            weight = parameter.detach()
            if weight.dim() < 2:
                scale[name] = torch.ones_like(weight)
                continue
            norm = weight.double().reshape(weight.shape[0], -1).norm(dim=1).to(weight.dtype)
            scale[name] = norm.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight).contiguous()
        return scale

    def describe(self) -> dict[str, object]:
        """JSON-ready."""
        with torch.no_grad():
            loss = float(F.cross_entropy(self.model(self.inputs), self.targets))
        return {
            "parameters": self.dim,
            "examples": len(self.inputs),
            "source": self.source,
            "loss": loss,
            "threshold": self.threshold,
            "metric": "filter",
        }


def mnist_mlp(
    sources: Sources = _GENERATED, count: int = 600, hidden: tuple[int, ...] = (256, 128)
) -> Problem:
    """784-256-128-10 with ReLU on ``count`` digits."""
    return _trained("MLP", lambda: networks.mlp(784, *hidden, CLASSES), data.digits(count, sources))


def mnist_cnn(sources: Sources = _GENERATED, count: int = 600) -> Problem:
    """See :func:`networks.cnn`, on ``count`` digits."""
    return _trained("CNN", lambda: networks.cnn(CLASSES), data.digits(count, sources))


def cifar_resnet(sources: Sources = _GENERATED, count: int = 200) -> Problem:
    """See :class:`networks.ResNet`, on ``count`` pictures."""
    return _trained(
        "ResNet",
        lambda: networks.ResNet(CLASSES),
        data.pictures(count, sources),
        rate=1e-2,
        least=5e-3,
    )


def transformer(sources: Sources = _GENERATED, count: int = 64) -> Problem:
    """See :class:`networks.Transformer`, on ``count`` sequences of 32 tokens, a label each."""
    del sources
    return _trained(
        "transformer",
        lambda: networks.Transformer(_VOCABULARY, _LENGTH, CLASSES),
        data.sequences(count, _LENGTH, _VOCABULARY),
        rate=1e-2,
    )


def row_reader(sources: Sources = _GENERATED, count: int = 100) -> Problem:
    """See :class:`networks.RowReader`, which cannot be traced, on ``count`` digits."""
    return _trained(
        "row reader",
        lambda: networks.RowReader(28, 64, CLASSES),
        data.digits(count, sources),
        rate=1e-2,
    )


def tiny_mlp(sources: Sources = _GENERATED) -> Problem:
    """49-32-10 with ReLU on 7×7 thumbnails of 200 images: where the loop itself can be felt."""
    inputs, targets, source = data.digits(200, sources)
    thumbnails = F.avg_pool2d(inputs, 4)
    return _trained(
        "tiny MLP",
        lambda: networks.mlp(49, 32, CLASSES),
        (thumbnails, targets, source),
        rate=1e-2,
        least=3e-2,
    )


def arcs_mlp() -> Problem:
    """2-16-2 with ReLU on 32 points of two interlocking arcs: the least that is still a network."""
    return _trained(
        "2-16-2 MLP", lambda: networks.mlp(2, 16, 2), data.arcs(32), rate=3e-2, least=1e-2
    )


def growing_mlp(sources: Sources, counts: list[int]) -> dict[int, Problem]:
    """One MLP as in :func:`mnist_mlp`, trained on at most 6000 digits, over more and more of them.

    The threshold lies 0.1 above the loss of each: the network has not seen the later digits.
    """
    inputs, targets, source = data.digits(max(counts), sources)
    seen = min(6000, max(counts))
    trained = _trained(
        "MLP",
        lambda: networks.mlp(784, 256, 128, CLASSES),
        (inputs[:seen], targets[:seen], source),
    )
    problems = {}
    for count in counts:
        own = (inputs[:count], targets[:count])
        threshold = THRESHOLD + _loss(trained.model, *own)
        problems[count] = Problem("MLP", trained.model, *own, threshold, source)
    return problems


def _trained(
    name: str,
    build: Callable[[], nn.Module],
    examples: Data,
    *,
    rate: float = 1e-3,
    least: float = _TRAINED,
) -> Problem:
    """AdamW on the full batch until the loss, in ``eval()`` mode, is ``least``."""
    inputs, targets, source = examples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        # The statistics of the latest full batch, so that both modes tell nearly the same loss.
        module.momentum = 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    loss = math.inf
    for _ in range(_STEPS):
        optimizer.zero_grad()
        value = F.cross_entropy(model(inputs), targets)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss = value.item()
        if norms and loss < least:
            loss = _loss(model, inputs, targets)
        if loss < least:
            break
    else:
        raise RuntimeError(f"{name} did not train: its loss is still {loss}")
    model.eval().requires_grad_(True).zero_grad()
    return Problem(name, model, inputs, targets, THRESHOLD, source)


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """In ``eval()`` mode, which is then left as it was."""
    training = model.training
    model.eval()
    with torch.no_grad():
        loss = F.cross_entropy(model(inputs), targets).item()
    model.train(training)
    return loss
