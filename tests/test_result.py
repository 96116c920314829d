"""The result: files, combination, tables, figures, words."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastvol


class Ellipsoid(nn.Module):
    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d, dtype=torch.float64))
        self.register_buffer("h", torch.logspace(0, 1, d, dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return (self.h * self.w.square()).sum()


def measure(**changes: object) -> fastvol.VolumeEstimate:
    options = {"n": 2000, "threshold": 1.0, **changes}
    return fastvol.estimate(Ellipsoid(), lambda m: m(), **options)


@pytest.mark.parametrize(
    "measure_of_space",
    [
        fastvol.Lebesgue(),
        fastvol.Lebesgue(0.9),
        fastvol.Gaussian(0.5),
        fastvol.Gaussian(torch.full((6,), 0.5)),
        fastvol.Gaussian({"w": torch.linspace(0.2, 0.5, 6)}),
    ],
)
def test_a_saved_result_is_the_same_when_loaded(tmp_path: Path, measure_of_space: object) -> None:
    result = measure(measure=measure_of_space)
    path = result.save(tmp_path / "basin.safetensors")
    loaded = fastvol.load(path)
    assert loaded.summary() == result.summary()
    assert repr(loaded) == repr(result)
    np.testing.assert_array_equal(loaded.log_radii, result.log_radii)
    np.testing.assert_array_equal(loaded.status, result.status)
    assert (loaded.config, loaded.plan) == (result.config, result.plan)
    assert loaded.ci(0.9) == result.ci(0.9)
    assert loaded.reliable_radius == result.reliable_radius
    assert [p.name for p in tmp_path.iterdir()] == ["basin.safetensors"]


def test_combined_runs_are_one_longer_run() -> None:
    a, b, c = (measure(seed=seed) for seed in (1, 2, 3))
    both = a.combine(b)
    assert both.n == 4000
    assert both.seeds == (1, 2)
    mean = np.exp([a.log_volume, b.log_volume]).mean()
    assert both.log_volume == pytest.approx(math.log(mean), abs=1e-9)
    assert both.stderr == pytest.approx(a.stderr / math.sqrt(2), rel=0.1)
    assert both.combine(c).n == 6000
    with pytest.raises(ValueError, match="same directions"):
        both.combine(a)
    with pytest.raises(ValueError, match="threshold"):
        a.combine(measure(seed=9, threshold=2.0))
    with pytest.raises(TypeError, match="other"):
        a.combine(3)  # type: ignore[arg-type]


def test_the_table_has_a_row_per_direction() -> None:
    result = measure(seed=5).combine(measure(seed=6, n=1000))
    table = result.to_dataframe()
    assert len(table) == 3000
    assert table["seed"].tolist() == [5] * 2000 + [6] * 1000
    assert table["direction"].iloc[2000] == 0
    np.testing.assert_allclose(np.log(table["radius"]), table["log_radius"])
    log_mean = np.logaddexp.reduce(table["log_weight"]) - math.log(3000)
    assert log_mean == pytest.approx(result.log_volume_metric, abs=1e-9)
    assert set(table["status"]) == {"converged"}


def test_the_profile_ends_at_the_volume() -> None:
    result = measure(n=20_000)
    largest = float(np.exp(result.log_radii.max()))
    profile = result.profile([0.1, largest])
    ball = 3 * math.log(math.pi) - math.lgamma(4)
    assert profile.log_fraction[0] == pytest.approx(0.0, abs=1e-12)
    assert profile.log_fraction[1] + ball + 6 * math.log(largest) == pytest.approx(
        result.log_volume_metric, abs=1e-9
    )
    assert profile.reliable.all()
    with pytest.raises(ValueError, match="radii"):
        result.profile([-1.0])
    with pytest.raises(ValueError, match="max_radius"):
        measure(measure=fastvol.Lebesgue(0.5)).profile([0.6])


def test_a_gaussian_profile_is_the_mass_at_other_widths() -> None:
    narrow = measure(measure=fastvol.Gaussian(0.25), n=5000)
    wide = measure(measure=fastvol.Gaussian(0.5), n=5000, seed=3)
    profile = wide.profile([0.5])
    error = math.hypot(narrow.stderr, float(profile.stderr[0]))
    assert abs(profile.log_fraction[0] - narrow.log_volume) < 4 * error


def test_a_result_cannot_be_written_to() -> None:
    result = measure(n=100)
    with pytest.raises(AttributeError):
        result.log_volume = 0.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        result.log_radii[0] = 0.0


def test_summaries_say_how_far_to_trust_the_number() -> None:
    reliable = measure()
    assert reliable.reliable
    assert "95 % interval" in reliable.summary()
    few = measure(n=20)
    assert not few.reliable
    assert "lower bound" in few.summary()
    assert "next:" in few.summary()


def test_comparing_a_basin_with_itself_is_a_tie() -> None:
    a = measure(n=3000)
    comparison = fastvol.compare(a, a)
    assert comparison.log_ratio == 0.0
    assert comparison.probability == 0.5
    assert comparison.paired


def test_a_larger_basin_is_found_larger() -> None:
    class Wider(Ellipsoid):
        def forward(self) -> torch.Tensor:
            return super().forward() / 1.1

    a = fastvol.estimate(Wider(), lambda m: m(), n=3000, threshold=1.0, metric={"w": 1.0})
    b = fastvol.estimate(Ellipsoid(), lambda m: m(), n=3000, threshold=1.0, metric={"w": 1.0})
    comparison = fastvol.compare(a, b)
    assert comparison.reliable
    assert comparison.paired
    exact = 0.5 * 6 * math.log(1.1)
    assert comparison.log_ratio == pytest.approx(exact, abs=4 * comparison.stderr + 1e-3)
    assert comparison.probability > 0.999
    assert "larger" in comparison.summary()
