"""The in-place engine: the same losses as by copies, and the parameters as they were."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_tolerances import assert_close, point
from torch import Tensor, nn

import fastvol
from fastvol import _backend
from fastvol._layout import ParameterLayout
from fastvol._objective import PREFIX, Objective
from fastvol._reference import noise
from fastvol._scale import Scale
from fastvol.engines import Dense, GeneralEngine, Indexed, InPlaceEngine, Plan, planning
from fastvol.engines.inplace import SPAN
from fastvol.metrics import FilterMetric, metric_scale

SEED = 11


class Net(nn.Module):
    """Tied weights, a frozen layer, a parameter that is not laid out in order, odd sizes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.turned = nn.Parameter(torch.randn(3, 7).t())
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.last = nn.Linear(7, 3)
        self.readout = nn.Linear(3, 5, bias=False)
        self.readout.weight = self.embedding.weight
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.frozen(self.embedding(tokens))) @ self.turned.t()
        return self.readout(self.last(torch.tanh(self.scalar * hidden)))


TOKENS = torch.arange(12) % 5
LABELS = (TOKENS * 3 + 1) % 5


def raw(model: nn.Module) -> list[bytes]:
    return [
        p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for p in model.parameters()
    ]


def plan_of(engine: str, layout: ParameterLayout, lanes: int, backend: str = "cpp") -> Plan:
    dtype = str(layout.dtype).removeprefix("torch.")
    return Plan(engine, 1, lanes, False, dtype, 1, 1, backend)


def engines_of(
    model: nn.Module,
    data: Any,
    *,
    lanes: int = 4,
    metric: Any = "euclidean",
    backend: str = "cpp",
    toward_origin: bool = False,
    parameters: Any = None,
) -> tuple[InPlaceEngine, GeneralEngine]:
    """The engine, and the general one beside it."""
    layout = ParameterLayout(model, parameters)
    objective = Objective(model, F.cross_entropy, data, layout.device)
    objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
    chosen = _backend.select(backend)
    scale = metric if isinstance(metric, Scale) else metric_scale(metric, layout)[0]
    project = None
    if toward_origin:
        moving = scale.flat > 0
        project = -layout.flatten().double()[moving] / scale.flat[moving]
    plan = plan_of("inplace", layout, lanes, backend)
    own = InPlaceEngine(objective, layout, scale, plan, chosen, toward_origin=toward_origin)
    plan = plan_of("general", layout, lanes, backend)
    return own, GeneralEngine(objective, layout, scale.flat, plan, chosen, project)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("metric", ["euclidean", "filter", "by name"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_those_of_copies(dtype: torch.dtype, metric: Any, backend: str) -> None:
    model = Net(dtype).eval()
    if metric == "by name":
        metric = {s.name: 0.5 + i for i, s in enumerate(ParameterLayout(model).segments)}
        metric["last.weight"] = torch.linspace(0.5, 2.0, 21).view(3, 7)
    own, other = engines_of(model, (TOKENS, LABELS), metric=metric, backend=backend)
    before = raw(model)
    ids, lanes = np.array([3, 2, 2**33, 8]), np.arange(4)
    rays = Indexed(SEED, ids, stream=2, antithetic=True)
    radii = np.array([0.0, 0.3, 1.0, 30.0])
    info, wanted = own.load(lanes, rays), other.load(lanes, rays)
    np.testing.assert_allclose(info.norm, wanted.norm, rtol=1e-14)
    # Of a product rounded in another order a half-precision parameter may take the next value.
    rtol = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 8 * torch.finfo(dtype).eps)
    np.testing.assert_allclose(own.loss(radii).values, other.loss(radii).values, rtol=rtol)
    assert raw(model) == before
    some = np.array([2, 0])
    np.testing.assert_allclose(
        own.loss(radii[some], some).values, other.loss(radii[some], some).values, rtol=rtol
    )
    assert raw(model) == before


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels were made for the GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("metric", ["euclidean", "filter"])
def test_kernels_write_the_same_rays(
    metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)).to(dtype)
    own, other = engines_of(model, (TOKENS, LABELS), lanes=2, metric=metric, backend="triton")
    assert own._launches is not None
    before, lanes, radii = raw(model), np.arange(2), np.array([0.3, 2.0])
    replayed = []

    class Graph:
        def replay(self) -> None:
            assert own._launches is not None
            replayed.append(own._launches._family)
            own._launches._issue()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("graph", "stream", "Stream", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **options: nullcontext())
    for can_capture in (False, True):
        own._launches._can_capture = can_capture
        for stream in (0, 2):
            rays = Indexed(SEED, np.array([3, 2**40]), stream=stream, antithetic=True)
            info, wanted = own.load(lanes, rays), other.load(lanes, rays)
            np.testing.assert_allclose(info.norm, wanted.norm, rtol=1e-6)
            rtol = 1e-12 if dtype == torch.float64 else 1e-5
            np.testing.assert_allclose(own.loss(radii).values, other.loss(radii).values, rtol=rtol)
            assert raw(model) == before
    # The first ray of a family is written launch by launch.
    assert replayed == [(SEED, stream, True) for stream in (0, 2)]


def test_what_kernels_cannot_write_is_written_in_stretches() -> None:
    pytest.importorskip("triton")
    own, _ = engines_of(Net(torch.float32), (TOKENS, LABELS), backend="triton")
    assert own._launches is None
    model = nn.Linear(3, 5)
    data = torch.randn(4, 3), torch.arange(4)
    by_rows = {"weight": torch.rand(5, 1).add(0.5).expand(5, 3), "bias": 2.0}
    by_entries = {"weight": torch.rand(5, 3).add(0.5), "bias": 2.0}
    expected = (("filter", True), ("euclidean", True), (by_rows, True), (by_entries, False))
    for metric, is_launched in expected:
        own, _ = engines_of(model, data, metric=metric, backend="triton")
        assert (own._launches is not None) == is_launched
    own, _ = engines_of(model, data)
    assert own._launches is None


def kernel_model(dtype: torch.dtype) -> nn.Module:
    """Rows of odd sizes, one that is longer than a tile of the kernel, and some that are zero."""
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2051), nn.Linear(2051, 3))
    with torch.no_grad():
        model[0].weight[[0, 3, 6]] = 0.0
        model[1].weight[5:8] = 0.0
        model[2].weight[1] = 0.0
    return model.to(dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels were made for the GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kernels_write_rays_whose_scale_differs_by_row(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    model = kernel_model(dtype)
    layout = ParameterLayout(model)
    objective = Objective(model, lambda m: m[0].weight.sum(), None, layout.device)
    with pytest.warns(fastvol.FastvolWarning, match="rows with norm 0"):
        scale = FilterMetric("drop").scale_of(layout)
    plan = plan_of("inplace", layout, 1, "triton")
    engine = InPlaceEngine(objective, layout, scale, plan, _backend.select("triton"))
    launches = engine._launches
    assert launches is not None
    # No coordinate that moves has a scale of its own.
    assert sum(p.scale.numel() for p in launches._parts if p.scale is not None) == 4 + 2048 + 2
    engine.load(np.array([0]), Indexed(SEED, np.array([5])))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    engine._write(0, 30.0)
    found = [p.detach().clone() for p in model.parameters()]
    # What does not move is not written either.
    assert bool(found[0][[0, 3, 6]].isnan().all())
    assert bool(found[1][5:8].isnan().all())
    assert bool(found[3][1].isnan().all())
    monkeypatch.setattr(engine, "_launches", None)
    engine._backend = _backend.select("torch")
    engine._write(0, 30.0)
    for own, wanted in zip(found, model.parameters(), strict=True):
        moves = ~wanted.isnan()
        assert torch.equal(moves, ~own.isnan())
        assert_close(own[moves], wanted.detach()[moves], point(dtype))
    engine._layout.restore()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("metric", ["euclidean", "filter"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rays_on_a_gpu(dtype: torch.dtype, metric: str) -> None:
    """Launch by launch and as a graph, of two families, against the definition."""
    model = nn.Sequential(nn.Embedding(501, 767), nn.Linear(767, 3071), nn.Linear(3071, 10))
    model.to("cuda", dtype)
    layout = ParameterLayout(model)
    objective = Objective(model, lambda m: m[0].weight.sum(), None, layout.device)
    scale = metric_scale(metric, layout)[0]
    plan, other_plan = (plan_of("inplace", layout, 3, name) for name in ("triton", "torch"))
    own = InPlaceEngine(objective, layout, scale, plan, _backend.select("triton", layout.device))
    other = InPlaceEngine(objective, layout, scale, other_plan, _backend.select("torch"))
    launches = own._launches
    assert launches is not None
    for stream in (0, 3):
        rays = Indexed(SEED, np.array([2, 2**40 + 1, 5]), stream=stream, antithetic=True)
        norms = [engine.load(np.arange(3), rays).norm for engine in (own, other)]
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)
        for lane in (0, 1, 2, 1):
            written = []
            for engine in (own, other):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.fill_(float("nan"))
                engine._write(lane, 30.0)
                written.append([p.detach().clone() for p in model.parameters()])
            for found, wanted in zip(*written, strict=True):
                assert_close(found, wanted, point(dtype))
            assert (launches._graph is None) == (lane == 0)
    own._layout.restore()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """θ = cast(float(θ0) + c·z): the parameters that the model sees, bit for bit."""
    model = nn.Linear(301, 3).to(dtype)
    seen: list[Tensor] = []

    def loss_fn(model: nn.Module) -> Tensor:
        seen[:] = [p.detach().clone() for p in model.parameters()]
        return model.weight.float().square().mean()

    layout = ParameterLayout(model)
    objective = Objective(model, loss_fn, None, layout.device)
    scale = Scale.uniform(layout)
    plan = plan_of("inplace", layout, 1, "torch")
    backend = _backend.select("torch")
    engine = InPlaceEngine(objective, layout, scale, plan, backend)
    info = engine.load(np.array([0]), Indexed(SEED, np.array([5])))
    engine.loss(np.array([2.5]))
    z = torch.empty(1, layout.size)
    noise.normals(z, SEED, 0, np.array([5]))
    theta0 = layout.flatten()
    made = theta0 + z[0] * torch.tensor(2.5 / info.norm[0]).float()
    expected = made.to(dtype)
    assert torch.equal(torch.cat([p.reshape(-1) for p in seen]), expected)
    assert (expected != theta0.to(dtype)).float().mean() > 0.9


def test_nothing_drifts() -> None:
    model = Net(torch.float32)
    own, _ = engines_of(model, (TOKENS, LABELS))
    before, ids = raw(model), np.arange(4)
    own.load(ids, Indexed(SEED, ids))
    first = own.loss(np.full(4, 1e3)).values
    for scale in (1e6, 1e-6, 1.0):
        own.loss(np.full(4, scale))
    np.testing.assert_array_equal(own.loss(np.full(4, 1e3)).values, first)
    assert raw(model) == before


@pytest.mark.parametrize("toward_origin", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_that_do_not_move(dtype: torch.dtype, toward_origin: bool) -> None:
    """Their coordinates are left out of the directions, as in the general engine."""
    model = Net(dtype)
    with torch.no_grad():
        model.last.weight[1] = 0.0
        model.embedding.weight[0] = 0.0
        model.embedding.weight[4] = 0.0
    layout = ParameterLayout(model)
    with pytest.warns(fastvol.FastvolWarning, match="rows with norm 0"):
        scale = FilterMetric("drop").scale_of(layout)
    assert scale.dim == layout.size - 7 - 6
    own, other = engines_of(model, (TOKENS, LABELS), metric=scale, toward_origin=toward_origin)
    before, ids = raw(model), np.arange(4)
    info, wanted = own.load(ids, Indexed(SEED, ids)), other.load(ids, Indexed(SEED, ids))
    np.testing.assert_allclose(info.norm, wanted.norm, rtol=1e-13)
    np.testing.assert_allclose(info.dot, wanted.dot, rtol=1e-6 if toward_origin else 0, atol=1e-13)
    assert toward_origin == bool(np.any(info.dot))
    radii = np.array([0.1, 0.5, 1.0, 3.0])
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(own.loss(radii).values, other.loss(radii).values, rtol=rtol)
    losses, slopes = own.loss_and_grad(radii)
    wanted_losses, wanted_slopes = other.loss_and_grad(radii)
    np.testing.assert_allclose(losses, wanted_losses, rtol=rtol)
    torch.testing.assert_close(slopes, wanted_slopes, rtol=1e-4, atol=1e-5)
    assert raw(model) == before


class Halving:
    """P = 1/2."""

    def matvec(self, rows: Tensor) -> Tensor:
        return 0.5 * rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dense_and_preconditioned_rays(dtype: torch.dtype) -> None:
    model = Net(dtype)
    own, other = engines_of(model, (TOKENS, LABELS), metric="filter", toward_origin=True)
    before = raw(model)
    directions = torch.randn(2, own.dim, dtype=torch.float64)
    radii = np.array([0.3, 0.02, 0.1, 0.4])
    for rays in (
        Dense(directions),
        Dense(directions, Halving()),
        Indexed(SEED, np.array([5, 6]), preconditioner=Halving()),
    ):
        infos = []
        for engine in (own, other):
            engine.load(np.arange(4), Indexed(SEED, np.arange(4)))
            infos.append(engine.load(np.array([1, 3]), rays))
        np.testing.assert_allclose(infos[0].norm, infos[1].norm, rtol=1e-6)
        np.testing.assert_allclose(infos[0].dot, infos[1].dot, rtol=1e-5)
        rtol = 1e-12 if dtype == torch.float64 else 0.03
        np.testing.assert_allclose(own.loss(radii).values, other.loss(radii).values, rtol=rtol)
    assert raw(model) == before
    with pytest.raises(ValueError, match=r"directions must have shape \(2, "):
        own.load(np.array([0, 1]), Dense(torch.zeros(2, own.dim + 1)))


def test_spans_beyond_the_working_memory() -> None:
    """A parameter larger than what is worked on together, in a dtype that needs it."""
    model = nn.Linear(SPAN + 77, 1).to(torch.bfloat16)

    def loss_fn(model: nn.Module) -> Tensor:
        return model.weight.float().square().sum() + model.bias.float().square().sum()

    layout = ParameterLayout(model)
    objective = Objective(model, loss_fn, None, layout.device)
    flat = torch.linspace(0.5, 1.5, layout.size, dtype=torch.float64)
    scale = Scale.from_flat(layout, flat)
    backend = _backend.select("cpp")
    own = InPlaceEngine(objective, layout, scale, plan_of("inplace", layout, 1), backend)
    other = GeneralEngine(objective, layout, flat, plan_of("general", layout, 1), backend)
    ray, lane = Indexed(SEED, np.array([9])), np.array([0])
    assert own.load(lane, ray).norm[0] == pytest.approx(other.load(lane, ray).norm[0], rel=1e-12)
    radius = np.array([300.0])
    assert own.loss(radius).values[0] == pytest.approx(other.loss(radius).values[0], rel=1e-5)


# Through the public call


def estimate(model: nn.Module, **options: Any) -> fastvol.VolumeEstimate:
    settings = {"n": 12, "data": (TOKENS, LABELS), "method": "radial", "rtol": 1e-3, **options}
    return fastvol.estimate(model, F.cross_entropy, **settings)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "filter", "antithetic": True},
        {"measure": fastvol.Gaussian(0.1, center="origin"), "increase": 1.0},
        {
            "measure": fastvol.Gaussian({"last.bias": 0.1, "last.weight": 0.3}),
            "parameters": "last*",
        },
        {"parameters": ["last.weight"], "metric": torch.linspace(1.0, 2.0, 21)},
        {"method": "preconditioned", "n": 30},
        {"method": "auto"},
    ],
    ids=["plain", "filter", "origin", "subset", "scales", "preconditioned", "auto"],
)
def test_radii_are_those_of_copies(options: dict[str, Any]) -> None:
    model = Net(torch.float64).train()
    before = raw(model)
    own = estimate(model, engine="inplace", **options)
    other = estimate(model, engine="general", **options)
    assert raw(model) == before
    assert model.training
    np.testing.assert_allclose(own.log_radii, other.log_radii, rtol=0, atol=1e-3)
    assert own.log_volume == pytest.approx(other.log_volume, abs=0.05)
    assert own.config == {**other.config, "pilot": own.config["pilot"]}
    assert own.plan["engine"] == own.provenance["engine"] == "inplace"
    assert own.provenance["engine_reason"] == "it was asked for"
    again = estimate(model, plan=own.plan, **options)
    np.testing.assert_array_equal(again.log_radii, own.log_radii)


class PlannedError(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("raised", [PlannedError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_after_an_exception(
    dtype: torch.dtype, calls: int, raised: type[BaseException]
) -> None:
    model = Net(dtype)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = raw(model)
    seen = [0]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        seen[0] += 1
        if seen[0] > calls:
            raise raised("here")
        return F.cross_entropy(output.float(), target)

    expected = KeyboardInterrupt if raised is KeyboardInterrupt else fastvol.FastvolError
    with pytest.raises(expected, match="here"):
        fastvol.estimate(model, loss_fn, 50, data=(TOKENS, LABELS), engine="inplace")
    assert raw(model) == before
    assert all(p.grad is None or bool((p.grad == 1).all()) for p in model.parameters())


def test_a_loss_that_writes_to_the_parameters() -> None:
    model = Net(torch.float32)
    before = raw(model)

    def loss_fn(model: nn.Module) -> Tensor:
        with torch.no_grad():
            model.last.bias.zero_()
        return model.last.weight.square().sum()

    with pytest.raises(fastvol.FastvolError, match=r"wrote in place to parameter 'last\.bias'"):
        fastvol.estimate(model, loss_fn, 4, engine="inplace", method="radial")
    assert raw(model) == before


class Aliased(nn.Module):
    """Holds its weight by another name too, which functional_call does not replace."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.held = [self.weight]

    def forward(self) -> Tensor:
        return (self.held[0] - 1).square().sum()


def scripted() -> nn.Module:
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.ones_(model.weight)
    return torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("make", "loss_fn", "reason"),
    [
        (Aliased, lambda m: m(), "does not notice"),
        (scripted, lambda m: (m.weight - 1).square().sum(), "TorchScript"),
    ],
)
def test_where_functional_call_cannot_go(
    make: Callable[[], nn.Module], loss_fn: Any, reason: str
) -> None:
    """The unit ball, by engine='auto'."""
    result = fastvol.estimate(make(), loss_fn, 8, threshold=1.0)
    np.testing.assert_allclose(result.log_radii, 0.0, atol=1e-3)
    assert result.plan["engine"] == "inplace"
    assert reason in result.provenance["engine_reason"]


def test_a_constant_loss_is_not_written_for() -> None:
    result = fastvol.estimate(Aliased(), lambda m: 0.0 * m.weight.sum(), 4, increase=1.0)
    assert result.plan["engine"] == "general"
    assert result.n_unbounded == 4


def test_large_models_are_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "large_bytes", lambda device: 300)
    large, small = nn.Linear(9, 9), nn.Linear(8, 8)
    data = torch.randn(5, 9), torch.arange(5)
    result = fastvol.estimate(large, F.cross_entropy, 4, data=data)
    assert result.plan["engine"] == "inplace"
    assert "too many to batch" in result.provenance["engine_reason"]
    asked = fastvol.estimate(large, F.cross_entropy, 4, data=data, engine="general")
    assert asked.plan["engine"] == "general"
    data = torch.randn(5, 8), torch.arange(5)
    assert fastvol.estimate(small, F.cross_entropy, 4, data=data).plan["engine"] != "inplace"


def test_directions_that_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then "auto" is plain rays, and says so; the constants come without the flat vectors."""
    model = Net(torch.float64)
    options: dict[str, Any] = {
        "engine": "inplace", "measure": fastvol.Gaussian(0.3, center="origin"), "increase": 0.5,
    }  # fmt: skip
    held = estimate(model, **options)
    monkeypatch.setattr("fastvol._problem._DIRECTIONS_BYTES", 1)
    monkeypatch.setattr("fastvol._scale.SPAN", 10)
    monkeypatch.setattr("fastvol._scale._FLAT", 10)
    result = estimate(model, **{**options, "method": "auto"})
    assert any("directions are not kept" in w for w in result.warnings)
    assert result.log_volume == pytest.approx(held.log_volume, abs=1e-9)
    np.testing.assert_allclose(result.log_radii, held.log_radii, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 10, 1 << 20])
def test_scales_by_parts_are_the_flat_ones(
    monkeypatch: pytest.MonkeyPatch, at_once: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("fastvol._scale.SPAN", at_once)
    monkeypatch.setattr("fastvol._scale._FLAT", at_once)
    layout = ParameterLayout(Net(dtype))
    theta = layout.flatten()
    scale = FilterMetric().scale_of(layout)
    flat = FilterMetric().scale(layout, theta)
    assert torch.equal(scale.flat, flat)
    assert scale.dim == layout.size
    assert scale.log_sum == pytest.approx(float(flat.to(layout.dtype).double().log().sum()))
    assert scale.length == pytest.approx(float((theta.double() / flat).norm()), rel=1e-12)
    for start, stop in ((0, 3), (4, 11), (20, 21)):
        i = next(i for i, s in enumerate(layout.segments) if s.name == "last.weight")
        first = layout.segments[i].start
        assert torch.equal(scale.of(i, start, stop), flat[first + start : first + stop])
    spread = Scale.from_flat(layout, flat)
    assert scale.digest() == spread.digest()
    assert scale.digest() != Scale.uniform(layout).digest()
    assert spread.digest(with_parameters=False) == scale.digest(with_parameters=False)


MEMORY = """
import torch, fastvol
from torch import nn
from benchmarks.million import held, peak
from benchmarks.inplace_memory import forget_peak

def loss_fn(model):
    return sum(p[:1, :1].square().sum() for p in model.parameters())

def model(width):
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))

def run(model):
    return fastvol.estimate(
        model, loss_fn, 2, engine="inplace", metric="filter", rtol=0.1, increase=1.0, lanes=2
    )

run(model(4))
large = model(1500)
forget_peak()
before = held()
result = run(large)
print(peak() - before, result.dim, result.plan["engine"])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory() -> None:
    """One more copy of 9M parameters, 36 MB, and 20 MB of working memory, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    above, dim, engine = done.stdout.split()
    assert (int(dim), engine) == (9_000_000, "inplace")
    assert 36e6 < int(above) < 36e6 + 30e6


def test_a_copy_of_the_model_is_another() -> None:
    """What is kept belongs to a layout, so that two runs do not meet."""
    model = Net(torch.float32)
    twin = copy.deepcopy(model)
    first, second = estimate(model, engine="inplace"), estimate(twin, engine="inplace")
    np.testing.assert_array_equal(first.log_radii, second.log_radii)
    with torch.no_grad():
        twin.last.bias += 0.5
    changed = raw(twin)
    estimate(twin, engine="inplace")
    assert raw(twin) == changed
