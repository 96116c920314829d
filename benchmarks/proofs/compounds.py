"""Bodies made from bodies, a body that is no power of a gauge, and volumes by plain Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from .bodies import Body, Function, geometric, log_ball
from .laplace import Vector

_CHUNK_NUMBERS = 1 << 17
_ROOT_STEPS_MOST = 100
_ROOT_TOLERANCE = 1e-10


def product(bodies: Sequence[Body]) -> Body:
    """S₁ × S₂ × …: L is the largest of the parts' losses."""
    dims = [body.dim for body in bodies]
    spans = list(pairwise(accumulate(dims, initial=0)))

    def value(w: Tensor) -> Tensor:
        largest = bodies[0].value(w[: dims[0]])
        for body, (first, end) in zip(bodies[1:], spans[1:], strict=True):
            largest = torch.maximum(largest, body.value(w[first:end]))
        return largest

    name = " × ".join(body.name for body in bodies)
    return Body(name, sum(dims), value, sum(body.log_volume for body in bodies))


def linear_image(body: Body, matrix: Tensor) -> Body:
    """M S: L′(w) = L(M⁻¹ w).

    Args:
        matrix: M, float64 ``[d, d]``.

    Raises:
        ValueError: naming ``matrix``, where its shape is not that or it has no inverse.
    """
    if matrix.shape != (body.dim, body.dim):
        raise ValueError(f"matrix must be {body.dim} × {body.dim}, got {tuple(matrix.shape)}")
    log_abs_det = float(torch.linalg.slogdet(matrix).logabsdet)
    if not math.isfinite(log_abs_det):
        raise ValueError(f"matrix must be invertible, got log |det| {log_abs_det}")
    inverse = torch.linalg.inv(matrix)
    return Body(
        f"image of {body.name}",
        body.dim,
        lambda w: body.value(inverse @ w),
        body.log_volume + log_abs_det,
    )


def shear_image(body: Body, strength: float, seed: int = 0) -> Body:
    """{(x₁, x₂ + strength·|R x₁|) : x ∈ S}: as large as S, and bent where R x₁ changes sign.

    x₁ is the first half of the coordinates, R a fixed random matrix. The map is homogeneous of
    degree 1, so that rays go to rays and a star body to a star body.
    """
    half = body.dim // 2
    normal = np.random.default_rng(seed).standard_normal((body.dim - half, half))
    # max: a single coordinate has nothing to be sheared by.
    matrix = torch.from_numpy(normal) * (strength / math.sqrt(max(half, 1)))

    def value(w: Tensor) -> Tensor:
        return body.value(torch.cat([w[:half], w[half:] - (matrix @ w[:half]).abs()]))

    return Body(f"shear {strength:g} of {body.name}", body.dim, value, body.log_volume)


def polynomial(d: int = 6) -> Body:
    """L = Σ cᵢ xᵢ² + eᵢ xᵢ⁴ + h xᵢ² xᵢ₊₁ + k xᵢ² xᵢ₊₁², indices modulo d: radii have no scale.

    c falls from 4 to 1 and e rises from 1/2 to 8. Along a ray every term
    xᵢ²·(cᵢ + h xᵢ₊₁ + k xᵢ₊₁²) rises where 9 h² ≤ 32 cᵢ k, so the body is star-shaped.

    The volume has no closed form: it is the mean of r^d over a scrambled Sobol sequence, good to
    about 1e-4 at d = 6, 5e-3 at d = 20.
    """
    c, e = geometric(d, 4.0, 1.0), geometric(d, 0.5, 8.0)
    h, k = 3.0, 3.0

    def value(w: Tensor) -> Tensor:
        squares, following = w.square(), w.roll(-1)
        cross = h * following + k * following.square()
        return (squares * (c + e * squares + cross)).sum()

    points = scipy.stats.qmc.Sobol(d, seed=0).random_base2(17)
    normal = torch.from_numpy(scipy.special.ndtri(points))
    log_mean, _ = _log_mean_power(d * _log_radii(value, normal))
    return Body(f"polynomial, d = {d}", d, value, log_ball(d) + log_mean)


def plain_reference(body: Body, n: int, seed: int = 0) -> tuple[float, float]:
    """log mean r^d over ``n`` random directions, and its standard error, nats.

    With ``log_ball(d)`` it is the log volume. Trust the error where d·log r varies by little more
    than 1.

    Raises:
        RuntimeError: where L does not cross 1 along some ray.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK_NUMBERS // body.dim)
    log_weights = np.empty(n)
    for first in range(0, n, rows):
        count = min(rows, n - first)
        normal = torch.from_numpy(generator.standard_normal((count, body.dim)))
        log_weights[first : first + count] = body.dim * _log_radii(body.value, normal)
    return _log_mean_power(log_weights)


def _log_mean_power(log_weights: Vector) -> tuple[float, float]:
    top = float(log_weights.max())
    weights = np.exp(log_weights - top)
    mean = float(weights.mean())
    return top + math.log(mean), float(weights.std()) / mean / math.sqrt(len(weights))


def _log_radii(value: Function, normal: Tensor) -> Vector:
    """log r along each row, ``[k]``: the root of log L in log r, by secants inside brackets."""
    unit = normal / normal.norm(dim=1, keepdim=True)
    batched = torch.func.vmap(value)

    def excess(x: Tensor) -> Tensor:
        return batched(unit * x.exp()[:, None]).log()

    low = torch.full((len(unit),), -math.inf, dtype=torch.float64)
    high = -low
    before = torch.zeros(len(unit), dtype=torch.float64)
    f_before = excess(before)
    # As if L were quadratic; any power is then met by the first secant.
    x = before - 0.5 * f_before
    for _ in range(_ROOT_STEPS_MOST):
        f = excess(x)
        if bool((f.abs() <= _ROOT_TOLERANCE).all()):
            log_radii: Vector = x.numpy()
            return log_radii
        low = torch.where(f < 0, torch.maximum(low, x), low)
        high = torch.where(f > 0, torch.minimum(high, x), high)
        slope = ((f - f_before) / (x - before)).clamp(0.05, 100.0)
        step = x - f / torch.where(slope.isfinite(), slope, 2.0)
        inside = (step >= low) & (step <= high)
        before, f_before = x, f
        x = torch.where(inside, step, 0.5 * (low + high))
    missing = int((~(excess(x).abs() <= _ROOT_TOLERANCE)).sum())
    raise RuntimeError(f"L does not cross 1 along {missing} of {len(unit)} rays")
