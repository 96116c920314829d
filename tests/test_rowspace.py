"""Row-space noise: other directions, the same law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvol
from fastvol import _backend
from fastvol._layout import ParameterLayout
from fastvol._objective import PREFIX, Objective
from fastvol.engines import Dense, Indexed, Plan
from fastvol.engines.layered import LayeredEngine

IDS = np.arange(4096)


def engine_for(
    model: nn.Module, loss_fn: Any, data: Any, scale: Tensor | None = None
) -> LayeredEngine:
    layout = ParameterLayout(model, None)
    objective = Objective(model, loss_fn, data, layout.device)
    objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
    dtype = str(layout.dtype).removeprefix("torch.")
    plan = Plan("layered", 8, len(IDS), True, dtype, 1, 1, "cpp", cached=True)
    scale = torch.ones(layout.size, dtype=torch.float64) if scale is None else scale
    return LayeredEngine(objective, layout, scale, plan, _backend.select("cpp"), rowspace=True)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def few_examples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(4, 12).double(), torch.randint(3, (4,))


def test_lengths_and_outputs_have_their_law() -> None:
    """A linear layer of inputs of rank 2: its change is normal with covariance X Xᵀ."""
    torch.manual_seed(3)
    x = torch.randn(3, 2).double() @ torch.randn(2, 9).double()
    model = nn.Linear(9, 2, bias=False).double()
    wanted = model(x).detach()
    engine = engine_for(model, lambda out, t: (out - t).square().mean(), (x, wanted))
    norm, _ = engine.load(IDS, Indexed(7, IDS))
    assert engine.dim == 18
    kolmogorov = scipy.stats.kstest(norm**2, "chi2", args=(18,))
    assert kolmogorov.pvalue > 1e-3
    # The loss at radius ‖z‖ is |X Zᵀ|² / 6, a weighted sum of chi-squares.
    losses = engine.loss(norm).values
    eigenvalues = torch.linalg.eigvalsh(x @ x.mT).numpy()
    expected = 2 * eigenvalues.sum() / 6
    deviation = np.sqrt(2 * 2 * (eigenvalues**2).sum()) / 6
    z = (losses.mean() - expected) / (deviation / np.sqrt(len(IDS)))
    assert abs(z) < 4
    ratio = losses.std() / deviation
    assert 0.9 < ratio < 1.1
    # Length and losses share the part that is seen, and no more.
    seen = 2 * 2
    correlation = np.corrcoef(norm**2, losses)[0, 1]
    share = np.sqrt(seen / 18) * eigenvalues.sum() / np.sqrt(2 * (eigenvalues**2).sum())
    assert abs(correlation - share) < 0.06


@pytest.mark.parametrize("metric", ["euclidean", "filter"])
@pytest.mark.parametrize("measure", [fastvol.Lebesgue(50.0), fastvol.Gaussian(0.3)])
def test_the_estimate_is_the_same(metric: Any, measure: Any) -> None:
    if metric == "filter" and isinstance(measure, fastvol.Gaussian):
        pytest.skip("a Gaussian measure has scales of its own")
    call: dict[str, Any] = {
        "data": few_examples(), "increase": 0.2, "metric": metric, "measure": measure,
        "method": "radial", "progress": False, "rtol": 1e-3,
    }  # fmt: skip
    full = fastvol.estimate(network(), F.cross_entropy, 8000, seed=1, **call)
    small = fastvol.estimate(network(), F.cross_entropy, 8000, seed=2, noise="rowspace", **call)
    assert small.config["noise"] == "rowspace"
    assert small.dim == full.dim == 83
    test = scipy.stats.ks_2samp(full.log_radii, small.log_radii)
    assert test.pvalue > 1e-3
    at = np.exp(np.median(full.log_radii)) * np.array([0.8, 1.0, 1.2])
    if isinstance(measure, fastvol.Lebesgue):
        one, other = full.profile(at), small.profile(at)
        z = (one.log_fraction - other.log_fraction) / np.hypot(one.stderr, other.stderr)
        assert np.abs(z).max() < 4
    else:
        z = (full.log_volume - small.log_volume) / np.hypot(full.stderr, small.stderr)
        assert abs(z) < 4


def test_antithetic_pairs_have_one_length() -> None:
    engine = engine_for(network(), F.cross_entropy, few_examples())
    ids = np.arange(64)
    norm, _ = engine.load(ids, Indexed(7, ids, antithetic=True))
    np.testing.assert_allclose(norm[::2], norm[1::2], rtol=1e-12)
    alone, _ = engine.load(np.array([0, 1]), Indexed(7, np.array([5, 9]), antithetic=True))
    np.testing.assert_allclose(alone, norm[[5, 9]], rtol=1e-12)


def test_other_directions_are_not_mixed_with_full_ones() -> None:
    call: dict[str, Any] = {
        "n": 64, "data": few_examples(), "increase": 0.2, "method": "radial", "progress": False
    }  # fmt: skip
    full = fastvol.estimate(network(), F.cross_entropy, **call)
    small = fastvol.estimate(network(), F.cross_entropy, noise="rowspace", **call)
    assert not np.allclose(full.log_radii, small.log_radii)
    with pytest.raises(ValueError, match="noise"):
        full.combine(small)
    assert fastvol.compare(full, full).paired
    assert not fastvol.compare(full, small).paired


@pytest.mark.parametrize(
    "change",
    [
        {"method": "annealed"},
        {"engine": "general"},
        {"measure": fastvol.Gaussian(0.3, center="origin")},
        {"metric": torch.linspace(1.0, 2.0, 83)},
        {"data": (torch.randn(40, 12).double(), torch.randint(3, (40,)))},
        {"noise": "half"},
    ],
)
def test_bad_input(change: dict[str, Any]) -> None:
    call = {"data": few_examples(), "increase": 0.2, "noise": "rowspace", "progress": False}
    with pytest.raises(ValueError, match="noise"):
        fastvol.estimate(network(), F.cross_entropy, 16, **{**call, **change})


def test_dense_rays_and_gradients_are_refused() -> None:
    engine = engine_for(network(), F.cross_entropy, few_examples())
    assert not engine.capabilities.gradients
    with pytest.raises(ValueError, match="noise"):
        engine.load(np.array([0]), Dense(torch.zeros(1, 83).double()))
    with pytest.raises(ValueError, match="noise"):
        engine.loss_and_grad(np.array([1.0]), np.array([0]))
