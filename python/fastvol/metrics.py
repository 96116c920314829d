"""In which coordinates w = (theta - theta*) / s length and volume are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._layout import ParameterLayout
from ._scale import SPAN, Scale
from ._sharding import gathered, is_sharded
from .errors import warn


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
        values = [theta[s.start : s.stop].view(s.shape) for s in layout.segments]
        return self._scale(layout, values).flat

    def scale_of(self, layout: ParameterLayout) -> Scale:
        """The scale at the parameters as they stand, one number a row."""
        return self._scale(layout, [part.values for part in layout.local])

    def _scale(self, layout: ParameterLayout, values: Sequence[Tensor]) -> Scale:
        parts = []
        dropped = []
        zero_rows: dict[int, list[int]] = {}
        for i, segment in enumerate(layout.segments):
            if not 2 <= len(segment.shape) <= 5:
                parts.append(torch.ones((), dtype=torch.float64, device="cpu"))
                continue
            norm = _row_norms(layout, i, values[i])
            zero = (norm == 0).nonzero().flatten().tolist()
            if zero and self.zero_rows == "error":
                raise ValueError(
                    f"metric='filter': row {zero[0]} of parameter {segment.name!r} has norm 0, so "
                    "it has no scale; choose other parameters=, or metric="
                    "fastvol.FilterMetric(zero_rows='drop') to leave such rows out"
                )
            if zero:
                dropped.append(f"{len(zero)} of {segment.name!r}")
                zero_rows[i] = zero
            local = layout.local[i]
            parts.append(norm[local.rows : local.rows + len(local.values)])
        scale = Scale(layout, parts, zero_rows)
        if scale.dim == 0:
            raise ValueError(
                f"metric: every row of the moved parameters has norm 0 ({', '.join(dropped)}); "
                "nothing is left to move"
            )
        if dropped:
            warn(
                f"metric: rows with norm 0 do not move and are left out of d: {', '.join(dropped)}",
            )
        return scale


def _row_norms(layout: ParameterLayout, i: int, values: Tensor) -> Tensor:
    """Of all rows of segment i, from what is here of it: float64 ``[rows]``, on the CPU."""
    local, sharded = layout.local[i], layout.parameters[i]
    if not local.whole_rows:
        values = gathered(values, sharded, sharded.shape)
    width = max(1, values[:1].numel())
    parts = torch.split(values, max(1, SPAN // width)) if len(values) else []
    norms = [part.to("cpu", torch.float64).reshape(len(part), -1).norm(dim=1) for part in parts]
    own = torch.cat(norms) if norms else torch.empty(0, dtype=torch.float64, device="cpu")
    if is_sharded(sharded) and local.whole_rows:
        return gathered(own.to(layout.device), sharded, sharded.shape[:1]).cpu()
    return own


Metric = str | FilterMetric | Mapping[str, Any] | Tensor


def metric_scale(
    metric: Metric, layout: ParameterLayout, *, used: bool = True
) -> tuple[Scale, Any]:
    """The metric's scales at the parameters as they stand, and its JSON-ready description.

    Args:
        metric: as in :func:`fastvol.estimate`.
        layout: the moved parameters.
        used: ``False`` where nothing is measured in it; then a filter is not evaluated.

    Raises:
        TypeError, ValueError: naming ``metric``.
    """
    if isinstance(metric, str):
        if metric == "euclidean":
            return Scale.uniform(layout), "euclidean"
        if metric == "filter":
            return metric_scale(FilterMetric(), layout, used=used)
        raise ValueError(
            f"metric must be 'euclidean', 'filter', a FilterMetric, or scales, got {metric!r}"
        )
    if isinstance(metric, FilterMetric):
        name = "filter" if metric.zero_rows == "error" else "filter, zero rows dropped"
        if not used:
            return Scale.uniform(layout), name
        return metric.scale_of(layout), name
    scale = Scale.given(layout, metric, "metric")
    return scale, {"scales_sha256": scale.digest(with_parameters=False)}
