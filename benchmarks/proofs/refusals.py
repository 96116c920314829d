"""What must not be called reliable is not, and the reliable radius holds against a longer run."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastvol

from . import bodies


def run(short: bool) -> dict[str, Any]:
    """Heavy log weights, a trained digits net, and a network of MNIST's size."""
    return {
        "heavy_log_weights": heavy(short),
        "digits": trained(*digits(), n=1000 if short else 3000),
        # The short form leaves the tenfold run out.
        "mnist_sized": trained(*mnist_sized(), n=300 if short else 1000, longer=not short),
    }


def heavy(short: bool) -> list[dict[str, Any]]:
    """Star bodies whose log weights have standard deviation 20, 600 and 20,000."""
    rows = []
    for sd, d in ((20.0, 1000), (600.0, 10_000), (20_000.0, 100_000)):
        # A cap that no ray reaches makes the weights bounded, and no lighter.
        for cap in (math.inf, math.exp(6.0 * sd / d)):
            result = fastvol.estimate(
                bodies.lognormal(d, sd).model(),
                bodies.loss,
                n=500 if short else 5000,
                threshold=1.0,
                measure=fastvol.Lebesgue(cap),
            )
            row = {
                "sd": sd,
                "d": d,
                "cap": None if math.isinf(cap) else cap,
                "sd_measured": float((d * result.log_radii).std()),
                "ess": result.ess,
                "reliable": result.reliable,
            }
            rows.append(row)
            assert not result.reliable, row
    return rows


def trained(
    model: nn.Module, data: tuple[Tensor, Tensor], *, n: int, longer: bool = True
) -> dict[str, Any]:
    """Uncapped volume refused; φ at the reliable radius right against ten times the directions."""
    call: dict[str, Any] = {"data": data, "metric": "filter", "increase": 0.1, "rtol": 1e-4}
    result = fastvol.estimate(model, F.cross_entropy, n=n, seed=1, **call)
    row: dict[str, Any] = {
        "d": result.dim,
        "n": n,
        "ess": result.ess,
        "reliable": result.reliable,
        "reliable_radius": result.reliable_radius,
    }
    assert not result.reliable, row
    assert 0 < result.reliable_radius < math.inf, row
    if longer:
        reference = fastvol.estimate(model, F.cross_entropy, n=10 * n, seed=2, **call)
        here = result.profile([result.reliable_radius])
        there = reference.profile([result.reliable_radius])
        difference = float(here.log_fraction[0] - there.log_fraction[0])
        error = math.hypot(float(here.stderr[0]), float(there.stderr[0]))
        row |= {
            "log_fraction": float(here.log_fraction[0]),
            "stderr": float(here.stderr[0]),
            "log_fraction_10n": float(there.log_fraction[0]),
            "stderr_10n": float(there.stderr[0]),
            "z": difference / error,
            "reliable_radius_10n": reference.reliable_radius,
        }
        assert abs(row["z"]) < 3.5, row
        assert reference.reliable_radius >= result.reliable_radius, row
    return row


def digits() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A trained net with 6,570 parameters on scikit-learn's digits."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:300] / 16.0, dtype=torch.float32)
    y = torch.tensor(labels[:300])
    return _train(x, y, (64, 64, 32, 10), steps=300), (x, y)


def mnist_sized() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A trained 784-256-128-10 net, 235,146 parameters, on generated images."""
    generator = torch.Generator().manual_seed(0)
    templates = torch.randn(10, 784, generator=generator)
    y = torch.arange(60) % 10
    x = templates[y] + 2.0 * torch.randn(60, 784, generator=generator)
    return _train(x, y, (784, 256, 128, 10), steps=100), (x, y)


def _train(x: Tensor, y: Tensor, widths: tuple[int, ...], steps: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model
