"""A basin of known volume, and hit-or-miss in the smallest ball that holds it."""

from __future__ import annotations

import math
import time

import torch

from .peers import log_ball_volume

_POINTS_AT_ONCE = 4096


class Ellipsoid(torch.nn.Module):
    """½ Σ h w² with curvatures h spread evenly in their logarithm.

    Args:
        dim: of w.
        condition: ratio of the largest to the smallest curvature, which is 1.
    """

    def __init__(self, dim: int, condition: float) -> None:
        super().__init__()
        self.register_buffer("curvature", torch.logspace(0, math.log10(condition), dim))
        self.w = torch.nn.Parameter(torch.zeros(dim))

    def forward(self) -> torch.Tensor:
        """The loss."""
        return 0.5 * (self.curvature * self.w.square()).sum()

    def enclosing_radius(self, threshold: float) -> float:
        """Half of the longest axis of the set where the loss is at most ``threshold``."""
        return math.sqrt(2 * threshold)

    def log_volume(self, threshold: float) -> float:
        """Of the set where the loss is at most ``threshold``, nats."""
        ball = log_ball_volume(self.w.numel(), self.enclosing_radius(threshold))
        return ball - 0.5 * float(self.curvature.double().log().sum())


def hit_or_miss(model: Ellipsoid, threshold: float, seconds: float, seed: int) -> tuple[int, int]:
    """Hits and points after so many seconds, a batch of points at a time under ``vmap``."""
    dim, ball = model.w.numel(), model.enclosing_radius(threshold)
    generator = torch.Generator().manual_seed(seed)
    evaluate = torch.func.vmap(lambda w: torch.func.functional_call(model, {"w": w}, ()))
    hits = points = 0
    deadline = time.perf_counter() + seconds
    with torch.no_grad():
        while time.perf_counter() < deadline:
            z = torch.randn(_POINTS_AT_ONCE, dim, generator=generator)
            uniform = torch.rand(_POINTS_AT_ONCE, 1, generator=generator)
            w = ball * uniform ** (1 / dim) * z / z.norm(dim=1, keepdim=True)
            hits += int((evaluate(w) <= threshold).sum())
            points += _POINTS_AT_ONCE
    return hits, points
