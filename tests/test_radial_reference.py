"""The NumPy radial integrals and accumulator against exact arithmetic."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest

from fastvol._reference.accumulate import LogMeanExp
from fastvol._reference.radial import (
    log_ball_volume,
    log_radial_gaussian,
    log_radial_lebesgue,
)

EPS = np.finfo(np.float64).eps
DIMS = (1, 2, 3, 10, 100, 10**4, 10**6, 10**9)


DIGITS = 40


def gauss_legendre(count):
    """Nodes and weights on [0, 1], by Newton's method from the float64 ones."""
    with mp.workdps(DIGITS):
        rule = []
        for guess in np.polynomial.legendre.leggauss(count)[0]:
            x = mp.mpf(guess)
            for _ in range(3):
                before, value = mp.mpf(1), x
                for k in range(2, count + 1):
                    before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
                slope = count * (x * value - before) / (x * x - 1)
                x -= value / slope
            rule.append(((1 + x) / 2, 1 / ((1 - x * x) * slope * slope)))
        return rule


RULE = gauss_legendre(20)


def exact_log_radial_gaussian(dim, radius, shift):
    """The log integral and its derivative by log radius, to about 20 digits.

    Gauss-Legendre in log t, relative to the largest value below the radius, in pieces over which
    the exponent changes by about two; the arguments are the float64 numbers they are.
    """
    with mp.workdps(DIGITS):
        d, b = mp.mpf(dim), mp.mpf(shift)
        rho = mp.mpf(radius)
        peak = (b + mp.sqrt(b * b + 4 * d)) / 2
        t = min(rho, peak)
        start = mp.log(t)

        def g(y):
            e = mp.exp(y)
            return d * y + e * (b - e / 2)

        top = g(start)
        width = 1 / (abs(d - t * t + b * t) + mp.sqrt(t * t + d))
        integral = mp.mpf(0)
        for sign in (-1, 1) if rho > peak else (-1,):
            end = mp.log(rho) - start if sign > 0 else mp.inf
            near, level = mp.mpf(0), top
            while level > top - 50 and near < end:
                step = width
                while level - g(start + sign * (near + step)) < 2:
                    step *= mp.mpf(1.5)
                step = min(step, end - near)
                integral += step * sum(
                    w * mp.exp(g(start + sign * (near + step * x)) - top) for x, w in RULE
                )
                near += step
                level = g(start + sign * near)
        value = top + mp.log(integral) - (d / 2 - 1) * mp.log(2) - mp.loggamma(d / 2)
        slope = mp.mpf(0) if mp.isinf(rho) else mp.exp(g(mp.log(rho)) - top) / integral
        return value, slope


@pytest.mark.parametrize("dim", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("relative", [0.3, 1.0, 1.5])
def test_the_oracle_agrees_with_the_incomplete_gamma_function(dim, relative):
    radius = relative * math.sqrt(dim)
    with mp.workdps(40):
        wanted = mp.log(mp.gammainc(mp.mpf(dim) / 2, 0, mp.mpf(radius) ** 2 / 2, regularized=True))
        assert abs(exact_log_radial_gaussian(dim, radius, 0.0)[0] - wanted) < 1e-18


@pytest.mark.parametrize("dim", DIMS)
def test_log_radial_gaussian_matches_exact_arithmetic(dim):
    root = math.sqrt(dim)
    centred = [1e-300, 1e-5 * root, 0.5 * root, root - 1, root, root + 2, 3 * root]
    cases = [(radius, 0.0) for radius in centred if radius > 0]
    for shift in (0.7, -0.7, root, -root, 30 * root, 1e5, -1e5):
        peak = root * math.exp(math.asinh(shift / (2 * root)))
        cases += [(f * peak, shift) for f in (0.5, 1 + 1 / root)] + [(1e300, shift)]
    radius, shift = np.array(cases).T
    got = log_radial_gaussian(dim, radius, shift)
    for value, (rho, b) in zip(got, cases, strict=True):
        wanted, slope = exact_log_radial_gaussian(dim, rho, b)
        tolerance = 1e-12 * max(1.0, abs(float(wanted))) + 4 * EPS * float(slope)
        assert abs(float(mp.mpf(float(value)) - wanted)) <= tolerance, (rho, b)


def test_log_radial_gaussian_at_its_ends():
    assert log_radial_gaussian(3, [0.0, np.inf]).tolist() == pytest.approx([-np.inf, 0.0])
    assert log_radial_gaussian(10**9, np.inf) == pytest.approx(0.0, abs=1e-12)
    # The whole ray in one dimension: sqrt(2 pi) Phi(b) exp(b^2/2) over sqrt(pi / 2).
    assert log_radial_gaussian(1, [np.inf], [0.0]) == pytest.approx(0.0, abs=1e-14)


def test_log_radial_gaussian_is_monotone_and_keeps_shape():
    radius = np.geomspace(1e-3, 1e3, 400).reshape(20, 20)
    got = log_radial_gaussian(50, radius, -2.0)
    assert got.shape == (20, 20)
    assert np.all(np.diff(got.ravel()) >= -1e-13)


@pytest.mark.parametrize("dim", DIMS)
def test_log_ball_volume(dim):
    with mp.workdps(40):
        d = mp.mpf(dim)
        wanted = d / 2 * mp.log(mp.pi) - mp.loggamma(d / 2 + 1)
        assert log_ball_volume(dim) == pytest.approx(float(wanted), rel=1e-14, abs=1e-13)


def test_log_radial_lebesgue():
    got = log_radial_lebesgue(7, [0.0, 1.0, 2.0, np.inf])
    wanted = [-np.inf, -math.log(7), 7 * math.log(2) - math.log(7), np.inf]
    assert got.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_ball_volume(0), "dim"),
        (lambda: log_radial_lebesgue(2, [-1.0]), "radius"),
        (lambda: log_radial_lebesgue(2, [np.nan]), "radius"),
        (lambda: log_radial_gaussian(0, [1.0]), "dim"),
        (lambda: log_radial_gaussian(2, [-1.0]), "radius"),
        (lambda: log_radial_gaussian(2, [1.0], [np.inf]), "shift"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def direct(log_weights):
    top = log_weights.max()
    w = np.exp(log_weights - top)
    n = w.size
    return {
        "log_mean": top + math.log(w.mean()),
        "stderr": w.std(ddof=1) / math.sqrt(n) / w.mean(),
        "ess": w.sum() ** 2 / np.square(w).sum(),
        "max_share": w.max() / w.sum(),
    }


@pytest.mark.parametrize("sd", [0.0, 1e-6, 1.0, 20.0, 20_000.0])
def test_log_mean_exp_in_pieces_is_the_direct_sum(sd):
    log_weights = np.random.default_rng(0).normal(1e6, 1.0, 1001) * 1.0
    log_weights = 1e6 + sd * (log_weights - 1e6)
    whole, left, right = LogMeanExp(), LogMeanExp(), LogMeanExp()
    whole.update(log_weights)
    for piece in np.array_split(log_weights[:400], 7):
        left.update(piece)
    right.update(log_weights[400:])
    right.update([])
    left.merge(right)
    left.merge(LogMeanExp())
    for got in (whole, left, LogMeanExp.from_state(left.state())):
        assert got.count == 1001
        for name, wanted in direct(log_weights).items():
            assert getattr(got, name) == pytest.approx(wanted, rel=1e-9, abs=1e-12), name


def test_log_mean_exp_with_zero_weights():
    total = LogMeanExp()
    assert math.isnan(total.log_mean)
    total.update([-np.inf, -np.inf])
    assert (total.log_mean, total.ess, total.stderr) == (-np.inf, 0.0, np.inf)
    assert math.isnan(total.max_share)
    total.update([5.0, 5.0])
    assert total.log_mean == pytest.approx(5.0 - math.log(2.0))
    assert total.ess == pytest.approx(2.0)
    other = LogMeanExp()
    other.update([-np.inf])
    total.merge(other)
    assert total.log_mean == pytest.approx(5.0 + math.log(2.0 / 5.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_log_mean_exp_refuses_what_is_not_a_weight(bad):
    with pytest.raises(ValueError, match="log_weights"):
        LogMeanExp().update([0.0, bad])
