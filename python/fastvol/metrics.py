"""In which coordinates w = (theta - theta*) / s length and volume are measured."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._layout import ParameterLayout, digest
from .errors import FastvolWarning


@dataclass(frozen=True)
class FilterMetric:
    r"""Scale of a weight = norm of its output unit's or filter's weights; 1 for 1-D parameters.

    For 2-D to 5-D weights every row of dimension 0 is divided by its own norm (filter
    normalisation, Li et al. 2018, arXiv 1712.09913, section 4).

    Args:
        zero_rows: what to do with a row whose norm is 0: ``"error"``, or ``"drop"`` to leave its
            coordinates where they are and out of d, with a warning.
    """

    zero_rows: str = "error"

    def __post_init__(self) -> None:
        if self.zero_rows not in ("error", "drop"):
            raise ValueError(f"zero_rows must be 'error' or 'drop', got {self.zero_rows!r}")

    def scale(self, layout: ParameterLayout, theta: Tensor) -> Tensor:
        """float64 ``[size]``, on the CPU; 0 marks a coordinate that does not move."""
        scale = torch.ones(layout.size, dtype=torch.float64, device="cpu")
        dropped = []
        for segment in layout.segments:
            if not 2 <= len(segment.shape) <= 5:
                continue
            weight = theta[segment.start : segment.stop].to("cpu", torch.float64)
            norm = weight.reshape(segment.shape[0], -1).norm(dim=1)
            zero = (norm == 0).nonzero().flatten().tolist()
            if zero and self.zero_rows == "error":
                raise ValueError(
                    f"metric='filter': row {zero[0]} of parameter {segment.name!r} has norm 0, so "
                    "it has no scale; choose other parameters=, or metric="
                    "fastvol.FilterMetric(zero_rows='drop') to leave such rows out"
                )
            if zero:
                dropped.append(f"{len(zero)} of {segment.name!r}")
            width = weight.numel() // segment.shape[0]
            scale[segment.start : segment.stop] = norm.repeat_interleave(width)
        if not bool((scale > 0).any()):
            raise ValueError(
                f"metric: every row of the moved parameters has norm 0 ({', '.join(dropped)}); "
                "nothing is left to move"
            )
        if dropped:
            warnings.warn(
                f"metric: rows with norm 0 do not move and are left out of d: {', '.join(dropped)}",
                FastvolWarning,
                stacklevel=4,
            )
        return scale


Metric = str | FilterMetric | Mapping[str, Any] | Tensor


def metric_scale(
    metric: Metric, layout: ParameterLayout, theta: Tensor, *, used: bool = True
) -> tuple[Tensor, Any]:
    """The metric's scales and its JSON-ready description.

    Args:
        metric: as in :func:`fastvol.estimate`.
        layout: the moved parameters.
        theta: their values, ``[size]``.
        used: ``False`` where nothing is measured in it; then a filter is not evaluated.

    Returns:
        float64 ``[size]`` on the CPU (0 where a coordinate does not move), and the description.

    Raises:
        TypeError, ValueError: naming ``metric``.
    """
    if isinstance(metric, str):
        if metric == "euclidean":
            return torch.ones(layout.size, dtype=torch.float64, device="cpu"), "euclidean"
        if metric == "filter":
            return metric_scale(FilterMetric(), layout, theta, used=used)
        raise ValueError(
            f"metric must be 'euclidean', 'filter', a FilterMetric, or scales, got {metric!r}"
        )
    if isinstance(metric, FilterMetric):
        name = "filter" if metric.zero_rows == "error" else "filter, zero rows dropped"
        if not used:
            return torch.ones(layout.size, dtype=torch.float64, device="cpu"), name
        return metric.scale(layout, theta), name
    scale = layout.expand(metric, "metric")
    return scale, {"scales_sha256": digest(scale)}
