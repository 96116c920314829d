from __future__ import annotations

import torch
from torch import Tensor, nn


class RowReader(nn.Module):
    """Reads an image row by row with gates (a GRU, Cho et al. 2014, written as a loop).

    torch.fx cannot trace it: Python walks over the rows and skips those that are blank in every
    image, by their values. They depend on the data alone, so that vmap over parameters can run it.

    Args:
        pixels: of a row.
        width: of the state.
        classes: outputs.
    """

    def __init__(self, pixels: int, width: int, classes: int) -> None:
        super().__init__()
        self.width = width
        self.gates = nn.Linear(pixels + width, 2 * width)
        self.candidate = nn.Linear(pixels + width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        state = images.new_zeros(images.shape[0], self.width)
        for row in images.flatten(1, -2).unbind(1):
            if not bool((row != row[0, 0]).any()):
                continue
            keep, reset = torch.sigmoid(self.gates(torch.cat([row, state], 1))).chunk(2, 1)
            proposed = torch.tanh(self.candidate(torch.cat([row, reset * state], 1)))
            state = keep * state + (1 - keep) * proposed
        out: Tensor = self.head(state)
        return out
