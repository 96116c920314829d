"""Layers whose noise is made where it is used: losses and radii as with kept directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_tolerances import assert_close, layer
from torch import Tensor, nn

pytest.importorskip("triton")

import fastvol
from fastvol import _backend, kernels
from fastvol._layout import ParameterLayout
from fastvol._objective import PREFIX, Objective
from fastvol._precision import products
from fastvol._reference import perturbed
from fastvol._reference.refill import refill
from fastvol._reference.search_step import Number
from fastvol._reference.threshold_step import threshold_step
from fastvol.engines import Dense, Indexed, Plan
from fastvol.engines.layered import LayeredEngine
from fastvol.engines.rounds import Rounds

# The interpreter computes what masks will hide.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GPU = torch.cuda.is_available()
interpreter = pytest.mark.skipif(GPU, reason="the kernels were made for the GPU")
DEVICE = "cuda" if GPU else "cpu"
SEED, LANES = 2**40 + 5, 5
PLAN = Plan("layered", 2, LANES, True, "float32", 1, 1, "cpp", cached=True)


# Kernels


@pytest.fixture
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel does not write is NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        result = empty(*args, **options)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    for module in ("linear", "pointwise"):
        monkeypatch.setattr(f"fastvol.kernels.{module}.torch.empty", poisoned)


def given(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        ((63, 60), "relu"),
        ((1,), None),
        ((257,), "gelu"),
        ((2, 3, 5, 7), "tanh"),
        ((1025,), "silu"),
        ((3, 341), "sigmoid"),
    ],
)
def test_scaled_add(shape: tuple[int, ...], activation: str | None, dtype: torch.dtype) -> None:
    base, change = given(*shape), given(4, *shape)
    c = np.array([0.1, 10.0, -2.0])
    for places in (None, torch.tensor([3, 0, 3], device=DEVICE)):
        options: dict[str, Any] = {"places": places, "activation": activation, "dtype": dtype}
        found = kernels.scaled_add(base, change, c, **options)
        assert_close(found, perturbed.scaled_add(base, change, c, **options), layer("fp32", dtype))


def test_scaled_add_refuses() -> None:
    with pytest.raises(ValueError, match="change must be contiguous of shape"):
        kernels.scaled_add(given(3, 4), given(2, 4, 3), np.ones(2))
    with pytest.raises(ValueError, match="activation must be None or one of"):
        kernels.scaled_add(given(3), given(2, 3), np.ones(2), activation="softmax")


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("precision", ["tf32", "bf16x3", "bf16"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "activation"),
    [(63, 60, 17, "relu"), (1, 257, 3, "sigmoid"), (65, 1, 1, None), (5, 62, 10, "tanh")],
)
def test_a_layer_from_what_its_inputs_change_by(
    rows: int, inputs: int, outputs: int, activation: str | None, precision: str
) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    base, change, weight = given(rows, inputs), given(3, rows, inputs), given(outputs, inputs)
    options: dict[str, Any] = {
        "offset": 3,
        "antithetic": True,
        "activation": "relu",
        "precision": precision,
        "base": base,
        "base_activation": activation,
        "places": torch.tensor([2, 0], device=DEVICE),
        "dtype": dtype,
    }
    args = (change, weight, given(outputs), np.array([0.3, 2.0]), SEED, 1, np.array([4, 7]))
    found = kernels.perturbed_linear(*args, **options)
    assert found.shape == (2, rows, outputs)
    assert_close(found, perturbed.perturbed_linear(*args, **options), layer(precision, dtype))


def test_a_base_that_does_not_fit() -> None:
    x, weight = given(2, 3, 8), given(5, 8)
    args = (x, weight, None, np.ones(2), SEED, 1, np.arange(2))
    with pytest.raises(ValueError, match="base must be like one lane of x"):
        kernels.perturbed_linear(*args, base=given(3, 7))
    with pytest.raises(ValueError, match="base_activation must be one of"):
        kernels.perturbed_linear(*args, base=given(3, 8), base_activation="softmax")
    with pytest.raises(ValueError, match="out must be contiguous of shape"):
        kernels.direction_linear(x[0], 5, SEED, 1, np.arange(2), out=given(2, 3, 4))


def test_changes_are_written_where_they_belong() -> None:
    places = torch.tensor([3, 1], device=DEVICE)
    for name, x, shape in (
        ("direction_linear", given(7, 9), (7, 5)),
        ("direction_conv2d", given(2, 3, 5, 4), (2, 5, 4, 3)),
    ):
        size: Any = 5 if name == "direction_linear" else (5, 3, 2, 2)
        out = torch.full((4, *shape), float("nan"), device=DEVICE)
        args = (x, size, SEED, 1, np.array([2**33, 5]))
        getattr(kernels, name)(*args, out=out, places=places, bias=True)
        assert out[[0, 2]].isnan().all()
        wanted = getattr(perturbed, name)(*args, bias=True)
        assert_close(out[places], wanted, layer("tf32", torch.float32))


# Engines


def mlp(activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 9, bias=bias),
        activation(),
        nn.Linear(9, 6, bias=bias),
        activation(),
        nn.Linear(6, 3),
    )


def pictures() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 5, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 9), nn.LayerNorm(9), nn.GELU(approximate="tanh"), nn.Linear(9, 3)
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 3)
    )


class Twice(nn.Module):
    """One layer's output read twice, a sum of two that are linear, weights used again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 6), nn.Linear(7, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.b(x)
        g = torch.relu(h) + self.c(torch.tanh(h))
        return self.c(torch.sigmoid(g))[:, :3]


# Model, shape of an example, whether no layer reads a direction.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "relu": (mlp, (7,), True),
    "gelu": (lambda: mlp(nn.GELU), (7,), True),
    "sigmoid": (lambda: mlp(nn.Sigmoid, bias=False), (7,), True),
    "silu": (lambda: mlp(nn.SiLU), (7,), True),
    "elu": (lambda: mlp(nn.ELU), (7,), True),
    "linear": (lambda: nn.Linear(7, 3), (7,), True),
    "pictures": (pictures, (1, 4, 4), True),
    "normalised": (normalised, (7,), False),
    "grouped": (grouped, (1, 4, 4), False),
    "twice": (Twice, (7,), True),
}


def problem(name: str, n: int = 13) -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    make, shape, _ = MODELS[name]
    model, x = make().eval().to(DEVICE), torch.randn(n, *shape).to(DEVICE)
    with torch.no_grad():
        return model, (x, model(x).argmax(1))


def opened(
    model: nn.Module, data: Any, backend: str, scale: Any = None, **changes: Any
) -> LayeredEngine:
    layout = ParameterLayout(model)
    objective = Objective(model, F.cross_entropy, data, layout.device)
    objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
    if scale is None:
        scale = torch.ones(layout.size, dtype=torch.float64)
    plan = replace(PLAN, backend=backend, **changes)
    return LayeredEngine(objective, layout, scale, plan, _backend.select(backend))


def same(ours: LayeredEngine, theirs: LayeredEngine, rtol: float = 1e-5) -> None:
    """Losses on all lanes, on some, after other directions came, and left on the device."""
    ids, some = np.arange(LANES), np.array([0, 2, 4])
    radii = np.array([0.3, 1.0, 2.5, 0.1, 4.0])
    for engine in (ours, theirs):
        engine.load(ids, Indexed(SEED, ids))
    np.testing.assert_allclose(ours.loss(radii).values, theirs.loss(radii).values, rtol=rtol)
    np.testing.assert_allclose(
        ours.loss(radii[some], some).values, theirs.loss(radii[some], some).values, rtol=rtol
    )
    infos = [engine.load(some[1:], Indexed(SEED, 2**33 + some[1:])) for engine in (ours, theirs)]
    np.testing.assert_allclose(infos[0].norm, infos[1].norm, rtol=1e-5)
    np.testing.assert_allclose(ours.loss(radii).values, theirs.loss(radii).values, rtol=rtol)


@interpreter
@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, backend: str) -> None:
    model, data = problem(name)
    ours = opened(model, data, backend, fused=True)
    same(ours, opened(model, data, "cpp"))
    assert (ours._rows is None) == MODELS[name][2]


@interpreter
@pytest.mark.usefixtures("by_definition")
@pytest.mark.parametrize("changes", [{"cached": False}, {"rows": 4}, {"chunk": 5}], ids=str)
def test_plans(changes: dict[str, Any]) -> None:
    model, data = problem("relu")
    same(opened(model, data, "triton", fused=True, **changes), opened(model, data, "cpp"))


@interpreter
@pytest.mark.usefixtures("by_definition")
@pytest.mark.parametrize("kind", ["rows", "elements", "some stay"])
def test_scales(kind: str) -> None:
    model, data = problem("relu")
    layout = ParameterLayout(model)
    scale = torch.rand(layout.size, dtype=torch.float64) + 0.5
    if kind == "rows":
        for segment in layout.segments:
            own = scale[segment.start : segment.stop].view(segment.shape[0], -1)
            own.copy_(own[:, :1].expand_as(own).clone())
    elif kind == "some stay":
        scale[::5] = 0.0
    ours = opened(model, data, "triton", scale, fused=True)
    same(ours, opened(model, data, "cpp", scale))
    assert (ours._rows is None) == (kind != "some stay")


@interpreter
def test_opposite_directions() -> None:
    model, data = problem("relu")
    ours = opened(model, data, "triton", fused=True)
    theirs = opened(model, data, "cpp")
    radii = np.array([0.3, 1.0, 2.5, 0.1, 1.0])
    for lanes, ids in (([0, 1, 2, 3, 4], [0, 1, 2, 3, 7]), ([1, 3], [5, 4]), ([0], [6])):
        values = []
        for engine in (ours, theirs):
            engine.load(np.array(lanes), Indexed(SEED, np.array(ids), antithetic=True))
            values.append(engine.loss(radii).values)
        np.testing.assert_allclose(*values, rtol=1e-5)
    # What a gradient needs is made of the same directions.
    (loss, slope), (wanted, wanted_slope) = (e.loss_and_grad(radii) for e in (ours, theirs))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-3, atol=1e-4)


@interpreter
@pytest.mark.usefixtures("by_definition")
def test_rays_that_no_kernel_makes_are_kept() -> None:
    model, data = problem("gelu")
    ours = opened(model, data, "triton", fused=True)
    theirs = opened(model, data, "cpp")
    ids, radii = np.arange(LANES), np.full(LANES, 0.5)
    dense = Dense(torch.randn(2, ours.dim))
    for engine in (ours, theirs):
        engine.load(ids, Indexed(SEED, ids))
        engine.load(np.array([1, 3]), dense)
    # Both kinds, another family among them, then the first again.
    np.testing.assert_allclose(ours.loss(radii).values, theirs.loss(radii).values, rtol=1e-5)
    for engine in (ours, theirs):
        engine.load(np.array([3]), Indexed(SEED, np.array([9]), stream=1))
    np.testing.assert_allclose(ours.loss(radii).values, theirs.loss(radii).values, rtol=1e-5)
    same(ours, theirs)


def told(engine: LayeredEngine, radii: np.ndarray) -> Tensor:
    """The losses that stay on the device, of all lanes."""
    rounds = Rounds(engine, slice(0, engine.lanes), threshold_step, refill)
    rounds.state.rules.fill_(1e9)
    everywhere = torch.arange(engine.lanes)
    rounds.state.begin(everywhere, torch.from_numpy(np.log(radii)), scan=False)
    rounds.begin()
    return rounds.state.numbers[Number.TOTAL]


@interpreter
@pytest.mark.usefixtures("by_definition")
@pytest.mark.parametrize("coarse", ["", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", ["relu", "pictures"])
def test_losses_left_on_the_device(name: str, coarse: str) -> None:
    model, data = problem(name)
    ours = opened(model, data, "triton", fused=True)
    ours.resize(3)
    wanted = opened(model, data, "cpp")
    ids, radii = np.arange(3), np.array([0.3, 1.0, 2.5])
    ours.coarse = coarse
    loaded = ours.load_async(ids, Indexed(SEED, ids + 4))
    assert loaded is not None
    info = wanted.load(ids, Indexed(SEED, ids + 4))
    np.testing.assert_allclose(loaded[0].numpy(), info.norm, rtol=1e-5)
    ours.prepare(ids)
    exact = wanted.loss(radii, ids).values
    rtol = 3e-2 if coarse == "bfloat16" else 1e-5
    np.testing.assert_allclose(told(ours, radii).numpy(), exact, rtol=rtol)
    if coarse == "bfloat16":
        assert np.abs(told(ours, radii).numpy() - exact).max() > 1e-6
    assert ours._rows is None


@interpreter
@pytest.mark.usefixtures("by_definition")
@pytest.mark.parametrize("fused", [False, True])
def test_a_coarse_engine_is_coarse_on_its_device(fused: bool) -> None:
    model, data = problem("relu")
    engine = opened(model, data, "triton", fused=fused)
    ids, radii = np.arange(LANES), np.full(LANES, 1.0)
    engine.load(ids, Indexed(SEED, ids))
    exact = engine.loss(radii).values
    engine.coarse = "bfloat16"
    engine.load(ids, Indexed(SEED, ids))
    engine.prepare(ids)
    away = np.abs(told(engine, radii).numpy() / exact - 1)
    assert 1e-5 < away.max() < 3e-2


class _Stale:
    def replay(self) -> None:
        raise AssertionError("a round of other directions was repeated")


@interpreter
@pytest.mark.usefixtures("by_definition")
def test_a_captured_round_is_of_one_family() -> None:
    model, data = problem("relu")
    engine = opened(model, data, "triton", fused=True)
    ids = np.arange(LANES)
    engine.load(ids, Indexed(SEED, ids))
    rounds = Rounds(engine, slice(0, LANES), threshold_step, refill)
    rounds.begin()
    for other in (Indexed(SEED, ids, stream=1), Indexed(SEED + 1, ids)):
        graph: Any = _Stale()
        rounds._graph = graph
        with pytest.raises(AssertionError):
            rounds.begin()
        engine.load(ids, other)
        rounds.begin()
        assert not rounds.is_captured
    rounds._graph = _Stale()  # type: ignore[assignment]
    engine.load(ids, Dense(torch.randn(LANES, engine.dim)))
    rounds.begin()
    assert not rounds.is_captured
    assert opened(model, data, "triton").bound_to is None


# Whole calls


@interpreter
@pytest.mark.usefixtures("by_definition")
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("cpp", {}),
        ("cpp", {"antithetic": True, "metric": "filter"}),
        ("triton", {"metric": "filter", "screening": "bfloat16"}),
        ("triton", {"measure": fastvol.Gaussian(0.3, center="origin"), "screening": "tf32"}),
    ],
    ids=str,
)
def test_radii(backend: str, options: dict[str, Any]) -> None:
    model, data = problem("relu")
    options = dict(options)
    screening = options.pop("screening", "off")
    call: dict[str, Any] = {
        "n": 8, "data": data, "increase": 0.3, "method": "radial", "rtol": 1e-3, "lanes": 4,
        "progress": False, "backend": backend, **options,
    }  # fmt: skip
    plain = fastvol.estimate(model, F.cross_entropy, engine="layered", **call)
    assert plain.plan["fused"] is False
    plan = {**plain.plan, "fused": True, "screening": screening}
    fused = fastvol.estimate(model, F.cross_entropy, plan=plan, **call)
    assert fused.plan == plan
    np.testing.assert_array_equal(fused.status, plain.status)
    np.testing.assert_allclose(fused.log_radii, plain.log_radii, rtol=0, atol=1e-3)
    again = fastvol.estimate(model, F.cross_entropy, plan=fused.plan, **call)
    np.testing.assert_array_equal(again.log_radii, fused.log_radii)


def test_a_plan_says_yes_or_no() -> None:
    assert Plan.from_description({**PLAN.describe(), "fused": True}).fused
    with pytest.raises(ValueError, match=r"plan\['fused'\] must be True or False"):
        Plan.from_description({**PLAN.describe(), "fused": 1})


def settings() -> tuple[Any, ...]:
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
    )


@pytest.mark.parametrize("interface", ["old", "new"])
def test_products_are_not_rounded(interface: str) -> None:
    """Whatever the caller had said, in either of PyTorch's two ways, and as it was afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = settings()
    seen = []

    def loss(model: nn.Module) -> Tensor:
        seen.append(settings())
        return model.weight.square().sum()

    try:
        if interface == "old":
            matmul.allow_tf32 = cudnn.allow_tf32 = True
        else:
            matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32"
        allowed = settings()
        assert allowed[:2] == ("tf32", "tf32")
        fastvol.estimate(nn.Linear(2, 1, bias=False), loss, 4, increase=1.0, method="radial")
        assert settings() == allowed
        assert seen
        assert all("tf32" not in now for now in seen)
        with pytest.raises(KeyError), products(tf32=False):
            raise KeyError
        assert settings() == allowed
        with products(tf32=False):
            with products(tf32=True):
                assert settings()[:2] == ("tf32", "tf32")
            assert "tf32" not in settings()
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


# On a card


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_radii_on_a_gpu(name: str) -> None:
    torch.manual_seed(0)
    if name == "mlp":
        model: nn.Module = nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        x = torch.randn(600, 784)
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(1568, 10),
        )  # fmt: skip
        x = torch.randn(100, 1, 28, 28)
    y = model(x).argmax(1)
    call: dict[str, Any] = {
        "n": 300, "increase": 0.3, "method": "radial", "metric": "filter", "rtol": 1e-3,
        "progress": False,
    }  # fmt: skip
    host = fastvol.estimate(model, F.cross_entropy, data=(x, y), engine="layered", **call)
    model, data = model.cuda(), (x.cuda(), y.cuda())
    plan = fastvol.estimate(model, F.cross_entropy, data=data, engine="layered", **call).plan
    for fused in (False, True):
        for screening in ("off", "tf32", "bfloat16"):
            changed = {**plan, "fused": fused, "screening": screening}
            found = fastvol.estimate(model, F.cross_entropy, data=data, plan=changed, **call)
            np.testing.assert_array_equal(found.status, host.status)
            np.testing.assert_allclose(found.log_radii, host.log_radii, rtol=0, atol=1e-3)
            assert found.provenance["loop"] == "cuda, CUDA graph"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_rows_begin_where_four_numbers_can_be_written_on_a_gpu() -> None:
    model, data = problem("relu")
    engine = opened(model, data, "triton")
    assert engine.dim % 4
    assert engine._rows is not None
    assert engine._rows.stride(0) % 4 == 0
    ids = np.arange(LANES)
    for lanes in (ids, np.array([0, 3])):
        engine.load(lanes, Indexed(SEED, lanes))
        wanted = torch.empty(len(lanes), engine.dim)
        _backend.select("cpp").normals(wanted, SEED, 0, lanes)
        torch.testing.assert_close(engine._rows.cpu()[lanes], wanted, rtol=0, atol=1e-5)
