"""Losses over batches that are read again and again: weights, changes, and leaving off early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import fastvol
from fastvol import _backend
from fastvol._layout import ParameterLayout
from fastvol._objective import PREFIX, Objective
from fastvol._scale import Scale
from fastvol.engines import Engine, GeneralEngine, Indexed, InPlaceEngine, Plan

Batches = list[tuple[Any, Any]]


class Stream:
    """Batches that are read anew, and counted."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = list(batches)
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.read += 1
            yield batch


class Token(nn.Module):
    """Logits ``[n, classes, tokens]`` of tokens ``[n, tokens]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.readout = nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.embedding(tokens)).transpose(1, 2)


def engine_on(
    model: nn.Module, loss_fn: Any, data: Any, kind: str, lanes: int = 6
) -> tuple[Engine, Objective]:
    layout = ParameterLayout(model)
    objective = Objective(model, loss_fn, data, layout.device)
    objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
    name, _, chunk = kind.partition(" ")
    dtype = str(layout.dtype).removeprefix("torch.")
    plan = Plan(name, int(chunk or 1), lanes, True, dtype, 1, 1, "cpp")
    backend = _backend.select("cpp")
    scale = Scale.uniform(layout)
    engine: Engine
    if name == "inplace":
        engine = InPlaceEngine(objective, layout, scale, plan, backend)
    else:
        engine = GeneralEngine(objective, layout, scale.flat, plan, backend)
    ids = np.arange(lanes)
    engine.load(ids, Indexed(3, ids))
    return engine, objective


KINDS = pytest.mark.parametrize("kind", ["general 1", "general 4", "inplace"])


def classifier() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(23, 3, dtype=torch.float64)
    return model, x, model(x).argmax(dim=-1)


@KINDS
def test_uneven_batches_are_weighted_by_examples(kind: str) -> None:
    model, x, y = classifier()
    radii = np.linspace(0.1, 3.0, 6)
    whole, one = engine_on(model, F.cross_entropy, (x, y), kind)
    for data in (
        DataLoader(TensorDataset(x, y), batch_size=5),
        Stream(zip(x.split([1, 9, 13]), y.split([1, 9, 13]), strict=True)),
        list(zip(x.split([20, 3]), y.split([20, 3]), strict=True)),
    ):
        engine, parts = engine_on(model, F.cross_entropy, data, kind)
        assert parts.weight == one.weight == 23
        assert parts.loss0 == pytest.approx(one.loss0, rel=1e-13)
        np.testing.assert_allclose(engine.loss(radii).values, whole.loss(radii).values, rtol=1e-12)
        losses, slopes = engine.loss_and_grad(radii)
        np.testing.assert_allclose(losses, whole.loss(radii).values, rtol=1e-12)
        torch.testing.assert_close(slopes, whole.loss_and_grad(radii)[1])


@KINDS
def test_tokens_that_are_ignored_do_not_count(kind: str) -> None:
    """The mean over all tokens that count, however they fall into batches."""
    model = Token().double()
    tokens, labels = torch.randint(7, (2, 9, 6))
    labels[torch.rand(9, 6) < 0.5] = -100
    labels[0] = -100
    whole, one = engine_on(model, F.cross_entropy, (tokens, labels), kind)
    # The first batch has no token that counts at all.
    data = Stream(zip(tokens.split([1, 3, 5]), labels.split([1, 3, 5]), strict=True))
    engine, parts = engine_on(model, F.cross_entropy, data, kind)
    assert parts.weight == one.weight == int((labels != -100).sum())
    radii = np.linspace(0.1, 3.0, 6)
    np.testing.assert_allclose(engine.loss(radii).values, whole.loss(radii).values, rtol=1e-12)


def test_sums_are_in_float64() -> None:
    """2,000 batches whose losses in float32 would each lose the last digits of the sum."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    batches = Stream([(torch.full((1, 1), 1.0 + 2.0**-12), torch.zeros(1, 1))] * 2_000)
    objective = Objective(model, F.mse_loss, batches, torch.device("cpu"))
    value = objective.prepare(None)
    exact = float(torch.tensor(1.0 + 2.0**-12).square())
    assert value == pytest.approx(exact, rel=1e-13)


# Data that change


class Changing:
    """The batches in another form from pass number ``since`` on."""

    def __init__(self, batches: Batches, since: int, change: Callable[[Batches], Batches]) -> None:
        self.batches, self.since, self.change = batches, since, change
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(self.change(self.batches) if self.passes >= self.since else self.batches)


def other_value(batches: Batches) -> Batches:
    x, y = batches[2]
    return [*batches[:2], (x + 1e-6, y), *batches[3:]]


def other_target(batches: Batches) -> Batches:
    x, y = batches[1]
    return [batches[0], (x, (y + 1) % 4), *batches[2:]]


CHANGES: dict[str, Callable[[Batches], Batches]] = {
    "order": lambda b: [b[1], b[0], *b[2:]],
    "value": other_value,
    "target": other_target,
    "fewer": lambda b: b[:-1],
    "more": lambda b: [*b, b[0]],
    "none": lambda b: [],
    "smaller": lambda b: [(b[0][0][:-1], b[0][1][:-1]), *b[1:]],
}


@pytest.mark.parametrize("engine", ["general", "inplace"])
@pytest.mark.parametrize("since", [2, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_data_that_change(change: str, since: int, engine: str) -> None:
    model, x, y = classifier()
    before = [p.detach().clone() for p in model.parameters()]
    batches = list(zip(x.split(6), y.split(6), strict=True))
    data = Changing(batches, since, CHANGES[change])
    with pytest.raises(ValueError, match="data gave other batches, or another order") as caught:
        # A loss that may be negative is summed to the end, so that every pass is a whole one.
        fastvol.estimate(model, lambda o, t: F.cross_entropy(o, t), 8, data=data, engine=engine)
    assert data.passes == since
    if change == "fewer":
        assert "3 batches came instead of 4" in str(caught.value)
    elif change not in ("more", "none"):
        number = {"order": 0, "value": 2, "target": 1, "smaller": 0}[change]
        assert f"batch {number} is not what it was" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_sampler_that_shuffles_by_itself() -> None:
    model, x, y = classifier()
    dataset = TensorDataset(x, y)
    shuffled = DataLoader(dataset, batch_size=6, shuffle=True)
    with pytest.raises(ValueError, match="data is a DataLoader that shuffles"):
        fastvol.estimate(model, F.cross_entropy, 8, data=shuffled)

    class Hidden(RandomSampler):
        """As a caller's own class of sampler would be."""

    hidden = DataLoader(dataset, batch_sampler=torch.utils.data.BatchSampler(
        Hidden(dataset), batch_size=6, drop_last=False
    ))  # fmt: skip
    with pytest.raises(ValueError, match="data gave other batches, or another order"):
        fastvol.estimate(model, F.cross_entropy, 8, data=hidden)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, float("nan"), 2.0]),
        torch.randn(3, 4, dtype=torch.complex64),
        torch.randn(5, dtype=torch.bfloat16),
        torch.randn(4, 6).t(),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.empty(0, 3),
    ],
    ids=["nan", "complex", "bfloat16", "transposed", "scalar", "bool", "empty"],
)
def test_batches_of_any_dtype_are_told_apart(value: Tensor) -> None:
    """What stays the same is, bit for bit; NaN equals itself."""
    from fastvol._objective import _digest

    assert _digest(value) == _digest(value.clone())
    if value.numel():
        other = value.clone()
        other[(0,) * value.dim()] = ~other[0] if value.dtype == torch.bool else 7
        assert _digest(other) != _digest(value)
    assert _digest({"x": value, "n": 1}) != _digest({"x": value, "n": 2})
    large = torch.zeros(1000, 784)
    assert _digest(large) != _digest(large + 1e-7)


# Early rejection


@KINDS
@pytest.mark.parametrize("held", [True, False])
def test_reading_stops_where_all_rays_are_outside(kind: str, held: bool) -> None:
    model, x, y = classifier()
    batches = list(zip(x.split(2), y.split(2), strict=True))
    calls = [0]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        return F.cross_entropy(output, target)

    loss_fn.nonnegative = True  # type: ignore[attr-defined]
    data: Any = batches if held else Stream(batches)
    engine, objective = engine_on(model, loss_fn, data, kind)
    radii = np.array([0.01, 0.02, 0.01, 0.02, 40.0, 90.0])
    full = engine.loss(radii)
    assert full.outside is None
    limit = 3.0
    cut = engine.loss(radii, limit=limit)
    far = full.values > 2 * limit
    assert far.any()
    assert (~far).any()
    np.testing.assert_array_equal(cut.values[~far], full.values[~far])
    if kind != "general 4" or not held:
        # Under vmap a chunk in memory is left only where all its rays are outside.
        assert cut.outside is not None
        np.testing.assert_array_equal(cut.outside, far)
    lanes = np.flatnonzero(far)
    before = (calls[0], getattr(data, "read", 0))
    cut = engine.loss(radii[lanes], lanes, limit=limit)
    assert cut.outside is not None
    assert cut.outside.all()
    assert (cut.values > limit).all()
    assert (cut.values <= full.values[lanes] * (1 + 1e-12)).all()
    assert calls[0] - before[0] < len(batches) * len(lanes)
    if not held:
        assert data.read - before[1] < len(batches)
    assert objective.weight == 23


@KINDS
def test_losses_of_either_sign_are_summed_to_the_end(kind: str) -> None:
    """Also where a loss says that it cannot be negative, and is."""
    model, x, y = classifier()
    data = list(zip(x.split(4), y.split(4), strict=True))

    def shifted(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) - 5.0

    for claims in (False, True):
        if claims:
            shifted.nonnegative = True  # type: ignore[attr-defined]
        engine, _ = engine_on(model, shifted, data, kind)
        radii = np.linspace(1.0, 90.0, 6)
        full, cut = engine.loss(radii), engine.loss(radii, limit=0.1)
        assert cut.outside is None
        np.testing.assert_array_equal(full.values, cut.values)


def test_a_nan_does_not_end_a_sum() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.ones(4, 1, dtype=torch.float64)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return torch.where(target > 0, output.square().mean() * float("nan"), 1e9).mean()

    loss_fn.nonnegative = True  # type: ignore[attr-defined]
    layout = ParameterLayout(model)
    batches = [(x, torch.full((4,), sign)) for sign in (1.0, -1.0)]
    objective = Objective(model, loss_fn, batches, layout.device)
    running = objective.running(1, 5.0)
    running.add(np.array([0]), 4.0, np.array([float("nan")]))
    assert not running.settled(np.array([0]))
    running.add(np.array([0]), 4.0, np.array([1e9]))
    assert np.isnan(running.values[0])
    assert running.outside is None


@pytest.mark.parametrize("engine", ["general", "inplace"])
def test_radii_do_not_depend_on_it(engine: str) -> None:
    """The threshold's side is the same, and a far loss is not interpolated."""
    model, x, y = classifier()
    batches = list(zip(x.split(6), y.split(6), strict=True))
    options: dict[str, Any] = {"threshold": 0.2 + float(F.cross_entropy(model(x), y).detach())}
    results, read = [], []
    for loss_fn in (F.cross_entropy, lambda o, t: F.cross_entropy(o, t)):
        data = Stream(batches)
        results.append(
            fastvol.estimate(
                model, loss_fn, 6, data=data, method="radial", rtol=1e-4, engine=engine, lanes=1,
                first_crossing=True, **options,
            )
        )  # fmt: skip
        read.append(data.read / results[-1].n_loss)
    np.testing.assert_allclose(results[0].log_radii, results[1].log_radii, rtol=0, atol=3e-4)
    assert read[0] <= read[1]


def test_a_loader_in_other_processes() -> None:
    model, x, y = classifier()
    loader = DataLoader(TensorDataset(x, y), batch_size=8, num_workers=0)
    own = fastvol.estimate(model, F.cross_entropy, 4, data=loader, rtol=0.1, engine="general")
    held = fastvol.estimate(model, F.cross_entropy, 4, data=(x, y), rtol=0.1, engine="general")
    np.testing.assert_allclose(own.log_radii, held.log_radii, rtol=0, atol=0.2)
