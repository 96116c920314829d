"""MNIST and CIFAR-10, from the hub by name or from parquet files in a folder."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ExperimentError
from .pools import Pool


@dataclass(frozen=True)
class ImageSet:
    """A data set of labelled images.

    Args:
        title: as people write it.
        hub: its name on the hub.
        folder: its name below ``--data DIR``.
        mean, std: by which pixels between 0 and 1 are normalised, a channel each.
    """

    title: str
    hub: str
    folder: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


SETS = {
    "mnist": ImageSet("MNIST", "ylecun/mnist", "mnist", (0.1307,), (0.3081,)),
    "cifar10": ImageSet(
        "CIFAR-10",
        "uoft-cs/cifar10",
        "cifar10",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
}
_SPLITS = ("train", "test")


def load_images(name: str, where: str, cache: Path) -> Pool:
    """The images of ``SETS[name]``, normalised, float32 ``[N, channels, height, width]``.

    Pixels are decoded once and kept in ``cache``.

    Args:
        name: key of :data:`SETS`.
        where: ``"hub"``, or a folder that holds ``<folder>/train.parquet`` and ``test.parquet``
            (or the two files themselves).
        cache: a folder for decoded pixels, and for what the hub sends.

    Raises:
        ExperimentError: they cannot be had.
    """
    images = SETS[name]
    if where == "hub":
        key, read = f"hub {images.hub}", _from_hub
        origin = f"{images.hub} of the hub"
    else:
        files = _files(images, Path(where))
        key = " ".join(_file_digest(path) for path in files)
        read = _from_files
        origin = "parquet files"
    kept = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    tensors = _read_kept(kept)
    if tensors is None:
        tensors = _decoded(read, images, where, cache)
        _keep(tensors, kept)
    mean = torch.tensor(images.mean)[:, None, None]
    std = torch.tensor(images.std)[:, None, None]

    def normalised(split: str) -> Tensor:
        return (tensors[f"{split}_pixels"].to(torch.float32) / 255 - mean) / std

    return Pool(
        name=name,
        source=f"{images.title}, {origin}",
        inputs=normalised("train"),
        labels=tensors["train_labels"].long(),
        test_inputs=normalised("test"),
        test_labels=tensors["test_labels"].long(),
        classes=10,
        loss="cross_entropy",
    )


def _files(images: ImageSet, folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ExperimentError(
            f"--data: there is no folder {folder}; name one that holds "
            f"{images.folder}/train.parquet and {images.folder}/test.parquet, or "
            f"--data hub for {images.hub}"
        )
    for place in (folder / images.folder, folder):
        files = [place / f"{split}.parquet" for split in _SPLITS]
        if all(path.is_file() for path in files):
            return files
    raise ExperimentError(
        f"--data: {folder} holds neither {images.folder}/train.parquet and "
        f"{images.folder}/test.parquet nor the two files themselves"
    )


def _file_digest(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def _decoded(
    read: Callable[[Any, ImageSet, str, Path], Any], images: ImageSet, where: str, cache: Path
) -> dict[str, Tensor]:
    try:
        import datasets
        from PIL import Image
    except ImportError as error:
        raise ExperimentError(
            f"{images.title} needs the extra 'experiments' ({error}): "
            "pip install 'fastvol[experiments]'"
        ) from error
    datasets.disable_progress_bars()
    table = read(datasets, images, where, cache)
    tensors = {}
    for split in _SPLITS:
        if split not in table:
            raise ExperimentError(f"--data: {images.title} from {where} has no split {split!r}")
        rows = table[split]
        column = next((name for name in ("image", "img") if name in rows.column_names), None)
        if column is None or "label" not in rows.column_names:
            raise ExperimentError(
                f"--data: {images.title} from {where} has the columns {rows.column_names}, not "
                "image (or img) and label"
            )
        rows = rows.cast_column(column, datasets.Image(decode=False))
        try:
            pixels = np.stack(
                [np.asarray(Image.open(io.BytesIO(entry["bytes"]))) for entry in rows[column]]
            )
        except (OSError, TypeError, ValueError) as error:
            raise ExperimentError(
                f"--data: {images.title} from {where} holds an image that cannot be read: {error}"
            ) from error
        channels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        tensors[f"{split}_pixels"] = torch.from_numpy(np.ascontiguousarray(channels))
        tensors[f"{split}_labels"] = torch.tensor(rows["label"], dtype=torch.uint8)
    return tensors


def _from_hub(datasets: Any, images: ImageSet, where: str, cache: Path) -> Any:
    try:
        return datasets.load_dataset(images.hub, cache_dir=str(cache / "hub"))
    except Exception as error:
        # The hub's client raises a dozen kinds, some of them its own, for one cause.
        raise ExperimentError(
            f"--data hub: {images.hub} could not be had from the hub "
            f"({_first_line(error)}). "
            "Without a network put its parquet files into a folder: "
            f"--data DIR with DIR/{images.folder}/train.parquet and test.parquet"
        ) from error


def _from_files(datasets: Any, images: ImageSet, where: str, cache: Path) -> Any:
    files = _files(images, Path(where))
    try:
        return datasets.load_dataset(
            "parquet",
            data_files=dict(zip(_SPLITS, map(str, files), strict=True)),
            cache_dir=str(cache / "parquet"),
        )
    except Exception as error:
        raise ExperimentError(
            f"--data: {files[0].parent} holds parquet files that cannot be read "
            f"({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    words = str(error).splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__


def _read_kept(path: Path) -> dict[str, Tensor] | None:
    """The pixels that an earlier run decoded; ``None`` where there are none, or damaged ones."""
    try:
        tensors = load_file(path)
        sizes = {name: len(tensors[f"{name}_labels"]) for name in _SPLITS}
        whole = all(len(tensors[f"{name}_pixels"]) == size for name, size in sizes.items())
    except (OSError, SafetensorError, KeyError):
        return None
    return tensors if whole else None


def _keep(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
