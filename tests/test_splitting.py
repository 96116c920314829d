from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastvol
from benchmarks.proofs import bodies, compounds
from benchmarks.proofs.laplace import gaussian_mass_quadratic
from fastvol import FastvolError, Gaussian, Lebesgue

D = 6
BODY = bodies.rotated_ellipsoid(D, 50.0, seed=1)
STD = 0.7
WRONG = bodies.wrong_preconditioner(BODY, 0.4, seed=2)


def split(body=BODY, n=3000, *, loss=bodies.loss, **options):
    settings = {"threshold": 1.0, "method": "splitting", "preconditioner": None, "progress": False}
    return fastvol.estimate(body.model(), loss, n, **{**settings, **options})


def mass(std=STD):
    return gaussian_mass_quadratic(BODY.curvatures, 1.0, std)


def check(result, truth, most=3.0):
    assert result.method == "splitting"
    assert 0.0 <= result.stderr < most
    assert abs(result.log_volume - truth) < 4.0 * result.stderr + 1e-3
    assert result.lower_bound(0.99) < truth
    assert result._combined.sampling < 0.3
    # Several seeds' errors together say more than one that holds a term for the mixing.
    return (result.log_volume - truth) / math.hypot(
        result._combined.sampling, result._combined.spread, 0.01
    )


@pytest.mark.parametrize("kind", ["None", "auto", "matrix", "hessian"])
@pytest.mark.parametrize("measure", [Lebesgue(), Gaussian(STD)])
def test_volumes_and_masses(kind, measure):
    spec = {"None": None, "matrix": WRONG}.get(kind, kind)
    truth = mass() if isinstance(measure, Gaussian) else BODY.log_volume
    z = [check(split(preconditioner=spec, measure=measure, seed=seed), truth) for seed in range(3)]
    assert abs(np.mean(z)) * math.sqrt(3) < 4.5, z


@pytest.mark.parametrize("kind", ["None", "matrix"])
def test_volumes_under_a_cap(kind):
    cap = 0.5
    plain = split(method="radial", n=6000, measure=Lebesgue(cap))
    assert plain.reliable
    result = split(preconditioner=WRONG if kind == "matrix" else None, measure=Lebesgue(cap))
    sampling = math.hypot(result._combined.sampling, result._combined.spread)
    assert result.stderr < 3.0
    error = math.hypot(plain.stderr, sampling)
    assert error < 0.3
    assert abs(result.log_volume - plain.log_volume) < 4.0 * error
    assert (result.log_radii <= math.log(cap) + 1e-12).all()


def test_the_origin_is_refused():
    with pytest.raises(FastvolError, match=r"splitting.*center='origin'.*annealed"):
        split(measure=Gaussian(STD, "origin"))


@pytest.mark.filterwarnings("ignore:rays are evaluated one at a time")
@pytest.mark.parametrize("measure", [Lebesgue(), Gaussian(STD)])
def test_a_loss_without_gradients(measure):
    body = bodies.rotated_ellipsoid(3, 20.0, seed=4)
    result = split(body, n=300, loss=lambda m: float(m.value(m.w.detach())), measure=measure)
    truth = body.log_volume
    if isinstance(measure, Gaussian):
        truth = gaussian_mass_quadratic(body.curvatures, 1.0, STD)
    assert result.n_grad == 0
    check(result, truth)


def test_gradients_take_over_where_steps_get_short():
    body = bodies.rotated_ellipsoid(30, 1e4, seed=1)
    result = split(body, n=3000)
    assert result.n_grad > 1000
    assert result.lower_bound(0.99) < body.log_volume
    gradients = [report.get("gradients", 0.0) for report in result._runs[0].reports[1:]]
    assert gradients == sorted(gradients)
    assert gradients[-1] == 1.0


def test_a_body_without_a_scale():
    body = compounds.polynomial(6)
    result = split(body, n=4000)
    check(result, body.log_volume, most=1.0)


def test_several_thresholds_and_seeds():
    both = split(threshold=[0.25, 1.0], n=1500)
    for result, level in zip(both, (0.25, 1.0), strict=True):
        truth = BODY.log_volume + 0.5 * D * math.log(level)
        assert abs(result.log_volume - truth) < 4.0 * result.stderr
    again = split(threshold=0.25, n=1500)
    assert again.log_volume == both[0].log_volume
    assert split(threshold=0.25, n=1500, seed=1).log_volume != again.log_volume


def test_single_precision():
    rotation, curvatures = BODY.rotation.float(), BODY.curvatures.float()
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(D))

    def loss(m):
        return (curvatures * (m.w @ rotation).square()).sum()

    for measure, truth in ((Lebesgue(), BODY.log_volume), (Gaussian(STD), mass())):
        result = fastvol.estimate(
            model, loss, 2000, threshold=1.0, method="splitting", preconditioner=None,
            measure=measure, progress=False,
        )  # fmt: skip
        check(result, truth)


def test_rays_without_end_are_said():
    flat = bodies.Body("half a ball", 4, lambda w: w[:2].square().sum(), math.nan)
    nothing = bodies.Body("constant", 4, lambda w: 0.0 * w.sum(), math.nan)
    for body in (flat, nothing):
        result = split(body, n=400)
        assert not result.reliable
        assert result.warnings
    ball = split(nothing, n=200, measure=Lebesgue(2.0))
    assert ball.log_volume == pytest.approx(bodies.log_ball(4) + 4 * math.log(2.0), abs=1e-6)
    whole = split(nothing, n=200, measure=Gaussian(1.0))
    assert whole.log_volume == pytest.approx(0.0, abs=1e-6)


def test_a_loss_that_is_not_a_number_further_out():
    def value(w):
        r2 = w.square().sum()
        return torch.where(r2 > 0.25, torch.tensor(math.nan, dtype=w.dtype), r2)

    result = split(bodies.Body("bounded by NaN", 3, value, math.nan), n=400)
    truth = bodies.log_ball(3) + 3 * math.log(0.5)
    assert result.n_nonfinite > 0
    assert abs(result.log_volume - truth) < 4.0 * result.stderr + 1e-3
    assert result.stderr < 0.1
