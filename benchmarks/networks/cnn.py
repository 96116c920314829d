from __future__ import annotations

from torch import nn


def cnn(classes: int) -> nn.Sequential:
    """For 1×28×28: two 3×3 convolutions 1-32-64, each with ReLU and max-pool 2, then 3136-128."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def cifar_cnn(classes: int) -> nn.Sequential:
    """For 3×32×32: 3×3 convolutions 3-32-64-64, each with ReLU and max-pool 2, then 1024-64."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
