"""Preconditioners: operators against matrices, curvature against autograd, and the boundary."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastvol import _backend
from fastvol import preconditioners as pc
from fastvol._layout import ParameterLayout
from fastvol._objective import PREFIX, Objective
from fastvol.engines import Dense, GeneralEngine, Plan
from fastvol.errors import FastvolError, FastvolWarning

D = 7
DTYPES = [torch.float32, torch.float64]
Data = tuple[Tensor, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def orthonormal(d: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(d, k, seed=seed)).Q


def dense(p: pc.Preconditioner) -> Tensor:
    """The matrix of P, from what it does to the unit vectors."""
    return p.matvec(torch.eye(p.dim, dtype=torch.float64)).T


# Operators


def operators() -> dict[str, tuple[pc.Preconditioner, Tensor]]:
    """Each kind of operator, with its matrix written down."""
    eye = torch.eye(D, dtype=torch.float64)
    values, basis, scales = randn(3).abs() + 0.5, orthonormal(D, 3), randn(D, seed=2).abs() + 0.3
    full, matrix = orthonormal(D, D), randn(D, D, seed=3)
    low_rank = basis * values @ basis.T + 0.4 * (eye - basis @ basis.T)
    made = {
        "identity": (pc.Identity(D), eye),
        "diagonal": (pc.Diagonal(-scales), -torch.diag(scales)),
        "matrix": (pc.Matrix(matrix), matrix),
        "lowrank": (pc.LowRank(values, basis, 0.4), low_rank),
        "lowrank with diagonal": (
            pc.LowRank(values, basis, 0.4, scales),
            torch.diag(scales) @ low_rank,
        ),
        "lowrank of full rank": (pc.LowRank(scales, full, 0.0), full * scales @ full.T),
    }
    made["matrices composed"] = (
        pc.compose(made["matrix"][0], made["diagonal"][0]),
        -matrix * scales,
    )
    made["composed"] = (
        pc.compose(made["matrix"][0], made["lowrank with diagonal"][0]),
        matrix @ torch.diag(scales) @ low_rank,
    )
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", operators())
def test_operators_are_their_matrices(name: str, dtype: torch.dtype) -> None:
    p, matrix = operators()[name]
    rows = randn(5, D, seed=4)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for result, expected in (
        (p.matvec(rows.to(dtype)), rows @ matrix.T),
        (p.rmatvec(rows.to(dtype)), rows @ matrix),
    ):
        assert result.dtype == dtype
        torch.testing.assert_close(
            result.to(torch.float64), expected, atol=tolerance, rtol=tolerance
        )
    assert p.logabsdet == pytest.approx(float(torch.linalg.slogdet(matrix)[1]), abs=1e-12)
    assert p.logabsdet_error == 0.0
    assert isinstance(p, pc.Preconditioner)


@pytest.mark.parametrize("name", operators())
def test_operators_describe_themselves(name: str) -> None:
    p, _ = operators()[name]
    described = json.loads(json.dumps(p.describe()))
    assert described["dim"] == D
    assert described["logabsdet"] == p.logabsdet
    assert described == operators()[name][0].describe()


def test_other_numbers_have_another_digest() -> None:
    values = randn(D)
    first = pc.Diagonal(values).describe()["sha256"]
    assert first != pc.Diagonal(values * (1 + 1e-15)).describe()["sha256"]


def test_an_operator_keeps_its_own_numbers() -> None:
    matrix = randn(D, D)
    p = pc.Matrix(matrix)
    before = dense(p).clone()
    matrix.zero_()
    torch.testing.assert_close(dense(p), before)


def test_a_matrix_in_mixed_units_is_not_singular() -> None:
    units = torch.logspace(-140, 140, D, dtype=torch.float64)
    matrix = orthonormal(D, D)
    assert pc.Matrix(units[:, None] * matrix).logabsdet == pytest.approx(
        float(units.log().sum()), abs=1e-9
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pc.Matrix(orthonormal(D, 3) @ orthonormal(D, 3).T), "singular"),
        (lambda: pc.Matrix(torch.diag(torch.arange(4.0))), "singular"),
        (lambda: pc.Matrix(randn(3, 4)), "square"),
        (lambda: pc.Matrix(randn(2, 2) * math.nan), "not finite"),
        (lambda: pc.Matrix(randn(2, 2) + 0j), "dense real"),
        (lambda: pc.Matrix(randn(3)), "2 axes"),
        (lambda: pc.Diagonal(torch.arange(4.0)), "1 zeros"),
        (lambda: pc.Diagonal(torch.zeros(0)), "not be empty"),
        (lambda: pc.LowRank(torch.ones(2), randn(D, 2), 1.0), "orthonormal"),
        (lambda: pc.LowRank(torch.ones(2), orthonormal(D, 2), 0.0), "singular"),
        (lambda: pc.LowRank(torch.ones(2), orthonormal(D, 2), math.inf), "rest"),
        (lambda: pc.LowRank(torch.ones(3), orthonormal(D, 2), 1.0), "one per row"),
        (lambda: pc.LowRank(torch.ones(2), orthonormal(D, 2), 1.0, torch.ones(3)), "7 entries"),
    ],
)
def test_what_is_no_preconditioner_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"preconditioner.*{message}"):
        make()


def test_rows_must_fit() -> None:
    with pytest.raises(ValueError, match=r"\[k, 7\]"):
        pc.Identity(D).matvec(randn(D))
    with pytest.raises(ValueError, match="do not fit"):
        pc.compose(pc.Identity(3), pc.Identity(4))


# A user's own operators


class Rows:
    """Takes rows, in the dtype of its matrix."""

    def __init__(self, matrix: Tensor, logabsdet: Any = None) -> None:
        self.matrix = matrix
        exact = float(torch.linalg.slogdet(matrix.double())[1])
        self.logabsdet = exact if logabsdet is None else logabsdet

    def matvec(self, rows: Any) -> Any:
        return rows @ self.matrix.T

    def rmatvec(self, rows: Any) -> Any:
        return rows @ self.matrix


class Vectors(Rows):
    """Takes one vector, and has its determinant as a method."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.exact = self.logabsdet
        self.logabsdet = lambda: self.exact

    def matvec(self, rows: Tensor) -> Tensor:
        return torch.mv(self.matrix, rows)

    def rmatvec(self, rows: Tensor) -> Tensor:
        return torch.mv(self.matrix.T, rows)


class Columns(Rows):
    """Takes a vector or a matrix of columns, which rows must not be mistaken for."""

    def matvec(self, rows: Tensor) -> Tensor:
        return self.matrix @ rows

    def rmatvec(self, rows: Tensor) -> Tensor:
        return self.matrix.T @ rows


def scipy_operator(matrix: Tensor) -> Any:
    array = matrix.numpy()
    operator = LinearOperator(
        array.shape, matvec=lambda v: array @ v, rmatvec=lambda v: array.T @ v, dtype=array.dtype
    )
    operator.logabsdet = float(torch.linalg.slogdet(matrix)[1])
    return operator


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 6])
@pytest.mark.parametrize("make", [Rows, Vectors, Columns, scipy_operator])
def test_a_users_operator_is_taken_as_it_comes(
    make: Callable[[Tensor], Any], d: int, dtype: torch.dtype
) -> None:
    matrix = randn(d, d, seed=5)
    p = pc.Wrapped(make(matrix), d)
    # As many rows as coordinates, too.
    for count in (1, 2, d):
        rows = randn(count, d, seed=6)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        for result, expected in (
            (p.matvec(rows.to(dtype)), rows @ matrix.T),
            (p.rmatvec(rows.to(dtype)), rows @ matrix),
        ):
            assert result.dtype == dtype
            torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
    assert p.logabsdet == pytest.approx(float(torch.linalg.slogdet(matrix)[1]))
    assert json.loads(json.dumps(p.describe()))["dim"] == d


def test_an_operator_in_single_precision_serves_both() -> None:
    matrix = randn(D, D)
    p = pc.Wrapped(Rows(matrix.float()), D)
    for dtype in DTYPES:
        rows = randn(2, D).to(dtype)
        torch.testing.assert_close(
            p.matvec(rows), (rows.double() @ matrix.T).to(dtype), atol=1e-5, rtol=1e-5
        )


def test_the_error_of_a_determinant_is_kept() -> None:
    operator = Rows(randn(D, D))
    operator.logabsdet += 0.1
    with pytest.raises(ValueError, match=r"preconditioner\.logabsdet is .* but the matrix"):
        pc.Wrapped(operator, D)
    operator.logabsdet_error = 0.05
    p = pc.Wrapped(operator, D)
    assert p.logabsdet_error == 0.05
    assert p.describe()["logabsdet_error"] == 0.05
    assert pc.compose(p, p).logabsdet_error == pytest.approx(0.05 * math.sqrt(2))


def broken(**methods: Any) -> Rows:
    operator = Rows(randn(D, D))
    for name, method in methods.items():
        setattr(operator, name, method)
    return operator


@pytest.mark.parametrize(
    ("operator", "error", "message"),
    [
        (broken(rmatvec=None), TypeError, "method rmatvec"),
        (broken(logabsdet=None), TypeError, "must have logabsdet"),
        (broken(logabsdet="large"), TypeError, r"\.logabsdet must be a number"),
        (broken(logabsdet=math.inf), ValueError, r"\.logabsdet must be finite"),
        (broken(logabsdet_error=-1.0), ValueError, "logabsdet_error"),
        (broken(matvec=lambda x: x[..., :2]), TypeError, r"\.matvec takes neither"),
        (broken(matvec=lambda x: 1 / 0), TypeError, "ZeroDivisionError"),
        (broken(matvec=lambda x: x * math.nan), ValueError, r"\.matvec gives values .* not finite"),
        (broken(matvec=lambda x: x + 1.0), ValueError, "not linear"),
        (broken(matvec=lambda x: x.abs()), ValueError, "not linear"),
        (broken(matvec=lambda x: 0.0 * x), ValueError, "singular"),
        (broken(rmatvec=Rows(randn(D, D)).matvec), ValueError, "not the transpose"),
        (broken(shape=(D, D + 1)), ValueError, "has shape"),
        (
            broken(matvec=lambda x: x * torch.arange(7), rmatvec=lambda x: x * torch.arange(7)),
            ValueError,
            "singular",
        ),
    ],
)
def test_a_users_operator_that_cannot_be_right_is_refused(
    operator: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"preconditioner.*{message}"):
        pc.Wrapped(operator, D)


# What a user hands in


def setting() -> tuple[nn.Module, ParameterLayout, Tensor]:
    """A model of 8 coordinates of which 6 move."""
    model = nn.Linear(3, 2)
    scale = torch.ones(8, dtype=torch.float64)
    scale[[1, 6]] = 0.0
    return model, ParameterLayout(model), scale


def test_diagonals_and_matrices_are_taken() -> None:
    model, layout, scale = setting()
    moving = scale > 0
    whole = randn(8).abs() + 0.1
    matrix = randn(6, 6)
    mapping = {"weight": whole[:6].view(2, 3), "bias": 2.5}
    from_mapping = torch.cat([whole[:6], torch.full((2,), 2.5, dtype=torch.float64)])[moving]
    given = whole.clone()
    given[1] = 0.0  # of no meaning: this coordinate does not move
    for value, expected in (
        (given, torch.diag(whole[moving])),
        (whole[moving].numpy(), torch.diag(whole[moving])),
        (whole[moving].float(), torch.diag(whole[moving].float().double())),
        (mapping, torch.diag(from_mapping)),
        (matrix, matrix),
        (matrix.numpy(), matrix),
        (Rows(matrix), matrix),
        (pc.Matrix(matrix), matrix),
    ):
        p = pc.as_preconditioner(value, layout, scale, model)
        assert isinstance(p, pc.Preconditioner)
        torch.testing.assert_close(dense(p), expected)


def test_a_curvature_and_an_optimizer_stay_a_curvature() -> None:
    model, layout, scale = setting()
    curvature = pc.DiagonalCurvature(torch.ones(6))
    assert pc.as_preconditioner(curvature, layout, scale, model) is curvature
    optimizer = torch.optim.Adam(model.parameters())
    model(randn(4, 3).float()).square().sum().backward()
    optimizer.step()
    assert isinstance(pc.as_preconditioner(optimizer, layout, scale, model), pc.DiagonalCurvature)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("hessian?", TypeError, "must be a positive diagonal"),
        (None, TypeError, "NoneType"),
        (3.0, TypeError, "float"),
        (-torch.ones(6), ValueError, "6 entries are negative"),
        (torch.zeros(6), ValueError, "zeros"),
        (torch.ones(5), ValueError, r"\[6\].*shape \(5,\)"),
        (torch.ones(8, 8), ValueError, r"\[6, 6\].*shape \(8, 8\)"),
        (torch.ones(6, 6), ValueError, "singular"),
        (np.array(["a"] * 6), TypeError, "real tensor"),
        ({"weight": 1.0}, ValueError, "missing.*bias"),
        ({"weight": 1.0, "bias": -1.0}, ValueError, "positive"),
        (pc.Identity(3), ValueError, "3 coordinates, but 6"),
    ],
)
def test_what_a_user_hands_in_is_checked(value: Any, error: type[Exception], message: str) -> None:
    model, layout, scale = setting()
    with pytest.raises(error, match=f"preconditioner.*{message}"):
        pc.as_preconditioner(value, layout, scale, model)


# Curvature, and what follows from it


def curvatures(indefinite: bool = False) -> dict[str, tuple[pc.Curvature, Tensor]]:
    """Each kind of curvature, with |H| written down."""
    eye = torch.eye(D, dtype=torch.float64)
    values, basis = torch.logspace(2, -2, D, dtype=torch.float64), orthonormal(D, D)
    sign = torch.ones(D, dtype=torch.float64)
    if indefinite:
        sign[::3] = -1.0
    part, remainder = basis[:, :3], randn(D, seed=3).abs()
    low = part * values[:3] @ part.T
    return {
        "diagonal": (pc.DiagonalCurvature(sign * values), torch.diag(values)),
        "dense": (
            pc.DenseCurvature(basis * (sign * values) @ basis.T),
            basis * values @ basis.T,
        ),
        "lowrank": (
            pc.LowRankCurvature((sign * values)[:3], part, 0.3),
            low + 0.3 * (eye - part @ part.T),
        ),
        "diagonal+lowrank": (
            pc.DiagonalPlusLowRankCurvature((sign * values)[:3], part, remainder),
            low + torch.diag(remainder),
        ),
        "diagonal+lowrank of rank 0": (
            pc.DiagonalPlusLowRankCurvature(values[:0], basis[:, :0], remainder),
            torch.diag(remainder),
        ),
    }


KINDS = list(curvatures())


@pytest.mark.parametrize("indefinite", [False, True])
@pytest.mark.parametrize("strength", [0.0, 1e-3, 1.0, 1e4, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_preconditioner_whitens_its_curvature(
    kind: str, strength: float, indefinite: bool
) -> None:
    curvature, H = curvatures(indefinite)[kind]
    p = curvature.preconditioner(strength)
    P = dense(p)
    A = H if strength == math.inf else torch.eye(D, dtype=torch.float64) + strength * H
    torch.testing.assert_close(P.T @ A @ P, torch.eye(D, dtype=torch.float64), atol=1e-9, rtol=0)
    assert p.logabsdet == pytest.approx(-0.5 * float(torch.linalg.slogdet(A)[1]), abs=1e-9)
    if not kind.startswith("diagonal+"):
        torch.testing.assert_close(P, P.T)
    json.dumps([p.describe(), curvature.describe()])


@pytest.mark.parametrize("with_mu", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.03, 5.0, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_excess_of_the_tilted_law(kind: str, strength: float, with_mu: bool) -> None:
    curvature, H = curvatures()[kind]
    mu = 3.0 * randn(D, seed=8) if with_mu else None
    inverse = torch.linalg.inv(torch.eye(D, dtype=torch.float64) + strength * H)
    expected = 0.5 * float(torch.trace(H @ inverse))
    if mu is not None:
        m = inverse @ mu
        expected += 0.5 * float(m @ H @ m)
        # The proposal w = P z, z ~ N(m, I), has the tilted law's mean.
        offset = curvature.tilted_offset(strength, mu)
        mean = curvature.preconditioner(strength).matvec(offset[None])[0]
        torch.testing.assert_close(mean, m, atol=1e-9, rtol=1e-9)
    assert curvature.mean_excess(strength, mu) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("with_mu", [False, True])
@pytest.mark.parametrize("share", [0.99, 0.5, 1e-3, 1e-7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_strength_meets_the_threshold(kind: str, share: float, with_mu: bool) -> None:
    curvature, _ = curvatures()[kind]
    mu = 3.0 * randn(D, seed=8) if with_mu else None
    untilted = curvature.mean_excess(0.0, mu)
    strength = pc.match_threshold(curvature, share * untilted, mu)
    assert curvature.mean_excess(strength, mu) == pytest.approx(share * untilted, rel=1e-8)
    assert pc.match_threshold(curvature, 1.01 * untilted, mu) == 0.0


def test_a_strength_that_one_eigenvalue_tells() -> None:
    # ½ λ / (1 + s λ) = gap in every one of d directions, so s = d/(2 gap) − 1/λ.
    curvature = pc.DiagonalCurvature(torch.full((10,), 4.0))
    assert pc.match_threshold(curvature, 0.5) == pytest.approx(10.0 - 0.25)


@pytest.mark.parametrize("gap", [0.0, -1.0, math.inf, math.nan])
def test_no_strength_meets_an_impossible_threshold(gap: float) -> None:
    with pytest.raises(ValueError, match="gap"):
        pc.match_threshold(pc.DiagonalCurvature(torch.ones(2)), gap)


def test_an_excess_that_overflows_is_said() -> None:
    curvature = pc.DiagonalCurvature(torch.full((2,), 1e308, dtype=torch.float64))
    with pytest.raises(FastvolError, match="mean excess"):
        pc.match_threshold(curvature, 1.0)


def test_flat_directions_are_floored_at_infinite_strength() -> None:
    values = torch.tensor([100.0, 1.0, 0.0, -1e-12], dtype=torch.float64)
    exact, coarse = pc.DiagonalCurvature(values), pc.DiagonalCurvature(values, resolution=1e-6)
    widest = 1.0 / math.sqrt(100.0 * 1e-10)
    expected = torch.tensor([0.1, 1.0, widest, widest], dtype=torch.float64)
    torch.testing.assert_close(dense(exact.preconditioner(math.inf)).diagonal(), expected)
    assert float(dense(coarse.preconditioner(math.inf)).max()) == pytest.approx(100.0)
    # A finite strength leaves them as they are.
    assert float(dense(exact.preconditioner(5.0))[2, 2]) == 1.0


def test_the_spectrum_is_counted() -> None:
    values = torch.tensor([2.0, -1.0, 1e-9, 0.0, -1e-9], dtype=torch.float64)
    basis = orthonormal(5, 5)
    for curvature in (
        pc.DiagonalCurvature(values),
        pc.DenseCurvature(basis * values @ basis.T),
        pc.LowRankCurvature(values[:2], basis[:, :2], 1e-9),
        pc.DiagonalPlusLowRankCurvature(values[:2], basis[:, :2], torch.zeros(5)),
    ):
        assert curvature.largest == pytest.approx(2.0)
        assert curvature.n_negative == 1
        assert curvature.n_zero == 3
    assert pc.LowRankCurvature(values, basis, 5.0).largest == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pc.DenseCurvature(randn(2, 2) * math.nan), FastvolError, "not finite"),
        (lambda: pc.DiagonalCurvature(torch.tensor([math.inf])), FastvolError, "not finite"),
        (lambda: pc.DenseCurvature(randn(2, 3)), ValueError, "square"),
        (lambda: pc.DiagonalCurvature(torch.zeros(0)), ValueError, "entries"),
        (lambda: pc.LowRankCurvature(torch.ones(1), orthonormal(3, 1), -1.0), ValueError, "rest"),
        (lambda: pc.LowRankCurvature(torch.ones(2), orthonormal(3, 1), 1.0), ValueError, "column"),
        (
            lambda: pc.DiagonalPlusLowRankCurvature(
                torch.ones(1), orthonormal(3, 1), -torch.ones(3)
            ),
            ValueError,
            "negative",
        ),
        (
            lambda: pc.DenseCurvature(torch.zeros(2, 2)).preconditioner(math.inf),
            FastvolError,
            "curvature is 0",
        ),
        (
            lambda: pc.DiagonalCurvature(torch.ones(2)).preconditioner(-1.0),
            ValueError,
            "strength",
        ),
        (
            lambda: pc.DiagonalCurvature(torch.ones(2)).mean_excess(math.inf),
            ValueError,
            "strength",
        ),
        (
            lambda: pc.DiagonalCurvature(torch.ones(2)).tilted_offset(1.0, torch.ones(3)),
            ValueError,
            "mu",
        ),
    ],
)
def test_what_is_no_curvature_is_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


# The curvature of a loss


def problem(
    model: nn.Module, loss_fn: Any, data: Any = None, parameters: Any = None
) -> tuple[Objective, ParameterLayout]:
    layout = ParameterLayout(model, parameters)
    objective = Objective(model, loss_fn, data, layout.device)
    objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
    return objective, layout


def ones(layout: ParameterLayout) -> Tensor:
    return torch.ones(layout.size, dtype=torch.float64)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """19 parameters, 3 of them frozen."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=True)).to(dtype)
    model[2].bias.requires_grad_(False)
    return model


def two_batches(dtype: torch.dtype = torch.float64) -> list[Data]:
    return [
        (randn(7, 3).to(dtype), torch.arange(7) % 3),
        (randn(13, 3, seed=1).to(dtype), torch.arange(13) % 2),
    ]


def gappy_scale(layout: ParameterLayout) -> Tensor:
    """Unequal scales as of a metric, with coordinates that do not move."""
    scale = randn(layout.size, seed=2).abs() + 0.2
    scale[[0, 5]] = 0.0
    return scale


def reference_hessian(objective: Objective, layout: ParameterLayout, scale: Tensor) -> Tensor:
    def loss(theta: Tensor) -> Tensor:
        batches = list(objective.batches())
        values = [objective.call(layout.unflatten(theta, PREFIX), batch) for batch in batches]
        weights = [batch.weight for batch in batches]
        total = sum(w * v for w, v in zip(weights, values, strict=True))
        return total / sum(weights)

    H = torch.autograd.functional.hessian(loss, layout.flatten()).double()
    moving = scale > 0
    return (scale[:, None] * H * scale)[moving][:, moving]


def reference_ggn(
    model: nn.Module, layout: ParameterLayout, scale: Tensor, loss_fn: Any, data: list[Data]
) -> Tensor:
    total: Any = 0.0
    for x, target in data:

        def outputs(theta: Tensor, x: Tensor = x) -> Tensor:
            return torch.func.functional_call(model, layout.unflatten(theta), (x,))

        J = torch.autograd.functional.jacobian(outputs, layout.flatten())
        out = outputs(layout.flatten())
        inner = torch.autograd.functional.hessian(
            lambda o, target=target: loss_fn(o, target), out.detach()
        )
        J = J.reshape(out.numel(), -1)
        total = total + len(x) * J.T @ inner.reshape(out.numel(), -1) @ J
    moving = scale > 0
    return (scale[:, None] * total.double() * scale)[moving][:, moving] / sum(
        len(x) for x, _ in data
    )


def matrix_of(curvature: pc.Curvature) -> Tensor:
    """|H| from what P does at infinite strength."""
    P = dense(curvature.preconditioner(math.inf))
    return torch.linalg.inv(P @ P.T)


def absolute(H: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(H)
    return vectors * values.abs() @ vectors.T


def vias() -> list[Any]:
    missing = pytest.mark.skipif(
        not _has_curvlinops(), reason="curvlinops-for-pytorch is not installed"
    )
    return ["torch", pytest.param("curvlinops", marks=missing)]


def _has_curvlinops() -> bool:
    import importlib.util

    return importlib.util.find_spec("curvlinops") is not None


NOT_A_MINIMUM = pytest.mark.filterwarnings("ignore:.*does not stand at a minimum")


@NOT_A_MINIMUM
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("via", vias())
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(ignore_index=2)])
def test_the_hessian_is_autograds(loss_fn: Any, via: Any, dtype: torch.dtype) -> None:
    objective, layout = problem(network(dtype), loss_fn, two_batches(dtype))
    scale = gappy_scale(layout)
    curvature, n_grad, provenance = pc.hessian(objective, layout, scale, via=via)
    expected = reference_hessian(objective, layout, scale)
    d = len(expected)
    assert curvature.dim == d == layout.size - 2
    assert n_grad == 2 * d + 1
    assert provenance["kind"] == "hessian"
    assert provenance["via"] == ("curvlinops" if via == "curvlinops" else "torch.autograd")
    json.dumps(provenance)
    values = torch.linalg.eigvalsh(expected)
    assert curvature.n_negative == int((values < -1e-5).sum()) > 0
    # The trace and the tilted law need no inverse of a nearly singular matrix.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    H = absolute(expected)
    assert curvature.mean_excess(0.0) == pytest.approx(0.5 * float(H.trace()), rel=tolerance)
    A = torch.eye(d, dtype=torch.float64) + 3.0 * H
    P = dense(curvature.preconditioner(3.0))
    torch.testing.assert_close(P @ P, torch.linalg.inv(A), atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("via", vias())
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, F.mse_loss])
def test_the_gauss_newton_matrix(loss_fn: Any, via: Any, dtype: torch.dtype) -> None:
    model, data = network(dtype), two_batches(dtype)
    if loss_fn is F.mse_loss:
        data = [(x, F.one_hot(y, 3).to(dtype)) for x, y in data]
    objective, layout = problem(model, loss_fn, data)
    scale = gappy_scale(layout)
    curvature, n_grad, provenance = pc.ggn(objective, layout, scale, via=via)
    expected = reference_ggn(model, layout, scale, loss_fn, data)
    d = len(expected)
    assert n_grad == 2 * d + 1
    assert provenance["via"] == ("curvlinops" if via == "curvlinops" else "torch.autograd")
    assert curvature.n_negative == 0
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    A = torch.eye(d, dtype=torch.float64) + 3.0 * expected
    P = dense(curvature.preconditioner(3.0))
    torch.testing.assert_close(P @ P, torch.linalg.inv(A), atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.skipif(not _has_curvlinops(), reason="curvlinops-for-pytorch is not installed")
def test_curvlinops_is_taken_where_it_fits() -> None:
    data = two_batches()
    fits = problem(network(), F.cross_entropy, data)
    for objective, layout, expected in (
        (*fits, "curvlinops"),
        (*problem(network(), lambda o, t: F.cross_entropy(o, t), data), "torch.autograd"),
        (*problem(network(), F.cross_entropy, Stream(data)), "torch.autograd"),
    ):
        assert pc.Products(objective, layout, ones(layout), "ggn", "auto").via == expected
    objective, layout = problem(network(), lambda model: model(data[0][0]).square().mean())
    with pytest.raises(FastvolError, match="curvlinops"):
        pc.hessian(objective, layout, ones(layout), via="curvlinops")


@NOT_A_MINIMUM
def test_curvlinops_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    built = pc.hessian(*with_ones(problem(network(), F.cross_entropy, two_batches())))
    assert built.provenance["via"] == "torch.autograd"


class Stream:
    """Batches that are read anew at every evaluation."""

    def __init__(self, batches: list[Data]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Data]:
        return iter(self.batches)


@NOT_A_MINIMUM
def test_any_form_of_loss_and_data() -> None:
    data = two_batches()
    model = network()
    x, y = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    expected = pc.hessian(*with_ones(problem(model, F.cross_entropy, (x, y)))).curvature
    for objective, layout in (
        problem(model, F.cross_entropy, data),
        problem(model, F.cross_entropy, Stream(data)),
        problem(model, lambda m: F.cross_entropy(m(x), y)),
    ):
        curvature = pc.hessian(objective, layout, ones(layout)).curvature
        torch.testing.assert_close(
            dense(curvature.preconditioner(2.0)), dense(expected.preconditioner(2.0))
        )


def with_ones(
    given: tuple[Objective, ParameterLayout],
) -> tuple[Objective, ParameterLayout, Tensor]:
    return (*given, ones(given[1]))


class Tied(nn.Module):
    """Attention, a tied embedding, an output in a dict, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        self.calls += 1
        return {"logits": self.out(self.layer(self.embedding(tokens))), "length": tokens.shape[1]}


def dict_loss(output: dict[str, Any], target: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"].flatten(0, 1), target.flatten())


@NOT_A_MINIMUM
def test_attention_ties_and_dicts() -> None:
    model = Tied().double().eval()
    tokens = torch.arange(12).view(3, 4) % 5
    objective, layout = problem(model, dict_loss, (tokens, tokens))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = absolute(reference_hessian(objective, layout, ones(layout)))
    curvature = pc.hessian(objective, layout, ones(layout)).curvature
    assert curvature.mean_excess(0.0) == pytest.approx(0.5 * float(expected.trace()))
    assert pc.ggn(objective, layout, ones(layout)).curvature.n_negative == 0


@NOT_A_MINIMUM
def test_the_model_is_left_as_it_was() -> None:
    model = Tied().train()
    tokens = torch.arange(12).view(3, 4) % 5
    model.layer.linear1.weight.grad = torch.ones_like(model.layer.linear1.weight)
    model.eval()
    objective, layout = problem(model, dict_loss, (tokens, tokens))
    model.train()

    def state() -> list[Any]:
        generators = [torch.get_rng_state().tolist(), random.getstate()]
        generators.append(np.random.get_state()[1].tolist())  # noqa: NPY002
        values = [v.tolist() for v in [*model.parameters(), *model.buffers()]]
        grads = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
        return [generators, values, grads, [m.training for m in model.modules()]]

    before = state()
    scale = ones(layout)
    pc.hessian(objective, layout, scale)
    pc.ggn(objective, layout, scale)
    pc.diagonal(objective, layout, scale, n_probes=3)
    pc.lowrank(objective, layout, scale, rank=2)
    assert state() == before


def test_a_hessian_makes_rays_equally_long() -> None:
    model, x = nn.Linear(5, 1, bias=False).double(), randn(20, 5) * torch.logspace(0, 2, 5)
    data = (x, model(x).detach())
    objective, layout = problem(model, F.mse_loss, data)
    scale = randn(5).abs() + 0.1
    p = pc.hessian(objective, layout, scale).curvature.preconditioner(math.inf)
    plan = Plan("general", 2, 6, True, "float64", 1, 1, "cpp")
    engine = GeneralEngine(objective, layout, scale, plan, _backend.select("cpp"))
    units = F.normalize(randn(6, 5, seed=3))
    engine.load(np.arange(6), Dense(units, preconditioner=p))
    np.testing.assert_allclose(engine.loss(np.full(6, 2.0)).values, 0.5 * 4.0)


# Many coordinates


class Bowl(nn.Module):
    """½ wᵀ H w around 0, on two parameters, with H known."""

    def __init__(self, H: Tensor, split: int) -> None:
        super().__init__()
        self.H = H
        self.a = nn.Parameter(torch.zeros(split, dtype=H.dtype))
        self.b = nn.Parameter(torch.zeros(len(H) - split, dtype=H.dtype))

    def forward(self) -> Tensor:
        w = torch.cat([self.a, self.b])
        return 0.5 * w @ self.H @ w


def loss_of(model: nn.Module) -> Tensor:
    value: Tensor = model()
    return value


def test_low_rank_finds_the_leading_eigenpairs() -> None:
    d, k = 200, 8
    basis = orthonormal(d, d)
    values = torch.cat(
        [torch.logspace(3, 1, k, dtype=torch.float64), torch.full((d - k,), 0.2).double()]
    )
    values[2] = -values[2]
    H = basis * values @ basis.T
    objective, layout = problem(Bowl(H, 50), loss_of)
    with pytest.warns(FastvolWarning, match="1 negative among 8"):
        curvature, n_grad, provenance = pc.lowrank(objective, layout, ones(layout), rank=k)
    assert curvature.n_negative == 1
    assert provenance["rest_value"] == pytest.approx(0.2, rel=1e-6)
    assert n_grad == 1 + 2 * (3 * k + 4 + 24)
    torch.testing.assert_close(matrix_of(curvature), absolute(H), atol=1e-6, rtol=1e-6)


def test_low_rank_of_a_matrix_of_lower_rank() -> None:
    basis = orthonormal(150, 3)
    H = basis * torch.tensor([5.0, 2.0, 1.0]).double() @ basis.T
    objective, layout = problem(Bowl(H, 50), loss_of)
    curvature = pc.lowrank(objective, layout, ones(layout)).curvature
    torch.testing.assert_close(curvature.mean_excess(0.0), 4.0)
    assert curvature.n_zero == 147
    P = dense(curvature.preconditioner(1.0))
    torch.testing.assert_close(P @ P, torch.linalg.inv(H + torch.eye(150).double()))


def test_low_rank_with_a_remainder_per_parameter() -> None:
    d, k, split = 90, 4, 30
    remainder = torch.cat([torch.full((split,), 2.0), torch.full((d - split,), 0.1)]).double()
    basis = orthonormal(d, k)
    H = torch.diag(remainder) + 1e4 * basis @ basis.T
    objective, layout = problem(Bowl(H, split), loss_of)
    scale = ones(layout)
    scale[[0, 40]] = 0.0
    moving = scale > 0
    H = H[moving][:, moving]
    spread = {}
    for rest in ("mean", "parameter"):
        curvature = pc.lowrank(objective, layout, scale, rank=k, rest=rest).curvature
        P = dense(curvature.preconditioner(math.inf))
        logs = torch.linalg.eigvalsh(P.T @ H @ P).log()
        spread[rest] = float(logs.std())
    # Both hold the eigenpairs; only one can tell the two parameters apart.
    assert spread["parameter"] < 0.35 * spread["mean"]


def test_low_rank_of_a_few_coordinates_is_exact() -> None:
    H = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    objective, layout = problem(Bowl(H, 2), loss_of)
    curvature = pc.lowrank(objective, layout, ones(layout), rank=4).curvature
    torch.testing.assert_close(matrix_of(curvature), H)
    for rank in (0, 5):
        with pytest.raises(ValueError, match="rank must be from 1 to 4"):
            pc.lowrank(objective, layout, ones(layout), rank=rank)
    with pytest.raises(ValueError, match="rest"):
        pc.lowrank(objective, layout, ones(layout), rest="median")  # type: ignore[arg-type]


def test_low_rank_of_the_gauss_newton_matrix() -> None:
    model, data = network(), two_batches()
    objective, layout = problem(model, F.cross_entropy, data)
    scale = gappy_scale(layout)
    exact = pc.ggn(objective, layout, scale).curvature
    curvature = pc.lowrank(objective, layout, scale, rank=exact.dim, kind="ggn").curvature
    assert curvature.mean_excess(0.7) == pytest.approx(exact.mean_excess(0.7), rel=1e-9)


def test_the_diagonal_is_unbiased_within_its_error() -> None:
    d, n = 60, 40
    A = randn(d, d)
    H = A @ A.T / d + torch.diag(torch.linspace(5, 50, d).double())
    objective, layout = problem(Bowl(H, 20), loss_of)
    curvature, n_grad, provenance = pc.diagonal(objective, layout, ones(layout), n_probes=n)
    h = dense(curvature.preconditioner(math.inf)).diagonal() ** -2.0
    off = H - torch.diag(H.diagonal())
    z = (h - H.diagonal()) / (off.norm(dim=1) / math.sqrt(n))
    assert float(z.abs().max()) < 5.0
    assert 0.5 < float(z.square().mean()) < 2.0
    assert n_grad == 1 + 2 * n
    assert provenance["n_unresolved"] == 0


def test_the_diagonal_of_few_coordinates_is_exact() -> None:
    H = randn(9, 9)
    H = H @ H.T + torch.eye(9).double()
    objective, layout = problem(Bowl(H, 4), loss_of)
    scale = gappy_scale(layout)
    curvature = pc.diagonal(objective, layout, scale).curvature
    expected = (H.diagonal() * scale.square())[scale > 0]
    torch.testing.assert_close(matrix_of(curvature).diagonal(), expected)


def test_an_entry_below_its_error_is_set_to_it() -> None:
    d = 80
    H = torch.ones(d, d, dtype=torch.float64)
    H.fill_diagonal_(1e-9)
    objective, layout = problem(Bowl(H, 20), loss_of)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastvolWarning)
        curvature, _, provenance = pc.diagonal(objective, layout, ones(layout), n_probes=50)
    # Each row's off-diagonal norm is √79; over √50 that is 1.26.
    h = dense(curvature.preconditioner(math.inf)).diagonal() ** -2.0
    assert provenance["n_unresolved"] > d / 2
    assert float(h.min()) > 0.8


# What cannot be differentiated, once or twice


class Square(torch.autograd.Function):
    """x², with a backward pass that batches of vectors cannot take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if bool((slope != slope).any()):
            raise ValueError
        return 2.0 * x * slope


class OnceSquare(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2.0 * x * slope


class Lopsided(torch.autograd.Function):
    """x·y, with a backward pass that forgets y's share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return x * y

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return slope * y, None


def on_weight(function: Callable[[Tensor], Any]) -> tuple[Objective, ParameterLayout, Tensor]:
    """A loss of three weights, at (1, 1, 1)."""
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.ones_(model.weight)
    return with_ones(problem(model, lambda m: function(m.weight.flatten())))


def test_a_backward_pass_that_takes_one_vector_at_a_time() -> None:
    curvature = pc.hessian(*on_weight(lambda w: Square.apply(w).sum())).curvature
    torch.testing.assert_close(matrix_of(curvature), 2.0 * torch.eye(3).double())


BUILDERS = [pc.hessian, pc.diagonal, pc.lowrank]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda w: float(w.square().sum()), "needs gradients.*returned a float"),
        (lambda w: w.detach().square().sum(), "needs gradients.*does not depend"),
        (lambda w: (w > 0.5).double().mean(), "needs gradients.*does not depend"),
        (lambda w: torch.zeros((), requires_grad=True).double() * 2, "needs gradients"),
        (lambda w: w.round().sum(), "needs gradients.*is 0 at"),
        (lambda w: (w - 1).abs().pow(0.5).sum(), "gradient.*not finite"),
        (lambda w: (w - 1).pow(4).sum(), "curvature .* is 0 .*'boundary'"),
        (lambda w: w.sum(), "curvature .* is 0"),
        (lambda w: (w - 1).abs().pow(1.5).sum(), "second derivatives.*not finite.*'boundary'"),
        (lambda w: (OnceSquare.apply(w) + w**2).sum(), "OnceSquare.* once_diff.*'boundary'"),
    ],
)
def test_losses_without_curvature_are_refused(
    build: Callable[..., Any], function: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(FastvolError, match=message):
        build(*on_weight(function))


def test_a_loss_without_gradients_names_what_needs_none() -> None:
    objective, layout, _ = on_weight(lambda w: float(w.sum()))
    with pytest.raises(FastvolError, match=r"'boundary' needs gradients.*a diagonal, a matrix"):
        pc.require_gradient(objective, layout, "boundary")
    objective, layout, _ = on_weight(lambda w: w.sum())
    assert pc.require_gradient(objective, layout, "boundary") == 1


def test_an_exact_fit_has_a_curvature_though_no_gradient() -> None:
    curvature = pc.hessian(*on_weight(lambda w: (w - 1).square().sum())).curvature
    torch.testing.assert_close(matrix_of(curvature), 2.0 * torch.eye(3).double())


def test_a_saturated_cross_entropy_points_to_the_boundary() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[500.0, 0.0], [0.0, 500.0]]))
    data = (torch.eye(2), torch.arange(2))
    for build in (pc.hessian, pc.ggn):
        with pytest.raises(FastvolError, match=r"saturated cross-entropy.*'boundary'"):
            build(*with_ones(problem(model, F.cross_entropy, data)))


def test_a_saddle_is_said() -> None:
    with pytest.warns(FastvolWarning, match="1 negative among 3 eigenvalues"):
        curvature = pc.hessian(*on_weight(lambda w: w[0] ** 2 + w[1] ** 2 - w[2] ** 2)).curvature
    torch.testing.assert_close(matrix_of(curvature), 2.0 * torch.eye(3).double())
    with pytest.warns(FastvolWarning, match="1 of the 3 diagonal entries"):
        pc.diagonal(*on_weight(lambda w: w[0] ** 2 + w[1] ** 2 - w[2] ** 2))


def test_a_wrong_backward_pass_is_said() -> None:
    def loss(w: Tensor) -> Tensor:
        return Lopsided.apply(w[0], w[1]) + 5 * w.square().sum()

    with pytest.warns(FastvolWarning, match="not symmetric"):
        pc.hessian(*on_weight(loss))


def test_gauss_newton_with_a_backward_pass_without_a_graph() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return OnceSquare.apply(self.w) * x

    given = with_ones(problem(Once(), F.mse_loss, (torch.ones(3, 2), torch.zeros(3, 2))))
    with pytest.raises(FastvolError, match=r"'ggn' needs second derivatives.*OnceSquare"):
        pc.ggn(*given)


def test_gauss_newton_needs_data() -> None:
    for build in (pc.ggn, lambda *a: pc.lowrank(*a, kind="ggn")):
        with pytest.raises(ValueError, match="preconditioner='ggn' needs data="):
            build(*on_weight(lambda w: w.square().sum()))


def test_exact_matrices_have_a_limit() -> None:
    model = nn.Linear(pc.EXACT_DIM + 1, 1, bias=False)
    objective, layout, scale = with_ones(problem(model, lambda m: m.weight.square().sum()))
    with pytest.raises(ValueError, match=r"'hessian' .* at most 5000 .* there are 5001"):
        pc.hessian(objective, layout, scale)
    assert pc.lowrank(objective, layout, scale, rank=1).curvature.largest == pytest.approx(2.0)


# Optimizers


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    """The flat gradient of each step."""
    gradients = []
    for step in range(steps):
        optimizer.zero_grad()
        model(randn(6, 3, seed=step).to(next(model.parameters()).dtype)).square().sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
        optimizer.step()
    return gradients


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_second_moments_of_adam(amsgrad: bool) -> None:
    model = nn.Linear(3, 2).double()
    wrapped = nn.DataParallel(model)
    optimizer = torch.optim.Adam(
        [{"params": [model.bias]}, {"params": [model.weight], "betas": (0.9, 0.5)}],
        lr=0.1,
        betas=(0.9, 0.9),
        amsgrad=amsgrad,
    )
    gradients = train(model, optimizer)
    beta = torch.tensor([0.5] * 6 + [0.9] * 2, dtype=torch.float64)
    v = largest = torch.zeros(8, dtype=torch.float64)
    for g in gradients:
        v = beta * v + (1 - beta) * g.square()
        largest = torch.maximum(largest, v)
    expected = (largest if amsgrad else v) / (1 - beta**3)
    layout = ParameterLayout(model)
    scale = gappy_scale(layout)
    curvature, n_grad, provenance = pc.from_optimizer(optimizer, wrapped, layout, scale)
    assert n_grad == 0
    assert provenance["via"] == "Adam"
    torch.testing.assert_close(
        matrix_of(curvature).diagonal(), (expected * scale.square())[scale > 0]
    )


def test_optimizers_that_do_not_fit() -> None:
    model = nn.Linear(3, 2)
    layout = ParameterLayout(model)

    def moments(optimizer: torch.optim.Optimizer, of: nn.Module = model) -> Any:
        return pc.from_optimizer(optimizer, of, layout, ones(layout))

    with pytest.raises(ValueError, match=r"preconditioner \(Adam\) has no state yet"):
        moments(torch.optim.Adam(model.parameters()))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, sgd)
    with pytest.raises(ValueError, match=r"preconditioner \(SGD\) has no state"):
        moments(sgd)
    rmsprop = torch.optim.RMSprop(model.parameters())
    train(model, rmsprop)
    with pytest.raises(ValueError, match=r"\(RMSprop\) keeps no exp_avg_sq.*square_avg"):
        moments(rmsprop)
    adam = torch.optim.Adam(model.parameters())
    train(model, adam)
    with pytest.raises(
        ValueError, match=r"does not hold the model's parameters \['weight', 'bias'"
    ):
        moments(adam, copy.deepcopy(model))
    del adam.state[model.bias]
    with pytest.raises(ValueError, match=r"keeps no exp_avg_sq for \['bias'\]"):
        moments(adam)
    # What does not move needs no moments.
    scale = ones(layout)
    scale[6:] = 0.0
    assert pc.from_optimizer(adam, model, layout, scale).curvature.dim == 6
    adam.state[model.weight]["exp_avg_sq"].zero_()
    with pytest.raises(FastvolError, match="all 0"):
        pc.from_optimizer(adam, model, layout, scale)
    adam.state[model.weight]["exp_avg_sq"][0, 0] = math.nan
    with pytest.raises(FastvolError, match="not finite"):
        pc.from_optimizer(adam, model, layout, scale)
    del adam.state[model.weight]["step"]
    with pytest.raises(ValueError, match="no step"):
        pc.from_optimizer(adam, model, layout, scale)


# The boundary


class Body:
    """{x : Σ |(Qᵀx)_i / a_i|^p ≤ 1} in d dimensions."""

    def __init__(self, axes: Tensor, p: float, rotated: bool = True) -> None:
        d = len(axes)
        self.p, self.axes = p, axes
        self.Q = orthonormal(d, d, seed=9) if rotated else torch.eye(d).double()

    def boundary(self, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Radii along ``directions``, and a gradient of no particular length."""
        y = directions @ self.Q / self.axes
        radii = y.abs().pow(self.p).sum(dim=1).pow(-1 / self.p)
        y = y * radii[:, None]
        slope = y.sign() * y.abs().pow(self.p - 1) / self.axes
        return radii, directions * radii[:, None], 3.0 * slope @ self.Q.T

    def spread(self, p: pc.Preconditioner | None, seed: int = 77) -> float:
        """sd(d · log r) over rays along P z."""
        z = F.normalize(randn(1000, len(self.axes), seed=seed))
        radii, _, _ = self.boundary(z if p is None else p.matvec(z))
        return len(self.axes) * float(radii.log().std())


def update(
    body: Body, n: int, power: float, previous: pc.Preconditioner | None = None, seed: int = 3
) -> pc.Preconditioner:
    """One more round of rays, from the preconditioner of the last."""
    z = F.normalize(randn(n, len(body.axes), seed=seed))
    if previous is None:
        _, points, normals = body.boundary(z)
        return pc.from_boundary(points, normals, power=power)
    radii, _, normals = body.boundary(previous.matvec(z))
    return pc.from_boundary(
        z * radii[:, None], previous.rmatvec(normals), power=power, previous=previous
    )


@pytest.mark.parametrize("n", [40, 60, 80])
def test_the_boundary_of_an_ellipsoid_whitens_it_exactly(n: int) -> None:
    body = Body(torch.logspace(0, -3, 40, dtype=torch.float64), 2.0)
    p = update(body, n, 1.0)
    assert body.spread(None) > 5.0
    # Not many points tell: with n = d the smallest of their scales are as good as unknown.
    assert body.spread(p) < (1e-3 if n == 40 else 1e-6)
    assert p.logabsdet == pytest.approx(float(torch.linalg.slogdet(dense(p))[1]), abs=1e-8)
    described = json.loads(json.dumps(p.describe()))
    assert described["source"] == {
        "from": "boundary",
        "form": "full",
        "power": 1.0,
        "n_used": n,
        "n_dropped": 0,
    }


def test_the_axes_of_an_ellipsoid_are_found() -> None:
    axes = torch.tensor([3.0, 1.0, 0.25], dtype=torch.float64)
    body = Body(axes, 2.0)
    P = dense(update(body, 5, 1.0))
    expected = body.Q * axes @ body.Q.T
    torch.testing.assert_close(P / P.norm(), expected / expected.norm())


@pytest.mark.parametrize("n", [50, 80])
def test_half_a_step_rounds_an_l4_ball(n: int) -> None:
    body = Body(torch.logspace(0, 1, 40, dtype=torch.float64), 4.0)
    plain, full, half = (
        body.spread(None),
        body.spread(update(body, n, 1.0)),
        body.spread(update(body, n, 0.5)),
    )
    # A whole step turns the error of log P into its opposite: as bad as before.
    assert plain > 7.0
    assert full > 6.0
    assert half < 3.0
    # With its own axes known, the ball's corners leave 2.05.
    again = update(body, n, 0.5, update(body, n, 0.5), seed=4)
    assert body.spread(again) < 2.7


def test_steps_round_a_cross_polytope() -> None:
    body = Body(torch.logspace(0, 2, 30, dtype=torch.float64), 1.0)
    p = None
    for seed in range(4):
        p = update(body, 90, 1.0, p, seed=seed)
    assert body.spread(p) < 0.4 * body.spread(None)


@pytest.mark.parametrize(("d", "n"), [(10, 4), (10, 9), (4001, 3)])
def test_few_points_or_many_coordinates_give_a_diagonal(d: int, n: int) -> None:
    axes = torch.logspace(0, 3, d, dtype=torch.float64)
    body = Body.__new__(Body)
    body.p, body.axes = 2.0, axes
    z = F.normalize(randn(n, d))
    y = z / axes
    radii = y.norm(dim=1, keepdim=True) ** -1
    p = pc.from_boundary(z * radii, (y * radii) / axes)
    assert isinstance(p, pc.Diagonal)
    assert p.describe()["source"]["form"] == "diagonal"
    torch.testing.assert_close(p.values / p.values[0], axes / axes[0])


def test_pairs_of_one_point_count_once() -> None:
    body = Body(torch.logspace(0, -1, 8, dtype=torch.float64), 2.0)
    z = F.normalize(randn(5, 8))
    _, points, normals = body.boundary(torch.cat([z, -z]))
    assert pc.from_boundary(points, normals).describe()["source"]["form"] == "diagonal"


def test_rows_that_say_nothing_are_left_out() -> None:
    body = Body(torch.logspace(0, -2, 6, dtype=torch.float64), 2.0)
    _, points, normals = body.boundary(F.normalize(randn(12, 6)))
    expected = dense(pc.from_boundary(points[4:], normals[4:]))
    normals[0] = math.nan
    points[1] = math.inf
    normals[2] = -normals[2]
    normals[3] = 0.0
    p = pc.from_boundary(points.float().double(), normals)
    torch.testing.assert_close(dense(p), expected, atol=1e-4, rtol=1e-4)
    source = p.describe()["source"]
    assert (source["n_used"], source["n_dropped"]) == (8, 4)
    with pytest.raises(FastvolError, match=r"preconditioner='boundary'.*none is finite"):
        pc.from_boundary(points[:4], normals[:4])


def test_one_far_point_does_not_decide() -> None:
    body = Body(torch.logspace(0, -2, 20, dtype=torch.float64), 2.0)
    _, points, normals = body.boundary(F.normalize(randn(60, 20)))
    points[7] *= 1e6
    normals[7] *= 1e-6
    assert body.spread(None) > 4.0
    assert body.spread(pc.from_boundary(points, normals)) < 1.0


@pytest.mark.parametrize("rotated", [False, True])
def test_directions_without_a_bound_stay_finite(rotated: bool) -> None:
    axes = torch.tensor([1.0, 0.1, 1e30, 1.0, 0.1, 1.0], dtype=torch.float64)
    body = Body(axes, 2.0, rotated)
    p = update(body, 30, 1.0)
    sizes = torch.linalg.svdvals(dense(p))
    assert float(sizes[0] / sizes[1]) > 1e3
    assert float(sizes[0] / sizes[-1]) < 1e10
    torch.testing.assert_close(
        sizes[1:] / sizes[1], torch.tensor([1, 1, 1, 0.1, 0.1]).double()[:5], atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    "previous", [pc.Diagonal(torch.arange(1.0, 7.0)), pc.Matrix(randn(6, 6)), pc.Identity(6)]
)
def test_an_update_goes_on_from_the_last(previous: pc.Preconditioner) -> None:
    body = Body(torch.logspace(0, -2, 6, dtype=torch.float64), 2.0)
    p = update(body, 12, 1.0, previous)
    assert body.spread(p) < 1e-8
    assert p.logabsdet == pytest.approx(float(torch.linalg.slogdet(dense(p))[1]), abs=1e-9)
    assert p.describe()["source"]["n_used"] == 12


def test_the_boundary_is_checked() -> None:
    with pytest.raises(ValueError, match=r"points and normals .* \[n, d\]"):
        pc.from_boundary(randn(3, 2), randn(2, 3))
    with pytest.raises(ValueError, match="power"):
        pc.from_boundary(randn(3, 2), randn(3, 2), power=0.0)
