"""The published protocol, so that it and fastvol can be evaluated on the same model.

A direction is z ~ N(0, I) over every parameter, each row or filter of it times the norm of the same
row of the weights. Coefficients are linspace(0, 1, 100)²; a direction's radius is the first
coefficient whose loss is above the threshold, times ‖z‖. Reported is log mean r^d.

The grid rounds every radius up, and at d parameters one step of it is worth d · 2 ln((k + 1)/k)
nats. So each crossing is also found by bisection between its two coefficients, along the same
direction: the difference is the grid's.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .losses import LOSSES
from .pools import Pool

_COEFFICIENTS = 100
_HALVINGS = 25


@torch.no_grad()
def published(
    model: nn.Module,
    pool: Pool,
    landscape: tuple[Tensor, Tensor],
    *,
    threshold: float,
    directions: int,
    tick: Any = lambda share: None,
) -> dict[str, Any]:
    """log mean r^d on the published grid, and with exact crossings along the same directions.

    Returns:
        grid, exact (nats; None where no direction crosses), step (nats that one step of the grid
        is worth at the longest radius), median_log_radius (exact), directions, dropped (that never
        cross).
    """
    loss_fn = LOSSES[pool.loss]
    inputs, targets = landscape
    weights = dict(model.named_parameters())
    dim = sum(weight.numel() for weight in weights.values())
    scales = {name: _row_norms(weight) for name, weight in weights.items()}
    grid = torch.linspace(0, 1, _COEFFICIENTS, dtype=torch.float64).square().tolist()
    log_grid, log_exact, highest = [], [], 0

    for seed in range(1, directions + 1):
        generator = torch.Generator().manual_seed(seed)
        z = {name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}
        length = math.sqrt(sum(float(part.double().square().sum()) for part in z.values()))
        step = {name: part.to(inputs.device) * scales[name] for name, part in z.items()}

        def above(coefficient: float, step: dict[str, Tensor] = step) -> bool:
            there = {name: weights[name] + coefficient * step[name] for name in weights}
            return not float(loss_fn(functional_call(model, there, inputs), targets)) <= threshold

        first = next((k for k, coefficient in enumerate(grid) if above(coefficient)), None)
        tick(seed / directions)
        if first is None:
            continue
        highest = max(highest, first)
        log_grid.append(_log(grid[first] * length))
        low, high = (grid[first - 1] if first else 0.0), grid[first]
        for _ in range(_HALVINGS if first else 0):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if above(middle) else (middle, high)
        log_exact.append(_log(0.5 * (low + high) * length))

    return {
        "grid": _log_mean_power(log_grid, dim),
        "exact": _log_mean_power(log_exact, dim),
        "step": 2 * dim * math.log((highest + 1) / highest) if highest else None,
        "median_log_radius": statistics.median(log_exact) if log_exact else None,
        "directions": directions,
        "dropped": directions - len(log_grid),
    }


def _row_norms(weight: Tensor) -> Tensor:
    """The norm of each row or filter, to be multiplied with; 1 for a vector."""
    if weight.dim() < 2:
        return torch.ones((), device=weight.device)
    norms = weight.flatten(1).norm(dim=1)
    return norms.reshape(-1, *[1] * (weight.dim() - 1))


def _log(radius: float) -> float:
    return math.log(radius) if radius > 0 else -math.inf


def _log_mean_power(log_radii: list[float], dim: int) -> float | None:
    if not log_radii:
        return None
    powers = dim * torch.tensor(log_radii, dtype=torch.float64)
    return float(powers.logsumexp(0)) - math.log(len(log_radii))
