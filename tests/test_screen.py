"""A screen chooses where a search begins; what it finds is settled on all data."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastvol
from fastvol._objective import Objective
from fastvol.methods import _screen

SCREENS = [("subset", 20), ("bfloat16", 0), ("subset in bfloat16", 33)]


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(257, 7)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x, y)


def measured(net: Any, plan: dict[str, Any] | None = None, **options: Any) -> Any:
    model, data = net
    return fastvol.estimate(
        model,
        F.cross_entropy,
        64,
        **{"data": data, "method": "radial", "progress": False, "plan": plan, **options},
    )


@pytest.mark.parametrize("engine", ["general", "layered"])
@pytest.mark.parametrize(("screening", "examples"), SCREENS)
@pytest.mark.parametrize("options", [{}, {"method": "preconditioned", "preconditioner": "ggn"}])
def test_radii_do_not_change(
    net: Any, engine: str, screening: str, examples: int, options: dict[str, Any]
) -> None:
    without = measured(net, engine=engine, **options)
    assert without.plan["screening"] == "off"
    change = {"screening": screening, "screen_examples": examples, "screen_offset": 0.01}
    screened = measured(net, {**without.plan, **change}, **options)
    rtol = screened.config["pilot"]["rtol"]
    assert np.array_equal(screened.status, without.status)
    assert np.abs(screened.log_radii - without.log_radii).max() <= 2 * rtol
    # The search did begin elsewhere.
    assert not np.array_equal(screened.log_radii, without.log_radii)
    # The whole searches, and some of the screen's.
    assert screened.n_loss > 0.8 * without.n_loss
    again = measured(net, screened.plan, **options)
    assert np.array_equal(again.log_radii, screened.log_radii)
    assert again.n_loss == screened.n_loss


def test_a_part_of_several_batches_is_spread_over_them() -> None:
    x, y = torch.arange(24.0).reshape(12, 2), torch.arange(12)
    model = nn.Linear(2, 1)
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    objective = Objective(model, F.mse_loss, batches, torch.device("cpu"))
    thinned = objective.thinned(4)
    assert thinned is not None
    assert [batch.target.tolist() for batch in thinned.batches()] == [[0, 3, 6], [7, 10]]
    assert [batch.weight for batch in thinned.batches()] == [3.0, 2.0]
    assert thinned.examples == 5
    assert objective.examples == 12
    assert objective.thinned(7) is None


def test_ignored_targets_do_not_count_in_a_part() -> None:
    target = torch.tensor([-100, 1, 0, 1, -100, 1, 1, 0])
    objective = Objective(
        nn.Linear(2, 2), F.cross_entropy, (torch.zeros(8, 2), target), torch.device("cpu")
    )
    thinned = objective.thinned(2)
    assert thinned is None
    thinned = objective.thinned(4)
    assert thinned is not None
    assert [batch.weight for batch in thinned.batches()] == [2.0]


def test_data_that_are_not_made_of_rows_have_no_part() -> None:
    model = nn.Linear(2, 2)
    device = torch.device("cpu")
    shapeless = ((torch.zeros(8, 2),), torch.tensor(1))
    assert Objective(model, F.mse_loss, shapeless, device).thinned(2) is None
    uneven = Objective(model, lambda output, target: output.sum(), None, device)
    assert uneven.thinned(2) is None


def test_a_plan_whose_screen_these_data_do_not_have(net: Any) -> None:
    model, (x, y) = net
    plan = {**measured(net).plan, "screening": "subset", "screen_examples": 20}
    loader = DataLoader(TensorDataset(x, y), batch_size=100)
    with pytest.raises(ValueError, match="plan: a screen of 20 examples"):
        measured((model, loader), plan)


@pytest.mark.parametrize(
    ("field", "value"),
    [("screening", "guess"), ("screen_examples", -1), ("screen_offset", float("nan"))],
)
def test_a_plan_with_a_bad_screen(net: Any, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"plan\['{field}'\]"):
        measured(net, {**measured(net).plan, field: value})


def choice(net: Any, monkeypatch: pytest.MonkeyPatch, **slow: float) -> dict[str, Any]:
    """What is chosen where a search without a start, or a screen, takes so much longer."""
    settle = _screen.settle
    inside = {"screen": False}

    def slowed(problem: Any, loss: Any, pilot: Any, threshold: Any, ids: Any, start: Any = None):
        if inside["screen"]:
            time.sleep(slow.get("screen", 0.0))
        elif start is None:
            time.sleep(slow.get("search", 0.0))
        return settle(problem, loss, pilot, threshold, ids, start)

    starts = _screen.Screen.starts

    def marked(self: Any, ids: Any) -> Any:
        inside["screen"] = True
        try:
            return starts(self, ids)
        finally:
            inside["screen"] = False

    monkeypatch.setattr(_screen, "settle", slowed)
    monkeypatch.setattr(_screen.Screen, "starts", marked)
    for name, value in {"_DEAR": 0.0, "_SHARE": 1e3, "_SHORT_RUN": 0.0}.items():
        monkeypatch.setattr(_screen, name, value)
    plan: dict[str, Any] = measured(net).plan
    return plan


def test_a_screen_is_taken_where_it_is_measured_to_be_faster(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = choice(net, monkeypatch, search=0.2)
    assert plan["screening"] != "off"
    assert abs(plan["screen_offset"]) < 0.5


def test_none_is_taken_where_it_is_measured_to_be_slower(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choice(net, monkeypatch, screen=0.2)["screening"] == "off"
