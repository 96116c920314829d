"""The mass of all solutions under a normal law, against closed forms and plain draws."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import fastvol
from fastvol._prior import prior_mass
from fastvol._prior_ladder import Reservoir, next_rung
from fastvol._prior_result import PriorMass, family_variance

N = 16e3


class Weights(nn.Module):
    def __init__(self, d: int, value: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((d,), value))


def squares(model: nn.Module) -> Tensor:
    return model.w.square().sum()  # type: ignore[operator,union-attr]


def first(model: nn.Module) -> Tensor:
    return model.w[0].abs()  # type: ignore[index,union-attr]


def chi_square_threshold(d: int, log_mass: float) -> float:
    low, high = 1e-300, float(d)
    for _ in range(400):
        middle = math.sqrt(low * high)
        low, high = (
            (middle, high) if scipy.stats.chi2.logcdf(middle, d) < log_mass else (low, middle)
        )
    return low


def judge(run: Callable[..., PriorMass], exact: float, seeds: int) -> None:
    """All runs count, and they must be honest together: Σ z² is nearly chi-square."""
    results = [run(seed=0)]
    # To time the loss anew for every seed would take longer than the runs.
    results += [run(seed=seed, plan=results[0].plan) for seed in range(1, seeds)]
    z = np.array([(r.log_mass - exact) / r.stderr for r in results])
    assert np.square(z).sum() < scipy.stats.chi2.ppf(0.9999, seeds), z
    assert abs(z.mean()) * math.sqrt(seeds) < 4.0, z
    # An error that says nothing would pass the rest.
    assert np.mean([r.stderr for r in results]) < 0.6
    assert all(r.log_mass < 0 for r in results)


def test_plain_draws() -> None:
    threshold = chi_square_threshold(20, -3.0)

    def run(**options: Any) -> PriorMass:
        result = prior_mass(Weights(20), squares, N, threshold=threshold, std=1.0, **options)
        assert result.reliable
        assert len(result.rungs) == 0
        draws = sum(run[0].losses.size for run in result._runs)
        p = math.exp(result.log_mass)
        assert result.stderr == pytest.approx(math.sqrt((1 - p) / (p * draws)))
        return result

    judge(run, -3.0, 10)


@pytest.mark.parametrize(("d", "log_mass", "n"), [(1, -9.0, N), (20, -12.0, N), (200, -8.0, N)])
def test_ball(d: int, log_mass: float, n: float) -> None:
    threshold = chi_square_threshold(d, log_mass)
    judge(
        lambda **options: prior_mass(
            Weights(d, 0.3), squares, n, threshold=threshold, std=1.0, **options
        ),
        float(scipy.stats.chi2.logcdf(threshold, d)),
        3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("d", [20, 200])
def test_far_down(d: int) -> None:
    threshold = chi_square_threshold(d, -200.0)
    result = prior_mass(Weights(d), squares, 1e6, threshold=threshold, std=1.0)
    assert abs(result.log_mass + 200.0) < 4.0 * result.stderr
    assert result.stderr < 2.0
    profile = result.profile()
    exact = scipy.stats.chi2.logcdf(profile.thresholds, d)
    assert (np.abs(profile.log_mass - exact) < 4.5 * profile.stderr).all()


def test_one_coordinate_and_a_std_for_each() -> None:
    """P(|w₀| ≤ τ) with std 1e-2 and a mean; float32, far from the model's own parameters."""
    std = torch.tensor([1e-2, 1.0, 5.0, 1e3])
    mean = torch.tensor([0.02, 7.0, 0.0, -1e3])
    exact = math.log(scipy.stats.norm.cdf(-1.999) - scipy.stats.norm.cdf(-2.001))
    judge(
        lambda **options: prior_mass(
            Weights(4, 50.0), first, N, threshold=1e-5, std=std, mean=mean, **options
        ),
        exact,
        3,
    )


def test_ridge_regression() -> None:
    """A quadratic form of condition 1e4 with an offset: a shifted ellipsoid under the law."""
    d, tau = 3, 1.0
    scale = torch.tensor([0.3, 3.0, 30.0])
    rotation = torch.linalg.qr(torch.randn(d, d))[0]
    x, target = scale[:, None] * rotation, scale * (rotation @ torch.tensor([0.5, 0.0, 0.2]))
    model = nn.Linear(d, 1, bias=False)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().sum()

    # On a grid over the two stiff axes, the soft one by its distribution function.
    offset = (rotation @ torch.tensor([0.5, 0.0, 0.2])).double().numpy()
    a = scale.double().numpy() ** 2
    grid = (np.arange(4000) + 0.5) / 2000 - 1
    u = grid / np.sqrt(a[2])
    inner = np.zeros(len(u))
    for i, stiff in enumerate(u):
        left = tau - a[2] * stiff**2
        middle = grid[::10] * math.sqrt(left / a[1])
        half = np.sqrt(np.maximum(left - a[1] * middle**2, 0.0) / a[0])
        mass = scipy.stats.norm.cdf(offset[0] + half) - scipy.stats.norm.cdf(offset[0] - half)
        step = 2 * math.sqrt(left / a[1]) / len(middle)
        inner[i] = (mass * scipy.stats.norm.pdf(offset[1] + middle)).sum() * step
    density = scipy.stats.norm.pdf(offset[2] + u)
    exact = math.log((inner * density).sum() / (2000 * np.sqrt(a[2])))
    data = (x, target[:, None])
    judge(
        lambda **options: prior_mass(
            model, loss, N, data=data, threshold=tau, std={"weight": 1.0}, **options
        ),
        exact,
        3,
    )


def test_tiny_network_against_plain_draws() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    x = torch.randn(8, 2)
    y = (x[:, :1] * x[:, 1:]).sign()
    thresholds = [0.85, 0.7, 0.6]
    hits, total, block = np.zeros(3), 2_000_000, 100_000
    for _ in range(total // block):
        z = torch.randn(9, block)
        hidden = torch.tanh(torch.einsum("hib,ni->hnb", z[:4].view(2, 2, -1), x) + z[4:6, None])
        losses = ((hidden * z[6:8, None]).sum(dim=0) + z[8] - y).square().mean(dim=0)
        hits += [int((losses <= t).sum()) for t in thresholds]
    log_plain, plain_error = np.log(hits / total), 1.0 / np.sqrt(hits)
    assert hits[1] > 100
    assert log_plain[2] < -8.0
    z_scores = []
    for seed in range(3):
        result = prior_mass(
            net, nn.MSELoss(), N, data=(x, y), threshold=thresholds, std=1.0, seed=seed
        )
        points = [result.at(t) for t in thresholds]
        assert points[0].log_mass > points[1].log_mass > points[2].log_mass
        z_scores += [
            (p.log_mass - log) / math.hypot(p.stderr, error)
            for p, log, error in zip(points, log_plain, plain_error, strict=True)
        ]
    # Thresholds of one run are not independent; the worst of nine is judged.
    assert max(map(abs, z_scores)) < 4.0, z_scores


def test_solutions_are_solutions() -> None:
    std = {"w": torch.linspace(0.5, 2.0, 20)}
    threshold = chi_square_threshold(20, -15.0)
    model = Weights(20, 3.0)
    result = prior_mass(model, squares, N, threshold=threshold, std=std)
    assert result.solutions.shape[1] == 20
    assert len(result.solutions) >= 16
    losses = result.solutions.square().sum(dim=1)
    assert float(losses.max()) <= threshold * (1 + 1e-6)
    assert float(losses.min()) > 0.05 * threshold
    named = result.solution(-1)
    assert torch.equal(named["w"], result.solutions[-1])
    model.load_state_dict(named)
    assert float(squares(model).detach()) <= threshold * (1 + 1e-6)
    with pytest.raises(IndexError, match="index is 1000"):
        result.solution(1000)


def test_profile_and_words() -> None:
    threshold = chi_square_threshold(5, -12.0)
    wanted = (threshold, 2 * threshold)
    result = prior_mass(Weights(5), squares, N, threshold=wanted, std=1.0)
    profile = result.profile()
    assert (np.diff(profile.thresholds) < 0).all()
    assert (np.diff(profile.log_mass) < 0).all()
    assert profile.log_mass[0] == pytest.approx(math.log(0.9), abs=0.01)
    assert profile.thresholds[-1] == result.threshold == threshold
    assert profile.log_mass[-1] == result.log_mass == result.at(threshold).log_mass
    exact = scipy.stats.chi2.logcdf(profile.thresholds, 5)
    assert (np.abs(profile.log_mass - exact) < 4.5 * profile.stderr).all()
    given = result.profile([threshold, 4.0])
    assert list(given.thresholds) == [4.0, threshold]
    low, high = result.ci()
    assert low < result.log_mass < high
    narrow = result.ci(0.5)
    assert low < narrow[0] < narrow[1] < high
    assert f"{result.log_mass:.6g}" in repr(result)
    summary = result.summary()
    assert "rungs" in summary
    assert f"at threshold {2 * threshold:.4g}" in summary
    assert 0.9 * N < result.n_loss < 1.05 * N


def test_a_small_budget_gives_a_bound() -> None:
    threshold = chi_square_threshold(50, -300.0)
    result = prior_mass(Weights(50), squares, 2000, threshold=threshold, std=1.0)
    assert result.bound
    assert not result.reliable
    assert -300.0 < result.log_mass < 0.0
    assert result.stderr == math.inf
    assert result.ci() == (-math.inf, result.log_mass)
    assert any("upper bound" in warning for warning in result.warnings)
    assert "below" in result.summary()
    assert "<=" in repr(result)
    assert len(result.solutions) == 0


def coins(model: nn.Module) -> Tensor:
    """Share of negative weights, as an accuracy is one: binomial, with ties everywhere."""
    return (model.w < 0).float().mean()  # type: ignore[operator,union-attr]


def test_ties() -> None:
    d = 16
    judge(
        lambda **options: prior_mass(
            Weights(d, 1.0), coins, 2 * N, threshold=0.0, std=1.0, **options
        ),
        -d * math.log(2.0),
        2,
    )
    result = prior_mass(Weights(d, 1.0), coins, N, threshold=0.0, std=1.0)
    assert (result.rungs * d == np.round(result.rungs * d)).all()
    assert bool((result.solutions > 0).all())


def test_a_plateau_is_a_bound() -> None:
    """Nothing lies below 1, which half the law reaches."""

    def loss(model: nn.Module) -> Tensor:
        w = model.w[0]  # type: ignore[index]
        return torch.where(w > 0, torch.ones_like(w), 2 + w.abs())

    result = prior_mass(Weights(3, 1.0), loss, 5000, threshold=0.5, std=1.0)
    assert result.bound
    assert not result.reliable
    assert result.log_mass == pytest.approx(math.log(0.5), abs=0.2)
    assert any("plateau" in warning for warning in result.warnings)
    assert result.at(1.0).log_mass == pytest.approx(math.log(0.5), abs=0.1)
    assert result.at(1.0).reliable


def test_a_constant_loss_is_a_bound() -> None:
    result = prior_mass(Weights(3), lambda m: m.w.sum() * 0 + 1.0, 2000, threshold=0.5, std=1.0)
    draws = sum(run[0].losses.size for run in result._runs)
    assert result.bound
    assert result.log_mass == pytest.approx(math.log(3 / draws))
    everything = prior_mass(Weights(3), lambda m: m.w.sum() * 0, 2000, threshold=0.5, std=1.0)
    assert everything.log_mass == 0.0
    assert everything.stderr == 0.0


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_losses_that_are_not_finite_lie_above(bad: float) -> None:
    """Most of the law has no finite loss at all."""

    def loss(model: nn.Module) -> Tensor:
        w = model.w[0].abs()  # type: ignore[index]
        return torch.where(w < 0.3, w, bad)

    exact = math.log(2 * scipy.stats.norm.cdf(1e-4) - 1)
    judge(
        lambda **options: prior_mass(Weights(2), loss, N, threshold=1e-4, std=1.0, **options),
        exact,
        3,
    )


def observe(model: nn.Module) -> list[Any]:
    seen: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
    seen.append(np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002
    seen += [
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        [m.training for m in model.modules()],
    ]
    for tensor in (*model.parameters(), *model.buffers()):
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        seen.append((id(tensor), tensor.data_ptr(), tensor.tolist(), grad))
    return seen


def test_side_effects() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    model.train()
    model[0].weight.grad = torch.ones(3, 2)
    data = (torch.randn(5, 2), torch.randn(5, 1))
    armed = False

    def loss(output: Tensor, target: Tensor) -> Tensor:
        torch.rand(2)
        random.random()
        np.random.rand()  # noqa: NPY002
        if armed:
            raise KeyboardInterrupt
        return (output - target).square().mean()

    before = observe(model)
    # vmap refuses a loss that draws.
    with pytest.warns(fastvol.FastvolWarning, match="one at a time"):
        result = prior_mass(model, loss, 2000, data=data, threshold=1.0, std=1.0)
    assert math.isfinite(result.log_mass)
    assert observe(model) == before
    armed = True
    with pytest.raises(KeyboardInterrupt):
        prior_mass(model, loss, 2000, data=data, threshold=1.0, std=1.0)
    assert observe(model) == before


def test_the_seed_decides() -> None:
    threshold = chi_square_threshold(6, -9.0)
    one = prior_mass(Weights(6), squares, 1e4, threshold=threshold, std=1.0, seed=3)
    torch.manual_seed(99)
    # Wherever the model stands: the law alone counts.
    two = prior_mass(
        Weights(6, 4.0), squares, 1e4, threshold=threshold, std=1.0, seed=3, plan=one.plan
    )
    other = prior_mass(
        Weights(6), squares, 1e4, threshold=threshold, std=1.0, seed=2**63 + 1, plan=one.plan
    )
    assert one.log_mass == two.log_mass
    assert one.stderr == two.stderr
    assert torch.equal(one.solutions, two.solutions)
    assert other.log_mass != one.log_mass


def test_frozen_parameters_keep_their_values() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.bias.fill_(3.0)
    seen = []

    def loss(m: nn.Module) -> Tensor:
        seen.append(float(m.bias.detach()))  # type: ignore[operator,union-attr]
        return m.weight.square().sum()  # type: ignore[operator,union-attr]

    with pytest.warns(fastvol.FastvolWarning, match="one at a time"):
        # The conversion to a float is what vmap cannot do.
        result = prior_mass(
            model,
            lambda m: loss(m) + 0 * float(m.weight.detach().sum()),
            1000,
            threshold=0.5,
            std=1.0,
            parameters="weight",
        )
    assert result.dim == 2
    assert set(seen) == {3.0}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"n": 999}, ValueError, "n must be at least 1000"),
        ({"n": "many"}, TypeError, "n must be a whole number"),
        ({"threshold": math.nan}, ValueError, "threshold must be finite"),
        ({"threshold": []}, ValueError, "threshold is an empty sequence"),
        ({"threshold": "low"}, TypeError, "threshold must be a number"),
        ({"std": 0.0}, ValueError, "std must be positive"),
        ({"std": {"v": 1.0}}, ValueError, "std must name every moved parameter"),
        ({"std": torch.ones(3)}, ValueError, "std must be a real tensor"),
        ({"std": "init"}, TypeError, "std must be a number"),
        ({"mean": math.inf}, ValueError, "mean must be finite"),
        ({"mean": {"v": 1.0}}, ValueError, "mean must name every moved parameter"),
        ({"mean": torch.ones(3)}, ValueError, "mean must be a real tensor"),
        ({"mean": "zero"}, TypeError, "mean must be a number"),
        ({"mean": [0.0, 0.0]}, TypeError, "mean must be a number"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"replicates": 0}, ValueError, "replicates must be at least 1"),
        ({"chains": 2}, ValueError, "chains must be at least 8"),
        ({"progress": 1}, TypeError, "progress must be True or False"),
        ({"plan": 3}, TypeError, "plan must be the plan of a result"),
        ({"parameters": "b"}, ValueError, "parameters: 'b' matches no parameter"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be callable"),
        ({"loss_fn": lambda m: m.w}, ValueError, "loss_fn must return a scalar"),
        ({"loss_fn": lambda m: m.w.sum() / 0}, ValueError, "loss_fn is"),
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"model": Weights(2, 1.0), "loss_fn": squares, "threshold": 1.0, "std": 1.0, **options}
    with pytest.raises(error, match=words):
        prior_mass(given.pop("model"), given.pop("loss_fn"), **given)


def test_bad_input_to_the_result() -> None:
    result = prior_mass(Weights(2), squares, 1000, threshold=1.0, std=1.0)
    with pytest.raises(ValueError, match="threshold must be finite"):
        result.at(math.nan)
    with pytest.raises(ValueError, match="level must lie between"):
        result.ci(1.0)


def test_next_rung() -> None:
    losses = np.arange(10.0)
    assert next_rung(losses, -5.0) == 2.0
    assert next_rung(losses, 4.5) == 4.5
    tied = np.array([3.0] * 8 + [1.0, 2.0])
    assert next_rung(tied, 0.0) == 2.0
    assert next_rung(np.full(10, 3.0), 0.0) is None
    rare = np.array([math.inf] * 9 + [7.0])
    assert next_rung(rare, 0.0) == 7.0
    assert next_rung(np.full(10, math.inf), 0.0) is None


def test_the_reservoir_chooses_uniformly() -> None:
    rng = np.random.default_rng(0)
    seen = np.zeros(12)
    for _ in range(1000):
        reservoir = Reservoir(3, 1, torch.zeros(1), rng)
        for step in range(4):
            values = 3.0 * step + np.arange(3.0)
            z = torch.as_tensor(values, dtype=torch.float32)[:, None]
            reservoir.offer(z, values, values % 4 != 1)
        states, losses, chains = reservoir.draw(3)
        assert (states[:, 0].numpy() == losses).all()
        assert (losses.astype(int) % 3 == chains).all()
        np.add.at(seen, losses.astype(int), 1)
    assert (seen[1::4] == 0).all()
    kept = np.delete(seen, [1, 5, 9])
    assert scipy.stats.chisquare(kept).pvalue > 1e-4


def test_family_variance() -> None:
    """Chains alike contribute nothing; independent ones their variance; related ones more."""
    count = 50
    own = np.arange(count)
    even = np.full(count, 1.0 / count)
    assert family_variance([even], [own]) == pytest.approx(0.0, abs=1e-12)
    rng = np.random.default_rng(0)
    values = rng.exponential(size=count)
    share = values / values.sum()
    exact = values.var(ddof=1) / values.mean() ** 2 / count
    assert family_variance([share], [own]) == pytest.approx(exact, rel=0.1)
    # Chosen at random, the parents add nothing on average; few parents add their excess of pairs.
    chance = [family_variance([even, even], [own, rng.integers(count, size=count)]) for _ in own]
    assert abs(np.mean(chance)) < 0.3 / count
    few = family_variance([even, even], [own, own // 5])
    assert few == pytest.approx(0.08 / 0.9 * (1 - 1 / count) - 1 / count)
