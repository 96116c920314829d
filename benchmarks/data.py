"""What the networks are trained on: MNIST and CIFAR-10 where folders are named, else generated.

Generated images have the shape of the real ones. All random numbers come from generators of their
own: making data leaves the global one alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10
# MNIST's own mean and standard deviation, as the published protocol normalises it.
_MEAN, _STD = 0.1307, 0.3081

Data = tuple[Tensor, Tensor, str]


@dataclass(frozen=True)
class Sources:
    """Folders that hold a ``train.parquet``; ``None`` stands for generated images.

    Args:
        mnist: columns ``image`` and ``label``.
        cifar: columns ``img`` (or ``image``) and ``label``.
    """

    mnist: Path | None = None
    cifar: Path | None = None


def digits(count: int, sources: Sources) -> Data:
    """Normalised images ``[count, 1, 28, 28]``, labels ``[count]``, and where they come from."""
    if sources.mnist is None:
        return *_generated(count, 1, 28, seed=20250101), "generated"
    pixels, labels = _drawn("--data", sources.mnist, count)
    return (pixels[:, None] - _MEAN) / _STD, labels, "MNIST"


def pictures(count: int, sources: Sources) -> Data:
    """Normalised images ``[count, 3, 32, 32]``, labels ``[count]``, and where they come from."""
    if sources.cifar is None:
        return *_generated(count, 3, 32, seed=20250102), "generated"
    pixels, labels = _drawn("--cifar", sources.cifar, count)
    drawn = pixels.permute(0, 3, 1, 2)
    mean, std = drawn.mean((0, 2, 3), keepdim=True), drawn.std((0, 2, 3), keepdim=True)
    return ((drawn - mean) / std).contiguous(), labels, "CIFAR-10"


def sequences(count: int, length: int, vocabulary: int) -> Data:
    """Tokens int64 ``[count, length]``, labels ``[count]``; each class prefers some."""
    generator = torch.Generator().manual_seed(20250103)
    preference = (2 * torch.randn(CLASSES, vocabulary, generator=generator)).softmax(1)
    labels = torch.arange(count) % CLASSES
    tokens = torch.multinomial(preference[labels], length, replacement=True, generator=generator)
    return tokens, labels, "generated"


def arcs(count: int) -> Data:
    """Points ``[count, 2]`` of two interlocking half circles, and which of the two."""
    angle = torch.linspace(0, torch.pi, (count + 1) // 2)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper])[:count]
    labels = (torch.arange(count) >= len(upper)).long()
    return points, labels, "generated"


def _generated(count: int, channels: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten smooth templates, each drawn with a shift of its own, another contrast, and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(CLASSES, channels, side // 4, side // 4, generator=generator)
    templates = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    labels = torch.arange(count) % CLASSES
    shifts = torch.randint(-3, 4, (count, 2), generator=generator).tolist()
    contrast = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    drawn = torch.stack(
        [
            templates[label].roll((down, right), dims=(1, 2))
            for label, (down, right) in zip(labels.tolist(), shifts, strict=True)
        ]
    )
    noise = torch.randn(count, channels, side, side, generator=generator)
    drawn = contrast * drawn + 1.0 * noise
    return (drawn - drawn.mean()) / drawn.std(), labels


def _drawn(option: str, folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Pixels between 0 and 1 and labels: a fixed draw without replacement from the table."""
    try:
        import numpy as np
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(
            f"{option} needs pyarrow and pillow ({error}); without it generated images are used"
        ) from error
    file = folder / "train.parquet"
    if not file.is_file():
        raise FileNotFoundError(f"{option}: there is no train.parquet in {folder}")
    names = parquet.read_schema(file).names
    column = "img" if "img" in names else "image"
    table: Any = parquet.read_table(file, columns=[column, "label"])
    if len(table) < count:
        raise ValueError(f"{option}: {count} images were asked for, {file.name} has {len(table)}")
    generator = torch.Generator().manual_seed(10)
    rows = table.take(torch.randperm(len(table), generator=generator)[:count].tolist())
    pixels = [
        np.asarray(Image.open(io.BytesIO(image["bytes"])))
        for image in rows.column(column).to_pylist()
    ]
    labels = torch.tensor(rows.column("label").to_pylist())
    return torch.from_numpy(np.stack(pixels)).to(torch.float32) / 255, labels
