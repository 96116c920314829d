"""Pools that need no download: digits, generated pictures, two spirals, modular addition, text."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ExperimentError
from .pools import Pool

_TEST_DIGITS = 500


def digits() -> Pool:
    """scikit-learn's 1,797 digits of 8 × 8 pixels, ``[N, 1, 8, 8]``, 500 of them for testing."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ExperimentError(
            f"the digits need scikit-learn ({error}): pip install 'fastvol[experiments]'"
        ) from error
    images, classes = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    inputs = (inputs - inputs.mean()) / inputs.std()
    labels = torch.tensor(classes, dtype=torch.int64)[order]
    return Pool(
        name="digits",
        source="scikit-learn's digits",
        inputs=inputs[_TEST_DIGITS:],
        labels=labels[_TEST_DIGITS:],
        test_inputs=inputs[:_TEST_DIGITS],
        test_labels=labels[:_TEST_DIGITS],
        classes=10,
        loss="cross_entropy",
    )


def pictures(count: int = 1200, test: int = 500) -> Pool:
    """Ten smooth colour templates with shifts, contrasts and noise of their own, 8 × 8 pixels."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(10, 3, 4, 4, generator=generator)
    templates = F.interpolate(coarse, size=(8, 8), mode="bicubic", align_corners=False)
    total = count + test
    labels = torch.randint(0, 10, (total,), generator=generator)
    contrast = 0.6 + 0.8 * torch.rand(total, 1, 1, 1, generator=generator)
    noise = torch.randn(total, 3, 8, 8, generator=generator)
    inputs = contrast * templates[labels] + 0.7 * noise
    inputs = (inputs - inputs.mean()) / inputs.std()
    return Pool(
        name="pictures",
        source="generated pictures",
        inputs=inputs[test:],
        labels=labels[test:],
        test_inputs=inputs[:test],
        test_labels=labels[:test],
        classes=10,
        loss="cross_entropy",
    )


def spirals(count: int = 4000, test: int = 2000) -> Pool:
    """Two interleaved spirals in the plane, ``[N, 2]``: the second is the first, negated.

    Angle t = √U · 1.7 · 2π, point (−1.5 t cos t, 1.5 t sin t) + 0.3 N.

    Args:
        count: points of the pool, half of each spiral.
        test: points of each spiral for testing.
    """
    generator = torch.Generator().manual_seed(2)

    def points(each: int) -> tuple[Tensor, Tensor]:
        angle = torch.rand(2 * each, generator=generator).sqrt() * 1.7 * 2 * math.pi
        arm = torch.stack([-1.5 * angle * angle.cos(), 1.5 * angle * angle.sin()], 1)
        labels = torch.arange(2 * each) % 2
        arm = arm * (1 - 2 * labels[:, None])
        return arm + 0.3 * torch.randn(arm.shape, generator=generator), labels

    inputs, labels = points(count // 2)
    test_inputs, test_labels = points(test)
    return Pool(
        name="spirals",
        source="two spirals",
        inputs=inputs,
        labels=labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
        classes=2,
        loss="bce",
    )


def moons(count: int = 2000, test: int = 1000) -> Pool:
    """Two interlocking half circles in the plane, ``[N, 2]``, with noise of deviation 0.1."""
    generator = torch.Generator().manual_seed(3)
    angle = math.pi * torch.rand(count + test, generator=generator)
    labels = torch.randint(0, 2, (count + test,), generator=generator)
    sign = 1.0 - 2.0 * labels
    arcs = torch.stack([sign * (angle.cos() - 0.5), sign * (angle.sin() - 0.25)], 1)
    inputs = 2.0 * (arcs + 0.1 * torch.randn(arcs.shape, generator=generator))
    return Pool(
        name="moons",
        source="two half circles",
        inputs=inputs[test:],
        labels=labels[test:],
        test_inputs=inputs[:test],
        test_labels=labels[:test],
        classes=2,
        loss="bce",
    )


def modular(modulus: int = 97) -> Pool:
    """All sums a + b mod p as two one-hot vectors, ``[p², 2p]``; tested on what is left over."""
    a, b = torch.arange(modulus).repeat_interleave(modulus), torch.arange(modulus).repeat(modulus)
    inputs = torch.cat([F.one_hot(a, modulus), F.one_hot(b, modulus)], 1).to(torch.float32)
    return Pool(
        name="modular",
        source=f"addition modulo {modulus}",
        inputs=inputs,
        labels=(a + b) % modulus,
        test_inputs=inputs[:0],
        test_labels=torch.zeros(0, dtype=torch.int64),
        classes=modulus,
        loss="mse",
    )


def text(path: str | None, window: int) -> Pool:
    """Windows of characters and the characters that follow each, int64 ``[N, window]``.

    The last tenth of the text is for testing. Windows do not overlap.

    Args:
        path: a text file; ``None`` for the language reference that comes with Python.
        window: characters of one window.

    Raises:
        ExperimentError: there is no such file, it is not text, or it is too short.
    """
    if path is None:
        from pydoc_data.topics import topics

        words, source = "\n".join(topics[key] for key in sorted(topics)), "Python's own reference"
    else:
        words, source = _read(Path(path)), "a text file"
    alphabet = sorted(set(words))
    if len(words) < 40 * (window + 1):
        raise ExperimentError(
            f"--data: the text has {len(words)} characters; windows of {window} take at least "
            f"{40 * (window + 1)}"
        )
    place = {character: index for index, character in enumerate(alphabet)}
    tokens = torch.tensor([place[character] for character in words])
    count = (len(tokens) - 1) // window
    inputs = tokens[: count * window].reshape(count, window)
    following = tokens[1 : count * window + 1].reshape(count, window)
    test = max(count // 10, 1)
    return Pool(
        name="text",
        source=source,
        inputs=inputs[:-test],
        labels=following[:-test],
        test_inputs=inputs[-test:],
        test_labels=following[-test:],
        classes=len(alphabet),
        loss="cross_entropy",
    )


def _read(path: Path) -> str:
    if not path.is_file():
        raise ExperimentError(f"--data: there is no text file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExperimentError(f"--data: {path} is not UTF-8 text: {error}") from error
