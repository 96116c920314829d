from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastvol
from benchmarks.proofs import bodies, compounds
from benchmarks.proofs.laplace import gaussian_mass_quadratic
from fastvol import Gaussian, Lebesgue
from fastvol._path_estimate import PathEstimate

D = 6
BODY = bodies.rotated_ellipsoid(D, 50.0, seed=1)
STD = 0.7


def vector(d, length, seed=3):
    normal = torch.from_numpy(np.random.default_rng(seed).standard_normal(d))
    return length * normal / normal.norm()


AT = vector(D, 0.8)
# A third of each eigenvalue's own scale off, and rotated as the body is.
WRONG = bodies.wrong_preconditioner(BODY, 0.4, seed=2)


def anneal(body=BODY, n=1500, *, at=None, loss=bodies.loss, **options):
    model = body.model()
    if at is not None:
        centre = at.clone()
        with torch.no_grad():
            model.w.copy_(centre)

        def loss(m):
            return m.value(m.w - centre)

    settings = {"threshold": 1.0, "method": "annealed", "preconditioner": None, "progress": False}
    return fastvol.estimate(model, loss, n, **{**settings, **options})


def mass(center="minimum", std=STD, level=1.0):
    offset = None if center == "minimum" else AT @ BODY.rotation
    return gaussian_mass_quadratic(BODY.curvatures, level, std, offset)


def check(result, truth, most=1.0):
    assert isinstance(result, PathEstimate)
    assert 0.0 < result.stderr < most
    # The error holds a term for the mixing, so a smaller one is no sign of bias.
    sampling = math.hypot(result._combined.sampling, result._combined.spread)
    assert sampling < 0.4
    assert abs(result.log_volume - truth) < 4.0 * max(sampling, 0.02) + 0.05
    assert result.lower_bound(0.99) < truth
    low, high = result.ci()
    assert low < truth < high


@pytest.mark.parametrize("kind", [None, "auto", "matrix", "boundary"])
def test_volumes(kind):
    spec = WRONG if kind == "matrix" else kind
    result = anneal(preconditioner=spec)
    error = result.stderr
    assert abs(result.log_volume - BODY.log_volume) < 4.0 * error + 1e-3
    assert error < 3.0
    assert result.method == "annealed"
    assert result.n_grad > 0
    if kind in ("auto", "hessian", "boundary"):
        assert result.reliable
        assert error < 0.01


@pytest.mark.parametrize("kind", [None, "matrix"])
def test_volumes_under_a_cap(kind):
    cap = 0.5
    plain = anneal(method="radial", n=6000, measure=Lebesgue(cap))
    assert plain.reliable
    result = anneal(preconditioner=WRONG if kind else None, measure=Lebesgue(cap))
    error = math.hypot(plain.stderr, result.stderr)
    assert error < 1.0
    assert abs(result.log_volume - plain.log_volume) < 4.0 * error
    assert (result.log_radii <= math.log(cap) + 1e-12).all()


# REPORTED: with a law that is shifted (center="origin" and a given P) the moves do not keep their
# target, and the answer is off by thousands of nats.
@pytest.mark.parametrize("center", ["minimum", "origin"])
@pytest.mark.parametrize("kind", [None, "auto", "hessian", "matrix"])
def test_masses(kind, center):
    result = anneal(
        preconditioner=WRONG if kind == "matrix" else kind,
        measure=Gaussian(STD, center),
        at=AT if center == "origin" else None,
    )
    check(result, mass(center), most=3.0)


def test_a_valley_that_plain_rays_miss():
    body = bodies.singular(20, 0.05)
    plain = anneal(body, method="radial", n=1000)
    result = anneal(body, n=12_000)
    assert not plain.reliable
    assert plain.log_volume < body.log_volume - 0.5
    assert abs(result.log_volume - body.log_volume) < 4.0 * result.stderr
    assert result.stderr < 2.0


def test_a_body_without_a_scale():
    body = compounds.polynomial(6)
    result = anneal(body, n=4000)
    assert abs(result.log_volume - body.log_volume) < 4.0 * result.stderr + 1e-3
    assert result.stderr < 0.5
    assert result.reliable


def test_several_thresholds():
    both = anneal(threshold=[0.25, 1.0], n=1500)
    assert [result.config["threshold"] for result in both] == [0.25, 1.0]
    for result, level in zip(both, (0.25, 1.0), strict=True):
        truth = BODY.log_volume + 0.5 * D * math.log(level)
        assert abs(result.log_volume - truth) < 4.0 * result.stderr
    alone = anneal(threshold=0.25, n=1500)
    assert alone.log_volume == both[0].log_volume


def test_a_seed_decides():
    first, second, other = (anneal(n=800, seed=seed) for seed in (5, 5, 6))
    assert first.log_volume == second.log_volume
    np.testing.assert_array_equal(first.log_radii, second.log_radii)
    assert first.log_volume != other.log_volume
    high = anneal(n=800, seed=5 + 2**40)
    assert high.log_volume != first.log_volume


@pytest.mark.filterwarnings("ignore:rays are evaluated one at a time")
@pytest.mark.parametrize("measure", [Gaussian(STD)])
def test_a_loss_without_gradients(measure):
    body = bodies.rotated_ellipsoid(3, 20.0, seed=4)
    with pytest.warns(fastvol.FastvolWarning, match="no gradient to go by"):
        result = anneal(body, n=100, loss=lambda m: float(m.value(m.w.detach())), measure=measure)
    truth = body.log_volume
    if isinstance(measure, Gaussian):
        truth = gaussian_mass_quadratic(body.curvatures, 1.0, STD)
    assert result.n_grad == 0
    assert any("great-circle slices" in warning for warning in result.warnings)
    assert abs(result.log_volume - truth) < 4.0 * result.stderr + 1e-3
    assert result.stderr < 6.0


def test_single_precision():
    body = bodies.rotated_ellipsoid(D, 50.0, seed=1)
    rotation, curvatures = body.rotation.float(), body.curvatures.float()
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(D))

    def loss(m):
        return (curvatures * (m.w @ rotation).square()).sum()

    options = {"threshold": 1.0, "method": "annealed", "preconditioner": None, "progress": False}
    for measure, truth in ((Lebesgue(), body.log_volume), (Gaussian(STD), mass())):
        result = fastvol.estimate(model, loss, 2000, measure=measure, **options)
        assert abs(result.log_volume - truth) < 4.0 * result.stderr
        assert result.stderr < 3.0


def test_a_subset_of_the_parameters():
    model = torch.nn.Linear(3, 2).double()
    centre = model.weight.detach().clone()

    def loss(m):
        return (m.weight - centre).square().sum() + 0.0 * m.bias.sum()

    result = fastvol.estimate(
        model, loss, 500, threshold=1.0, parameters=["weight"], method="annealed", progress=False,
    )  # fmt: skip
    assert result.dim == 6
    # The radii are known to rtol only.
    allowed = 6 * result.config["pilot"]["rtol"]
    assert result.log_volume == pytest.approx(bodies.log_ball(6), abs=allowed)


def test_rays_without_end_are_said():
    flat = bodies.Body("half a ball", 4, lambda w: w[:2].square().sum(), math.nan)
    nothing = bodies.Body("constant", 4, lambda w: 0.0 * w.sum(), math.nan)
    result = anneal(flat, n=600)
    assert not result.reliable
    assert result.warnings
    with pytest.warns(fastvol.FastvolWarning, match="no gradient"):
        empty = anneal(nothing, n=200)
    assert not empty.reliable
    assert empty.warnings
    # Inside a cap a constant loss leaves the whole ball.
    with pytest.warns(fastvol.FastvolWarning, match="no gradient"):
        ball = anneal(nothing, n=200, measure=Lebesgue(2.0))
    assert abs(ball.log_volume - bodies.log_ball(4) - 4 * math.log(2.0)) < 4.0 * ball.stderr
    assert ball.stderr < 0.1
    with pytest.warns(fastvol.FastvolWarning, match="no gradient"):
        whole = anneal(nothing, n=200, measure=Gaussian(1.0))
    assert abs(whole.log_volume) < 4.0 * whole.stderr + 1e-9
    assert whole.stderr < 0.1


def test_a_loss_that_is_not_a_number_further_out():
    def value(w):
        r2 = w.square().sum()
        return torch.where(r2 > 0.25, torch.tensor(math.nan, dtype=w.dtype), r2)

    result = anneal(bodies.Body("bounded by NaN", 3, value, math.nan), n=400)
    truth = bodies.log_ball(3) + 3 * math.log(0.5)
    assert result.n_nonfinite > 0
    assert abs(result.log_volume - truth) < 4.0 * result.stderr + 1e-3
    assert result.stderr < 0.1


@pytest.mark.parametrize("method", ["radial", "preconditioned"])
def test_a_basin_of_one_point(method):
    # Not a number anywhere but at the model's parameters.
    def value(w):
        return torch.where(w.abs().max() > 0, math.nan, 0.0) + 0.0 * w.sum()

    result = anneal(bodies.Body("a point", 3, value, math.nan), n=10, method=method)
    assert result.n_failed == 10
    assert result.log_volume < -100.0
    assert result.warnings
    assert not result.reliable


# REPORTED: reliable=True from chains as short as those that are to tell whether they mix.
def test_chains_too_short_to_tell_are_not_trusted():
    result = anneal(bodies.singular(40, 0.05), n=6000, seed=2)
    assert result._runs[0].length < 12
    assert not result.reliable


@pytest.mark.filterwarnings("ignore::fastvol.FastvolWarning")
@pytest.mark.parametrize("method", ["splitting"])
def test_a_threshold_at_the_loss_itself(method):
    result = anneal(bodies.ball(3), n=10, threshold=0.0, method=method)
    assert not result.reliable or result.log_volume < -100.0


def test_cost_is_about_what_n_pays_for():
    # Chains have a least length, which a small n does not pay for.
    for n, most in ((1000, 4.0), (4000, 2.5)):
        plain = anneal(method="radial", n=n)
        result = anneal(n=n)
        spent = result.n_loss + 3 * result.n_grad
        assert 0.3 * plain.n_loss < spent < most * plain.n_loss


def test_too_small_an_n_is_said():
    result = anneal(n=50)
    assert any("n = 50 pays for chains of" in warning for warning in result.warnings)
