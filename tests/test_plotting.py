"""Axes in, Axes out: what is drawn, and what its legend says."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastvol
from fastvol import FastvolError, Gaussian, Lebesgue, VolumeEstimate
from fastvol.plotting import plot_profile, plot_radii

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


class _Quadratic(nn.Module):
    """A loss of d parameters whose curvatures run from 1 to ``condition``."""

    def __init__(self, dim: int, condition: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dim, dtype=torch.float64))
        self.curvature = torch.logspace(0, np.log10(condition), dim, dtype=torch.float64)

    def forward(self) -> Tensor:
        return (self.curvature * self.w**2).sum()


def _measured(dim: int = 60, condition: float = 100.0, **options: object) -> VolumeEstimate:
    model = _Quadratic(dim, condition)
    arguments = {"n": 400, "threshold": 1.0, "progress": False, **options}
    return fastvol.estimate(model, lambda module: module(), **arguments)


def _legend(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("plot", [plot_profile, plot_radii])
def test_draws_on_new_axes_and_on_given_ones(plot) -> None:
    result = _measured()
    assert isinstance(plot(result), Axes)
    _, ax = pyplot.subplots()
    assert plot(result, ax) is ax
    assert ax.has_data()
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    ax.figure.canvas.draw()


def test_the_result_draws_its_own_profile() -> None:
    _, ax = pyplot.subplots()
    assert _measured().plot(ax, label="one") is ax
    assert _legend(ax)[0] == "one"


def test_what_is_not_reliable_is_dashed_and_the_legend_says_so() -> None:
    result = _measured()
    assert not result.reliable
    ax = plot_profile(result)
    assert _legend(ax) == ["reliable radius", "lower bound only"]
    dashed = [line for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    (line,) = dashed
    x = line.get_xdata()
    # It starts at the last reliable point, so that the curve has no gap.
    inside = x[~np.isnan(x)] <= result.reliable_radius
    assert inside.sum() == 1


def test_a_reliable_result_has_no_dashes() -> None:
    result = _measured(condition=1.0)
    assert result.reliable
    ax = plot_profile(result, label="ball")
    assert "lower bound only" not in _legend(ax)
    assert all(line.get_linestyle() != "--" for line in ax.lines)


def test_two_results_explain_the_marks_once_and_last() -> None:
    ax = plot_profile(_measured(), label="a")
    plot_profile(_measured(condition=400.0), ax, label="b")
    assert _legend(ax) == ["a", "b", "reliable radius", "lower bound only"]


def test_the_marker_stands_at_the_reliable_radius() -> None:
    result = _measured()
    ax = plot_profile(result)
    (marker,) = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert float(marker.get_xdata()[0]) == pytest.approx(result.reliable_radius)


def test_radii_may_be_given_in_any_order() -> None:
    ax = plot_profile(_measured(), radii=[0.2, 0.1])
    drawn = ax.lines[0].get_xdata()
    assert drawn[~np.isnan(drawn)].tolist() == [0.1, 0.2]
    with pytest.raises(ValueError, match="radii"):
        plot_profile(_measured(), radii=[-1.0])


def test_style_is_passed_on() -> None:
    ax = plot_profile(_measured(), color="#0072B2", linewidth=3)
    assert ax.lines[0].get_color() == "#0072B2"
    assert ax.lines[0].get_linewidth() == 3
    plot_radii(_measured(), ax := pyplot.subplots()[1], bins=7, color="#0072B2", histtype="bar")
    assert len(ax.patches) == 7


@pytest.mark.parametrize("measure", [Gaussian(0.05), Lebesgue(max_radius=0.2)])
def test_every_measure_can_be_drawn(measure) -> None:
    result = _measured(measure=measure)
    ax = plot_profile(result)
    assert ("std" in ax.get_xlabel()) == isinstance(measure, Gaussian)
    plot_radii(result).figure.canvas.draw()
    ax.figure.canvas.draw()


def test_the_histogram_is_a_density_of_the_log_radius() -> None:
    result = _measured()
    ax = plot_radii(result, histtype="bar", bins=20)
    heights = np.array([patch.get_height() for patch in ax.patches])
    left = np.array([patch.get_x() for patch in ax.patches])
    right = left + np.array([patch.get_width() for patch in ax.patches])
    assert heights @ np.log(right / left) == pytest.approx(1.0)


def test_rays_without_an_end_are_counted_in_the_legend() -> None:
    result = _measured(measure=Lebesgue(max_radius=0.2))
    assert 0 < result.n_unbounded < result.n
    (text,) = _legend(plot_radii(result, label="capped"))
    assert text == f"capped ({result.n_unbounded} of {result.n} inside up to the cap)"


def test_no_ray_ends_at_all() -> None:
    result = _measured(measure=Lebesgue(max_radius=1e-3))
    assert result.n_unbounded == result.n
    plot_radii(result).figure.canvas.draw()
    plot_profile(result).figure.canvas.draw()


def test_radii_that_are_all_alike() -> None:
    result = _measured(condition=1.0)
    plot_radii(result).figure.canvas.draw()


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _measured()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FastvolError, match=r"fastvol\[plot\]"):
        result.plot()
