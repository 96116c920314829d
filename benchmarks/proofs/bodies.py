"""Star bodies of known volume, as models: the body is {L ≤ 1}, seen from the origin, where L = 0.

Most L are a power of the gauge g, the least t with w ∈ t·S; the radius along a unit vector u is
1 / g(u). Each L can go through ``torch.func``, and its gradient is finite everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special
import torch
from torch import Tensor, nn

from .laplace import Complex, log_cdf_from_laplace

Function = Callable[[Tensor], Tensor]


# Tensors among the fields have no truth value, so bodies are compared by identity.
@dataclass(frozen=True, eq=False)
class Body:
    """A body around the origin of R^d.

    Args:
        name: of the shape.
        dim: d.
        value: L, of a float64 tensor ``[d]``; it rises along every ray and is 1 at the boundary.
        log_volume: the exact answer, nats.
    """

    name: str
    dim: int
    value: Function
    log_volume: float

    def model(self) -> BodyModel:
        """A module that stands at the origin."""
        return BodyModel(self)


@dataclass(frozen=True, eq=False)
class Ellipsoid(Body):
    """L = Σ aᵢ xᵢ² with x = Qᵀ w; its Hessian is 2 Q diag(a) Qᵀ.

    Args:
        curvatures: a, ascending, float64 ``[d]``.
        rotation: Q, float64 ``[d, d]``.
    """

    curvatures: Tensor
    rotation: Tensor


class BodyModel(nn.Module):
    """L(w), float64."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(body.dim, dtype=torch.float64))
        self.value = body.value

    def forward(self) -> Tensor:
        return self.value(self.w)


def loss(model: nn.Module) -> Tensor:
    """``loss_fn`` of every body."""
    value: Tensor = model()
    return value


def log_ball(d: int) -> float:
    """Log volume of the unit ball."""
    return 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1.0)


def squared(gauge: Function) -> Function:
    """L = g²."""
    return lambda w: gauge(w).square()


def geometric(d: int, first: float, last: float) -> Tensor:
    """d values from ``first`` to ``last`` at a constant ratio, float64 ``[d]``."""
    return torch.logspace(math.log10(first), math.log10(last), d, dtype=torch.float64)


# Quadratics are sums of squares: through a norm, their Hessian at the origin would come out as 0.
def ball(d: int, radius: float = 1.0) -> Body:
    """Isotropic quadratic."""
    log_volume = log_ball(d) + d * math.log(radius)
    return Body("ball", d, lambda w: (w / radius).square().sum(), log_volume)


def ellipsoid(d: int, condition: float) -> Body:
    """Curvatures spaced geometrically from 1 to ``condition``."""
    axes = geometric(d, 1.0, condition**-0.5)
    return Body(
        f"ellipsoid, condition {condition:g}",
        d,
        lambda w: (w / axes).square().sum(),
        log_ball(d) + float(axes.log().sum()),
    )


def cube(d: int) -> Body:
    """[−1, 1]^d."""
    return Body("cube", d, squared(lambda w: w.abs().max()), d * math.log(2.0))


def l1_ball(d: int) -> Body:
    """Σ |w_i| ≤ 1."""
    log_volume = d * math.log(2.0) - math.lgamma(d + 1.0)
    return Body("l1 ball", d, squared(lambda w: w.abs().sum()), log_volume)


def simplex(d: int) -> Body:
    """The standard simplex {x ≥ 0, Σ x ≤ 1}, seen from its centroid."""
    c = 1.0 / (d + 1.0)

    def gauge(w: Tensor) -> Tensor:
        return torch.maximum((-w / c).max(), w.sum() / c).clamp(min=0.0)

    return Body("simplex", d, squared(gauge), -math.lgamma(d + 1.0))


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

    return Body(f"star, k = {k:g}", d, squared(gauge), log_ball(d) + log_mean)


def lognormal(d: int, sd: float) -> Body:
    """r(u) = exp(sd·√d·u₁ / d): log weights d·log r with standard deviation close to ``sd``.

    Its volume, a Bessel function of a very large argument, is not needed.
    """
    steepness = sd / math.sqrt(d)

    def gauge(w: Tensor) -> Tensor:
        length = w.norm()
        return length * torch.exp(-steepness * w[0] / length.clamp(min=1e-300))

    return Body(f"log weights of sd {sd:g}", d, squared(gauge), math.nan)


def random_rotation(d: int, seed: int = 0) -> Tensor:
    """Uniform over the orthogonal group, float64 ``[d, d]``."""
    normal = np.random.default_rng(seed).standard_normal((d, d))
    q, r = torch.linalg.qr(torch.from_numpy(normal))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


def rotated_ellipsoid(d: int, condition: float, seed: int = 0) -> Ellipsoid:
    """L = wᵀ Q diag(a) Qᵀ w, a spaced geometrically from 1 to ``condition``, Q random."""
    curvatures, rotation = geometric(d, 1.0, condition), random_rotation(d, seed)
    return Ellipsoid(
        f"rotated ellipsoid, condition {condition:g}",
        d,
        lambda w: (curvatures * (w @ rotation).square()).sum(),
        log_ball(d) - 0.5 * float(curvatures.log().sum()),
        curvatures,
        rotation,
    )


def wrong_preconditioner(body: Ellipsoid, sd: float = 0.5, seed: int = 0) -> Tensor:
    """P = Q diag(a^{−1/2} e^{sd·N}), N standard normal, float64 ``[d, d]``: right where sd is 0.

    The Hessian's eigenvalues that it stands for are off by e^{2·sd·N}.
    """
    normal = torch.from_numpy(np.random.default_rng(seed).standard_normal(body.dim))
    return body.rotation * (body.curvatures.rsqrt() * (sd * normal).exp())


def top_eigenvectors_preconditioner(body: Ellipsoid, k: int) -> Tensor:
    """P that whitens the k largest curvatures and takes all others for the next, ``[d, d]``."""
    if not 0 <= k < body.dim:
        raise ValueError(f"k must be from 0 to {body.dim - 1}, got {k}")
    known = body.curvatures.clamp(min=float(body.curvatures[body.dim - 1 - k]))
    return body.rotation * known.rsqrt()


def singular(d: int, gamma: float = 0.02, level: float = 1.0) -> Body:
    r"""L = (Σ_k (a_k b_k)² + γ/2·‖w‖²) / level, pairs (a_k, b_k) = (w_{2k}, w_{2k+1}).

    Valleys along the coordinate planes a_k b_k = 0, as in a product of two layers. Each pair's
    Laplace transform is √(π/s)·e^z·K₀(z) with z = s·γ²/8, and the log volume is that of their
    product, inverted. The shape depends on γ/√level alone; at the default and d = 1000, 10,000
    plain directions fall 81 to 85 nats short.

    Raises:
        ValueError: naming ``d``, where it is odd.
    """
    if d % 2:
        raise ValueError(f"d must be even, got {d}")

    def value(w: Tensor) -> Tensor:
        pairs = (w[0::2] * w[1::2]).square().sum()
        return (pairs + 0.5 * gamma * w.square().sum()) / level

    def log_laplace(s: Complex) -> Complex:
        pair: Complex = 0.5 * np.log(math.pi / s) + _log_k0_scaled(s * gamma**2 / 8.0)
        return 0.5 * d * pair

    name = f"singular, γ = {gamma:g}, level {level:g}"
    return Body(name, d, value, log_cdf_from_laplace(log_laplace, level))


# e^z·K₀(z)·√(2z/π) in powers of 1/z, to the last digit from |z| = 1000.
_K0_FAR = 1e3
_K0_SERIES = (-893025 / 3932160, 11025 / 98304, -225 / 3072, 9 / 128, -1 / 8, 1.0)


def _log_k0_scaled(z: Complex) -> Complex:
    """log(e^z·K₀(z)), complex128 ``[k]``; SciPy's ends at |z| = 1e9."""
    far = np.abs(z) > _K0_FAR
    large, small = np.where(far, z, 1.0), np.where(far, 1.0, z)
    series = 0.5 * np.log(0.5 * math.pi / large) + np.log(np.polyval(_K0_SERIES, 1.0 / large))
    log_k0: Complex = np.where(far, series, np.log(scipy.special.kve(0, small)))
    return log_k0


def lp_ball(
    d: int,
    p: float,
    axes: Tensor | Sequence[float] | None = None,
    rotation_seed: int | None = None,
) -> Body:
    """L = Σ |x_i / axes_i|^p, x = w or Qᵀ w with a random rotation; axes are 1 unless given.

    For p < 1, where the slope is infinite on the coordinate planes, the gradient there is 0.
    """
    scale = torch.ones(d, dtype=torch.float64)
    if axes is not None:
        scale = torch.as_tensor(axes, dtype=torch.float64)
        if scale.shape != (d,):
            raise ValueError(f"axes must have {d} entries, got shape {tuple(scale.shape)}")
    powers = power_sum([p] * d)
    log_volume = log_power_ball([p] * d) + float(scale.log().sum())
    name = f"l{p:g} ball"
    if rotation_seed is None:
        return Body(name, d, lambda w: powers(w / scale), log_volume)
    rotation = random_rotation(d, rotation_seed)
    return Body(f"rotated {name}", d, lambda w: powers((w @ rotation) / scale), log_volume)


def mixed_powers(powers: Sequence[float]) -> Body:
    """L = Σ |x_i|^{p_i}: along each coordinate another growth, and no gauge."""
    return Body(
        f"powers {min(powers):g} to {max(powers):g}",
        len(powers),
        power_sum(powers),
        log_power_ball(powers),
    )


def log_power_ball(powers: Sequence[float]) -> float:
    """Log volume of {Σ |x_i|^{p_i} ≤ 1}: 2^d·Π Γ(1 + 1/p_i) / Γ(1 + Σ 1/p_i) (Dirichlet)."""
    inverse = [1.0 / p for p in powers]
    log_gammas = sum(math.lgamma(1.0 + x) for x in inverse)
    return len(powers) * math.log(2.0) + log_gammas - math.lgamma(1.0 + sum(inverse))


def power_sum(powers: Sequence[float]) -> Function:
    """x ↦ Σ |x_i|^{p_i}, smooth at 0 for even p_i, without NaN in the gradients of the others."""
    if not min(powers) > 0:
        raise ValueError(f"powers must be positive, got {min(powers)}")
    exponent = torch.tensor(powers, dtype=torch.float64)
    even = exponent % 2 == 0
    if bool(even.all()):
        return lambda x: x.pow(exponent).sum()

    def value(x: Tensor) -> Tensor:
        kink = (x == 0) & ~even
        # Both branches are differentiated, so the one that is not taken must be finite too.
        base = torch.where(kink, 1.0, torch.where(even, x, x.abs()))
        return torch.where(kink, 0.0, base.pow(exponent)).sum()

    return value
