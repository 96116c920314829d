"""The loop on the device, against the core's; what it does where it cannot run or runs out."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastvol
from fastvol import FastvolError, Gaussian, Lebesgue, NotAvailableError, _backend
from fastvol._layout import ParameterLayout
from fastvol._objective import Objective
from fastvol._precision import products
from fastvol._reference.refill import Found, refill
from fastvol._reference.search_step import Mark, Number, Phase, Rule, SearchState
from fastvol._reference.threshold_step import threshold_step
from fastvol.engines import GeneralEngine, Indexed, Plan
from fastvol.engines.layered import LayeredEngine
from fastvol.engines.rounds import Pools, Rounds
from fastvol.methods import _device_loop

pytest.importorskip("triton")

from fastvol import kernels
from fastvol.kernels import threshold_step as threshold_kernels

# The interpreter computes what masks will hide.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels were made for the GPU"
)


@pytest.fixture
def interpreted_kernels() -> None:
    """For tests of which the kernels themselves are a part."""


@pytest.fixture(autouse=True)
def _loop_alone(request: pytest.FixtureRequest) -> None:
    if "interpreted_kernels" not in request.fixturenames:
        request.getfixturevalue("by_definition")


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)).eval()


def images(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, outputs),
    ).eval()


def labelled(model: nn.Module, *shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape)
    with torch.no_grad():
        return x, model(x).argmax(dim=1)


def both(
    model: nn.Module, loss: Any, data: Any, *, seen: list[str] | None = None, **options: Any
) -> tuple[Any, Any]:
    """The result by the core's loop and by the device's, of the same settings."""
    settings = {
        "n": 9,
        "data": data,
        "increase": 0.3,
        "method": "radial",
        "rtol": 1e-3,
        "lanes": 6,
        "progress": False,
        **options,
    }
    host = fastvol.estimate(model, loss, backend="cpp", **settings)
    device = fastvol.estimate(model, loss, backend="triton", **settings)
    assert device.provenance["backend"] == "triton"
    assert host.provenance["loop"] == "host, cpp"
    return host, device


def agree(host: Any, device: Any, rtol: float = 2e-5) -> None:
    np.testing.assert_array_equal(device.status, host.status)
    np.testing.assert_allclose(device.log_radii, host.log_radii, rtol=0, atol=rtol)
    assert device.log_volume == pytest.approx(host.log_volume, abs=1e-3)


@interpreter
@pytest.mark.parametrize("engine", ["general", "layered"])
@pytest.mark.usefixtures("interpreted_kernels")
def test_radii_are_those_of_the_core(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    step, normals = threshold_kernels.threshold_step, kernels.write_normals

    def counted(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **options)

        return functools.wraps(function)(call)

    monkeypatch.setattr(threshold_kernels, "threshold_step", counted(step))
    monkeypatch.setattr(kernels, "write_normals", counted(normals))
    _backend._triton_backend.cache_clear()
    model = network()
    host, device = both(model, F.cross_entropy, labelled(model, 13, 6), engine=engine)
    agree(host, device)
    assert device.n_loss == host.n_loss
    assert device.provenance["loop"] == "cpu, operation by operation"
    assert device.provenance["engine"] == engine
    assert 0 < device.provenance["engine_seconds"] < 1.1 * device.seconds
    assert {"threshold_step", "write_normals"} <= set(calls)
    _backend._triton_backend.cache_clear()


@interpreter
@pytest.mark.parametrize(
    "options",
    [
        {"first_crossing": True, "n": 8},
        {"antithetic": True, "n": 6},
        {"parameters": ["0.weight", "2.bias"], "n": 6},
        {"measure": Gaussian(0.3, center="origin"), "n": 6},
        {"measure": Lebesgue(1.0), "n": 6},
        {"lanes": 1, "n": 6},
        {"metric": "filter", "lanes": 7, "n": 17},
    ],
    ids=str,
)
def test_settings(options: dict[str, Any]) -> None:
    model = network()
    data = labelled(model, 7, 6)
    agree(*both(model, F.cross_entropy, data, engine="layered", **options))


@interpreter
def test_images_by_patches_and_rows() -> None:
    model = images()
    agree(*both(model, F.cross_entropy, labelled(model, 5, 1, 4, 4), engine="layered", n=6))


@interpreter
@pytest.mark.parametrize(
    ("engine", "loss"),
    [
        ("layered", F.mse_loss),
        ("layered", F.binary_cross_entropy_with_logits),
        ("layered", nn.HuberLoss(delta=0.1)),
        ("general", F.mse_loss),
    ],
    ids=["mse", "bce", "huber", "general mse"],
)
def test_losses_in_batches(engine: str, loss: Any) -> None:
    model = network()
    x = torch.randn(11, 6)
    with torch.no_grad():
        y = model(x)
    if loss is F.binary_cross_entropy_with_logits:
        y = y.sigmoid()
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    agree(*both(model, loss, data, engine=engine, n=6))


@interpreter
def test_ignored_targets() -> None:
    model = network()
    x, y = labelled(model, 9, 6)
    y[::3] = -100
    agree(*both(model, F.cross_entropy, [(x[:4], y[:4]), (x[4:], y[4:])], engine="layered"))


@interpreter
def test_directions_of_another_law() -> None:
    model = network()
    x = torch.randn(7, 6)
    with torch.no_grad():
        data = (x, model(x))
    options = {"method": "preconditioned", "preconditioner": torch.linspace(0.5, 2.0, 53)}
    agree(*both(model, F.mse_loss, data, engine="layered", **options))


@interpreter
def test_what_must_be_read_anew_runs_on_the_host() -> None:
    model = network()
    x, y = labelled(model, 8, 6)

    class Reader:
        def __iter__(self) -> Iterator[Any]:
            yield from [(x[:4], y[:4]), (x[4:], y[4:])]

    host, device = both(model, F.cross_entropy, Reader(), n=8)
    agree(host, device)
    assert device.provenance["loop"] == "host, triton"
    assert device.provenance["fell_back"][-1] == (
        "loop on the device: the data are read anew for every evaluation"
    )


@interpreter
def test_a_loss_on_the_host_runs_on_the_host() -> None:
    model = network()
    x, y = labelled(model, 8, 6)

    def loss(m: nn.Module) -> float:
        return float(F.cross_entropy(m(x), y))

    with pytest.warns(fastvol.FastvolWarning, match="one at a time"):
        host, device = both(model, loss, None, n=8)
    agree(host, device)
    assert "loss_fn does not return a tensor on the model's device" in str(
        device.provenance["fell_back"]
    )


# Memory


def failing(monkeypatch: pytest.MonkeyPatch, engine: type[GeneralEngine], most: int) -> list[int]:
    """Lanes of an engine that were asked for; more than ``most`` find no memory."""
    asked = []
    original: Any = engine.loss_parts

    def limited(self: Any, radii: Tensor, lanes: slice) -> Any:
        asked.append(self.lanes)
        if self.lanes > most and len(asked) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return original(self, radii, lanes)

    monkeypatch.setattr(engine, "loss_parts", limited)
    return asked


@interpreter
@pytest.mark.parametrize("engine", ["general", "layered"])
def test_out_of_memory_halves_the_lanes(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    data = labelled(model, 9, 6)
    plan = fastvol.estimate(model, F.cross_entropy, data=data, n=9, engine=engine, lanes=7).plan
    settings: dict[str, Any] = {
        "data": data,
        "n": 10,
        "method": "radial",
        "parameters": ["0.weight", "2.weight"],
        "plan": {**plan, "backend": "triton", "lanes": 7, "chunk": 3},
        "rtol": 1e-3,
        "backend": "triton",
    }
    whole = fastvol.estimate(model, F.cross_entropy, **settings)
    kind = GeneralEngine if engine == "general" else LayeredEngine
    asked = failing(monkeypatch, kind, most=2)
    result = fastvol.estimate(model, F.cross_entropy, **settings)
    agree(whole, result)
    assert {7, 3, 1} <= set(asked)
    told = result.provenance["fell_back"][-2:]
    assert told == ["cpu was out of memory: 3 lanes", "cpu was out of memory: 1 lanes"]
    assert "memory" not in str(whole.provenance["fell_back"])


@interpreter
def test_no_memory_for_one_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    failing(monkeypatch, GeneralEngine, most=0)
    with pytest.raises(FastvolError, match="memory for one ray in flight; pass data in"):
        fastvol.estimate(
            model,
            F.cross_entropy,
            data=labelled(model, 9, 6),
            n=20,
            engine="general",
            backend="triton",
            lanes=4,
            method="radial",
        )


# Engines


def opened(
    kind: type[GeneralEngine], model: nn.Module, data: Any, *, backend: str = "cpp", **changes: Any
) -> GeneralEngine:
    layout = ParameterLayout(model)
    objective = Objective(model, F.cross_entropy, data, layout.device)
    name = "general" if kind is GeneralEngine else "layered"
    plan = Plan(name, 2, 5, True, "float32", 1, 1, "cpp", cached=True)
    plan = Plan(**{**plan.describe(), **changes})
    scale = torch.rand(layout.size, dtype=torch.float64) + 0.5
    return kind(objective, layout, scale, plan, _backend.select(backend))


def summed(engine: GeneralEngine, radii: Tensor, lanes: slice) -> Tensor:
    state = SearchState.empty(lanes.stop - lanes.start, "cpu")
    rules = dict.fromkeys(Rule, 1e9)
    state.keep_rules(rules)
    state.begin(torch.arange(state.lanes), radii.log(), scan=False)
    with torch.no_grad():
        for part in engine.loss_parts(radii, lanes):
            threshold_step(
                state,
                part.outputs,
                part.target,
                kind=part.kind,
                scale=part.scale,
                lanes=part.lanes,
                first=part.first,
                last=False,
            )
            last = part.last
    assert last
    return state.numbers[Number.TOTAL]


@pytest.mark.parametrize("make", [network, images])
@pytest.mark.parametrize("kind", [GeneralEngine, LayeredEngine])
def test_parts_add_up_to_the_losses(kind: type[GeneralEngine], make: Any) -> None:
    model = make()
    shape = (6,) if make is network else (1, 4, 4)
    x, y = labelled(model, 9, *shape)
    engine = opened(kind, model, [(x[:2], y[:2]), (x[2:], y[2:])])
    ids = np.arange(5)
    engine.load(ids, Indexed(3, ids))
    radii = np.array([0.1, 0.5, 1.0, 2.0, 3.0])
    wanted = engine.loss(radii).values
    found = summed(engine, torch.from_numpy(radii), slice(0, 5))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    some = summed(engine, torch.from_numpy(radii[1:4]), slice(1, 4))
    np.testing.assert_allclose(some.numpy(), wanted[1:4], rtol=1e-6)


@pytest.mark.parametrize("kind", [GeneralEngine, LayeredEngine])
def test_other_lanes_after_a_change_of_their_number(kind: type[GeneralEngine]) -> None:
    model = network()
    engine = opened(kind, model, labelled(model, 9, 6))
    wanted = opened(kind, model, labelled(model, 9, 6), lanes=2)
    for ids in (np.arange(5), np.arange(2)):
        if len(ids) == 2:
            engine.resize(2)
        assert engine.lanes == len(ids)
        engine.load(ids, Indexed(3, ids))
        engine.loss(np.ones(len(ids)))
    torch.manual_seed(0)
    ids = np.array([7, 4])
    for each in (engine, wanted):
        norm, dot = each.load_async(np.arange(2), Indexed(3, ids)) or (None, None)
        assert isinstance(norm, Tensor)
        assert isinstance(dot, Tensor)
        each.prepare(np.arange(2))
    radii = torch.tensor([0.5, 1.5], dtype=torch.float64)
    info = wanted.load(np.arange(2), Indexed(3, ids))
    assert torch.equal(norm, torch.from_numpy(info.norm))
    if kind is GeneralEngine:
        torch.testing.assert_close(
            summed(engine, radii, slice(0, 2)),
            torch.from_numpy(engine.loss(radii.numpy()).values),
            rtol=1e-6,
            atol=0,
        )
    values, slopes = engine.loss_and_grad(radii.numpy())
    np.testing.assert_allclose(values, engine.loss(radii.numpy()).values, rtol=1e-6)
    assert slopes.shape == (2, engine.dim)


@pytest.mark.parametrize("make", [network, images])
def test_directions_are_shown_together_as_alone(make: Any) -> None:
    model = make()
    shape = (6,) if make is network else (1, 4, 4)
    engine = opened(LayeredEngine, model, labelled(model, 9, *shape))
    assert isinstance(engine, LayeredEngine)
    ids = np.arange(5)
    engine.load(ids, Indexed(3, ids))
    wanted = engine.loss(np.ones(5)).values
    (program,) = engine._programs
    kept = list(program._change.values())
    assert kept
    before = [change.clone() for change in kept]
    for change in kept:
        change.fill_(float("nan"))
    engine._show_together(ids[:3])
    engine._show_together(ids[3:])
    for change, value in zip(kept, before, strict=True):
        torch.testing.assert_close(change, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(engine.loss(np.ones(5)).values, wanted, rtol=1e-6)


def test_directions_that_are_not_kept_need_the_host() -> None:
    model = network()
    engine = opened(GeneralEngine, model, labelled(model, 9, 6), keep_rows=False)
    ids = np.arange(5)
    assert engine.load_async(ids, Indexed(3, ids)) is None
    engine.load(ids, Indexed(3, ids))
    with pytest.raises(Exception, match="too large to be kept"):
        summed(engine, torch.ones(5, dtype=torch.float64), slice(0, 5))


def test_a_round_tells_how_many_lanes_have_settled() -> None:
    model = network()
    engine = opened(GeneralEngine, model, labelled(model, 9, 6))
    ids = np.arange(5)
    engine.load(ids, Indexed(3, ids))
    rounds = Rounds(engine, slice(1, 5), threshold_step, refill)
    # The cap is the start, so that inside is unbounded at once.
    settings = {Rule.THRESHOLD: 1e9, Rule.LIMIT: 1e9, Rule.MAX_EVALUATIONS: 99, Rule.XTOL: 1e-3}
    found, starts = Found.empty(7, "cpu"), torch.zeros(7, dtype=torch.float64)
    for _ in range(2):
        rounds.clear({**dict.fromkeys(Rule, 1.0), Rule.LOG_CAP: 0.0, **settings})
        count, lanes = rounds.refill(found, starts, 0, scan=False)
        assert count == rounds.carried == 4
        # The host knows the first ones.
        assert isinstance(lanes, np.ndarray)
        assert lanes.tolist() == [1, 2, 3, 4]
        # Two lanes are left as they are.
        rounds.state.marks[Mark.PHASE, [1, 3]] = int(Phase.IDLE)
        rounds.begin()
        assert rounds.settled() == 2
        rounds.state.marks[Mark.PHASE, [1, 3]] = int(Phase.BRACKET)
        count, lanes = rounds.refill(found, starts, 4, scan=False)
        assert count == 2
        assert isinstance(lanes, Tensor)
        assert lanes.tolist() == [1, 3]
        rounds.begin()
        assert rounds.settled() == rounds.carried == 4
        count, lanes = rounds.refill(found, starts, 6, scan=False)
        assert count == rounds.carried == 1
        assert isinstance(lanes, np.ndarray)
        assert lanes.tolist() == [1]
        assert found.marks[1].tolist()[:6] == [1] * 6
    assert not rounds.is_captured


class _Reads(TorchDispatchMode):
    """Where the host has read a number; what it cannot know the shape of is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function not in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select)
        if function is torch.ops.aten._local_scalar_dense.default:
            self.places.append(args[0].data_ptr())
        return function(*args, **(kwargs or {}))


def test_the_host_reads_one_number_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds_made, counts = [], set()
    begin = Rounds.begin

    def counted(self: Rounds) -> None:
        rounds_made.append(self)
        counts.add(self._count.data_ptr())
        begin(self)

    monkeypatch.setattr(Rounds, "begin", counted)
    reads: list[_Reads] = []
    run = _device_loop._DeviceLoop._run

    def watched(self: Any, *args: Any) -> Any:
        reads.append(_Reads())
        with reads[-1]:
            return run(self, *args)

    monkeypatch.setattr(_device_loop._DeviceLoop, "_run", watched)
    model = network()
    agree(*both(model, F.cross_entropy, labelled(model, 9, 6), engine="general", n=40))
    assert reads
    places = [place for read in reads for place in read.places]
    assert set(places) <= counts
    # Once to decide, and once more where a lane is filled anew.
    assert len(rounds_made) <= len(places) <= 2 * len(rounds_made)


@interpreter
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (GeneralEngine, {}),
        (LayeredEngine, {"cached": True}),
        (LayeredEngine, {"cached": False}),
        (LayeredEngine, {"backend": "triton"}),
        (LayeredEngine, {"backend": "triton", "fused": True, "keep_rows": False}),
    ],
    ids=["general", "cached", "not cached", "kernels", "fused"],
)
def test_lanes_that_only_the_device_knows(
    kind: type[GeneralEngine], changes: dict[str, Any]
) -> None:
    """They hold what they would if the host had chosen them, and the host learns of it."""
    model = network()
    data = labelled(model, 9, 6)
    engines = []
    for _ in range(2):
        torch.manual_seed(0)
        engines.append(opened(kind, model, data, **changes))
    alone, told = engines
    ids, radii = np.array([4, 0, 7, 9, 1]), np.array([0.1, 0.5, 1.0, 2.0, 3.0])
    lanes, more = np.array([3, 0]), np.array([2, 3])
    for engine, as_lanes in ((told, lambda x: x), (alone, torch.from_numpy)):
        engine.load(np.arange(5), Indexed(3, ids))
        engine.prepare(np.arange(5))
        for some, rays in (
            (lanes, Indexed(3, np.array([20, 21]))),
            (more, Indexed(3, np.array([30, 31]))),
            (lanes[:1], Indexed(3, np.array([40]), stream=1)),
        ):
            assert engine.load_async(as_lanes(some), rays) is not None
            engine.prepare(as_lanes(some))
    both_sums = [summed(e, torch.from_numpy(radii), slice(0, 5)) for e in (told, alone)]
    assert torch.equal(*both_sums)
    np.testing.assert_array_equal(alone.loss(radii).values, told.loss(radii).values)
    held = [(rays.stream, int(rays.ids[position])) for rays, position in filter(None, alone._rays)]
    assert held == [(0, 21), (0, 0), (0, 30), (1, 40), (0, 1)]
    alone.load(np.array([1]), Indexed(3, np.array([50])))
    told.load(np.array([1]), Indexed(3, np.array([50])))
    for a, b in zip(alone.loss_and_grad(radii), told.loss_and_grad(radii), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class _Graph:
    """What stands for a CUDA graph where there is no GPU: it repeats a function."""

    function: Any = None

    def replay(self) -> None:
        _Graph.function()


@pytest.mark.parametrize("trouble", ["", "other losses", "an operation that waits"])
def test_a_captured_round_has_to_repeat_the_operations(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    engine = opened(GeneralEngine, model, labelled(model, 9, 6))
    ids = np.arange(5)
    engine.load(ids, Indexed(3, ids))
    several = [Rounds(engine, slice(0, 5), threshold_step, refill) for _ in range(2)]
    for rounds in several:
        limits = {Rule.THRESHOLD: 1.5, Rule.LIMIT: 1e9, Rule.MAX_EVALUATIONS: 99, Rule.XTOL: 1e-3}
        rounds.state.keep_rules({**dict.fromkeys(Rule, 1.0), Rule.LOG_CAP: 9.0, **limits})
        rounds.state.begin(torch.from_numpy(ids), torch.zeros(5, dtype=torch.float64), scan=False)
    plain, captured = several

    @contextmanager
    def graph(*args: Any, **options: Any) -> Iterator[None]:
        if trouble == "an operation that waits":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        saved = [tensor.clone() for tensor in (captured.state.numbers, captured.state.marks)]
        yield
        # Nothing runs while it is captured.
        captured.state.numbers.copy_(saved[0])
        captured.state.marks.copy_(saved[1])

    def repeat() -> None:
        captured._round()
        if trouble == "other losses":
            captured.state.numbers[Number.TOTAL] += 1e-3

    monkeypatch.setattr(captured, "_gpu", True)
    monkeypatch.setattr(_Graph, "function", staticmethod(repeat))
    for name, value in {
        "CUDAGraph": _Graph,
        "graph": graph,
        "Stream": lambda device: _Stream(),
        "current_stream": lambda device: _Stream(),
        "stream": lambda stream: nullcontext(),
        "set_stream": lambda stream: None,
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    while plain.settled() < 5:
        plain.begin()
        captured.begin()
        assert torch.equal(plain.state.numbers, captured.state.numbers)
        assert torch.equal(plain.state.marks, captured.state.marks)
        assert plain.settled() == captured.settled()
    assert captured.is_captured == (trouble == "")
    if trouble == "an operation that waits":
        assert captured.trouble == "operation not permitted when stream is capturing"
    elif trouble:
        assert captured.trouble == "the captured round gave other losses"


def test_other_directions_are_captured_into_another_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = iter(range(9))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    pools = Pools()
    assert [pools.of(bound) for bound in (None, None, "a", "a", "b", "a")] == [0, 0, 1, 1, 2, 3]
    pools.forget()
    assert [pools.of("a"), pools.of("a")] == [4, 4]


class _Stream:
    def wait_stream(self, other: Any) -> None:
        pass


# Which backend


@interpreter
def test_auto_on_a_gpu_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    assert _backend.select("auto", device).name == "triton"
    assert _backend.select("auto", torch.device("cpu")).name == "cpp"
    monkeypatch.setitem(sys.modules, "triton", None)
    backend = _backend.select("auto", device)
    assert backend.name == "cpp"
    assert len(backend.fell_back) == 1
    assert "triton: it cannot be imported" in backend.fell_back[0]
    with pytest.raises(NotAvailableError, match="backend='triton' cannot run here"):
        _backend.select("triton")


@pytest.mark.usefixtures("interpreted_kernels")
def test_dtypes_that_the_kernels_do_not_know_go_to_the_reference() -> None:
    backend = _backend.select("triton")
    state = SearchState.empty(1, "cpu")
    state.begin(torch.tensor([0]), torch.zeros(1, dtype=torch.float64), scan=False)
    backend.threshold_step(state, torch.ones(1, 2, dtype=torch.int32), None, kind="given")
    assert float(state.numbers[Number.TOTAL, 0]) == 2.0
    out = torch.zeros(1, 5, dtype=torch.float64)
    again = torch.zeros(1, 5, dtype=torch.float64)
    norm, _ = backend.normals(out, 1, 0, np.array([3]), threads=2)
    wanted, _ = _backend.select("cpp").normals(again, 1, 0, np.array([3]))
    np.testing.assert_allclose(norm, wanted, rtol=1e-12)
    torch.testing.assert_close(out, again, rtol=1e-12, atol=1e-12)


_ALONE = """
import sys
import torch, fastvol
from fastvol import _backend
assert "triton" not in sys.modules
torch.cuda.is_available = lambda: False
try:
    fastvol.estimate(torch.nn.Linear(2, 1), lambda m: 0.0, backend="triton")
except fastvol.NotAvailableError as error:
    print(error)
"""


def test_triton_without_a_gpu_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ALONE],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert "backend='triton' cannot run here: PyTorch sees no GPU" in done.stdout


# On a card


def trained(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    y = torch.arange(len(x)) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if loss.item() < 1e-3:
            break
    return model.eval(), y


@pytest.fixture
def exact() -> Iterator[None]:
    """Products and convolutions of a GPU in full float32, by either of PyTorch's interfaces."""
    with products(tf32=False):
        yield


@pytest.mark.gpu
@gpu
@pytest.mark.usefixtures("exact")
def test_convolutions_on_a_gpu() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 1, 28, 28)
    model, y = trained(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8).eval(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(784, 10),
        ).eval(),
        x,
    )
    settings: dict[str, Any] = {
        "n": 100,
        "threshold": 0.1,
        "method": "radial",
        "rtol": 1e-3,
        "engine": "layered",
        "progress": False,
    }
    host = fastvol.estimate(model, F.cross_entropy, data=(x, y), **settings)
    model.cuda()
    device = fastvol.estimate(model, F.cross_entropy, data=(x.cuda(), y.cuda()), **settings)
    agree(host, device, rtol=1e-3)
    assert device.provenance["backend"] == "triton"
    assert device.provenance["loop"] == "cuda, CUDA graph"


@pytest.mark.gpu
@gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("engine", ["general", "layered"])
@pytest.mark.parametrize(("backend", "lanes"), [("triton", "auto"), ("triton", 48), ("torch", 48)])
def test_a_gpu_finds_the_radii_of_the_cpu(engine: str, backend: str, lanes: Any) -> None:
    """With few lanes most directions are put on some that only the device knows."""
    torch.manual_seed(0)
    x = torch.randn(600, 784)
    model, y = trained(
        nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        ),
        x,
    )
    settings: dict[str, Any] = {
        "n": 200,
        "threshold": 0.1,
        "method": "radial",
        "metric": "filter",
        "rtol": 1e-3,
        "engine": engine,
        "progress": False,
    }
    host = fastvol.estimate(model, F.cross_entropy, data=(x, y), **settings)
    model.cuda()
    device = fastvol.estimate(
        model,
        F.cross_entropy,
        data=(x.cuda(), y.cuda()),
        backend=backend,
        lanes=lanes,
        **settings,
    )
    agree(host, device, rtol=1e-3)
    assert device.provenance["loop"] == "cuda, CUDA graph"
    assert device.provenance["fell_back"] == []


@pytest.mark.gpu
@gpu
def test_memory_runs_out_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 20, device="cuda")
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).cuda()
    y = model(x).argmax(1)
    settings: dict[str, Any] = {
        "data": (x, y),
        "n": 100,
        "method": "radial",
        "engine": "layered",
        "lanes": 16,
        "rtol": 1e-3,
    }
    whole = fastvol.estimate(model, F.cross_entropy, **settings)
    asked = failing(monkeypatch, LayeredEngine, most=4)
    result = fastvol.estimate(model, F.cross_entropy, **settings)
    agree(whole, result, rtol=1e-3)
    assert {16, 8, 4} <= set(asked)
    assert len(result.provenance["fell_back"]) == 2
