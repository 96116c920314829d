from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut (He et al. 2016).

    Args:
        width_in, width_out: channels.
        stride: of the first convolution, and of the shortcut's 1×1 where the shape changes.
    """

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """For 3×32×32: a 3×3 stem, then three blocks, the later ones with half the side each.

    Args:
        classes: outputs.
        widths: channels of the blocks.
    """

    def __init__(self, classes: int, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(first)
        self.blocks = nn.Sequential(
            BasicBlock(first, first, 1), BasicBlock(first, second, 2), BasicBlock(second, third, 2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(third, classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(self.blocks(F.relu(self.norm(self.stem(x)))))
        out: Tensor = self.head(torch.flatten(pooled, 1))
        return out
