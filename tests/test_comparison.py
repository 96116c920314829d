"""Which of two basins is larger."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from fastvol import Gaussian, Lebesgue, compare
from fastvol._comparison import compare_arrays
from fastvol._profile import gaussian_reliable_scale, reliable_radius
from fastvol._reference.radial import log_radial_gaussian
from fastvol.result import Rays, assemble

SPREAD = 0.1


def exact_log_fraction(dim, radius, centre):
    """log E[min(1, (rho / R)^d)] for log rho ~ N(centre, SPREAD^2)."""
    x, s = math.log(radius) - centre, SPREAD
    return np.logaddexp(
        special.log_ndtr(-x / s),
        0.5 * (dim * s) ** 2 - dim * x + special.log_ndtr((x - dim * s * s) / s),
    )


def two_basins(rng, n, correlation):
    """Log radii of two basins, the second 1 % smaller."""
    common, a, b = rng.standard_normal((3, n))
    share, rest = math.sqrt(correlation), math.sqrt(1 - correlation)
    return SPREAD * (share * common + rest * a), -0.01 + SPREAD * (share * common + rest * b)


def estimate(log_radii, *, measure=None, dim=100, status=None, shift=None, **changes):
    """An estimate of these radii; ``changes`` are of its config."""
    rays = Rays.empty(len(log_radii))
    rays.log_radii[:] = log_radii
    rays.status[:] = 0 if status is None else status
    rays.shift[:] = 0.0 if shift is None else shift
    rays.reentrant_share = changes.pop("reentrant_share", 0.0)
    rays.reentrant_error = changes.pop("reentrant_error", 0.0)
    offset_squared = changes.pop("offset_squared", 0.0)
    pilot = {"rtol": 0.0, "rounding": 0.0, "bias": 0.0, "log_cap": 9.0} | changes.pop("pilot", {})
    config = {"seed": 0, "n": len(log_radii), "layout": "all", "metric": "euclidean"}
    config |= {"antithetic": False, "noise": "full", "method": "radial", "pilot": pilot} | changes
    return assemble(
        rays,
        measure=measure or Lebesgue(),
        dim=dim,
        log_abs_scale=0.0,
        offset_squared=offset_squared,
        seeds=(config["seed"],),
        config=config,
        plan={},
        provenance={},
        n_loss=0,
        n_grad=0,
        seconds=0.0,
    )


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("dim", [100, 100_000])
def test_the_difference_is_right_within_its_error(same, dim):
    rng = np.random.default_rng(dim)
    z, covered, runs = [], 0, 40
    for _ in range(runs):
        a, b = two_basins(rng, 1000, 0.9 if same else 0.0)
        got = compare_arrays(a, b, dim, same_directions=same)
        assert got.reliable
        assert got.paired is same
        wanted = exact_log_fraction(dim, got.radius, 0.0) - exact_log_fraction(
            dim, got.radius, -0.01
        )
        z.append((got.log_ratio - wanted) / got.stderr)
        low, high = got.ci()
        covered += low <= wanted <= high
    assert abs(np.mean(z)) < 4 / math.sqrt(runs)
    assert abs(np.std(z) - 1) < 4 / math.sqrt(2 * runs)
    assert covered >= (0.95 - 4 * math.sqrt(0.05 * 0.95 / runs)) * runs


@pytest.mark.parametrize("n", [1000, 50_000])
@pytest.mark.parametrize("paired", [False, True])
def test_the_bootstrap_agrees_with_the_delta_method(n, paired):
    a, b = two_basins(np.random.default_rng(n), n, 0.9)
    dim = 200
    got = compare_arrays(a, b, dim, same_directions=True, paired_a=paired, paired_b=paired)
    shares = []
    for log_radii in (a, b):
        weights = np.exp(dim * np.minimum(log_radii - math.log(got.radius), 0.0))
        if paired:
            weights = weights.reshape(-1, 2).mean(axis=1)
        shares.append(weights / weights.mean())
    influence = shares[0] - shares[1]
    assert got.n_units == influence.size
    wanted = influence.std(ddof=1) / math.sqrt(influence.size)
    assert got.stderr == pytest.approx(wanted, rel=0.06)
    independent = compare_arrays(a, b, dim, paired_a=paired, paired_b=paired)
    assert got.stderr < 0.7 * independent.stderr


def test_the_radius_is_the_largest_that_is_reliable_in_both():
    a, b = two_basins(np.random.default_rng(0), 2000, 0.5)
    got = compare_arrays(a, b, 1000)
    reach = [reliable_radius(log_radii, 1000) for log_radii in (a, b)]
    assert got.radius == pytest.approx(min(reach))


def test_whole_volumes_are_compared_where_both_are_reliable():
    rng = np.random.default_rng(0)
    u = rng.standard_normal((4000, 2))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    a = -0.5 * np.log(np.square(u) @ [1.0, 2.0])
    b = -0.5 * np.log(np.square(u) @ [1.0, 3.0])
    got = compare(estimate(a, dim=2), estimate(b, dim=2))
    assert got.radius == math.inf
    assert got.paired
    assert abs(got.log_ratio - 0.5 * math.log(1.5)) < 4 * got.stderr
    assert got.probability > 0.999
    assert "log volume of a minus that of b:" in got.summary()
    # With a cap on the search the comparison stays below it.
    capped = estimate(np.minimum(a, math.log(0.9)), dim=2, measure=Lebesgue(0.9))
    got = compare(capped, estimate(b, dim=2))
    assert got.radius <= 0.9


def test_an_estimate_equals_itself():
    log_radii = two_basins(np.random.default_rng(0), 1000, 0.5)[0]
    got = compare(estimate(log_radii), estimate(log_radii))
    assert (got.log_ratio, got.stderr, got.probability) == (0.0, 0.0, 0.5)
    assert got.reliable
    assert got.ci() == (0.0, 0.0)


@pytest.mark.parametrize("same", [True, False])
def test_the_errors_of_the_radii_count(same):
    # Two balls at d = 100, the second 1 % smaller, each radius searched to 5 %.
    pilot = {"rtol": 0.05}
    basins = [
        estimate(np.full(500, x), seed=s, pilot=pilot) for x, s in ((0, 0), (-0.01, not same))
    ]
    got = compare(*basins)
    assert got.paired is same
    assert got.radius == math.inf
    assert got.stderr == pytest.approx(math.sqrt(2) * 0.5 * (100 * 0.05) ** 2)
    assert 0.5 < got.probability < 0.6
    assert got.stderr == pytest.approx(math.hypot(*(basin.stderr for basin in basins)))


def test_at_a_joint_cap_the_errors_are_those_of_the_profile():
    a, b = two_basins(np.random.default_rng(0), 2000, 0.0)
    pilot = {"rtol": 0.01, "rounding": 0.02, "bias": 1e-3}
    basins = [
        estimate(a, dim=1000, pilot=pilot),
        estimate(b, dim=1000, seed=1, pilot=pilot, reentrant_error=0.02),
    ]
    got = compare(*basins)
    assert 0 < got.radius < math.inf
    plain = compare_arrays(a, b, 1000)
    slopes = [basin.profile([got.radius]).slope[0] for basin in basins]
    added = [0.5 * (slope * 0.02) ** 2 for slope in slopes] + [slope * 1e-3 for slope in slopes]
    assert got.radius == plain.radius
    assert got.stderr == pytest.approx(math.hypot(plain.stderr, *added, 0.02))


def test_what_reentrance_takes_off_counts_where_the_whole_is_compared():
    log_radii = np.zeros(500)
    a = estimate(log_radii, dim=2)
    b = estimate(log_radii, dim=2, reentrant_share=0.1, reentrant_error=0.02)
    got = compare(a, b)
    assert got.radius == math.inf
    assert got.log_ratio == pytest.approx(a.log_volume - b.log_volume)
    assert got.stderr >= 0.02
    assert compare(b, b).stderr == 0.0


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_at_a_bound_the_probability_agrees_with_the_interval(same, cut):
    # All of a fills the cap; of b's rays, ``cut`` of 200 end earlier.
    a, b = np.zeros(200), np.zeros(200)
    b[:cut] = -0.5
    ball = Lebesgue(1.0)
    got = compare(
        estimate(a, measure=ball, status=1),
        estimate(b, measure=ball, status=b == 0, seed=0 if same else 1, threshold=2.0),
    )
    assert got.paired is same
    assert got.reliable
    assert got.stderr >= 1 / 200
    assert got.ci()[0] <= got.log_ratio + math.log(0.05) / 200 + 1e-12
    assert 0.5 <= got.probability < 1
    for level in (0.2, 0.5, 0.9, 0.99):
        low, _ = got.ci(level)
        if abs(got.probability - 0.5 * (1 + level)) > 1e-6:
            assert (low > 0) is (got.probability > 0.5 * (1 + level))
    back = compare_arrays(b, a, 100, same_directions=same, max_radius=1.0)
    assert back.probability == pytest.approx(1 - got.probability)


def test_paired_runs_that_agree_may_differ_where_no_ray_went():
    ball = Lebesgue(1.0)
    a, b = (estimate(np.zeros(200), measure=ball, status=1, loss0=loss0) for loss0 in (0.0, 0.1))
    got = compare(a, b)
    assert got.paired
    assert got.log_ratio == 0.0
    assert got.probability == 0.5
    assert got.ci() == pytest.approx((math.log(0.05) / 200, -math.log(0.05) / 200))
    again = estimate(np.zeros(200), measure=ball, status=1, loss0=0.0)
    assert compare(a, again).ci() == (0.0, 0.0)


def test_swapping_the_two_changes_the_sign():
    a, b = two_basins(np.random.default_rng(0), 1000, 0.5)
    there, back = (compare_arrays(*both, 100, same_directions=True) for both in ((a, b), (b, a)))
    assert there.log_ratio == -back.log_ratio
    assert there.stderr == pytest.approx(back.stderr)
    assert there.probability == pytest.approx(1 - back.probability)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"layout": "some"}, {"noise": "rowspace"}, {"antithetic": True}],
)
def test_other_directions_are_compared_with_independent_errors(changes):
    a, b = two_basins(np.random.default_rng(0), 1000, 0.9)
    assert compare(estimate(a), estimate(b)).paired
    got = compare(estimate(a), estimate(b, **changes))
    assert not got.paired
    assert "independent errors" in got.summary()


def test_runs_of_unequal_length_share_their_first_directions():
    a, b = two_basins(np.random.default_rng(0), 3001, 0.9)
    got = compare(estimate(a), estimate(b[:1001]))
    assert got.paired
    assert got.n_units == 1001
    assert "1001 directions" in got.summary()
    antithetic = {"antithetic": True}
    got = compare(estimate(a, **antithetic), estimate(b[:1001], **antithetic))
    assert got.n_units == 500


def test_where_nothing_is_jointly_reliable_there_is_no_probability():
    got = compare(estimate([0.0]), estimate([0.1]))
    assert not got.reliable
    assert math.isnan(got.probability)
    assert math.isnan(got.log_ratio)
    assert got.ci() == (-math.inf, math.inf)
    text = got.summary()
    assert "cannot be compared" in text
    assert "probability" not in text


def test_rays_that_never_crossed_limit_the_radius():
    a, b = two_basins(np.random.default_rng(0), 2000, 0.5)
    status = np.zeros(2000, dtype=np.uint8)
    status[3], b[3] = 1, 0.02
    got = compare(estimate(a), estimate(b, status=status))
    assert got.radius == pytest.approx(math.exp(0.02))


def log_chi_square(dim, radius, shift):
    assert shift is None
    with np.errstate(divide="ignore"):
        return np.log(special.gammainc(dim / 2, np.square(radius) / 2))


def test_gaussian_masses_of_two_balls():
    got = compare_arrays(
        np.full(200, math.log(2.0)),
        np.full(200, math.log(1.5)),
        4,
        kind="gaussian",
        log_radial_gaussian=log_chi_square,
    )
    wanted = stats.chi2.logcdf(4.0, 4) - stats.chi2.logcdf(2.25, 4)
    assert got.log_ratio == pytest.approx(wanted)
    assert (got.radius, got.stderr, got.probability) == (1.0, 0.0, 1.0)


def test_a_narrower_normal_law_is_taken_where_the_given_one_is_not_reliable():
    a, b = two_basins(np.random.default_rng(0), 2000, 0.9)
    a, b = (math.log(10.0) + log_radii for log_radii in (a, b))
    got = compare_arrays(
        a, b, 1000, kind="gaussian", same_directions=True, log_radial_gaussian=log_chi_square
    )
    assert got.reliable
    assert 0.25 < got.radius < 0.5
    assert "times the given std" in got.summary()
    assert got.warnings
    # The joint scale is the smaller of the two.
    reach = [
        gaussian_reliable_scale(log_radii, 1000, log_radial_gaussian=log_chi_square)
        for log_radii in (a, b)
    ]
    assert got.radius == pytest.approx(min(reach), rel=1e-2)
    # About the origin a narrower law is another question.
    got = compare_arrays(
        a[:100],
        b[:100],
        1000,
        kind="gaussian",
        shift_a=np.zeros(100),
        shift_b=np.zeros(100),
        log_radial_gaussian=log_radial_gaussian,
    )
    assert not got.reliable


def test_off_centre_masses_are_judged_by_their_tail():
    # A few rays towards the law's centre carry the mass: as bounded weights they would pass.
    rng = np.random.default_rng(1)
    z = rng.standard_normal((4000, 4))
    cosine = z[:, 0] / np.linalg.norm(z, axis=1)
    law = Gaussian(1.0, center="origin")
    refused = 0
    for offset in np.arange(2.0, 6.0, 0.5):
        one, two = (
            estimate(
                np.full(4000, math.log(radius)),
                measure=law,
                dim=4,
                shift=-offset * cosine,
                offset_squared=offset**2,
            )
            for radius in (6.0, 6.1)
        )
        assert compare(one, two).reliable is (one.reliable and two.reliable)
        refused += not one.reliable
    assert 0 < refused < 8


def test_the_offset_of_an_off_centre_law_counts():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 3))
    cosine = z[:, 0] / np.linalg.norm(z, axis=1)
    basins = []
    for offset in (0.3, 0.6):
        radii = np.full(500, math.log(1.5))
        law = Gaussian(1.0, center="origin")
        basins.append(
            estimate(radii, measure=law, dim=3, shift=-offset * cosine, offset_squared=offset**2)
        )
    got = compare(*basins)
    assert got.log_ratio == pytest.approx(basins[0].log_volume - basins[1].log_volume)
    wanted = stats.ncx2.logcdf(2.25, 3, 0.09) - stats.ncx2.logcdf(2.25, 3, 0.36)
    assert abs(got.log_ratio - wanted) < 4 * got.stderr


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (estimate(np.zeros(9), dim=3), "dim"),
        (estimate(np.zeros(9), measure=Gaussian(1.0)), "measure"),
        (estimate(np.zeros(9), metric="filter"), "metric"),
        (estimate(np.zeros(9), metric=[1.0, 2.0]), "metric"),
    ],
)
def test_unlike_estimates_are_refused(b, message):
    with pytest.raises(ValueError, match=f"^b has .*{message}"):
        compare(estimate(np.zeros(9)), b)


@pytest.mark.parametrize("law", [Gaussian(2.0), Gaussian(1.0, center="origin")])
def test_unlike_normal_laws_are_refused(law):
    a = estimate(np.zeros(9), measure=Gaussian(1.0))
    with pytest.raises(ValueError, match=r"^b has another normal law"):
        compare(a, estimate(np.zeros(9), measure=law))


def test_what_is_not_an_estimate_is_refused_by_name():
    good = estimate(np.zeros(9))
    with pytest.raises(TypeError, match=r"^a must be a VolumeEstimate, got int"):
        compare(3, good)
    with pytest.raises(TypeError, match=r"^b must be a VolumeEstimate, got str"):
        compare(good, "b")


def test_bad_arrays_are_refused():
    with pytest.raises(ValueError, match="log_radii_b"):
        compare_arrays(np.zeros(9), np.zeros(8), 3, same_directions=True)
    with pytest.raises(ValueError, match="kind"):
        compare_arrays(np.zeros(9), np.zeros(9), 3, kind="uniform")
    with pytest.raises(ValueError, match="log_radial_gaussian"):
        compare_arrays(np.zeros(9), np.zeros(9), 3, kind="gaussian")
    with pytest.raises(ValueError, match="level"):
        compare_arrays(np.zeros(9), np.zeros(9), 3).ci(0.0)
