"""Star bodies of known volume, as models: L is a power of the gauge, and the threshold is 1.

The gauge g of a body S is the least t with w ∈ t·S; the radius along a unit vector u is 1 / g(u).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import scipy.special
import torch
from torch import Tensor, nn

Gauge = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Body:
    """A body around the origin of R^d.

    Args:
        name: of the shape.
        dim: d.
        gauge: g, of a float64 tensor ``[d]``.
        log_volume: the exact answer, nats.
    """

    name: str
    dim: int
    gauge: Gauge
    log_volume: float

    def model(self) -> BodyModel:
        """A module that stands at the origin."""
        return BodyModel(self)


class BodyModel(nn.Module):
    """L(w) = g(w)², float64."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(body.dim, dtype=torch.float64))
        self.gauge = body.gauge

    def forward(self) -> Tensor:
        return self.gauge(self.w).square()


def loss(model: nn.Module) -> Tensor:
    """``loss_fn`` of every body."""
    value: Tensor = model()
    return value


def log_ball(d: int) -> float:
    """Log volume of the unit ball."""
    return 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1.0)


def ball(d: int, radius: float = 1.0) -> Body:
    """Isotropic quadratic."""
    return Body("ball", d, lambda w: w.norm() / radius, log_ball(d) + d * math.log(radius))


def ellipsoid(d: int, condition: float) -> Body:
    """Curvatures spaced geometrically from 1 to ``condition``."""
    axes = torch.logspace(0.0, -0.5 * math.log10(condition), d, dtype=torch.float64)
    return Body(
        f"ellipsoid, condition {condition:g}",
        d,
        lambda w: (w / axes).norm(),
        log_ball(d) + float(axes.log().sum()),
    )


def cube(d: int) -> Body:
    """[−1, 1]^d."""
    return Body("cube", d, lambda w: w.abs().max(), d * math.log(2.0))


def l1_ball(d: int) -> Body:
    """Σ |w_i| ≤ 1."""
    return Body("l1 ball", d, lambda w: w.abs().sum(), d * math.log(2.0) - math.lgamma(d + 1.0))


def simplex(d: int) -> Body:
    """The standard simplex {x ≥ 0, Σ x ≤ 1}, seen from its centroid."""
    c = 1.0 / (d + 1.0)

    def gauge(w: Tensor) -> Tensor:
        return torch.maximum((-w / c).max(), w.sum() / c).clamp(min=0.0)

    return Body("simplex", d, gauge, -math.lgamma(d + 1.0))


def star(d: int, k: float) -> Body:
    r"""Not convex: r(u)^d = exp(k·u₁), whose mean is Γ(ν+1)·(2/k)^ν·I_ν(k), ν = d/2 − 1."""
    nu = 0.5 * d - 1.0
    log_mean = (
        math.lgamma(nu + 1.0)
        + nu * math.log(2.0 / k)
        + math.log(float(scipy.special.ive(nu, k)))
        + k
    )

    def gauge(w: Tensor) -> Tensor:
        length = w.norm()
        first = w[0] / length.clamp(min=1e-300)
        return length * torch.exp(-k * first / d)

    return Body(f"star, k = {k:g}", d, gauge, log_ball(d) + log_mean)


def lognormal(d: int, sd: float) -> Body:
    """r(u) = exp(sd·√d·u₁ / d): log weights d·log r with standard deviation close to ``sd``.

    Its volume, a Bessel function of a very large argument, is not needed.
    """
    steepness = sd / math.sqrt(d)

    def gauge(w: Tensor) -> Tensor:
        length = w.norm()
        return length * torch.exp(-steepness * w[0] / length.clamp(min=1e-300))

    return Body(f"log weights of sd {sd:g}", d, gauge, math.nan)
