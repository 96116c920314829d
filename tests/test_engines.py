"""The general engine: the losses and gradients of rays, however they are made and evaluated."""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvol
from fastvol import _backend
from fastvol._layout import ParameterLayout
from fastvol._objective import PREFIX, Objective
from fastvol._reference import noise
from fastvol.engines import Dense, GeneralEngine, Indexed, Plan, blocks
from fastvol.metrics import FilterMetric

SEED = 11
Data = tuple[Tensor, Tensor]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def examples(dtype: torch.dtype = torch.float64) -> Data:
    return torch.randn(7, 2, dtype=dtype), torch.randn(7, 1, dtype=dtype)


class Stream:
    """Batches that are read anew at every evaluation."""

    def __init__(self, batches: list[Data]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Data]:
        return iter(self.batches)


def engine_for(
    model: nn.Module,
    data: Any,
    *,
    chunk: int = 1,
    lanes: int = 6,
    keep_rows: bool = True,
    scale: Tensor | None = None,
    parameters: Any = None,
    backend: str = "cpp",
    project: Tensor | None = None,
    loss_fn: Any = F.mse_loss,
) -> GeneralEngine:
    layout = ParameterLayout(model, parameters)
    objective = Objective(model, loss_fn, data, layout.device)
    objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
    dtype = str(layout.dtype).removeprefix("torch.")
    plan = Plan("general", chunk, lanes, keep_rows, dtype, 1, 1, backend)
    scale = torch.ones(layout.size, dtype=torch.float64) if scale is None else scale
    return GeneralEngine(objective, layout, scale, plan, _backend.select(backend), project)


def normals(dim: int, ids: np.ndarray, *, stream: int = 0, antithetic: bool = False) -> Tensor:
    """The vectors z of some directions, by the reference."""
    z = torch.empty(len(ids), dim, dtype=torch.float64)
    noise.normals(z, SEED, stream, ids, antithetic=antithetic)
    return z


def loss_at(model: nn.Module, shift: Tensor, data: Data, parameters: Any = None) -> float:
    """The loss of a copy of the model, moved by ``shift``."""
    moved = copy.deepcopy(model)
    layout = ParameterLayout(moved, parameters)
    values = layout.unflatten(layout.flatten() + shift)
    with torch.no_grad():
        for name, value in values.items():
            moved.get_parameter(name).copy_(value)
        return float(F.mse_loss(moved(data[0]), data[1]))


def losses_at(model: nn.Module, shifts: Tensor, data: Data, parameters: Any = None) -> np.ndarray:
    return np.array([loss_at(model, shift, data, parameters) for shift in shifts])


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("keep_rows", [True, False])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_indexed_rays(
    backend: str, keep_rows: bool, chunk: int, antithetic: bool, scaled: bool
) -> None:
    """L(θ* + s·t·z/‖z‖), z from the seed, the stream and the index."""
    model, data = network(), examples()
    scale = torch.linspace(0.5, 2.0, 17, dtype=torch.float64) if scaled else None
    project = torch.linspace(-1.0, 1.0, 17, dtype=torch.float64)
    engine = engine_for(
        model, data, chunk=chunk, keep_rows=keep_rows, scale=scale, backend=backend,
        project=project,
    )  # fmt: skip
    ids = np.array([0, 1, 6, 7, 2**33, 2**33 + 1])
    radii = np.array([0.0, 0.3, 1.0, 1.0, 2.0, 50.0])
    info = engine.load(np.arange(6), Indexed(SEED, ids, stream=3, antithetic=antithetic))
    z = normals(17, ids, stream=3, antithetic=antithetic)
    np.testing.assert_allclose(info.norm, z.norm(dim=1).numpy(), rtol=1e-13)
    np.testing.assert_allclose(info.dot, (z @ project).numpy(), rtol=0, atol=1e-12)
    shifts = torch.from_numpy(radii)[:, None] * z / z.norm(dim=1, keepdim=True)
    if scale is not None:
        shifts = shifts * scale
    values = engine.loss(radii).values
    np.testing.assert_allclose(values, losses_at(model, shifts, data), rtol=1e-12)
    if antithetic:
        torch.testing.assert_close(z[1], -z[0], rtol=0, atol=0)
        torch.testing.assert_close(z[3], -z[2], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dense_rays_equal_indexed_ones(dtype: torch.dtype) -> None:
    model, data = network(dtype), examples(dtype)
    engine = engine_for(model, data, lanes=10)
    ids, radii = np.arange(5), np.linspace(0.1, 2.0, 5)
    engine.load(np.arange(5), Indexed(SEED, ids))
    z = normals(17, ids)
    unit = (z / z.norm(dim=1, keepdim=True)).to(dtype)
    info = engine.load(np.arange(5, 10), Dense(unit))
    np.testing.assert_allclose(info.norm, 1.0, rtol=1e-6)
    values = engine.loss(np.tile(radii, 2)).values
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(values[:5], values[5:], rtol=tolerance)


def test_dense_rays_are_not_normalised() -> None:
    model, data = network(), examples()
    engine = engine_for(model, data, lanes=2)
    directions = torch.randn(2, 17, dtype=torch.float64)
    info = engine.load(np.arange(2), Dense(directions))
    np.testing.assert_allclose(info.norm, directions.norm(dim=1).numpy(), rtol=1e-14)
    values = engine.loss(np.array([0.5, 0.5])).values
    np.testing.assert_allclose(values, losses_at(model, 0.5 * directions, data), rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 16), (1, 17), (17,), (2, 17, 1)])
def test_dense_rays_of_another_shape(shape: tuple[int, ...]) -> None:
    engine = engine_for(network(), examples(), lanes=2)
    with pytest.raises(ValueError, match=r"directions must have shape \(2, 17\)"):
        engine.load(np.arange(2), Dense(torch.zeros(shape)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_chunks_agree(dtype: torch.dtype, tolerance: float) -> None:
    model, data = network(dtype), examples(dtype)
    radii = np.geomspace(0.01, 3.0, 70)
    values = []
    for chunk in (1, 8, 64):
        engine = engine_for(model, data, chunk=chunk, lanes=70)
        engine.load(np.arange(70), Indexed(SEED, np.arange(70)))
        values.append(engine.loss(radii).values)
    np.testing.assert_allclose(values[1], values[0], rtol=tolerance)
    np.testing.assert_allclose(values[2], values[0], rtol=tolerance)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("keep_rows", [True, False])
@pytest.mark.parametrize(
    "lanes", [[0, 1, 2, 3], [2, 3], [5], [0, 2, 5], [3, 1, 0], [0, 2, 1, 3], [4, 3, 2, 1, 0, 5]]
)
def test_lanes_in_any_order(lanes: list[int], keep_rows: bool, chunk: int) -> None:
    """Which lanes carry a ray, and in which order they are asked, does not matter."""
    model, data = network(), examples()
    engine = engine_for(model, data, chunk=chunk, keep_rows=keep_rows)
    where = np.array(lanes)
    engine.load(np.arange(6), Indexed(SEED, np.arange(100, 106)))
    engine.load(where, Indexed(SEED, 10 * where))
    radii = 0.1 + 0.2 * np.arange(6)
    z = normals(17, np.where(np.isin(np.arange(6), where), 10 * np.arange(6), np.arange(100, 106)))
    shifts = torch.from_numpy(radii)[:, None] * z / z.norm(dim=1, keepdim=True)
    expected = losses_at(model, shifts, data)
    np.testing.assert_allclose(engine.loss(radii).values, expected, rtol=1e-12)
    np.testing.assert_allclose(engine.loss(radii[where], where).values, expected[where], rtol=1e-12)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_dense_beside_indexed(keep_rows: bool) -> None:
    """A dense ray on one lane leaves the rays on the others as they are."""
    model, data = network(), examples()
    engine = engine_for(model, data, keep_rows=keep_rows)
    radii = 0.1 + 0.2 * np.arange(6)
    engine.load(np.arange(6), Indexed(SEED, np.arange(6)))
    before = engine.loss(radii).values
    engine.load(np.array([2]), Dense(torch.randn(1, 17)))
    after = engine.loss(radii).values
    others = np.arange(6) != 2
    np.testing.assert_allclose(after[others], before[others], rtol=1e-12)
    assert after[2] != before[2]


class Squeeze:
    """P = diag(p) + the exchange of the first two coordinates."""

    def __init__(self, dim: int) -> None:
        self.matrix = torch.diag(torch.linspace(0.5, 2.0, dim, dtype=torch.float64))
        self.matrix[0, 1] = self.matrix[1, 0] = 0.3

    def matvec(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix.T.to(rows.dtype)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("keep_rows", [True, False])
def test_preconditioned_rays(keep_rows: bool, chunk: int) -> None:
    """v = P z/‖z‖ on indexed rays, P x on dense ones, then the metric's scale."""
    model, data = network(), examples()
    scale = torch.linspace(2.0, 0.5, 17, dtype=torch.float64)
    engine = engine_for(model, data, chunk=chunk, keep_rows=keep_rows, scale=scale)
    operator = Squeeze(17)
    ids, radii = np.array([4, 9, 2]), np.array([0.2, 0.7, 1.1])
    info = engine.load(np.arange(3), Indexed(SEED, ids, preconditioner=operator))
    z = normals(17, ids)
    np.testing.assert_allclose(info.norm, z.norm(dim=1).numpy(), rtol=1e-13)
    unit = z / z.norm(dim=1, keepdim=True)
    engine.load(np.arange(3, 6), Dense(unit, preconditioner=operator))
    shifts = torch.from_numpy(radii)[:, None] * (unit @ operator.matrix.T) * scale
    expected = losses_at(model, shifts, data)
    np.testing.assert_allclose(
        engine.loss(np.tile(radii, 2)).values, np.tile(expected, 2), rtol=1e-12
    )


@pytest.mark.parametrize("chunk", [1, 4])
def test_streams_equal_lists(chunk: int) -> None:
    model, (x, y) = network(), examples()
    batches = list(zip(x.split(3), y.split(3), strict=True))
    radii = np.linspace(0.1, 2.0, 6)
    values = []
    for data in ((x, y), batches, Stream(batches)):
        engine = engine_for(model, data, chunk=chunk)
        engine.load(np.arange(6), Indexed(SEED, np.arange(6)))
        losses, gradients = engine.loss_and_grad(radii)
        np.testing.assert_allclose(losses, engine.loss(radii).values, rtol=1e-12)
        values.append((losses, gradients.numpy()))
    for losses, gradients in values[1:]:
        np.testing.assert_allclose(losses, values[0][0], rtol=1e-12)
        np.testing.assert_allclose(gradients, values[0][1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("metric", ["filter", "dropped rows", "subset"])
def test_gradients_in_metric_coordinates(metric: str, chunk: int) -> None:
    """∂L/∂w of w = (θ − θ*)/s, against central differences along every coordinate."""
    model, (x, y) = network(), examples()
    parameters = ["0.weight", "2.*"] if metric == "subset" else None
    if metric == "dropped rows":
        with torch.no_grad():
            model[0].weight[1] = 0.0
    layout = ParameterLayout(model, parameters)
    if metric == "dropped rows":
        with pytest.warns(fastvol.FastvolWarning, match="rows with norm 0"):
            scale = FilterMetric("drop").scale(layout, layout.flatten())
    else:
        scale = FilterMetric().scale(layout, layout.flatten())
    moving = scale > 0
    dim = int(moving.sum())
    assert dim == {"filter": 17, "dropped rows": 15, "subset": 13}[metric]
    batches = list(zip(x.split(3), y.split(3), strict=True))
    engine = engine_for(
        model, batches, chunk=chunk, lanes=2 * dim, scale=scale, parameters=parameters
    )
    assert engine.dim == dim

    ids, radii = np.arange(2), np.array([0.2, 0.6])
    engine.load(ids, Indexed(SEED, ids))
    losses, gradients = engine.loss_and_grad(radii, ids)
    z = normals(dim, ids)
    w = torch.from_numpy(radii)[:, None] * z / z.norm(dim=1, keepdim=True)
    full = torch.zeros(2, layout.size, dtype=torch.float64)
    full[:, moving] = w * scale[moving]
    np.testing.assert_allclose(losses, losses_at(model, full, (x, y), parameters), rtol=1e-12)

    step = 1e-5
    for ray in range(2):
        ends = torch.cat([w[ray] + step * torch.eye(dim), w[ray] - step * torch.eye(dim)])
        engine.load(np.arange(2 * dim), Dense(ends))
        values = engine.loss(np.ones(2 * dim)).values
        differences = (values[:dim] - values[dim:]) / (2 * step)
        np.testing.assert_allclose(gradients[ray].numpy(), differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 4])
def test_half_precision(dtype: torch.dtype, chunk: int) -> None:
    """θ* + ... is made in float32 and rounded once, when the model is called."""
    model, data = network(dtype), examples(dtype)
    engine = engine_for(model, data, chunk=chunk)
    ids, radii = np.arange(6), np.linspace(0.5, 2.0, 6)
    engine.load(ids, Indexed(SEED, ids))
    z = normals(17, ids)
    shifts = (torch.from_numpy(radii)[:, None] * z / z.norm(dim=1, keepdim=True)).float()
    values = engine.loss(radii).values
    rounding = torch.finfo(dtype).eps
    np.testing.assert_allclose(values, losses_at(model, shifts, data), rtol=8 * rounding)


def test_capabilities() -> None:
    engine = engine_for(network(), examples(), lanes=5)
    assert engine.lanes == 5
    assert engine.capabilities.gradients


# Through the public call


class Branching(nn.Module):
    """Takes one way or the other by the sign of a sum, which comes to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self) -> Tensor:
        moved = self.weight - 1
        if moved.sum() > 0:
            return moved.square().sum()
        return (-moved).square().sum()


class Reading(Branching):
    """Reads a value out of a tensor on the way."""

    def forward(self) -> Tensor:
        return (self.weight - 1).square().sum() + 0.0 * self.weight[0].item()


def loss_of(model: nn.Module) -> Tensor:
    return model()


def float_loss_of(model: nn.Module) -> float:
    return float(model())


def squares(model: nn.Module) -> Tensor:
    return (model.weight - 1).square().sum()


@pytest.mark.parametrize(
    ("make", "loss_fn"),
    [
        (Branching, loss_of),
        (Reading, loss_of),
        (Branching, float_loss_of),
        (Branching, lambda m: float(squares(m))),
        (Branching, lambda m: squares(m).detach().numpy()),
        (Branching, lambda m: squares(m) + 0 * torch.rand(())),
    ],
    ids=["branch", "item", "branch, float", "float", "numpy", "random numbers"],
)
def test_rays_one_at_a_time(make: Any, loss_fn: Any) -> None:
    """Where vmap cannot go there is one warning, and the radii of the unit ball all the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fastvol.estimate(make(), loss_fn, n=20, threshold=1.0, rtol=1e-10)
    assert [w.category for w in caught] == [fastvol.FastvolWarning]
    assert "one at a time" in str(caught[0].message)
    assert result.plan["chunk"] == 1
    assert len(result.provenance["fell_back"]) == 1
    np.testing.assert_allclose(result.log_radii, 0.0, atol=1e-9)


def test_no_warning_where_vmap_works() -> None:
    result = fastvol.estimate(Branching(), squares, n=20, threshold=1.0)
    assert result.provenance["fell_back"] == []


def plan_like(result: fastvol.VolumeEstimate, **changes: Any) -> dict[str, Any]:
    return {**result.plan, **changes}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"antithetic": True},
        {"metric": "filter"},
        {"measure": fastvol.Gaussian(0.5, "origin")},
        {"parameters": "2.*"},
        {"first_crossing": True},
    ],
    ids=str,
)
def test_backends_agree(options: dict[str, Any]) -> None:
    model, data = network(), examples()
    results = {
        name: fastvol.estimate(
            model, F.mse_loss, n=24, data=data, rtol=1e-10, lanes=8, backend=name, **options
        )
        for name in ("cpp", "torch")
    }
    assert results["torch"].plan["backend"] == "torch"
    np.testing.assert_allclose(
        results["torch"].log_radii, results["cpp"].log_radii, rtol=0, atol=1e-9
    )
    assert results["torch"].log_volume == pytest.approx(results["cpp"].log_volume, abs=1e-6)
    assert np.array_equal(results["torch"].status, results["cpp"].status)


@pytest.mark.parametrize("lanes", [1, 3, 64])
def test_lanes_are_respected(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network(), examples()
    in_flight = []
    loss = GeneralEngine.loss

    def watched(self: GeneralEngine, radii: np.ndarray, asked: Any = None, **options: Any) -> Any:
        in_flight.append(len(radii))
        return loss(self, radii, asked, **options)

    monkeypatch.setattr(GeneralEngine, "loss", watched)
    result = fastvol.estimate(model, F.mse_loss, n=80, data=data, lanes=lanes)
    assert result.plan["lanes"] == lanes
    assert result.plan["chunk"] <= lanes
    assert max(in_flight) == lanes


def test_a_plan_repeats_a_run(tmp_path: Path) -> None:
    """Bitwise, also after a way through JSON or a file."""
    model, data = network(torch.float32), examples(torch.float32)
    first = fastvol.estimate(model, F.mse_loss, n=40, data=data)
    plans = [
        first.plan,
        json.loads(json.dumps(first.plan)),
        fastvol.load(first.save(tmp_path / "result")).plan,
    ]
    for plan in plans:
        again = fastvol.estimate(model, F.mse_loss, n=40, data=data, plan=plan)
        assert again.log_radii.tobytes() == first.log_radii.tobytes()
        assert again.status.tobytes() == first.status.tobytes()
        assert again.log_volume == first.log_volume
        assert again.stderr == first.stderr
        assert again.plan == first.plan


@pytest.mark.parametrize("chunk", [1, 4])
def test_more_directions_extend_a_run(chunk: int) -> None:
    """Block by block, a direction's radius does not depend on n."""
    model, data = network(torch.float32), examples(torch.float32)
    base = fastvol.estimate(model, F.mse_loss, n=8, data=data, lanes=4, rtol=1e-4)
    plan = plan_like(base, chunk=chunk, block=16)
    short, long = (
        fastvol.estimate(model, F.mse_loss, n=n, data=data, plan=plan, rtol=1e-4) for n in (32, 64)
    )
    np.testing.assert_array_equal(short.log_radii, long.log_radii[:32])


@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-9])
def test_the_tolerance_holds_under_every_plan(rtol: float) -> None:
    """The radius of an ellipsoid is known; every plan finds it to rtol."""
    model = Branching()
    axes = torch.tensor([1.0, 0.1, 3.0], dtype=torch.float64)

    def ellipsoid(model: nn.Module) -> Tensor:
        return ((model.weight - 1) / axes).square().sum()

    z = normals(3, np.arange(30))
    unit = z / z.norm(dim=1, keepdim=True)
    exact = -0.5 * (unit / axes).square().sum(dim=1).log().numpy()
    base = fastvol.estimate(model, ellipsoid, n=4, threshold=1.0)
    for changes in (
        {"chunk": 1, "lanes": 1},
        {"chunk": 1, "lanes": 5, "keep_rows": False},
        {"chunk": 4, "lanes": 5},
        {"chunk": 16, "lanes": 16},
        {"chunk": 4, "lanes": 16, "block": 7},
    ):
        result = fastvol.estimate(
            model, ellipsoid, n=30, threshold=1.0, rtol=rtol, seed=SEED,
            plan=plan_like(base, **changes),
        )  # fmt: skip
        assert math.isclose(result.config["rtol"], rtol)
        np.testing.assert_allclose(result.log_radii, exact, rtol=0, atol=1.1 * rtol)


def test_another_default_device() -> None:
    """What new tensors are made on by default does not matter to the run."""
    model, data = network(), examples()
    plain = fastvol.estimate(model, F.mse_loss, n=6, data=data, lanes=2, backend="cpp")
    options = {"n": 6, "data": data, "plan": plain.plan, "backend": "cpp"}
    named = {name: 1.0 for name, _ in model.named_parameters()}
    for metric in ("euclidean", 1.0, named):
        with torch.device("meta"):
            moved = fastvol.estimate(model, F.mse_loss, metric=metric, **options)
        assert np.array_equal(plain.log_radii, moved.log_radii)


@pytest.mark.parametrize(
    ("seconds", "least", "rays", "shares", "block"),
    [
        (1e-3, 16, 10**6, 1, 1024),
        # Half a minute is what a kill may cost.
        (0.1, 16, 10**6, 1, 256),
        (10.0, 1, 10**6, 1, 2),
        (1e3, 1, 10**6, 1, 1),
        # But not for lanes that stand idle.
        (10.0, 12, 10**6, 1, 16),
        (10.0, 10**5, 10**6, 1, 1024),
        # What takes no time is kept more seldom.
        (1e-4, 16, 10**6, 1, 2048),
        (1e-9, 16, 10**6, 1, 4096),
        # Every process has a share.
        (0.05, 16, 1000, 4, 16),
        (0.05, 1, 100, 4, 8),
        (1e-4, 16, 1000, 4, 2048),
    ],
)
def test_how_many_directions_make_a_block(
    seconds: float, least: int, rays: int, shares: int, block: int
) -> None:
    found = blocks.fitting_block(
        torch.device("cpu"), seconds, least=least, rays=rays, shares=shares
    )
    assert found == block


@pytest.mark.parametrize("engine", ["auto", "inplace"])
def test_dear_directions_come_in_small_blocks(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_LONGEST", 0.05)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        time.sleep(0.002)
        return F.mse_loss(output, target)

    seen: list[fastvol.Progress] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastvol.FastvolWarning)
        result = fastvol.estimate(
            network(), loss_fn, n=40, data=examples(), method="radial", engine=engine,
            lanes=4, callbacks=[seen.append],
        )  # fmt: skip
    assert result.plan["block"] <= 16
    assert len(seen) == math.ceil(40 / result.plan["block"])
