"""Engines side by side: the same losses, whichever of them has a ray."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastvol
from fastvol import _backend
from fastvol._layout import ParameterLayout
from fastvol._objective import PREFIX, Objective
from fastvol._scale import Scale
from fastvol.engines import Dense, Engine, Indexed, Plan, open_engine, planning
from fastvol.engines.parallel import ParallelEngine

PLAN = Plan(
    engine="layered",
    chunk=2,
    lanes=7,
    keep_rows=True,
    dtype="float64",
    threads=1,
    noise_threads=1,
    backend="cpp",
    cached=True,
    screening="off",
)


@pytest.fixture
def net() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    model = nn.Sequential(nn.Linear(13, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, (torch.randn(11, 13, dtype=torch.float64), torch.arange(11) % 3)


def opened(net: Any, workers: int, **options: Any) -> Engine:
    model, data = net
    layout = ParameterLayout(model)
    objective = Objective(model, F.cross_entropy, data, torch.device("cpu"))
    objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
    plan = replace(PLAN, workers=workers)
    return open_engine(
        objective, layout, Scale.uniform(layout), plan, _backend.select("auto"), **options
    )


def rays(kind: str, count: int, dim: int) -> Any:
    ids = np.arange(count) + 3
    if kind == "dense":
        return Dense(torch.randn(count, dim, dtype=torch.float64))
    return Indexed(5, ids, antithetic=kind == "antithetic")


@pytest.mark.parametrize("workers", [2, 3, 9])
@pytest.mark.parametrize("kind", ["plain", "antithetic", "dense", "rowspace"])
def test_losses_and_gradients(net: Any, workers: int, kind: str) -> None:
    options = {"rowspace": kind == "rowspace"}
    alone, several = opened(net, 1, **options), opened(net, workers, **options)
    assert isinstance(several, ParallelEngine)
    assert several.lanes == 7
    dim = 13 * 6 + 6 + 21
    given = rays(kind, 7, dim)
    # In an order of their own.
    lanes = np.array([6, 0, 3, 2, 5, 1, 4])
    for engine in (alone, several):
        engine.load(np.arange(7), rays("plain", 7, dim))
    told, wanted = several.load(lanes, given), alone.load(lanes, given)
    np.testing.assert_allclose(told.norm, wanted.norm, rtol=1e-14)
    np.testing.assert_array_equal(told.dot, wanted.dot)
    some = np.array([1, 6, 4])
    for which in (None, some):
        radii = np.linspace(0.1, 3.0, 7 if which is None else 3)
        np.testing.assert_allclose(
            several.loss(radii, which).values, alone.loss(radii, which).values, rtol=1e-12
        )
        if kind == "rowspace":
            continue
        losses, gradients = several.loss_and_grad(radii, which)
        true_losses, true_gradients = alone.loss_and_grad(radii, which)
        np.testing.assert_allclose(losses, true_losses, rtol=1e-12)
        torch.testing.assert_close(gradients, true_gradients, rtol=1e-10, atol=1e-12)


def test_what_lies_far_outside_is_flagged(net: Any) -> None:
    several = opened(net, 3)
    several.load(np.arange(7), rays("plain", 7, 105))
    radii = np.array([1e3, 1e-3, 1e3, 1e-3, 1e-3, 1e-3, 1e3])
    found = several.loss(radii, limit=several.loss(np.full(7, 1e-3)).values.max() + 0.1)
    assert found.outside is not None
    assert found.outside.tolist() == (radii > 1).tolist()


def test_an_error_in_one_thread_is_told(net: Any) -> None:
    several = opened(net, 3)
    with pytest.raises(ValueError, match="directions must have shape"):
        several.load(np.arange(7), Dense(torch.zeros(7, 3, dtype=torch.float64)))
    # All of them go on.
    several.load(np.arange(7), rays("plain", 7, 105))
    assert np.isfinite(several.loss(np.ones(7)).values).all()


def measured(net: Any, workers: int, **options: Any) -> Any:
    model, data = net
    plan = replace(PLAN, workers=workers).describe()
    settings = {"data": data, "plan": plan, "progress": False, "method": "radial", **options}
    return fastvol.estimate(model, F.cross_entropy, 100, **settings)


def test_an_estimate_is_the_same_and_repeats_bitwise(net: Any) -> None:
    threads = torch.get_num_threads()
    several, alone = measured(net, 2), measured(net, 1)
    assert torch.get_num_threads() == threads
    np.testing.assert_allclose(several.log_radii, alone.log_radii, atol=1e-9)
    assert np.array_equal(several.status, alone.status)
    again = measured(net, 2, plan=several.plan)
    assert np.array_equal(again.log_radii, several.log_radii)


def test_a_plan_without_sense_is_refused(net: Any) -> None:
    with pytest.raises(ValueError, match=r"plan\['workers'\]"):
        measured(net, 0)


@pytest.mark.parametrize("pays", [True, False])
def test_they_are_taken_where_that_is_measured_to_pay(
    net: Any, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = planning._Trial.seconds

    def timed(self: Any, engine: Engine) -> float:
        several = isinstance(engine, ParallelEngine)
        return seconds(self, engine) * (1e-3 if several is pays else 1.0)

    monkeypatch.setattr(planning._Trial, "seconds", timed)
    monkeypatch.setattr(planning, "_LEAST", 30.0)
    model, data = net
    torch.set_num_threads(2)
    try:
        result = fastvol.estimate(
            model, F.cross_entropy, 64, data=data, engine="layered", method="radial", progress=False
        )
    finally:
        torch.set_num_threads(1)
    assert result.plan["workers"] == (2 if pays else 1)
    assert result.plan["threads"] == 1 or not pays
