from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention of several heads, every token seeing every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = torch.chunk(self.projections(x), 3, dim=-1)
        mixed = F.scaled_dot_product_attention(
            self._split(query), self._split(key), self._split(value)
        )
        out: Tensor = self.output(mixed.transpose(-3, -2).flatten(-2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """``[…, tokens, width]`` to ``[…, heads, tokens, width / heads]``."""
        parts: Tensor = x.unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]
        return parts.transpose(-3, -2)


class Layer(nn.Module):
    """Attention, then two linear layers with GELU; each after a LayerNorm and beside a sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.contract(F.gelu(self.expand(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """A class for each sequence of tokens: pre-norm layers, then the mean over the tokens.

    Args:
        vocabulary, length: of the sequences.
        classes: outputs.
        width, heads, layers: of the network.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        classes: int,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.register_buffer("places", torch.arange(length))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layers(self.tokens(tokens) + self.positions(self.places))
        out: Tensor = self.head(self.norm(x).mean(-2))
        return out
