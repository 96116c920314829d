"""The trained networks that every benchmark measures, and the data they were trained on.

Real MNIST where ``--data`` names a folder with it, else generated images of the same shape. All
random numbers come from generators of their own: building a problem leaves the global one alone.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THRESHOLD = 0.1
_CLASSES = 10
# MNIST's own mean and standard deviation, as the published protocol normalises it.
_MEAN, _STD = 0.1307, 0.3081
_TRAINED = 1e-3


@dataclass(frozen=True)
class Problem:
    """A trained network, its data and its loss: everything that peers and fastvol share.

    Args:
        name: what it is called in tables.
        model: in ``eval()`` mode, float32, on the CPU.
        inputs: float32 ``[images, ...]``.
        targets: int64 ``[images]``.
        threshold: where the basin ends, nats of cross-entropy.
        source: where the images come from, in words.
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
            "images": len(self.inputs),
            "source": self.source,
            "loss": loss,
            "threshold": self.threshold,
            "metric": "filter",
        }


def mnist_mlp(data: Path | None = None) -> Problem:
    """784-256-128-10 with ReLU, 600 images."""
    inputs, targets, source = images(600, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 256),
            nn.ReLU(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, _CLASSES),
        )
    return _train("MLP", model, inputs, targets, source)


def mnist_cnn(data: Path | None = None, count: int = 60) -> Problem:
    """Two 3×3 convolutions 1-32-64, each with ReLU and max-pool 2, then 3136-128-10."""
    inputs, targets, source = images(count, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(3136, 128),
            nn.ReLU(),
            nn.Linear(128, _CLASSES),
        )
    return _train("CNN", model, inputs, targets, source)


def tiny_mlp(data: Path | None = None) -> Problem:
    """49-32-10 with ReLU on 7×7 thumbnails of 200 images: where the loop itself can be felt."""
    inputs, targets, source = images(200, data)
    thumbnails = F.avg_pool2d(inputs, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(49, 32), nn.ReLU(), nn.Linear(32, _CLASSES))
    return _train("tiny MLP", model, thumbnails, targets, source, rate=1e-2, least=3e-2)


def _train(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    source: str,
    *,
    rate: float = 1e-3,
    least: float = _TRAINED,
) -> Problem:
    """AdamW on the full batch until the loss is ``least``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    loss = math.inf
    for _ in range(2000):
        optimizer.zero_grad()
        value = F.cross_entropy(model(inputs), targets)
        value.backward()
        optimizer.step()
        loss = value.item()
        if loss < least:
            break
    else:
        raise RuntimeError(f"{name} did not train: its loss is still {loss}")
    model.eval().requires_grad_(True).zero_grad()
    return Problem(name, model, inputs, targets, THRESHOLD, source)


def images(count: int, data: Path | None) -> tuple[Tensor, Tensor, str]:
    """Normalised images ``[count, 1, 28, 28]``, labels ``[count]``, and where they come from."""
    if data is None:
        return *_generated(count), "generated"
    return *_mnist(count, data), "MNIST"


def _generated(count: int) -> tuple[Tensor, Tensor]:
    """Ten smooth templates, each drawn with a shift of its own, another contrast, and noise."""
    generator = torch.Generator().manual_seed(20250101)
    coarse = torch.randn(_CLASSES, 1, 7, 7, generator=generator)
    templates = F.interpolate(coarse, size=(28, 28), mode="bicubic", align_corners=False)
    labels = torch.arange(count) % _CLASSES
    shifts = torch.randint(-3, 4, (count, 2), generator=generator).tolist()
    contrast = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    drawn = torch.stack(
        [
            templates[label].roll((down, right), dims=(1, 2))
            for label, (down, right) in zip(labels.tolist(), shifts, strict=True)
        ]
    )
    drawn = contrast * drawn + 1.0 * torch.randn(count, 1, 28, 28, generator=generator)
    return (drawn - drawn.mean()) / drawn.std(), labels


def _mnist(count: int, data: Path) -> tuple[Tensor, Tensor]:
    """A fixed draw without replacement from ``train.parquet`` (columns ``image``, ``label``)."""
    try:
        import numpy as np
        import pyarrow.parquet as parquet
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(
            f"--data needs pyarrow and pillow ({error}); without --data generated images are used"
        ) from error
    file = data / "train.parquet"
    if not file.is_file():
        raise FileNotFoundError(f"--data: there is no train.parquet in {data}")
    table = parquet.read_table(file, columns=["image", "label"])
    generator = torch.Generator().manual_seed(10)
    rows = table.take(torch.randperm(len(table), generator=generator)[:count].tolist())
    pixels = [
        np.asarray(Image.open(io.BytesIO(image["bytes"])))
        for image in rows.column("image").to_pylist()
    ]
    inputs = torch.from_numpy(np.stack(pixels)).to(torch.float32)[:, None] / 255
    return (inputs - _MEAN) / _STD, torch.tensor(rows.column("label").to_pylist())
