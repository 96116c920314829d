"""The profile and the reliable radius."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest
from scipy import special, stats

from fastvol._profile import (
    gaussian_profile,
    gaussian_reliable_scale,
    lebesgue_profile,
    lebesgue_slope,
    reliable_radius,
)
from fastvol._reference.radial import log_radial_gaussian
from fastvol._statistics import summarise
from fastvol.errors import FastvolError

SPREAD = 0.1


def log_normal_radii(seed, n):
    return SPREAD * np.random.default_rng(seed).standard_normal(n)


def exact_log_fraction(dim, radius):
    """log E[min(1, (rho / R)^d)] for log rho ~ N(0, SPREAD^2)."""
    x, s = np.log(radius), SPREAD
    return np.logaddexp(
        special.log_ndtr(-x / s),
        0.5 * (dim * s) ** 2 - dim * x + special.log_ndtr((x - dim * s * s) / s),
    )


def log_chi_square(dim, radius, shift):
    """The centred radial integral, fast."""
    assert shift is None
    with np.errstate(divide="ignore"):
        return np.log(special.gammainc(dim / 2, np.square(radius) / 2))


def pair_radii(seed, n):
    """Log radii with correlation 1/2 within each pair."""
    common, own = (np.random.default_rng(seed + k).standard_normal(n) for k in range(2))
    return SPREAD * (np.repeat(common[: n // 2], 2) + own) / math.sqrt(2)


@pytest.mark.parametrize("dim", [1, 5, 300, 235_146])
@pytest.mark.parametrize("paired", [False, True])
def test_columns_are_those_of_the_capped_weights(dim, paired):
    log_radii = log_normal_radii(0, 3000)
    radii = np.concatenate(
        [np.geomspace(0.6, 1.6, 30), np.exp(np.sort(log_radii)[[0, 10, 1500, -2, -1]])]
    )
    got = lebesgue_profile(log_radii, dim, radii=radii, paired=paired)
    for row, radius in enumerate(radii):
        log_q = dim * np.minimum(log_radii - np.log(radius), 0.0)
        wanted = summarise(log_q, bounded=True, paired=paired, log_bound=0.0)
        assert got.log_fraction[row] == pytest.approx(wanted.log_mean, rel=1e-9, abs=1e-10)
        assert got.stderr[row] == pytest.approx(wanted.stderr, rel=1e-6, abs=1e-9)
        assert got.ess[row] == pytest.approx(wanted.ess, rel=1e-8)
        if not wanted.reliable and dim > 5:
            assert not got.reliable[row]


@pytest.mark.parametrize("dim", [5, 300])
@pytest.mark.parametrize("paired", [False, True])
def test_fractions_are_right_within_their_errors(dim, paired):
    radii = np.array([0.9, 1.0, 1.1, 1.15])
    draw = pair_radii if paired else log_normal_radii
    wanted = exact_log_fraction(dim, radii)
    runs = [
        lebesgue_profile(draw(7 * seed, 4000), dim, radii=radii, paired=paired)
        for seed in range(60)
    ]
    assert all(run.reliable.all() for run in runs)
    z = np.array([(run.log_fraction - wanted) / run.stderr for run in runs])
    assert np.all(np.abs(z.mean(axis=0)) < 4 / math.sqrt(60))
    assert np.all(np.abs(z.std(axis=0) - 1) < 4 / math.sqrt(120))
    covered = [(run.ci_low <= wanted) & (wanted <= run.ci_high) for run in runs]
    assert np.mean(covered) > 0.9


def test_a_body_of_two_radii():
    # Half of the directions reach 1, half reach 2: phi(R) = log(1/2 + R^-d / 2) between them.
    dim, log_radii = 3, np.log(np.tile([1.0, 2.0], 500))
    got = lebesgue_profile(log_radii, dim, radii=[0.5, 1.0, 1.5, 2.0, 4.0])
    half = np.log(0.5 + 0.5 * 1.5**-3.0), np.log(0.5 + 0.5 * 2.0**-3)
    wanted = [0.0, 0.0, *half, np.log((1 + 8) / 2 / 64)]
    assert got.log_fraction == pytest.approx(wanted, abs=1e-12)
    share = 1.5**-3.0 / (1 + 1.5**-3.0)
    assert got.slope == pytest.approx([0, 0, 3 * share, 3 / 9, 3], abs=1e-12)


@pytest.mark.parametrize("paired", [False, True])
def test_slope_is_the_derivative(paired):
    log_radii = log_normal_radii(1, 2000)
    step = 1e-6
    at = lebesgue_profile(log_radii, 50, radii=[1.05], paired=paired)
    ends = lebesgue_profile(
        log_radii, 50, radii=[1.05 * math.exp(-step), 1.05 * math.exp(step)], paired=paired
    )
    assert at.slope[0] == pytest.approx(-np.diff(ends.log_fraction)[0] / (2 * step), rel=1e-4)


def test_a_ball_is_full_up_to_its_radius_and_reliable_everywhere():
    got = lebesgue_profile(np.full(500, math.log(3.0)), 1000, radii=[1.0, 3.0, 6.0])
    assert got.log_fraction == pytest.approx([0, 0, -1000 * math.log(2)], abs=1e-9)
    assert got.reliable.all()
    assert np.all(got.stderr == 0)
    assert got.reliable_radius == math.inf
    assert got.ci_high.tolist()[:2] == [0.0, 0.0]
    assert got.ci_low[0] == pytest.approx(-math.log(20) / 500)


@pytest.mark.parametrize("dim", [30, 1000, 235_146])
@pytest.mark.parametrize("paired", [False, True])
def test_the_gate_passes_up_to_the_reliable_radius_only(dim, paired):
    log_radii = pair_radii(3, 20_000)

    def passes(radius):
        log_q = dim * np.minimum(log_radii - math.log(radius), 0.0)
        return summarise(log_q, bounded=True, paired=paired).reliable

    got = reliable_radius(log_radii, dim, paired)
    assert all(passes(r) for r in np.linspace(0.5, 0.999, 15) * got)
    assert not passes(1.002 * got)
    profile = lebesgue_profile(log_radii, dim, paired=paired)
    assert profile.reliable_radius == pytest.approx(got)
    assert np.array_equal(profile.reliable, profile.radius <= got)
    # More directions reach further.
    assert reliable_radius(log_radii[:2000], dim, paired) < got


@pytest.mark.parametrize("paired", [False, True])
def test_no_radius_is_reliable_below_a_hundred_units(paired):
    # Under a cap below every radius the weight is constant, but what few rays met proves little.
    units = 200 if paired else 100
    log_radii = np.log(np.tile([1.0, 1.0, 8.0, 8.0], 50)[:units])
    assert reliable_radius(log_radii, 10, paired) >= 1.0
    assert reliable_radius(log_radii[:-2], 10, paired) == 0.0
    got = lebesgue_profile(log_radii[:-2], 10, radii=[0.5, 1.0], paired=paired)
    assert not got.reliable.any()
    assert reliable_radius([-np.inf, -np.inf], 10) == 0.0


def test_a_ball_known_to_the_searchs_tolerance_is_reliable_everywhere():
    delta, dim = 1e-5, 1000
    log_radii = delta * np.round(np.random.default_rng(0).uniform(-1, 1, 500), 1)
    assert lebesgue_profile(log_radii, dim).reliable_radius == pytest.approx(
        math.exp(log_radii.max())
    )
    got = lebesgue_profile(log_radii, dim, radii=[2.0], log_radius_error=delta)
    assert got.reliable_radius == math.inf
    assert got.reliable.all()
    assert got.stderr[0] > 0.5 * dim * delta / math.sqrt(3 * 500)


def test_the_upper_ends_stay_below_a_full_ball():
    log_radii = np.zeros(500)
    log_radii[:3] = -0.1
    got = lebesgue_profile(log_radii, 100, radii=[1.0], extra_error=0.1)
    assert got.ci_high[0] == 0.0
    assert got.ci_low[0] < got.log_fraction[0] - 0.1


def test_the_reliable_radius_ends_at_the_largest_radius():
    log_radii = np.log(np.random.default_rng(0).uniform(1.0, 1.01, 5000))
    assert reliable_radius(log_radii, 2) == pytest.approx(math.exp(log_radii.max()))


@pytest.mark.parametrize("paired", [False, True])
def test_nothing_is_reliable_beyond_a_ray_that_never_crossed(paired):
    log_radii = log_normal_radii(0, 2000)
    unbounded = np.zeros(2000, dtype=bool)
    unbounded[5], log_radii[5] = True, 0.05
    got = lebesgue_profile(
        log_radii, 2, radii=[1.0, 1.04, 1.06, 2.0], unbounded=unbounded, paired=paired
    )
    assert got.reliable.tolist() == [True, True, False, False]
    assert got.reliable_radius == pytest.approx(math.exp(0.05))


def test_a_finite_cap_ends_the_profile():
    log_radii = np.minimum(log_normal_radii(0, 2000), math.log(1.1))
    got = lebesgue_profile(log_radii, 100, max_radius=1.1, unbounded=log_radii >= math.log(1.1))
    assert got.radius[-1] == pytest.approx(1.1)
    assert got.reliable[-1]
    with pytest.raises(ValueError, match="max_radius"):
        lebesgue_profile(log_radii, 100, radii=[1.2], max_radius=1.1)


def test_a_preconditioner_does_not_change_the_answer():
    # In the plane, directions v = P z / |z| with P = diag(1, 3) for the ellipse with those axes:
    # every ray ends at t = 1, and all of the variance lies in the cap.
    rng = np.random.default_rng(0)
    z = rng.standard_normal((20_000, 2))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    v = z * [1.0, 3.0]
    norms = np.log(np.linalg.norm(v, axis=1))
    radii = [0.5, 1.0, 2.0, 3.0, 5.0]
    got = lebesgue_profile(
        np.zeros(20_000), 2, radii=radii, log_abs_det=math.log(3.0), log_norms=norms
    )
    plain = -0.5 * np.log(np.square(z) @ [1.0, 1 / 9.0])
    other = lebesgue_profile(plain, 2, radii=radii)
    gap = np.abs(got.log_fraction - other.log_fraction)
    assert np.all(gap < 4 * np.hypot(got.stderr, other.stderr) + 1e-9)
    assert got.log_fraction[-1] == pytest.approx(math.log(3.0 / 25.0), abs=1e-6)
    assert got.reliable.all()


def test_errors_of_the_radii_are_added():
    log_radii = log_normal_radii(0, 2000)
    plain = lebesgue_profile(log_radii, 300, radii=[1.1])
    wider = lebesgue_profile(log_radii, 300, radii=[1.1], log_radius_error=0.02, extra_error=0.01)
    added = 0.5 * (plain.slope[0] * 0.02) ** 2
    wanted = math.sqrt(plain.stderr[0] ** 2 + added**2 + 0.01**2)
    assert wider.stderr[0] == pytest.approx(wanted)
    assert wider.ci_low[0] < plain.ci_low[0]
    shared = lebesgue_profile(log_radii, 300, radii=[1.1], log_radius_bias=0.02)
    assert shared.stderr[0] == pytest.approx(math.hypot(plain.stderr[0], 0.02 * plain.slope[0]))
    assert lebesgue_slope(log_radii, 300, 1.1) == pytest.approx(plain.slope[0])
    assert lebesgue_slope(log_radii, 300, math.inf) == pytest.approx(300)


def test_errors_of_the_radii_are_added_to_a_mass():
    log_radii = log_normal_radii(0, 2000)
    at = {"scales": [0.5], "log_radial_gaussian": log_chi_square}
    plain = gaussian_profile(log_radii, 30, **at)
    wider = gaussian_profile(
        log_radii, 30, log_radius_error=0.05, log_radius_bias=0.01, extra_error=0.01, **at
    )
    errors = (plain.stderr[0], 0.5 * (plain.slope[0] * 0.05) ** 2, 0.01 * plain.slope[0], 0.01)
    assert wider.stderr[0] == pytest.approx(math.hypot(*errors))


def test_the_mass_of_a_ball_is_a_chi_square_law():
    dim, radius = 7, 2.0
    scales = np.array([0.2, 0.5, 1.0, 3.0])
    got = gaussian_profile(
        np.full(300, math.log(radius)), dim, scales=scales, log_radial_gaussian=log_radial_gaussian
    )
    wanted = stats.chi2.logcdf((radius / scales) ** 2, dim)
    assert got.log_fraction == pytest.approx(wanted, rel=1e-10, abs=1e-10)
    assert got.kind == "gaussian"
    assert got.reliable.all()
    assert got.reliable_radius == pytest.approx(3.0)
    step = 1e-5
    ends = stats.chi2.logcdf((radius / scales * np.exp([[-step], [step]])) ** 2, dim)
    assert got.slope == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-5)


def test_the_mass_of_a_ball_about_another_centre():
    # A ball of radius r around a point at distance m from the law's centre, in units of its width.
    dim, radius, offset = 3, 1.5, 1.2
    rng = np.random.default_rng(0)
    z = rng.standard_normal((4_000, dim))
    cosine = z[:, 0] / np.linalg.norm(z, axis=1)
    scales = np.array([0.7, 1.0, 2.0])
    got = gaussian_profile(
        np.full(4_000, math.log(radius)),
        dim,
        -offset * cosine,
        scales=scales,
        offset_squared=offset**2,
        log_radial_gaussian=log_radial_gaussian,
    )
    wanted = stats.ncx2.logcdf((radius / scales) ** 2, dim, (offset / scales) ** 2)
    assert np.all(np.abs(got.log_fraction - wanted) < 4 * got.stderr)
    assert np.all(got.reliable)


def test_a_gaussian_scale_is_reliable_only_if_every_smaller_one_is():
    log_radii = math.log(30) + log_normal_radii(0, 4000)
    got = gaussian_profile(log_radii, 1000, log_radial_gaussian=log_chi_square)
    count = np.count_nonzero(got.reliable)
    assert 0 < count < got.radius.size
    assert got.reliable[:count].all()
    assert got.radius[count - 1] <= got.reliable_radius <= got.radius[count]


def test_off_centre_each_scale_is_judged_alone():
    # A ball of radius 1 at distance 4 from the law's centre: the narrower the law, the fewer rays
    # towards the centre carry all of the mass.
    rng = np.random.default_rng(0)
    z = rng.standard_normal((1000, 10))
    shift = -4.0 * z[:, 0] / np.linalg.norm(z, axis=1)
    arguments = {"offset_squared": 16.0, "log_radial_gaussian": log_radial_gaussian}
    got = gaussian_profile(np.zeros(1000), 10, shift, scales=[0.1, 2.0, 4.0], **arguments)
    assert got.reliable.tolist() == [False, True, True]
    assert got.reliable_radius == 4.0
    got = gaussian_profile(np.zeros(1000), 10, shift, scales=[0.1, 0.12], **arguments)
    assert got.reliable_radius == 0.0


@pytest.mark.parametrize("centre", [-4.0, 0.0, 4.0])
def test_default_scales_include_the_law_itself(centre):
    got = gaussian_profile(
        centre + log_normal_radii(0, 200), 100, log_radial_gaussian=log_chi_square
    )
    assert 1.0 in got.radius
    assert np.all(np.diff(got.radius) > 0)


@pytest.mark.parametrize("typical", [0.1, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("paired", [False, True])
def test_the_reliable_scale_is_that_of_the_profile_at_a_few_scales(typical, paired):
    log_radii = math.log(typical) + pair_radii(0, 4000)
    calls = []

    def counted(dim, radius, shift):
        calls.append(dim)
        return log_chi_square(dim, radius, shift)

    got = gaussian_reliable_scale(log_radii, 1000, paired=paired, log_radial_gaussian=counted)
    assert len(calls) <= 12
    profile = gaussian_profile(log_radii, 1000, paired=paired, log_radial_gaussian=log_chi_square)
    assert got == pytest.approx(profile.reliable_radius, rel=0.01)
    capped = gaussian_reliable_scale(
        log_radii, 1000, paired=paired, largest=1.0, log_radial_gaussian=counted
    )
    assert capped == pytest.approx(min(got, 1.0), rel=0.01)


def test_a_gaussian_without_a_reliable_scale():
    few = log_normal_radii(0, 50)
    assert gaussian_reliable_scale(few, 10, log_radial_gaussian=log_chi_square) == 0.0
    with pytest.raises(ValueError, match="largest"):
        gaussian_reliable_scale(few, 10, largest=0.5, log_radial_gaussian=log_chi_square)


def test_a_gaussian_scale_is_not_reliable_where_an_open_ray_matters():
    log_radii = np.full(200, math.log(3.0))
    unbounded = np.arange(200) < 100
    got = gaussian_profile(
        log_radii,
        2,
        scales=[2.0, 0.5],
        unbounded=unbounded,
        log_radial_gaussian=log_radial_gaussian,
    )
    assert got.reliable.tolist() == [False, True]


def test_to_dataframe():
    pytest.importorskip("pandas")
    got = lebesgue_profile(log_normal_radii(0, 200), 5)
    frame = got.to_dataframe()
    assert list(frame.columns) == [
        "radius",
        "log_fraction",
        "stderr",
        "ci_low",
        "ci_high",
        "ess",
        "slope",
        "reliable",
    ]
    assert len(frame) == got.radius.size
    assert np.array_equal(frame["log_fraction"], got.log_fraction)


def test_to_dataframe_names_what_is_missing(monkeypatch):
    plain_import = builtins.__import__

    def without_pandas(name, *rest):
        if name == "pandas":
            raise ImportError(name)
        return plain_import(name, *rest)

    got = lebesgue_profile(log_normal_radii(0, 200), 5)
    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(FastvolError, match=r"fastvol\[table\]"):
        got.to_dataframe()


def run(**changes):
    arguments = {"log_radii": np.zeros(10), "dim": 3, **changes}
    return lebesgue_profile(arguments.pop("log_radii"), arguments.pop("dim"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_radii": []}, "log_radii"),
        ({"log_radii": [[0.0]]}, "log_radii"),
        ({"log_radii": [np.nan]}, "log_radii"),
        ({"log_radii": [np.inf]}, "log_radii"),
        ({"log_radii": [-np.inf]}, "log_radii"),
        ({"dim": 0}, "dim"),
        ({"radii": [0.0]}, "radii"),
        ({"radii": []}, "radii"),
        ({"radii": [np.inf]}, "radii"),
        ({"level": 1.0}, "level"),
        ({"max_radius": 0.0}, "max_radius"),
        ({"unbounded": [True]}, "unbounded"),
        ({"log_norms": [0.0]}, "log_norms"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": [-1.0]}, "scales"),
        ({"scales": []}, "scales"),
        ({"shift": np.zeros(3)}, "shift"),
        ({"level": 0.0}, "level"),
    ],
)
def test_bad_gaussian_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        gaussian_profile(np.zeros(10), 3, log_radial_gaussian=log_radial_gaussian, **changes)
