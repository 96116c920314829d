"""Which of two basins is larger."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import special, stats

from fastvol import compare
from fastvol._comparison import compare_arrays
from fastvol._profile import reliable_radius
from fastvol._reference.radial import log_radial_gaussian

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


def estimate(log_radii, *, kind="lebesgue", dim=100, **changes):
    """What compare() reads of a VolumeEstimate."""
    config = {"seed": 0, "layout": "all", "metric": "euclidean", "antithetic": False}
    config |= {"noise": "full"} | changes.pop("config", {})
    law = {"std": changes.pop("std", 1.0), "center": changes.pop("center", "minimum")}
    measure = SimpleNamespace(kind=kind, max_radius=math.inf, **law)
    fields = {
        "log_radii": np.asarray(log_radii, dtype=np.float64),
        "dim": dim,
        "measure": measure,
        "config": config,
        "status": np.zeros(len(log_radii), dtype=np.uint8),
        "shift": None,
        "n": len(log_radii),
        **changes,
    }
    return SimpleNamespace(**fields)


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
    capped = SimpleNamespace(kind="lebesgue", max_radius=0.9)
    got = compare(estimate(a, dim=2, measure=capped), estimate(b, dim=2))
    assert got.radius <= 0.9


def test_an_estimate_equals_itself():
    log_radii = two_basins(np.random.default_rng(0), 1000, 0.5)[0]
    got = compare(estimate(log_radii), estimate(log_radii))
    assert (got.log_ratio, got.stderr, got.probability) == (0.0, 0.0, 0.5)
    assert got.reliable
    assert got.ci() == (0.0, 0.0)


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
    got = compare(estimate(a), estimate(b, config=changes))
    assert not got.paired
    assert "independent errors" in got.summary()


def test_runs_of_unequal_length_share_their_first_directions():
    a, b = two_basins(np.random.default_rng(0), 3001, 0.9)
    got = compare(estimate(a), estimate(b[:1001]))
    assert got.paired
    assert got.n_units == 1001
    assert "1001 directions" in got.summary()
    antithetic = {"antithetic": True}
    got = compare(estimate(a, config=antithetic), estimate(b[:1001], config=antithetic))
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


def test_the_offset_of_an_off_centre_law_counts():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 3))
    cosine = z[:, 0] / np.linalg.norm(z, axis=1)
    basins = []
    for offset in (0.3, 0.6):
        shift = -offset * cosine
        weights = log_radial_gaussian(3, np.full(500, 1.5), shift)
        log_mass = np.logaddexp.reduce(weights) - math.log(500) - 0.5 * offset**2
        basins.append(
            estimate(
                np.full(500, math.log(1.5)),
                kind="gaussian",
                center="origin",
                dim=3,
                shift=shift,
                log_volume=log_mass,
            )
        )
    got = compare(*basins)
    assert got.log_ratio == pytest.approx(basins[0].log_volume - basins[1].log_volume)
    wanted = stats.ncx2.logcdf(2.25, 3, 0.09) - stats.ncx2.logcdf(2.25, 3, 0.36)
    assert abs(got.log_ratio - wanted) < 4 * got.stderr


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (estimate(np.zeros(9), dim=3), "dim"),
        (estimate(np.zeros(9), kind="gaussian"), "measure"),
        (estimate(np.zeros(9), config={"metric": "filter"}), "metric"),
        (estimate(np.zeros(9), config={"metric": [1.0, 2.0]}), "metric"),
    ],
)
def test_unlike_estimates_are_refused(b, message):
    with pytest.raises(ValueError, match=f"^b has .*{message}"):
        compare(estimate(np.zeros(9)), b)


@pytest.mark.parametrize("changes", [{"std": 2.0}, {"center": "origin"}])
def test_unlike_normal_laws_are_refused(changes):
    a = estimate(np.zeros(9), kind="gaussian")
    with pytest.raises(ValueError, match=r"^b has another normal law"):
        compare(a, estimate(np.zeros(9), kind="gaussian", **changes))


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
