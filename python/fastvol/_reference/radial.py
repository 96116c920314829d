r"""Integrals along a ray: what one radius is worth under Lebesgue and Gaussian measure.

Notation: d = dim, rho = radius, b = shift (the linear term an off-centre Gaussian leaves on a ray).
Everything is a natural logarithm in float64; the compiled routines of the same names are tested
against these.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# 20 Gauss-Legendre nodes integrate an exponential that falls by 20 nats to rounding; here the
# panels share 50 nats.
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(20)
_PANELS = 16
# The integrand is followed until it has fallen by this many nats (exp(-50) is 2e-22).
_DEPTH = 50.0
_CHUNK = 4096


def log_ball_volume(dim: int) -> float:
    r"""Log volume of the unit ball in R^dim, :math:`\log(\pi^{d/2} / \Gamma(d/2 + 1))`.

    Args:
        dim: dimension, at least 1.

    Raises:
        ValueError: ``dim`` is less than 1.
    """
    _check_dim(dim)
    return 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1.0)


def log_radial_lebesgue(dim: int, radius: npt.ArrayLike) -> Array:
    r"""Log of :math:`\int_0^\rho t^{d-1} dt`, that is d log(rho) - log(d).

    Args:
        dim: dimension d, at least 1.
        radius: [n], rho >= 0; 0 gives -inf, inf gives inf.

    Raises:
        ValueError: ``dim`` is less than 1, or a radius is negative or not a number.
    """
    _check_dim(dim)
    rho = _check_radius(radius)
    with np.errstate(divide="ignore"):
        return np.asarray(dim * np.log(rho) - math.log(dim), dtype=np.float64)


def log_radial_gaussian(
    dim: int, radius: npt.ArrayLike, shift: npt.ArrayLike | None = None
) -> Array:
    r"""Log of the part of a Gaussian's mass on a ray that lies within rho.

    .. math::
        \log \frac{\int_0^\rho t^{d-1} e^{-t^2/2 + b t} dt}{\int_0^\infty t^{d-1} e^{-t^2/2} dt}

    With b = 0 it is the log of the regularised incomplete gamma function P(d/2, rho^2/2). In
    y = log(t / sqrt(d)) the integrand has one peak, at asinh(b / (2 sqrt(d))), for every b. It is
    integrated by Gauss-Legendre panels relative to its largest value below rho, with every
    difference of exponents written without cancellation. Error against exact arithmetic, for d up
    to 1e9: ``1e-12 * max(1, |log I|) + 4 eps |d log I / d log rho|``.

    Args:
        dim: dimension d, at least 1.
        radius: [n], rho >= 0 in units of the standard deviation; 0 gives -inf, inf the whole ray.
        shift: [n] or a scalar, b in the same units; None is 0. Finite, |b| up to 1e100.

    Returns:
        [n] float64, nats.

    Raises:
        ValueError: ``dim`` is less than 1, a radius is negative or not a number, or a shift is not
            finite.
    """
    _check_dim(dim)
    rho = _check_radius(radius)
    b = np.asarray(0.0 if shift is None else shift, dtype=np.float64)
    if not np.all(np.isfinite(b)):
        raise ValueError("shift: must be finite")
    rho, b = np.broadcast_arrays(rho, b)
    shape = rho.shape
    rho, b = rho.ravel(), b.ravel()
    out = np.full(rho.shape, -np.inf)
    positive = np.flatnonzero(rho > 0)
    for first in range(0, positive.size, _CHUNK):
        rows = positive[first : first + _CHUNK]
        out[rows] = _log_gaussian(float(dim), rho[rows], b[rows])
    return out.reshape(shape)


def _log_gaussian(d: float, rho: Array, b: Array) -> Array:
    root = math.sqrt(d)
    y_peak = np.arcsinh(b / (2.0 * root))
    t_peak = root * np.exp(y_peak)
    with np.errstate(divide="ignore"):
        y_rho = np.log(rho / root)
    below = rho < t_peak
    t0 = np.where(below, rho, t_peak)

    # g(y) = d y - d/2 (exp(2y) - 1) + b t, at the base point. At the peak b t = t^2 - d makes both
    # terms of one sign.
    at_peak = d * y_peak + 0.5 * d * np.expm1(2.0 * y_peak)
    y_low = np.where(below, y_rho, 0.0)
    base = np.where(below, -0.5 * d * _em2(2.0 * y_low) + b * np.where(below, rho, 0.0), at_peak)

    # g'(y) = d - t^2 + b t, factored over its roots t_peak and -d/t_peak.
    slope = np.where(below, (t_peak - t0) * (t0 + d / t_peak), 0.0)

    def drop(eta: Array) -> Array:
        """g(y0 + eta) - g(y0), for eta of shape [n] or [n, k]: three terms of one sign."""
        column = (slice(None),) + (None,) * (eta.ndim - 1)
        second = _em2(eta)
        first = second + eta  # exp(eta) - 1
        return np.asarray(
            slope[column] * first - d * second - 0.5 * (t0 * t0)[column] * first * first
        )

    width = 1.0 / (slope + np.sqrt(t0 * t0 + d))
    left = _reach(drop, -width)
    # Where rho is below the peak nothing lies to the right of it: what is computed there, which
    # may overflow, is discarded.
    with np.errstate(invalid="ignore", over="ignore"):
        right = _reach(drop, width)
        right = np.where(below, 0.0, np.minimum(right, np.log(rho / t_peak)))
    integral = _integrate(drop, left) + _integrate(drop, right)
    return np.asarray(base + np.log(integral) - _log_normaliser(d), dtype=np.float64)


def _reach(drop: Callable[[Array], Array], step: Array) -> Array:
    """Offset, on the side of ``step``, at which the integrand has fallen by about _DEPTH nats."""
    near, far = np.zeros_like(step), step.copy()
    while True:
        short = drop(far) > -_DEPTH
        if not np.any(short):
            break
        near = np.where(short, far, near)
        far = np.where(short, 2.0 * far, far)
    for _ in range(12):
        middle = 0.5 * (near + far)
        deep = np.asarray(drop(middle) < -_DEPTH)
        near, far = np.where(deep, near, middle), np.where(deep, middle, far)
    return np.asarray(far)


def _integrate(drop: Callable[[Array], Array], reach: Array) -> Array:
    """Integral of exp(drop) between 0 and reach (of either sign), [n], positive."""
    # Narrow panels near the base point, where the integrand changes fastest.
    edges = np.linspace(0.0, 1.0, _PANELS + 1) ** 2
    panel = np.diff(edges)[:, None]
    nodes = (edges[:-1, None] + panel * 0.5 * (1.0 + _NODES)).ravel()
    weights = (panel * 0.5 * _NODE_WEIGHTS).ravel()
    values = np.exp(drop(reach[:, None] * nodes))
    return np.asarray((values @ weights) * np.abs(reach), dtype=np.float64)


def _log_normaliser(d: float) -> float:
    """Log of the integral of t^(d-1) exp(-t^2/2) over that integrand's value at sqrt(d), times t.

    Equals log(sqrt(2 pi / a) GammaStar(a) / 2), a = d/2, where GammaStar is the gamma function over
    its Stirling formula; its log is summed as a series where subtraction would cancel.
    """
    a = 0.5 * d
    if a < 20.0:
        return math.lgamma(a) - a * math.log(a) + a - math.log(2.0)
    inverse_square = 1.0 / (a * a)
    series = 0.0
    for coefficient in (1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12):
        series = series * inverse_square + coefficient
    return 0.5 * math.log(2.0 * math.pi / a) + series / a - math.log(2.0)


def _em2(x: Array) -> Array:
    """exp(x) - 1 - x, to rounding for every x."""
    small = np.abs(x) < 1.0
    z = np.where(small, x, 0.0)
    series = np.zeros_like(z)
    for k in range(20, 1, -1):
        series = series * z + 1.0 / math.factorial(k)
    with np.errstate(over="ignore"):
        return np.where(small, series * z * z, np.expm1(x) - x)


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim: must be at least 1, got {dim}")


def _check_radius(radius: npt.ArrayLike) -> Array:
    rho = np.asarray(radius, dtype=np.float64)
    if np.any(np.isnan(rho)) or np.any(rho < 0):
        raise ValueError("radius: must be non-negative numbers")
    return rho
