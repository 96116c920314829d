"""Log distribution functions from Laplace transforms, far tails included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize
from torch import Tensor

Complex = npt.NDArray[np.complexfloating[Any, Any]]
Vector = npt.NDArray[np.float64]
LogLaplace = Callable[[Complex], Complex]

# How far the modulus may rise above the saddle's, nats: what cancels is lost.
_HUMP_MOST = 0.5
# Where the modulus has fallen this far below the saddle's, nats, the contour ends.
_DEPTH = 50.0
_CONVERGED = 1e-12
_POINTS_MOST = 2**21
_CHUNK = 1024


def log_cdf_from_laplace(log_laplace: LogLaplace, level: float) -> float:
    r"""Log measure of {Q ≤ level} for a quantity Q ≥ 0, nats, from its transform F(s) = E e^{−sQ}.

    The measure is (1 / 2πi) ∫ e^{s·level} F(s) / s ds. The contour passes through the saddle s₀ of
    the integrand on the positive axis and bends to the left, s = s₀·(1 + iy − b·y²/4): as much
    (b ≤ 1) as it can without the modulus rising above the saddle's, so that nothing cancels. The
    trapezoid rule on it converges geometrically (Trefethen & Weideman 2014, SIAM Review 56).

    Args:
        log_laplace: log F of a complex128 array ``[k]``, real on the positive axis, with all its
            singularities on the negative one. It need not be a probability's: a volume's will do.
        level: of Q.

    Raises:
        ValueError: naming ``level``, where it is not above all that Q can fall to.
        RuntimeError: where no contour reaches twelve digits.
    """
    if not 0.0 < level < math.inf:
        raise ValueError(f"level must be positive and finite, got {level!r}")

    def exponent(s: Complex) -> Complex:
        parts = [s[i : i + _CHUNK] for i in range(0, len(s), _CHUNK)]
        return np.concatenate([p * level + log_laplace(p) - np.log(p) for p in parts])

    saddle = _saddle(exponent, level)
    log_peak = float(exponent(np.array([saddle + 0j]))[0].real)
    step = 1e-3
    log_beside = float(exponent(np.array([saddle * (1 + 1j * step)]))[0].real)
    width = min(1.0, step / math.sqrt(max(2.0 * (log_peak - log_beside), 1e-300)))
    # The exponent's own rounding is about s₀·level units of the last place.
    tolerance = max(_CONVERGED, 1e-15 * saddle * level)
    for bend in _bends():

        def integrand(y: Vector, bend: float = bend) -> Complex:
            s: Complex = saddle * (1.0 + 1j * y - 0.25 * bend * y * y)
            log_slope: Complex = np.log(1.0 + 0.5j * bend * y)
            return exponent(s) - log_peak + log_slope

        integral = _integral(integrand, width, tolerance)
        if integral is not None:
            return log_peak + math.log(saddle * integral / math.pi)
    raise RuntimeError(f"the inversion at level {level!r} does not converge on any contour")


def _bends() -> Iterator[float]:
    yield from (4.0**-k for k in range(24))
    yield 0.0


def _saddle(exponent: LogLaplace, level: float) -> float:
    """Minimum of the exponent on the positive axis, where it is convex."""

    def slope(log_s: float) -> float:
        s = math.exp(log_s)
        return float(exponent(np.array([s * (1 + 1e-5j)]))[0].imag)

    # F falls, so the slope is negative below 1 / level.
    low = high = -math.log(level)
    while slope(high) < 0.0:
        low, high = high, high + 2.0
        if high > 600.0:
            raise ValueError(f"level must be above all that Q can fall to, got {level!r}")
    if high == low:
        return math.exp(low)
    return math.exp(float(scipy.optimize.brentq(slope, low, high, xtol=1e-6)))


def _integral(
    integrand: Callable[[Vector], Complex], width: float, tolerance: float
) -> float | None:
    """∫₀^∞ Re e^{integrand(y)} dy, or ``None`` where its modulus rises or it does not converge."""
    scan = width * np.logspace(-2.0, 12.0, 1401)
    log_modulus = integrand(scan).real
    # Not "greater than": a modulus may be NaN.
    if not log_modulus.max() <= _HUMP_MOST:
        return None
    end = float(scan[min(np.flatnonzero(log_modulus > -_DEPTH)[-1] + 1, len(scan) - 1)])
    count = math.ceil(2.0 * end / width)
    if count > _POINTS_MOST:
        return None
    nodes = np.arange(1, count + 1) / count
    # The integrand is even in y: the trapezoid rule on the half line keeps its rate.
    total, before = 0.5, math.nan
    while count <= _POINTS_MOST:
        log_values = integrand(end * nodes)
        if not log_values.real.max() <= _HUMP_MOST:
            return None
        total += float(np.exp(log_values).real.sum())
        integral = total * end / count
        if abs(integral - before) <= tolerance * abs(integral):
            return integral if integral > 0.0 else None
        before = integral
        nodes = (np.arange(count) + 0.5) / count
        count *= 2
    return None


def gaussian_mass_quadratic(
    curvatures: Tensor | Vector,
    level: float,
    std: float,
    offset: Tensor | Vector | None = None,
) -> float:
    r"""Log probability of {Σ aᵢ xᵢ² ≤ level} for x ~ N(m, std²·I), nats.

    A weighted sum of noncentral chi-squares (Imhof 1961), inverted from
    E e^{−sQ} = Π (1 + 2 s aᵢ std²)^{−1/2} · exp(−s aᵢ mᵢ² / (1 + 2 s aᵢ std²)).

    Args:
        curvatures: a, positive, ``[d]``.
        level: of the sum.
        std: of every coordinate.
        offset: m in the same basis, ``[d]``; 0 where it is ``None``.

    Raises:
        ValueError: naming ``curvatures``, where one is not positive, or ``level``.
    """
    a = np.asarray(curvatures, dtype=np.float64)
    if not (a > 0.0).all():
        raise ValueError(f"curvatures must be positive, got one of {a.min():g}")
    twice = 2.0 * a * std**2
    shift = None if offset is None else a * np.asarray(offset, dtype=np.float64) ** 2

    def log_laplace(s: Complex) -> Complex:
        scaled = np.outer(s, twice)
        log_f: Complex = -0.5 * np.log1p(scaled).sum(axis=1)
        if shift is not None:
            log_f -= s * (shift / (1.0 + scaled)).sum(axis=1)
        return log_f

    return log_cdf_from_laplace(log_laplace, level)
