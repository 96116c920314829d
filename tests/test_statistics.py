"""The gate, the error and the interval of a log mean."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastvol._statistics import (
    interval,
    lower_bound,
    pareto_shape,
    summarise,
    unit_log_weights,
    with_extra_error,
)


def directions(rng, n, dim):
    z = rng.standard_normal((n, dim))
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def ellipsoid_log_weights(rng, n, eigenvalues):
    """d log r for u' diag(eigenvalues) u r^2 = 1; the log mean is -sum(log eigenvalues) / 2."""
    u = directions(rng, n, eigenvalues.size)
    return -0.5 * eigenvalues.size * np.log(np.square(u) @ eigenvalues)


def cube_log_weights(rng, n, dim):
    return -dim * np.log(np.abs(directions(rng, n, dim)).max(axis=1))


def log_ball(dim):
    return 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1)


def test_moments_are_those_of_the_weights():
    log_weights = np.random.default_rng(1).normal(3.0, 0.7, 500) + 4000.0
    w = np.exp(log_weights - 4000.0)
    got = summarise(log_weights, bounded=True)
    assert got.n == 500
    assert got.log_mean == pytest.approx(4000.0 + math.log(w.mean()), rel=1e-14)
    assert got.stderr == pytest.approx(w.std(ddof=1) / math.sqrt(500) / w.mean(), rel=1e-12)
    assert got.ess == pytest.approx(w.sum() ** 2 / np.square(w).sum(), rel=1e-12)
    assert got.max_share == pytest.approx(w.max() / w.sum(), rel=1e-12)
    skewness = np.mean((w - w.mean()) ** 3) / np.mean((w - w.mean()) ** 2) ** 1.5
    assert got.skewness == pytest.approx(skewness, rel=1e-10)
    assert got.n_half_max == np.count_nonzero(w > w.max() / 2)
    assert math.isnan(got.pareto_k)


def test_pairs_are_one_unit_and_an_odd_last_entry_stands_alone():
    log_weights = np.log(np.array([1.0, 3.0, 5.0, 7.0, 2.0]))
    units = unit_log_weights(log_weights, paired=True)
    assert np.exp(units) == pytest.approx([2.0, 6.0, 2.0])
    got = summarise(log_weights, bounded=True, paired=True)
    assert got.n == 3
    assert got.log_mean == pytest.approx(math.log(10.0 / 3.0))


@pytest.mark.parametrize("sd", [20.0, 600.0, 20_000.0])
@pytest.mark.parametrize("n", [1_000, 10_000, 100_000])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_wild_log_weights_are_refused(sd, n, bounded, paired):
    log_weights = np.random.default_rng(n).normal(0.0, sd, n)
    got = summarise(log_weights, bounded=bounded, paired=paired)
    assert not got.reliable
    assert got.reasons
    assert bounded or got.pareto_k > 0.5
    low, high = interval(got)
    assert low <= got.log_mean <= high
    assert lower_bound(got) == pytest.approx(got.log_mean - math.log(20.0))


@pytest.mark.parametrize("dim", [6_570, 100_000])
def test_an_underflowing_tail_counts_as_infinite(dim):
    log_weights = dim * np.random.default_rng(0).normal(0.0, 0.3, 10_000)
    assert pareto_shape(log_weights) == math.inf


def test_a_tail_of_ties_counts_as_infinite():
    log_weights = np.zeros(10_000)
    log_weights[:40] = 3.0
    assert pareto_shape(log_weights) == math.inf
    assert not summarise(log_weights, bounded=False).reliable


@pytest.mark.parametrize("n", [300, 1024, 10_000, 12_345])
def test_pareto_shape_is_that_of_all_weights(n):
    from arviz_stats.base import array_stats

    generator = np.random.default_rng(n)
    for log_weights in (generator.normal(size=n), generator.exponential(0.7, size=n)):
        relative = log_weights - log_weights.max()
        assert pareto_shape(log_weights) == array_stats.psislw(-relative)[1]


@pytest.mark.parametrize("shape", [0.2, 0.4, 0.7, 1.5])
def test_pareto_shape_of_a_pareto_law(shape):
    u = np.random.default_rng(3).random(100_000)
    # The prior at 1/2 and the finite tail leave some 0.1 of error.
    assert pareto_shape(-shape * np.log(u)) == pytest.approx(shape, abs=0.15)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("n", [2, 99, 100, 1000])
def test_a_constant_weight_is_exact_and_reliable_from_a_hundred_units_on(bounded, n):
    rounding = 1e-13 * np.random.default_rng(0).standard_normal(n)
    got = summarise(1234.5 + rounding, bounded=bounded)
    assert got.reliable is (n >= 100)
    assert got.constant
    assert got.stderr == 0.0
    assert interval(got) == pytest.approx((1234.5, 1234.5))


def test_a_few_equal_weights_do_not_hide_another_value():
    # In the line a segment from -2 to 1 has two radii; three directions often meet one of them.
    assert not summarise(np.zeros(3), bounded=False).reliable


def test_what_the_search_blurs_has_no_tail_but_keeps_its_error():
    # A ball whose radii are known to 1e-4 at d = 100.
    blur = 1e-4 * np.random.default_rng(0).standard_t(3, 1000)
    log_weights = 100 * np.clip(blur, -2e-4, 2e-4)
    log_weights[:40] = log_weights.max()
    assert not summarise(log_weights, bounded=False).reliable
    got = summarise(log_weights, bounded=False, resolution=4 * 100 * 1e-4)
    assert got.reliable
    assert got.constant
    w = np.exp(log_weights)
    assert got.stderr == pytest.approx(w.std(ddof=1) / math.sqrt(1000) / w.mean())
    # However coarse the search says it was, a spread of 0.1 nats is one of the weights.
    assert not summarise(10 * log_weights, bounded=False, resolution=4.0).constant


def test_one_unit_is_never_reliable():
    got = summarise([3.0], bounded=True)
    assert not got.reliable
    assert got.stderr == math.inf
    assert interval(got) == (-math.inf, math.inf)
    assert not summarise([3.0, 3.0], bounded=True, paired=True).reliable


def test_all_weights_zero_is_legal_and_not_reliable():
    got = summarise(np.full(1000, -np.inf), bounded=True)
    assert got.log_mean == -math.inf
    assert not got.reliable
    assert interval(got) == (-math.inf, math.inf)
    assert lower_bound(got) == -math.inf


def test_some_zero_weights_are_counted():
    log_weights = np.where(np.arange(1000) % 2, 0.0, -np.inf)
    got = summarise(log_weights, bounded=True)
    assert got.reliable
    assert got.log_mean == pytest.approx(-math.log(2.0))
    assert got.stderr == pytest.approx(1 / math.sqrt(999))


def test_bounded_weights_need_a_hundred_units_near_the_largest():
    base = np.full(100_000, -2.0)
    for count, wanted in ((99, False), (100, True)):
        log_weights = base.copy()
        log_weights[:count] = 0.0
        assert summarise(log_weights, bounded=True).reliable is wanted


def test_an_unexamined_tail_is_not_reliable():
    log_weights = np.random.default_rng(0).normal(0.0, 0.1, 1000)
    assert summarise(log_weights, bounded=False).reliable
    got = summarise(log_weights, bounded=False, need_pareto=False)
    assert not got.reliable
    assert "not examined" in got.reasons[0]


def test_reasons_name_what_failed():
    got = summarise(np.append(np.zeros(500), 8.0), bounded=True)
    text = " ".join(got.reasons)
    assert "effective sample size" in text
    assert "of the total weight" in text
    assert "half the largest weight" in text


@pytest.mark.parametrize("bad", [[], [[1.0]], [np.nan, 1.0], [np.inf, 1.0]])
def test_bad_weights_are_refused(bad):
    with pytest.raises(ValueError, match="log_weights"):
        summarise(bad, bounded=True)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, math.nan])
def test_bad_levels_are_refused(level):
    got = summarise([1.0, 2.0], bounded=True)
    with pytest.raises(ValueError, match="level"):
        interval(got, level)
    with pytest.raises(ValueError, match="level"):
        lower_bound(got, level)


@pytest.mark.parametrize("sd", [0.01, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("n", [2, 10, 1000])
def test_the_interval_grows_with_its_level_and_is_never_nan(sd, sign, n):
    z = np.abs(np.random.default_rng(n).standard_normal(n))
    got = summarise(sign * sd * z, bounded=True)
    ends = np.array([interval(got, level) for level in (0.001, 0.1, 0.5, 0.9, 0.99, 0.999999)])
    assert np.all(np.isfinite(ends))
    assert np.all(ends[:, 0] <= got.log_mean)
    assert np.all(ends[:, 1] >= got.log_mean)
    assert np.all(np.diff(ends[:, 0]) <= 0)
    assert np.all(np.diff(ends[:, 1]) >= 0)


def test_the_interval_is_longer_on_the_side_of_the_skewness():
    heavy = summarise(np.random.default_rng(0).normal(0.0, 1.5, 3000), bounded=True)
    low, high = interval(heavy)
    assert high - heavy.log_mean > 1.05 * (heavy.log_mean - low)


def test_weights_at_their_bound_leave_room_for_what_was_not_met():
    got = summarise(np.zeros(1000), bounded=True, log_bound=0.0)
    low, high = interval(got, 0.95)
    assert low == pytest.approx(-math.log(20.0) / 1000)
    assert high == 0.0
    elsewhere = summarise(np.full(1000, -1.0), bounded=True, log_bound=0.0)
    assert interval(elsewhere) == pytest.approx((-1.0, -1.0))


@pytest.mark.parametrize("cut", [0.002, 0.01, 0.05])
def test_intervals_under_a_cap_cover_and_end_at_it(cut):
    # The ball of radius 1 in space without the part beyond a plane, under the cap 1: a share
    # ``cut`` of the directions ends early, with cosine at least c at c over the cosine.
    rng = np.random.default_rng(0)
    c = 1 - 2 * cut
    bound = -math.log(3)
    # E[r^3]: the cosine is uniform on [-1, 1].
    truth = bound + math.log((1 + c) / 2 + c**3 / 4 * (c**-2 - 1))
    covered = 0
    for _ in range(60):
        cosine = rng.uniform(-1, 1, 200)
        log_radii = np.log(np.where(cosine > c, c / np.maximum(cosine, c), 1.0))
        got = summarise(3 * log_radii + bound, bounded=True, log_bound=bound)
        assert got.reliable
        assert got.at_bound
        low, high = interval(got)
        assert high <= max(bound, got.log_mean)
        covered += low <= truth <= high
    assert covered >= 54


def test_the_interval_ends_at_the_bound_also_with_further_errors():
    got = summarise(np.append(np.zeros(500), -1.0), bounded=True, log_bound=0.0)
    low, high = interval(got, extra_error=0.1)
    assert high == 0.0
    assert low < got.log_mean - 0.1


def test_extra_errors_add_in_quadrature():
    got = summarise(np.random.default_rng(0).normal(0.0, 0.5, 1000), bounded=True)
    wider = with_extra_error(got, 0.03, 0.04)
    assert wider.stderr == pytest.approx(math.hypot(got.stderr, 0.05))
    low, high = interval(got)
    far_low, far_high = interval(wider)
    reach = 1.959964 * 0.05
    assert got.log_mean - far_low == pytest.approx(math.hypot(got.log_mean - low, reach))
    assert far_high - got.log_mean == pytest.approx(math.hypot(high - got.log_mean, reach))
    assert interval(got, extra_error=0.05) == pytest.approx((far_low, far_high))
    with pytest.raises(ValueError, match="errors"):
        with_extra_error(got, -1.0)


BODIES = {
    "ellipsoid d=2": (
        lambda rng, n: ellipsoid_log_weights(rng, n, np.array([1.0, 20.0])),
        -0.5 * math.log(20.0),
    ),
    "ellipsoid d=10": (
        lambda rng, n: ellipsoid_log_weights(rng, n, np.geomspace(1, 3, 10)),
        -0.25 * 10 * math.log(3.0),
    ),
    "cube d=5": (
        lambda rng, n: cube_log_weights(rng, n, 5),
        5 * math.log(2.0) - log_ball(5),
    ),
}


@pytest.mark.parametrize("body", BODIES)
def test_z_scores_are_standard_normal_and_intervals_cover(body):
    draw, truth = BODIES[body]
    rng = np.random.default_rng(20)
    runs = 200
    z, covered, passed = [], 0, 0
    for _ in range(runs):
        got = summarise(draw(rng, 1000), bounded=False)
        z.append((got.log_mean - truth) / got.stderr)
        low, high = interval(got)
        covered += low <= truth <= high
        passed += got.reliable
    assert passed >= 0.95 * runs
    # Four standard errors of the mean, the standard deviation and the count over 200 runs.
    assert abs(np.mean(z)) < 4 / math.sqrt(runs)
    assert abs(np.std(z) - 1) < 4 / math.sqrt(2 * runs)
    assert covered >= (0.95 - 4 * math.sqrt(0.05 * 0.95 / runs)) * runs


def test_the_markov_bound_holds_under_a_heavy_tail():
    rng = np.random.default_rng(4)
    # Pareto with shape 0.9: finite mean 10, no variance.
    log_weights = -0.9 * np.log(rng.random((500, 1000)))
    bounds = [lower_bound(summarise(row, bounded=True), 0.9) for row in log_weights]
    assert np.mean(np.array(bounds) <= math.log(10.0)) >= 0.9
