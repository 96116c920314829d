"""The public call: what each argument does to the answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

import fastvol


class Bowl(nn.Module):
    """L = Σ (w / a)² over one matrix and one vector, float64, centred at (2, 3)."""

    def __init__(self, rows: int = 3, columns: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((rows, columns), 2.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.full((rows,), 3.0, dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return (self.weight - 2.0).square().sum() + (self.bias - 3.0).square().sum()


def bowl_loss(model: nn.Module) -> torch.Tensor:
    return model()


def log_ball(d: int, radius: float = 1.0) -> float:
    return 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1) + d * math.log(radius)


def test_a_bowl_has_the_volume_of_a_ball() -> None:
    result = fastvol.estimate(Bowl(), bowl_loss, n=500, threshold=0.25)
    assert result.dim == 9
    assert result.log_volume == pytest.approx(log_ball(9, 0.5), abs=1e-6)
    assert result.log_volume_metric == result.log_volume
    assert result.log_mean_power == pytest.approx(9 * math.log(0.5), abs=1e-6)
    assert result.reliable
    assert math.isinf(result.reliable_radius)
    low, high = result.ci()
    assert low <= result.log_volume <= high
    # All of the error is the search's own: the weights are constant.
    bound = result.log_volume - math.log(20) - result.stderr
    assert result.lower_bound(0.95) == pytest.approx(bound, abs=1e-9)


def test_increase_is_relative_to_the_loss_at_the_minimum() -> None:
    def shifted(model: nn.Module) -> torch.Tensor:
        return model() + 7.0

    a = fastvol.estimate(Bowl(), shifted, n=200, increase=0.25)
    b = fastvol.estimate(Bowl(), shifted, n=200, threshold=7.25)
    np.testing.assert_allclose(a.log_radii, b.log_radii, atol=1e-9)
    default = fastvol.estimate(Bowl(), shifted, n=200)
    assert default.config["threshold"] == pytest.approx(7.1)


def test_a_sequence_of_thresholds_shares_the_directions() -> None:
    results = fastvol.estimate(Bowl(), bowl_loss, n=200, threshold=[0.04, 1.0])
    single = fastvol.estimate(Bowl(), bowl_loss, n=200, threshold=1.0)
    assert isinstance(results, list)
    assert [r.config["threshold"] for r in results] == [0.04, 1.0]
    np.testing.assert_allclose(results[1].log_radii, single.log_radii, atol=1e-9)
    np.testing.assert_allclose(
        results[1].log_radii - results[0].log_radii, math.log(5.0), atol=1e-6
    )


def test_the_metric_changes_the_coordinates_and_not_the_volume() -> None:
    euclidean = fastvol.estimate(Bowl(), bowl_loss, n=20_000, threshold=0.25)
    filtered = fastvol.estimate(Bowl(), bowl_loss, n=20_000, threshold=0.25, metric="filter")
    norm = math.sqrt(2 * 2.0**2)  # of a row of weight; 1 for the vector
    assert filtered.log_volume - filtered.log_volume_metric == pytest.approx(6 * math.log(norm))
    assert abs(filtered.log_volume - euclidean.log_volume) < 4 * filtered.stderr
    given = {"weight": norm, "bias": torch.ones(3)}
    same = fastvol.estimate(Bowl(), bowl_loss, n=500, threshold=0.25, metric=given)
    np.testing.assert_allclose(same.log_radii, filtered.log_radii[:500], atol=1e-5)


def test_rows_of_norm_zero_can_be_left_out() -> None:
    model = Bowl()
    with torch.no_grad():
        model.weight[1] = 0.0
    centre = model.weight.detach().clone()

    def loss(m: nn.Module) -> torch.Tensor:
        return (m.weight - centre).square().sum() + (m.bias - 3.0).square().sum()

    with pytest.warns(fastvol.FastvolWarning, match="weight"):
        result = fastvol.estimate(
            model, loss, n=2000, threshold=1.0, metric=fastvol.FilterMetric(zero_rows="drop")
        )
    assert result.dim == 7
    assert abs(result.log_volume - log_ball(7)) < 4 * result.stderr + 1e-6


def test_a_cap_cuts_the_body() -> None:
    result = fastvol.estimate(
        Bowl(), bowl_loss, n=500, threshold=1.0, measure=fastvol.Lebesgue(max_radius=0.5)
    )
    assert result.log_volume == pytest.approx(log_ball(9, 0.5), abs=1e-9)
    assert result.n_unbounded == 500
    assert result.reliable


def test_gaussian_mass_at_both_centres() -> None:
    d, radius, std = 9, 0.5, 0.2
    around = fastvol.estimate(
        Bowl(), bowl_loss, n=300, threshold=radius**2, measure=fastvol.Gaussian(std)
    )
    exact = math.log(scipy.special.gammainc(d / 2, (radius / std) ** 2 / 2))
    assert around.log_volume == pytest.approx(exact, abs=1e-6)
    assert math.isnan(around.log_mean_power)

    std = 2.0
    distance = 6 * 2.0**2 + 3 * 3.0**2
    from_origin = fastvol.estimate(
        Bowl(),
        bowl_loss,
        n=5000,
        threshold=radius**2,
        measure=fastvol.Gaussian({"weight": std, "bias": torch.tensor(std)}, center="origin"),
    )
    exact = scipy.stats.ncx2.logcdf((radius / std) ** 2, d, distance / std**2)
    assert from_origin.reliable
    assert abs(from_origin.log_volume - exact) < 4 * from_origin.stderr


def test_the_mass_does_not_depend_on_the_metric() -> None:
    call = {"n": 300, "threshold": 0.25, "measure": fastvol.Gaussian(0.3)}
    a = fastvol.estimate(Bowl(), bowl_loss, **call)
    b = fastvol.estimate(Bowl(), bowl_loss, metric="filter", **call)
    assert a.log_volume == b.log_volume


def test_a_subset_of_the_parameters() -> None:
    for parameters in ("bias", ["bi*"], lambda name, p: p.dim() == 1):
        result = fastvol.estimate(Bowl(), bowl_loss, n=100, threshold=1.0, parameters=parameters)
        assert result.dim == 3
        assert result.log_volume == pytest.approx(log_ball(3), abs=1e-6)


def test_frozen_parameters_stay_and_tied_ones_count_once() -> None:
    model = Bowl()
    model.bias.requires_grad_(False)
    assert fastvol.estimate(model, bowl_loss, n=50, threshold=1.0).dim == 6

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False).double()
            self.b = nn.Linear(3, 3, bias=False).double()
            self.b.weight = self.a.weight
            nn.init.zeros_(self.a.weight)

    def loss(m: Tied) -> torch.Tensor:
        # Each copy sees half: a copy left behind would double the squared radius.
        return 0.5 * m.a.weight.square().sum() + 0.5 * m.b.weight.square().sum()

    result = fastvol.estimate(Tied(), loss, n=50, threshold=1.0)
    assert result.dim == 9
    assert result.log_volume == pytest.approx(log_ball(9), abs=1e-6)


def test_antithetic_directions_are_pairs() -> None:
    class Tilted(Bowl):
        def forward(self) -> torch.Tensor:
            return super().forward() * (1 + 0.5 * torch.tanh(self.bias[0] - 3.0))

    paired = fastvol.estimate(Tilted(), bowl_loss, n=4000, threshold=0.3, antithetic=True)
    assert paired.statistics.n == 2000
    single = fastvol.estimate(Tilted(), bowl_loss, n=4000, threshold=0.3)
    assert single.statistics.n == 4000
    error = math.hypot(paired.stderr, single.stderr)
    assert abs(paired.log_volume - single.log_volume) < 4 * error


def test_more_directions_begin_with_the_same_ones() -> None:
    short = fastvol.estimate(Bowl(), bowl_loss, n=1100, threshold=0.5, metric="filter", rtol=1e-8)
    long = fastvol.estimate(Bowl(), bowl_loss, n=2200, threshold=0.5, metric="filter", rtol=1e-8)
    np.testing.assert_allclose(long.log_radii[:1100], short.log_radii, atol=1e-8)
    other = fastvol.estimate(Bowl(), bowl_loss, n=1100, threshold=0.5, metric="filter", seed=1)
    assert np.abs(other.log_radii - short.log_radii).max() > 1e-3


def test_n_may_be_a_whole_float() -> None:
    assert fastvol.estimate(Bowl(), bowl_loss, n=1e2, threshold=1.0).n == 100
    with pytest.raises(ValueError, match="n must be a whole number"):
        fastvol.estimate(Bowl(), bowl_loss, n=1.5, threshold=1.0)


def test_an_unbounded_ray_makes_a_lower_bound() -> None:
    class Valley(Bowl):
        def forward(self) -> torch.Tensor:
            return torch.clamp(self.weight[0, 0] - 2.0, min=0.0)

    result = fastvol.estimate(Valley(), bowl_loss, n=500, threshold=1.0)
    assert result.n_unbounded > 100
    assert not result.reliable
    assert "lower bound" in result.summary()
    assert ">=" in repr(result)


def test_a_loss_that_turns_to_nan_bounds_the_basin() -> None:
    class Cliff(Bowl):
        def forward(self) -> torch.Tensor:
            loss = super().forward()
            return torch.where(loss > 0.01, torch.nan, loss)

    result = fastvol.estimate(Cliff(), bowl_loss, n=200, threshold=1.0)
    assert result.n_nonfinite == 200
    np.testing.assert_allclose(np.exp(result.log_radii), 0.1, rtol=2e-3)


def test_losses_for_data() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(60, 4), torch.randint(0, 3, (60,))
    kl = fastvol.estimate(
        model, fastvol.losses.KLDivergence(), n=200, data=(x, y), increase=0.01, rtol=1e-4
    )
    assert kl.config["loss0"] == pytest.approx(0.0, abs=1e-7)
    batches = [(x[:25], y[:25]), (x[25:], y[25:])]
    streamed = fastvol.estimate(
        model, fastvol.losses.KLDivergence(), n=200, data=batches, increase=0.01, rtol=1e-4
    )
    np.testing.assert_allclose(kl.log_radii, streamed.log_radii, atol=3e-3)

    error = fastvol.estimate(
        model, fastvol.losses.error_rate, n=200, data=(x, y), increase=0.101, rtol=1e-3
    )
    accuracy = (model(x).argmax(1) == y).float().mean()
    assert error.config["loss0"] == pytest.approx(1 - accuracy.item(), abs=1e-6)
    assert (error.status <= 1).all()


def test_conv_and_batchnorm_models_run() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )
    x, y = torch.randn(20, 1, 8, 8), torch.randint(0, 5, (20,))
    result = fastvol.estimate(
        model, F.cross_entropy, n=100, data=(x, y), increase=0.2, metric="filter"
    )
    assert (result.status == 0).all()
    assert result.provenance["fell_back"] == []
    assert model.training


def test_callbacks_and_progress() -> None:
    seen: list[fastvol.Progress] = []
    result = fastvol.estimate(Bowl(), bowl_loss, n=9000, threshold=1.0, callbacks=[seen.append])
    block = result.plan["block"]
    assert [p.n_done for p in seen] == [*range(block, 9000, block), 9000]
    for p in seen:
        np.testing.assert_array_equal(p.log_radii, result.log_radii[: p.n_done])
        assert not p.log_radii.flags.writeable


def test_without_the_extension_the_reference_serves_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastvol import _backend

    monkeypatch.setattr(_backend, "_import_core", lambda: None)
    _backend._warn_once.cache_clear()
    with pytest.warns(fastvol.FastvolWarning, match="pip install") as caught:
        first = fastvol.estimate(Bowl(), bowl_loss, n=50, threshold=1.0)
        fastvol.estimate(Bowl(), bowl_loss, n=50, threshold=1.0)
    assert len(caught) == 1
    assert first.provenance["backend"] == "torch"
    with pytest.raises(ValueError, match="backend"):
        fastvol.estimate(Bowl(), bowl_loss, n=50, threshold=1.0, backend="cpp")


def test_a_jump_is_not_taken_for_rounding() -> None:
    class Step(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(d, dtype=torch.float64))

        def forward(self) -> torch.Tensor:
            return ((self.w - 1.0).square().sum() > 1.69).to(torch.float64)

    for d in (5, 5000):
        result = fastvol.estimate(Step(d), bowl_loss, n=128)
        error = result.log_volume - log_ball(d, 1.3)
        assert abs(error) < 3 * result.stderr
        assert result.stderr < 0.05


def test_a_threshold_that_the_loss_cannot_resolve_is_refused() -> None:
    model = nn.Linear(3, 1, bias=False)

    def loss(m: nn.Module) -> torch.Tensor:
        return m.weight.square().sum() + 2.3

    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match="increase"):
        fastvol.estimate(model, loss, n=10, increase=1e-9)
    coarse = fastvol.estimate(model, loss, n=300, increase=1e-6)
    exact = log_ball(3) + 1.5 * math.log(1e-6)
    assert abs(coarse.log_volume - exact) < 3 * coarse.stderr


def test_measured_reentrance_is_corrected() -> None:
    # In a cone of directions the loss leaves the basin between 1.1 and 1.3.
    class Cone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self) -> torch.Tensor:
            r = self.w.norm()
            gap = (self.w[0] > 0.9 * r) & (r > 1.1) & (r < 1.3)
            return torch.where(gap, torch.ones_like(r), 0.05 * r.square())

    share = math.acos(0.9) / math.pi
    exact = (
        math.log(math.pi) + 2 * math.log(1.414) + math.log(1 - share + share * (1.1 / 1.414) ** 2)
    )
    call = {"n": 3000, "threshold": 0.05 * 1.414**2, "measure": fastvol.Lebesgue(1.414)}
    scores = []
    for seed in range(12):
        result = fastvol.estimate(Cone(), bowl_loss, seed=seed, **call)
        assert any("re-enter" in warning for warning in result.warnings)
        scores.append((result.log_volume - exact) / result.stderr)
    assert np.abs(scores).max() < 3.5
    assert abs(np.mean(scores)) < 3.0 / math.sqrt(12)
    every = fastvol.estimate(Cone(), bowl_loss, first_crossing=True, **call)
    assert abs(every.log_volume - exact) < 4 * every.stderr


def test_noise_that_vanishes_at_the_minimum_is_found() -> None:
    model = nn.Linear(50, 1, bias=False)
    nn.init.ones_(model.weight)

    def loss(m: nn.Module) -> torch.Tensor:
        return F.dropout(m.weight - 1.0, 0.5).square().sum()

    with pytest.raises(ValueError, match="loss_fn gave"):
        fastvol.estimate(model, loss, n=10)


def test_arrays_and_numpy_numbers_are_numbers() -> None:
    std = np.full(9, 0.3)
    measure = fastvol.Gaussian(std)
    std[:] = -1.0
    a = fastvol.estimate(Bowl(), bowl_loss, n=100, threshold=0.25, measure=measure)
    b = fastvol.estimate(
        Bowl(), bowl_loss, n=100, threshold=0.25, measure=fastvol.Gaussian(np.float32(0.3))
    )
    assert a.log_volume == pytest.approx(b.log_volume, abs=1e-5)
    c = fastvol.estimate(Bowl(), bowl_loss, n=100, threshold=0.25, metric=np.full(9, 2.0))
    assert c.log_volume == pytest.approx(log_ball(9, 0.5), abs=1e-6)


def test_no_bar_is_made_where_none_is_wanted(regression, monkeypatch):
    """Its lock is shared with forked processes, whatever it shows."""

    def made(*args, **options):
        raise AssertionError("a bar was made")

    monkeypatch.setattr("tqdm.auto.tqdm", made)
    model, data = regression
    for method in ("radial", "annealed"):
        fastvol.estimate(
            model, F.mse_loss, 64, data=data, increase=1.0, method=method, progress=False
        )
    with pytest.raises(AssertionError, match="a bar was made"):
        fastvol.estimate(model, F.mse_loss, 64, data=data, increase=1.0, progress=True)
