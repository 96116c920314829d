from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastvol._backend import formulas
from fastvol._proposal import Directions, Proposal
from fastvol.preconditioners import Diagonal, Matrix
from fastvol.result import ray_offsets

D = 4


def matrix(seed=0):
    normal = np.random.default_rng(seed).standard_normal((D, D))
    return torch.from_numpy(np.eye(D) + 0.3 * normal)


def vector(length, seed=1):
    normal = torch.from_numpy(np.random.default_rng(seed).standard_normal(D))
    return length * normal / normal.norm()


def normals(n, seed=2):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, D)))


def z_of(weights, truth):
    error = weights.std(ddof=1) / math.sqrt(len(weights))
    assert error < 0.05 * abs(truth)
    return (weights.mean() - truth) / error


def test_rays_are_p_times_units():
    P, m = matrix(), vector(1.5)
    law, z = Proposal(Matrix(P), m), normals(7)
    rows = law.directions(z)
    u = (z + m) / (z + m).norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows.v, u @ P.T)
    np.testing.assert_allclose(rows.log_norm, (u @ P.T).norm(dim=1).log())
    np.testing.assert_allclose(rows.proposal_shift, u @ m)
    mean = vector(2.0, seed=3)
    np.testing.assert_allclose(rows.shift(mean), (u @ P.T @ mean) / (u @ P.T).norm(dim=1))
    np.testing.assert_array_equal(rows.shift(None), np.zeros(7))
    some = rows.take(np.array([5, 0]))
    torch.testing.assert_close(some.v, rows.v[[5, 0]])
    np.testing.assert_array_equal(some.log_norm, rows.log_norm[[5, 0]])
    np.testing.assert_array_equal(some.proposal_shift, rows.proposal_shift[[5, 0]])
    unshifted = Proposal(Matrix(P)).directions(z)
    np.testing.assert_array_equal(unshifted.proposal_shift, np.zeros(7))


def test_single_precision_keeps_its_logs_exact():
    law = Proposal(Matrix(matrix()), vector(1.5))
    rows = law.directions(normals(50).to(torch.float32))
    assert rows.v.dtype == torch.float32
    assert rows.log_norm.dtype == rows.proposal_shift.dtype == np.float64
    # Of the ray as it is evaluated, not of the one it was meant to be.
    np.testing.assert_allclose(rows.log_norm, rows.v.double().norm(dim=1).log(), rtol=1e-14)


def test_constants():
    P, m = matrix(), vector(1.5)
    log_det = float(torch.linalg.slogdet(P).logabsdet)
    assert Proposal(Matrix(P)).log_constant == pytest.approx(log_det)
    assert Proposal(Matrix(P), m).log_constant == pytest.approx(log_det + 0.5 * 1.5**2)
    assert Proposal(Matrix(P)).log_constant_error == 0.0
    described = Proposal(Matrix(P), m, name="mine").describe()
    assert described["name"] == "mine"
    assert described["shifted"] is True
    other = Proposal(Matrix(matrix(9)), m, name="mine").describe()
    assert described != other


@pytest.mark.parametrize("make", [lambda: Matrix(matrix()), lambda: Diagonal(matrix().diagonal())])
def test_the_ball_in_any_directions(make):
    # Of a ball every ray has length 1: log E[‖v‖^−d] = −log|det P|.
    law = Proposal(make())
    rows = law.directions(normals(40_000))
    weights = np.exp(ray_offsets(D, rows.log_norm, rows.proposal_shift) + law.log_constant)
    assert abs(z_of(weights, 1.0)) < 4.0


@pytest.mark.parametrize("shifted", [False, True])
def test_the_whole_mass_in_any_directions(shifted):
    # Rays without end hold all of the mass of N(μ, I).
    mu = vector(1.2, seed=4)
    law = Proposal(Matrix(matrix()), matrix().T @ mu if shifted else None)
    rows = law.directions(normals(40_000, seed=5))
    offsets = ray_offsets(D, rows.log_norm, rows.proposal_shift)
    whole = formulas().log_radial_gaussian(D, np.full(40_000, math.inf), rows.shift(mu))
    weights = np.exp(whole + offsets + law.log_constant - 0.5 * float(mu.square().sum()))
    assert abs(z_of(weights, 1.0)) < 4.0


@pytest.mark.parametrize("shifted", [False, True])
def test_the_mass_of_a_ball_in_any_directions(shifted):
    mu, radius = vector(1.2, seed=4), 1.5
    law = Proposal(Matrix(matrix(3)), vector(0.8, seed=6) if shifted else None)
    rows = law.directions(normals(40_000, seed=7))
    offsets = ray_offsets(D, rows.log_norm, rows.proposal_shift)
    part = formulas().log_radial_gaussian(D, np.full(40_000, radius), rows.shift(mu))
    weights = np.exp(part + offsets + law.log_constant - 0.5 * float(mu.square().sum()))
    from scipy.stats import ncx2

    assert abs(z_of(weights, ncx2.cdf(radius**2, D, float(mu.square().sum())))) < 4.0


def test_the_right_shift_and_p_make_the_weights_of_the_whole_law_equal():
    mu = vector(1.2, seed=4)
    law = Proposal(Diagonal(torch.ones(D, dtype=torch.float64)), mu)
    rows = law.directions(normals(50))
    offsets = ray_offsets(D, rows.log_norm, rows.proposal_shift)
    whole = formulas().log_radial_gaussian(D, np.full(50, math.inf), rows.shift(mu))
    np.testing.assert_allclose(whole + offsets, 0.0, atol=1e-10)


def test_directions_are_rows():
    rows = Directions(normals(3), np.zeros(3), np.zeros(3))
    np.testing.assert_allclose(rows.shift(vector(1.0)), normals(3) @ vector(1.0))
