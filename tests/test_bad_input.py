"""Input that cannot be used is refused by name, and input that can be gives a number."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

import fastvol

REFUSALS = (TypeError, ValueError, fastvol.FastvolError)
NAN, INF = math.nan, math.inf
HUGE = 10**400  # a whole number beyond any float


def refused(
    name: str, call: Callable[..., Any], *arguments: Any, **options: Any
) -> pytest.ExceptionInfo[Exception]:
    """Asserts that the call is refused in words that name the argument."""
    with pytest.raises(REFUSALS) as caught:
        call(*arguments, **options)
    assert name in str(caught.value), f"{caught.value!r} does not name {name}"
    return caught


def bowl(model: nn.Module) -> Tensor:
    return sum(p.double().square().sum() for p in model.parameters())  # type: ignore[return-value]


def zeros(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A module with parameters p0, p1, ... of these shapes, all zero."""
    model = nn.Module()
    for index, shape in enumerate(shapes or [(2,)]):
        model.register_parameter(f"p{index}", nn.Parameter(torch.zeros(shape, dtype=dtype)))
    return model


def estimate(model: Any = zeros, loss_fn: Any = bowl, n: Any = 2, **options: Any) -> Any:
    """A run of two rays of a bowl, but for what is given."""
    options = {"lanes": 1, "rtol": 1e-3, **options}
    return fastvol.estimate(zeros() if model is zeros else model, loss_fn, n, **options)


# Of no use as any argument. Tensors and arrays are tried by name below.
JUNK = st.one_of(
    st.sampled_from(
        [None, object(), Ellipsis, NotImplemented, NAN, INF, -INF, HUGE, -HUGE, -1, -0.5, 1e-300]
    ),
    st.booleans(),
    st.text(max_size=4),
    st.binary(max_size=2),
    st.complex_numbers(allow_nan=False),
    st.sampled_from([np.complex128(1j), np.bool_(True), np.str_("x"), Fraction(1, 3), set(), {1}]),
    st.lists(st.one_of(st.none(), st.text(max_size=2), st.complex_numbers()), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), min_size=1, max_size=2),
)

# What of the junk an argument can use after all.
USABLE: dict[str, Callable[[Any], bool]] = {
    "model": lambda value: False,
    "loss_fn": callable,
    "n": lambda value: False,
    "data": lambda value: value is None,
    "threshold": lambda value: value is None or value in (1e-300, Fraction(1, 3), {1}),
    "increase": lambda value: value in (1e-300, Fraction(1, 3), {1}),
    "metric": lambda value: value in (1e-300, Fraction(1, 3)),
    "measure": lambda value: False,
    "method": lambda value: False,
    "preconditioner": lambda value: value is None,
    "parameters": lambda value: value is None,
    "rtol": lambda value: value == Fraction(1, 3),
    "seed": lambda value: False,
    "replicates": lambda value: value is HUGE,
    "antithetic": lambda value: isinstance(value, (bool, np.bool_)),
    "noise": lambda value: False,
    "first_crossing": lambda value: isinstance(value, (bool, np.bool_)),
    "distributed": lambda value: isinstance(value, (bool, np.bool_)),
    "engine": lambda value: False,
    "backend": lambda value: False,
    "device": lambda value: value is None,
    "lanes": lambda value: value is HUGE,
    "plan": lambda value: value is None,
    # Any text that a file system takes names a folder.
    "checkpoint": lambda value: value is None or isinstance(value, str),
    "on_interrupt": lambda value: False,
    "progress": lambda value: isinstance(value, (bool, np.bool_)),
    "callbacks": lambda value: isinstance(value, (str, bytes, list, set)) and not value,
}


KNOWN = {
    "auto",
    "radial",
    "general",
    "layered",
    "inplace",
    "cpp",
    "torch",
    "full",
    "raise",
    "euclidean",
    "filter",
    "cpu",
}


def usable(name: str, value: Any) -> bool:
    # Text strategies also draw constants that they find in the source.
    if isinstance(value, str) and value in KNOWN:
        return True
    try:
        return bool(USABLE[name](value))
    except TypeError:  # an unhashable value was looked for in a set
        return False


def test_every_argument_is_covered() -> None:
    import inspect

    assert set(USABLE) == set(inspect.signature(fastvol.estimate).parameters)


@pytest.mark.parametrize("name", USABLE)
@given(data=st.data())
@settings(max_examples=60)
def test_junk(name: str, data: st.DataObject) -> None:
    value = data.draw(JUNK.filter(lambda value: not usable(name, value)))
    options: dict[str, Any] = {"model": zeros(), "loss_fn": bowl, name: value}
    refused(name, estimate, **options)


@given(
    name=st.sampled_from(["method", "engine", "backend", "noise", "on_interrupt"]),
    text=st.text(max_size=12),
)
@settings(max_examples=200)
def test_unknown_strings(name: str, text: str) -> None:
    refused(name, estimate, **{name: text if text not in KNOWN else text + "?"})


@pytest.mark.parametrize(
    ("name", "value"),
    [],
)
def test_arguments_of_later_versions(name: str, value: Any) -> None:
    caught = refused(name, estimate, **{name: value})
    assert isinstance(caught.value, fastvol.NotAvailableError)
    assert isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize(
    "n",
    [0, -1, -1e6, 1.5, NAN, INF, "ten", True, False, None, 2.0**70, HUGE, 1j, [3], Fraction(3, 2)],
)
def test_counts_that_are_none(n: Any) -> None:
    refused("n ", estimate, n=n)


@pytest.mark.parametrize("n", [2, 2.0, np.int64(2), np.float32(2), Fraction(4, 2)])
def test_counts_that_are_whole(n: Any) -> None:
    assert estimate(n=n).n == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("seed", True),
        ("replicates", 0),
        ("lanes", 0),
        ("lanes", -4),
        ("lanes", "many"),
        ("rtol", 0.0),
        ("rtol", -1e-3),
        ("rtol", 0.6),
        ("rtol", NAN),
        ("rtol", True),
        ("rtol", "small"),
        ("antithetic", 1),
        ("antithetic", None),
        ("first_crossing", 1),
        ("distributed", "no"),
        ("progress", 0),
        ("callbacks", print),
        ("callbacks", [print, None]),
        ("callbacks", 3),
        ("device", "meta"),
        ("device", "nowhere"),
        ("device", -7),
        ("device", 3.5),
        ("device", 10**30),
        ("device", torch.device("meta")),
        ("measure", fastvol.Gaussian),
        ("measure", "gaussian"),
    ],
)
def test_options(name: str, value: Any) -> None:
    refused(name, estimate, **{name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is not absent")
def test_absent_device() -> None:
    refused("device", estimate, device="cuda")
    refused("device", estimate, device="cuda:1")


def test_many_lanes_are_no_more_than_a_block() -> None:
    assert estimate(lanes=10**15).plan["lanes"] == 1024


# Thresholds


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"threshold": -1e-9}, "threshold"),
        ({"threshold": [1.0, -1.0]}, "threshold"),
        ({"threshold": NAN}, "threshold"),
        ({"threshold": [1.0, NAN]}, "threshold"),
        ({"threshold": INF}, "threshold"),
        ({"threshold": HUGE}, "threshold"),
        ({"threshold": "1.0"}, "threshold"),
        ({"threshold": ["1.0"]}, "threshold"),
        ({"threshold": True}, "threshold"),
        ({"threshold": np.array([1j])}, "threshold"),
        ({"threshold": torch.tensor(1j)}, "threshold"),
        ({"threshold": torch.ones(2, 2)}, "threshold"),
        ({"threshold": np.ones((2, 2))}, "threshold"),
        ({"threshold": []}, "threshold"),
        ({"threshold": ()}, "threshold"),
        ({"threshold": torch.empty(0)}, "threshold"),
        ({"increase": 0.0}, "increase"),
        ({"increase": -0.1}, "increase"),
        ({"increase": [0.1, 0.0]}, "increase"),
        ({"increase": NAN}, "increase"),
        ({"increase": INF}, "increase"),
        ({"increase": []}, "increase"),
        ({"increase": None}, "increase"),
        ({"threshold": 1.0, "increase": 0.5}, "threshold"),
        ({"threshold": 1.0, "increase": 0.5}, "increase"),
        ({"threshold": [1.0], "increase": [0.5]}, "increase"),
    ],
)
def test_thresholds(options: dict[str, Any], name: str) -> None:
    refused(name, estimate, **options)


def test_an_increase_that_rounds_away() -> None:
    refused("increase", estimate, loss_fn=lambda m: bowl(m) + 1e17, increase=0.1)


@pytest.mark.parametrize(
    "threshold", [1, 1.0, Fraction(1, 2), np.float32(1), torch.tensor(1.0), np.array(1.0)]
)
def test_a_threshold_of_any_real_type(threshold: Any) -> None:
    assert isinstance(estimate(threshold=threshold), fastvol.VolumeEstimate)
    assert isinstance(estimate(threshold=[threshold]), list)


def test_a_threshold_equal_to_the_loss() -> None:
    result = estimate(threshold=0.0)
    assert not math.isnan(result.log_volume)
    assert result.log_volume < -100


# Models


class Untouched(nn.Module):
    """A model whose forward pass must not be reached."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.weight = parameter


def complex_parameter() -> nn.Module:
    return Untouched(nn.Parameter(torch.zeros(2, dtype=torch.complex64)))


def holding(value: float) -> nn.Module:
    return Untouched(nn.Parameter(torch.tensor([1.0, value])))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (nn.Module, "model"),
        (lambda: nn.Linear, "model"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), "model"),
        (lambda: nn.Linear(0, 0), "model"),
        (lambda: nn.LazyLinear(3), "model"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight"),
        (complex_parameter, "weight"),
        (lambda: holding(NAN), "weight"),
        (lambda: holding(INF), "weight"),
        (lambda: Untouched(nn.Parameter(torch.eye(2).to_sparse())), "weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_models(make: Callable[[], Any], name: str) -> None:
    caught = refused(name, estimate, make())
    assert "model" in str(caught.value)


def with_integers() -> nn.Module:
    model = nn.Linear(2, 1)
    model.register_parameter(
        "table", nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    )
    return model


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("nothing", "matches no parameter"),
        (["weight", "nothing"], "matches no parameter"),
        ("bias*nothing", "matches no parameter"),
        ("table", "frozen"),
        (["weight", "table"], "frozen"),
        ("*", "frozen"),
        ([], "selects none"),
        (lambda name, parameter: False, "selects none"),
        (lambda name, parameter: name == "table", "selects none"),
        (lambda name, parameter: 1 / 0, "ZeroDivisionError"),
        (lambda: True, "TypeError"),
        (3, "got int"),
        ([3], "strings"),
        ([None], "strings"),
        (b"weight", "strings"),
        (torch.zeros(1), "strings"),
    ],
)
def test_selections(parameters: Any, words: str) -> None:
    caught = refused("parameters", estimate, with_integers(), parameters=parameters)
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_that_work(dtype: torch.dtype) -> None:
    model = zeros((2, 2), (), dtype=dtype)
    result = estimate(model, n=16, threshold=1.0)
    assert result.dim == 5
    # Rounding of the parameters blurs the radii of half-precision models.
    assert result.log_radii == pytest.approx(np.zeros(16), abs=0.05)


def test_dtypes_side_by_side() -> None:
    model = zeros((3,), dtype=torch.bfloat16)
    model.register_parameter("wide", nn.Parameter(torch.zeros((), dtype=torch.float64)))
    result = estimate(model, n=16, threshold=1.0)
    assert result.plan["dtype"] == "float64"
    assert result.dim == 4


# Metrics and measures


@pytest.mark.parametrize(
    "metric",
    [
        "riemannian",
        "",
        "Filter",
        None,
        [1.0, 1.0, 1.0],
        {},
        {"p0": 1.0},
        {"p0": 1.0, "p1": 1.0, "p2": 1.0},
        {"p0": 1.0, "P1": 1.0},
        {"p0": 1.0, 1: 1.0},
        {"p0": torch.ones(3), "p1": 1.0},
        {"p0": torch.ones(2, 2), "p1": 1.0},
        {"p0": [1.0, "x"], "p1": 1.0},
        {"p0": None, "p1": 1.0},
        {"p0": 1j, "p1": 1.0},
        {"p0": torch.tensor(1j), "p1": 1.0},
        {"p0": HUGE, "p1": 1.0},
        {"p0": torch.ones(2, device="meta"), "p1": 1.0},
        {"p0": 0.0, "p1": 1.0},
        {"p0": [1.0, -1.0], "p1": 1.0},
        {"p0": NAN, "p1": 1.0},
        {"p0": INF, "p1": 1.0},
        torch.ones(2),
        torch.ones(4),
        torch.empty(0),
        torch.tensor([1.0, 0.0, 1.0]),
        torch.tensor([1.0, -1.0, 1.0]),
        torch.tensor([1.0, NAN, 1.0]),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, device="meta"),
        torch.ones(3).to_sparse(),
        np.ones(4),
        np.array(["x"] * 3),
        0.0,
        -1.0,
        NAN,
        HUGE,
        True,
    ],
)
def test_metrics(metric: Any) -> None:
    refused("metric", estimate, zeros((2,), ()), metric=metric)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_scales_beyond_the_working_dtype(scale: float) -> None:
    """In float32 such a scale is 0 or infinite; in float64 it is one like any other."""
    refused("metric", estimate, zeros(dtype=torch.float32), metric=scale)
    refused("std", estimate, zeros(dtype=torch.float32), measure=fastvol.Gaussian(scale))
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(model.weight)
    result = estimate(
        model, lambda m: (m.weight - 1).square().sum(), metric=scale, threshold=1.0, n=4
    )
    assert result.log_volume == pytest.approx(math.log(math.pi), abs=1e-2)


def test_mapping_scales_keep_their_precision() -> None:
    plain = estimate(metric=0.1, threshold=1.0)
    named = estimate(metric={"p0": 0.1}, threshold=1.0)
    assert plain.log_volume == named.log_volume


def test_a_filter_of_norm_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with torch.no_grad():
        model[1].weight.zero_()
    caught = refused("metric", estimate, model, metric="filter")
    assert "'1.weight'" in str(caught.value)
    metric = fastvol.FilterMetric(zero_rows="drop")
    with pytest.warns(fastvol.FastvolWarning, match=r"metric: .*'1\.weight'") as caught_warnings:
        result = estimate(model, metric=metric, increase=1.0)
    assert len(caught_warnings) == 1
    assert result.dim == 2 * 3 + 3 + 1
    assert math.isfinite(result.log_volume)


@pytest.mark.parametrize("zero_rows", ["keep", "", None, 1, True, ["drop"]])
def test_filter_metric(zero_rows: Any) -> None:
    refused("zero_rows", fastvol.FilterMetric, zero_rows)


def test_nothing_moves() -> None:
    """Every row dropped: there is no direction left."""
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    refused("metric", estimate, model, metric=fastvol.FilterMetric(zero_rows="drop"))


@pytest.mark.parametrize(
    "std", [0.0, -1.0, NAN, INF, HUGE, -HUGE, True, None, "1", 1j, [1.0], object(), {1.0}]
)
def test_widths(std: Any) -> None:
    refused("std", fastvol.Gaussian, std)


@pytest.mark.parametrize(
    "std",
    [
        {},
        {"p0": 1.0, "p1": 1.0},
        {"p0": 0.0},
        {"p0": [1.0, NAN]},
        {"p0": torch.ones(3)},
        {"p0": "wide"},
        torch.ones(3),
        torch.zeros(2),
        torch.ones(2, device="meta"),
        torch.ones(2, dtype=torch.complex128),
    ],
)
def test_widths_that_do_not_fit_the_model(std: Any) -> None:
    refused("std", estimate, measure=fastvol.Gaussian(std))


@pytest.mark.parametrize("std", [2, {"p0": [1.0, 2.0]}, {"p0": np.ones(2)}, {"p0": torch.ones(())}])
def test_widths_that_fit(std: Any, tmp_path: Path) -> None:
    result = estimate(measure=fastvol.Gaussian(std), threshold=1.0)
    assert math.isfinite(result.log_volume)
    assert fastvol.load(result.save(tmp_path / "r")).log_volume == result.log_volume


@pytest.mark.parametrize("center", ["mean", "", None, 0])
def test_centers(center: Any) -> None:
    refused("center", fastvol.Gaussian, 1.0, center)


@pytest.mark.parametrize("max_radius", [0, -1.0, NAN, HUGE, True, None, "1", 1j, [1.0]])
def test_caps(max_radius: Any) -> None:
    refused("max_radius", fastvol.Lebesgue, max_radius)


@pytest.mark.parametrize(
    "change",
    [
        {"chunk": 0},
        {"lanes": -1},
        {"lanes": 10**12},
        {"block": 0},
        {"threads": 0},
        {"threads": 10**9},
        {"chunk": "4"},
        {"chunk": 1.0},
        {"block": None},
        {"engine": "triton"},
        {"rows": -1},
        {"cached": 1},
        {"backend": "triton"},
        {"backend": "torch"},
        {"surprise": 1},
        {1: 1},
    ],
)
def test_plans(change: dict[Any, Any]) -> None:
    plan = estimate(backend="cpp").plan
    refused("plan", estimate, backend="cpp", plan={**plan, **change})
    refused("plan", estimate, plan={key: plan[key] for key in ("chunk", "lanes")})


# Losses


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.reshape(-1) for p in model.parameters()])


def raises(model: nn.Module) -> Tensor:
    raise KeyError("planned")


class NotAFloat:
    def __float__(self) -> float:
        raise ValueError("planned")


@pytest.mark.parametrize(
    "value",
    [
        vector,
        raises,
        lambda m: None,
        lambda m: "0.5",
        lambda m: b"1",
        lambda m: 1j,
        lambda m: torch.tensor(1j),
        lambda m: True,
        lambda m: [0.5],
        lambda m: (bowl(m), None),
        lambda m: {"loss": bowl(m)},
        lambda m: np.zeros(2),
        lambda m: np.array("x"),
        lambda m: HUGE,
        lambda m: NotAFloat(),
        lambda m: torch.empty(()).to("meta"),
        lambda m: torch.empty(0),
        lambda m: bowl(m) * NAN,
        lambda m: NAN,
        lambda m: bowl(m) + INF,
        lambda m: bowl(m) - INF,
        lambda m: m.no_such_attribute,
        lambda: 1.0,
        lambda m, target: 1.0,
        nn.MSELoss(reduction="none"),
        nn.MSELoss(reduction="sum"),
        nn.CrossEntropyLoss(),
        3.0,
        None,
        "mse",
    ],
)
def test_losses(value: Any) -> None:
    refused("loss_fn", estimate, loss_fn=value)
    x = torch.zeros(3, 2)
    with_data = value
    if not isinstance(value, nn.Module) and callable(value):

        def with_data(output: Tensor, target: Tensor) -> Any:
            return value(zeros())

    elif isinstance(value, nn.Module) and value.reduction == "mean":
        return
    refused("loss_fn", estimate, nn.Linear(2, 2), with_data, data=(x, x))


def test_the_cause_is_kept() -> None:
    caught = refused("loss_fn", estimate, loss_fn=raises)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "KeyError" in str(caught.value)


@pytest.mark.parametrize("start", [0.0, 5.0])
def test_a_loss_that_differs_between_calls(start: float) -> None:
    calls = []

    def counting(model: nn.Module) -> Tensor:
        calls.append(None)
        return bowl(model) + start + 1e-3 * len(calls)

    refused("loss_fn", estimate, loss_fn=counting)
    refused("loss_fn", estimate, loss_fn=lambda m: bowl(m) + torch.rand(()))


@pytest.mark.parametrize("beyond", [NAN, INF, -INF])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_loss_that_is_not_finite_far_away(beyond: float, backend: str) -> None:
    def cliff(model: nn.Module) -> Tensor:
        return torch.where(bowl(model) < 1.0, bowl(model), beyond)

    result = estimate(loss_fn=cliff, n=4, threshold=4.0, backend=backend, rtol=1e-6)
    assert result.n_nonfinite == 4
    np.testing.assert_allclose(result.log_radii, 0.0, atol=1e-6)


def test_a_loss_that_raises_far_away() -> None:
    def cliff(model: nn.Module) -> Tensor:
        if bowl(model) > 1.0:
            raise ArithmeticError("planned")
        return bowl(model)

    refused("loss_fn", estimate, loss_fn=cliff, threshold=4.0)


def test_a_loss_that_becomes_a_vector_far_away() -> None:
    def widens(model: nn.Module) -> Tensor:
        loss = bowl(model)
        return loss if loss < 1.0 else loss.repeat(2)

    refused("loss_fn", estimate, loss_fn=widens, threshold=4.0)


@pytest.mark.parametrize("constant", [0.0, 3, np.float64(1), torch.tensor(2.0), Fraction(1, 2)])
def test_a_loss_that_does_not_depend_on_the_model(constant: Any) -> None:
    result = estimate(loss_fn=lambda m: constant)
    assert result.n_unbounded == 2
    assert not result.reliable
    assert not math.isnan(result.log_volume)


# Data

X, Y = torch.zeros(4, 2), torch.zeros(4, 1)


def read_once() -> Iterator[tuple[Tensor, Tensor]]:
    yield X, Y


class Batches:
    """Gives what it is told, at every reading."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.mark.parametrize(
    "data",
    [
        [],
        (),
        Batches(),
        read_once(),
        iter([(X, Y)]),
        zip([X], [Y], strict=True),
        X,
        X.numpy(),
        (X.numpy(), Y.numpy()),
        [X, X, X],
        [X[:2], X[:2], X[:2]],
        Batches(X),
        Batches(X[:2]),
        Batches({"input": X, "target": Y}),
        [{"input": X, "target": Y}],
        {"input": X, "target": Y},
        [(X,)],
        (X,),
        (X, Y, Y),
        [(X, Y, Y)],
        [(X, Y), (X, Y, Y)],
        [None],
        "xy",
        3,
        nn.Sequential(nn.Linear(2, 2)),
        (X, Y[:3]),
        [(X, Y), (X, Y[:3])],
        (X[:0], Y[:0]),
        [(X, Y), (X[:0], Y[:0])],
        Batches((X, Y), (X[:0], Y[:0])),
        ({"input": X[:0]}, Y[:0]),
        (X.to("meta"), Y),
        (X, Y.to("meta")),
        Batches((X.to("meta"), Y)),
    ],
)
def test_data(data: Any) -> None:
    refused("data", estimate, nn.Linear(2, 1), F.mse_loss, data=data)


@pytest.mark.parametrize(
    "data",
    [
        (torch.zeros(4, 3), Y),
        (X.double(), Y),
        (X.long(), Y),
        ((X, X), Y),
        ({"x": X}, Y),
        (X, "labels"),
        (X, None),
        ([X, X], None),
        [(X, Y), None],  # two inputs, no target
    ],
)
def test_data_that_does_not_fit_the_model(data: Any) -> None:
    refused("model", estimate, nn.Linear(2, 1), F.mse_loss, data=data)


def test_data_without_an_example_that_counts() -> None:
    targets = torch.full((4,), -100)
    refused("data", estimate, nn.Linear(2, 3), F.cross_entropy, data=(X, targets))
    refused("data", estimate, nn.Linear(2, 3), F.cross_entropy, data=Batches((X, targets)))


def test_data_that_runs_dry() -> None:
    """A stream with fewer batches the second time."""

    class Drying(Batches):
        def __iter__(self) -> Iterator[Any]:
            yield from self.batches
            self.batches = self.batches[:-1]

    refused("data", estimate, nn.Linear(2, 1), F.mse_loss, data=Drying((X, Y), (X, Y), (X, Y)))


def test_divergence_without_data() -> None:
    refused("loss_fn", estimate, loss_fn=fastvol.losses.KLDivergence())


# What can be used gives a number.


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments that are all in order."""
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    shapes = draw(
        st.lists(st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 1)]), min_size=1, max_size=3)
    )
    model = zeros(*shapes, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(draw(st.sampled_from([0.5, -2.0, 64.0, 2.0**-20])))
    centre = [p.detach().clone() for p in model.parameters()]
    power = draw(st.sampled_from([0, 1, 2, 3]))
    level = draw(st.sampled_from([0.0, 1.0, -1e6, 1e-30]))
    sign = draw(st.sampled_from([1.0, 1.0, 1.0, -1.0]))

    def loss_fn(model: nn.Module) -> Tensor:
        moved = sum(
            (p.double() - c.double()).abs().pow(power).sum()
            for p, c in zip(model.parameters(), centre, strict=True)
        )
        return level + sign * moved

    scale = st.sampled_from([1.0, 1e-6, 1e6])
    options = {
        "model": model,
        "loss_fn": loss_fn,
        "n": draw(st.sampled_from([1, 2, 5])),
        "metric": draw(st.sampled_from(["euclidean", "filter"]) | scale),
        "measure": draw(
            st.sampled_from([fastvol.Lebesgue(), fastvol.Lebesgue(1e-3), fastvol.Lebesgue(1e200)])
            | st.builds(fastvol.Gaussian, scale, st.sampled_from(["minimum", "origin"]))
        ),
        "antithetic": draw(st.booleans()),
        "first_crossing": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "rtol": draw(st.sampled_from(["auto", 1e-2, 1e-12])),
        "backend": draw(st.sampled_from(["cpp", "cpp", "torch"])),
        "lanes": draw(st.sampled_from([1, 2, 7])),
    }
    least = float(loss_fn(model).detach())
    if draw(st.booleans()):
        options["increase"] = draw(st.sampled_from([1e-3, 1.0, 1e6])) * max(1.0, abs(least) * 1e-6)
    else:
        options["threshold"] = least + draw(st.sampled_from([0.0, 1e-200, 0.5, 1e3, 1e300]))
    return options


@given(options=calls())
@settings(max_examples=50)
def test_what_is_valid_gives_a_number(options: dict[str, Any]) -> None:
    result = fastvol.estimate(**options)
    assert isinstance(result, fastvol.VolumeEstimate)
    assert not math.isnan(result.log_volume)
    assert not math.isnan(result.log_volume_metric)
    assert not np.isnan(result.log_radii).any()
    assert not math.isnan(result.stderr)
    assert result.stderr >= 0
    low, high = result.ci()
    assert low <= result.log_volume <= high
    assert result.lower_bound() <= result.log_volume
    assert result.reliable_radius >= 0
    assert not np.isnan(result.profile().log_fraction).any()
    assert result.summary()
    assert repr(result)
    json.dumps([result.config, result.plan, result.provenance])


# Results


@pytest.fixture(scope="module")
def result() -> fastvol.VolumeEstimate:
    return estimate(n=8, threshold=1.0)


@pytest.mark.parametrize("level", [0, 1, 0.0, 1.0, -0.5, 1.5, 95, NAN, INF, True, None, "0.9", 1j])
def test_levels(result: fastvol.VolumeEstimate, level: Any) -> None:
    refused("level", result.ci, level)
    refused("level", result.lower_bound, level)
    refused("level", result.profile, level=level)


@pytest.mark.parametrize("radii", [0.0, -1.0, NAN, [1.0, NAN], [], [[1.0]], [None], [1.0, -1.0]])
@pytest.mark.parametrize("measure", [fastvol.Lebesgue(), fastvol.Gaussian(1.0)])
def test_radii(radii: Any, measure: Any) -> None:
    refused("radii", estimate(threshold=1.0, measure=measure).profile, radii)


@pytest.mark.parametrize("radii", ["wide", object(), 1j, INF])
def test_radii_that_are_no_numbers(radii: Any) -> None:
    refused("radii", estimate(threshold=1.0, measure=fastvol.Gaussian(1.0)).profile, radii)


def test_radii_beyond_the_cap() -> None:
    capped = estimate(threshold=1.0, measure=fastvol.Lebesgue(0.5))
    refused("radii", capped.profile, [0.1, 0.6])


@given(junk=JUNK)
@settings(max_examples=60)
def test_comparing_with_junk(result: fastvol.VolumeEstimate, junk: Any) -> None:
    refused("b ", fastvol.compare, result, junk)
    refused("a ", fastvol.compare, junk, result)
    refused("other", result.combine, junk)


def test_comparing_unlike_results(result: fastvol.VolumeEstimate) -> None:
    refused("dim", fastvol.compare, result, estimate(zeros((3,))))
    refused("measure", fastvol.compare, result, estimate(measure=fastvol.Gaussian(1.0)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "seed"),
        ({"seed": 1, "threshold": 2.0}, "threshold"),
        ({"seed": 1, "metric": 2.0}, "metric"),
        ({"seed": 1, "measure": fastvol.Lebesgue(3.0)}, "measure"),
        ({"seed": 1, "antithetic": True}, "antithetic"),
        ({"seed": 1, "model": zeros((3,))}, "layout"),
    ],
)
def test_combining_unlike_results(
    result: fastvol.VolumeEstimate, change: dict[str, Any], words: str
) -> None:
    other = estimate(**{"n": 4, "threshold": 1.0, **change})
    caught = refused("other", result.combine, other)
    assert words in str(caught.value)


@pytest.mark.parametrize("path", [None, 3, object(), 1j, [], b"file", ""])
def test_paths_that_are_none(path: Any) -> None:
    with pytest.raises((*REFUSALS, FileNotFoundError)):
        fastvol.load(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    for missing in (tmp_path / "missing", tmp_path, str(tmp_path / "a" / "b")):
        with pytest.raises(FileNotFoundError, match="path"):
            fastvol.load(missing)


def header_of(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return json.loads(file.metadata()["fastvol"])


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"PK\x03\x04", b"{}", b"text\n"])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    caught = refused("path", fastvol.load, path)
    assert isinstance(caught.value, fastvol.FastvolError)


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    for metadata in (None, {}, {"format": "pt"}, {"fastvol": ""}, {"fastvol": "[1]"},
                     {"fastvol": "{}"}, {"fastvol": "3"}, {"fastvol": "null"}):  # fmt: skip
        save_file({"x": np.zeros(2)}, path, metadata=metadata)
        caught = refused("path", fastvol.load, path)
        assert isinstance(caught.value, fastvol.FastvolError)


def test_truncated_files(result: fastvol.VolumeEstimate, tmp_path: Path) -> None:
    path = result.save(tmp_path / "whole")
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        caught = refused("path", fastvol.load, path)
        assert isinstance(caught.value, fastvol.FastvolError)
    path.write_bytes(whole)
    assert fastvol.load(path).log_volume == result.log_volume


def rewrite(
    path: Path, header: dict[str, Any] | None = None, arrays: dict[str, Any] | None = None
) -> None:
    """The file at ``path`` with another header, or other arrays."""
    kept = header_of(path)
    save_file(
        load_file(path) if arrays is None else arrays,
        path,
        metadata={"fastvol": json.dumps(kept if header is None else header)},
    )


def test_damaged_headers(result: fastvol.VolumeEstimate, tmp_path: Path) -> None:
    path = result.save(tmp_path / "damaged")
    header = header_of(path)
    damages: list[dict[str, Any]] = [
        {k: v for k, v in header.items() if k != key} for key in header
    ]
    damages += [{**header, "format_version": version} for version in (0, 1, "2", None)]
    damages += [{**header, "measure": measure} for measure in ({}, {"kind": "counting"}, 3, None)]
    damages += [{**header, "dim": dim} for dim in ("many", 0, -1, None)]
    damages += [{**header, "config": config} for config in ({}, None, [])]
    damages += [{**header, "seeds": seeds} for seeds in (3, None)]
    for damaged in damages:
        rewrite(path, header=damaged)
        caught = refused("path", fastvol.load, path)
        assert isinstance(caught.value, fastvol.FastvolError)


def test_damaged_arrays(result: fastvol.VolumeEstimate, tmp_path: Path) -> None:
    path = result.save(tmp_path / "damaged")
    arrays = load_file(path)
    damages = [{k: v for k, v in arrays.items() if k != key} for key in arrays]
    damages += [{**arrays, key: arrays[key][:-1]} for key in arrays]
    damages += [{**arrays, key: arrays[key][:, None]} for key in arrays]
    damages += [
        {**arrays, "log_radii": np.full(8, NAN)},
        {**arrays, "status": np.full(8, 9, dtype=np.uint8)},
        {key: value[:0] for key, value in arrays.items()},
    ]
    for damaged in damages:
        rewrite(path, arrays=damaged)
        caught = refused("path", fastvol.load, path)
        assert isinstance(caught.value, fastvol.FastvolError)


def test_saving_where_there_is_no_folder(result: fastvol.VolumeEstimate, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        result.save(tmp_path / "no" / "such" / "folder" / "result")
    with pytest.raises((IsADirectoryError, PermissionError, *REFUSALS)):
        result.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_frozen(result: fastvol.VolumeEstimate) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.log_volume = 0.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        result.log_radii[0] = 0.0
