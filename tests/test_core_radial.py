"""The radial integrals of the C++ core against mpmath in 40 digits."""

from __future__ import annotations

import functools
import math

import mpmath
import numpy as np
import pytest

from fastvol import _core

DIMS = [1, 2, 3, 10, 100, 10**4, 10**6, 10**9]
DEPTH = 110


@functools.cache
def gauss_rule(order: int) -> list[tuple[mpmath.mpf, mpmath.mpf]]:
    """Nodes and weights on [0, 1] in the working precision."""
    rule = []
    for x in np.polynomial.legendre.leggauss(order)[0]:
        root = mpmath.mpf(float(x))
        for _ in range(3):
            before, value = mpmath.mpf(1), root
            for k in range(2, order + 1):
                before, value = value, ((2 * k - 1) * root * value - (k - 1) * before) / k
            derivative = order * (root * value - before) / (root * root - 1)
            root -= value / derivative
        rule.append(((1 + root) / 2, 1 / ((1 - root * root) * derivative**2)))
    return rule


def integrate(f, low, high):
    panels = 8
    width = (high - low) / panels
    return width * mpmath.fsum(
        w * f(low + (p + x) * width) for p in range(panels) for x, w in gauss_rule(40)
    )


def oracle(dim: int, radius: float, shift: float) -> tuple[float, float]:
    """log I and d log I / d log radius, from composite Gauss quadrature about the peak."""
    with mpmath.workdps(40):
        n, b = mpmath.mpf(dim - 1), mpmath.mpf(shift)
        peak = (b + mpmath.sqrt(b * b + 4 * n)) / 2 if dim > 1 else max(b, mpmath.mpf(0))
        top = mpmath.mpf(radius) if radius < peak else peak

        def log_density(t):
            return (n * mpmath.log(t) if dim > 1 else 0) - t * t / 2 + b * t

        at_top = log_density(top) if top > 0 else mpmath.mpf(0)
        slope = abs((n / top if dim > 1 else 0) - top + b)
        curvature = 1 + (n / top**2 if dim > 1 else 0)
        left = 2 * DEPTH / (slope + mpmath.sqrt(slope**2 + 2 * DEPTH * curvature))
        right = 2 * DEPTH / (slope + mpmath.sqrt(slope**2 + 2 * DEPTH))
        if dim > 1:
            p = DEPTH / n
            right = top * min(p + mpmath.sqrt(p * p + 2 * p), right / top)

        def density(t):
            return mpmath.exp(log_density(t) - at_top)

        total = mpmath.mpf(0)
        if top > 0:
            total += integrate(density, max(top - left, mpmath.mpf(0)), top)
        if radius > top:
            total += integrate(density, top, min(mpmath.mpf(radius), top + right))
        a = mpmath.mpf(dim) / 2
        log_normaliser = (a - 1) * mpmath.log(2) + mpmath.loggamma(a)
        value = at_top + mpmath.log(total) - log_normaliser
        derivative = density(mpmath.mpf(radius)) * radius / total if radius < 1e150 else 0
        return value, float(derivative)


def assert_accurate(dim: int, radius: list[float], shift: list[float]) -> None:
    got = _core.log_radial_gaussian(dim, np.array(radius), np.array(shift))
    for rho, b, value in zip(radius, shift, got, strict=True):
        expected, slope = oracle(dim, rho, b)
        error = float(abs(mpmath.mpf(float(value)) - expected))
        eps = np.finfo(np.float64).eps
        allowed = 1e-12 * max(1.0, abs(float(expected))) + 4 * eps * slope
        assert error <= allowed, (dim, rho, b, value, float(expected), error, allowed)


@pytest.mark.parametrize("dim", DIMS)
def test_centred(dim):
    root = math.sqrt(dim)
    radius = [root * x for x in (1e-200, 1e-6, 0.1, 0.7, 0.99, 1.01, 1.5, 1e3)]
    radius += [1e-300, 1e300, math.inf]
    radius += [root + x for x in (-3.0, -1.0, 0.0, 1.0, 3.0) if root + x > 0.0]
    assert_accurate(dim, radius, [0.0] * len(radius))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "of_root_dim"])
def test_shifted(dim, relative):
    shifts = [0.3, 3.0] if relative else [1e-8, 0.5, 30.0, 1e4]
    unit = math.sqrt(dim) if relative else 1.0
    radius, shift = [], []
    for b in [sign * unit * s for s in shifts for sign in (1.0, -1.0)]:
        peak = 0.5 * (b + math.hypot(b, 2.0 * math.sqrt(dim)))
        for rho in (0.01 * peak, 0.9 * peak, peak, peak + 1.0, 1e-300, math.inf):
            radius.append(rho)
            shift.append(b)
    assert_accurate(dim, radius, shift)


def test_against_the_incomplete_gamma_function():
    radius = np.array([0.3, 1.0, 3.0, 3.5, 6.0])
    with mpmath.workdps(30):
        expected = [
            float(mpmath.log(mpmath.gammainc(5, 0, mpmath.mpf(r) ** 2 / 2, regularized=True)))
            for r in radius
        ]
    np.testing.assert_allclose(
        _core.log_radial_gaussian(10, radius), expected, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("dim", DIMS)
def test_ends(dim):
    ends = np.array([0.0, np.inf])
    np.testing.assert_allclose(
        _core.log_radial_gaussian(dim, ends), [-np.inf, 0.0], rtol=0, atol=1e-13
    )
    assert _core.log_radial_gaussian(dim, ends, np.array([5.0, 5.0]))[0] == -np.inf
    assert _core.log_radial_gaussian(dim, np.empty(0)).shape == (0,)


@pytest.mark.parametrize("dim", DIMS)
def test_no_shift_is_a_shift_of_zero(dim):
    radius = math.sqrt(dim) * np.linspace(0.0, 3.0, 31)
    values = _core.log_radial_gaussian(dim, radius)
    np.testing.assert_array_equal(values, _core.log_radial_gaussian(dim, radius, 0.0 * radius))
    assert (values <= 0.0).all()
    # Above the bulk the values are 0 but for rounding.
    assert (np.diff(values) >= -1e-14).all()


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 50, 10**4, 10**9])
def test_ball_volume(dim):
    with mpmath.workdps(40):
        a = mpmath.mpf(dim) / 2
        expected = float(a * mpmath.log(mpmath.pi) - mpmath.loggamma(a + 1))
    assert _core.log_ball_volume(dim) == pytest.approx(expected, rel=1e-14, abs=1e-13)


def test_lebesgue():
    radius = np.array([0.0, 1e-300, 2.0, np.inf])
    values = _core.log_radial_lebesgue(5, radius)
    assert values[0] == -np.inf
    assert values[3] == np.inf
    np.testing.assert_allclose(values[1:3], 5 * np.log(radius[1:3]) - np.log(5), rtol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, np.ones(1)), ValueError, "dim must lie in"),
        ((2.0, np.ones(1)), TypeError, "dim must be an integer, got float"),
        ((2, np.array([-1.0])), ValueError, "radius must not be negative"),
        ((2, np.array([np.nan])), ValueError, "radius must not be negative or nan"),
        ((2, np.ones(1, np.float32)), TypeError, "radius must have dtype float64"),
        ((2, np.ones((1, 1))), ValueError, "radius must have the shape"),
        ((2, np.ones(2), np.ones(1)), ValueError, "shift must have the shape"),
        ((2, np.ones(1), np.array([np.inf])), ValueError, "shift must be finite"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        _core.log_radial_gaussian(*arguments)
