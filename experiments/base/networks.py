"""The networks of the published experiments, with PyTorch's own initialisation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pools import Pool


@dataclass(frozen=True)
class Net:
    """Which network, and how it is initialised.

    Args:
        kind: ``"mlp"``, ``"cnn"`` or ``"gpt"``.
        hidden: widths of the hidden fully connected layers; of a GPT its one width.
        channels: of the convolutions, 3 × 3 each and followed by a 2 × 2 max-pooling.
        activation: ``"relu"`` or ``"tanh"``.
        layers, heads: of a GPT.
        init_std: of a normal law that every parameter is drawn from; 0 is PyTorch's own
            initialisation.
        seed: of the initialisation.
    """

    kind: str
    hidden: tuple[int, ...]
    channels: tuple[int, ...] = ()
    activation: str = "relu"
    layers: int = 0
    heads: int = 0
    init_std: float = 0.0
    seed: int = 0

    def build(self, pool: Pool) -> nn.Module:
        """The untrained network for this pool; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.kind == "gpt":
                window = pool.inputs.shape[1]
                return GPT(pool.classes, window, self.hidden[0], self.layers, self.heads)
            outputs = 1 if pool.loss == "bce" else pool.classes
            model = _feed_forward(self, tuple(pool.inputs.shape[1:]), outputs)
            if self.init_std:
                for parameter in model.parameters():
                    nn.init.normal_(parameter, std=self.init_std)
            return model

    def work(self, pool: Pool) -> float:
        """Multiplications for one example, forward; roughly."""
        shape = tuple(pool.inputs.shape[1:])
        if self.kind == "gpt":
            width = self.hidden[0]
            return float(shape[0] * (12 * self.layers * width**2 + width * pool.classes))
        total, width = 0.0, math.prod(shape)
        if self.channels:
            channels, *sides = shape
            for more in self.channels:
                total += 9 * channels * more * math.prod(sides)
                channels, sides = more, [side // 2 for side in sides]
            width = channels * math.prod(sides)
        for more in (*self.hidden, pool.classes):
            total += width * more
            width = more
        return total

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"hidden": list(self.hidden), "channels": list(self.channels)}


def _feed_forward(net: Net, shape: tuple[int, ...], outputs: int) -> nn.Module:
    activations: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
    activation = activations[net.activation]
    layers: list[nn.Module] = []
    width = math.prod(shape)
    if net.channels:
        channels, *sides = shape
        for more in net.channels:
            layers += [nn.Conv2d(channels, more, 3, padding=1), activation(), nn.MaxPool2d(2)]
            channels, sides = more, [side // 2 for side in sides]
        width = channels * math.prod(sides)
    if len(shape) > 1:
        layers.append(nn.Flatten())
    for more in net.hidden:
        layers += [nn.Linear(width, more), activation()]
        width = more
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class GPT(nn.Module):
    """A small GPT over characters: pre-norm, no biases, the head tied to the embedding.

    Args:
        vocabulary: characters.
        window: the longest context.
        width, layers, heads: its size.
    """

    def __init__(self, vocabulary: int, window: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(window, width)
        self.blocks = nn.ModuleList([_Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith("out.weight")
                std = 0.02 / (2 * layers) ** 0.5 if deep else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[N, vocabulary, length]``: the class axis where the losses look for it."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.attention(self.norm_attention(x)).split(width, 2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp(self.norm_mlp(x))))
