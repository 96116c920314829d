"""What a user hands in as ``preconditioner=``, as a preconditioner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._layout import ParameterLayout
from .curvature import from_optimizer
from .operators import Diagonal, Matrix, Operator, Preconditioner
from .quadratic import Curvature
from .wrapped import Wrapped

_CHOICES = (
    "a positive diagonal ([d] tensor, or a mapping from parameter name to values), a matrix "
    "[d, d], an operator with matvec, rmatvec and logabsdet, or an Adam-like torch.optim optimizer"
)


def as_preconditioner(
    value: Any, layout: ParameterLayout, scale: Tensor, model: nn.Module
) -> Preconditioner | Curvature:
    """P from what a user hands in; from an optimizer, the curvature that P follows from.

    A diagonal, a matrix and an operator are P itself, not a curvature: how far to look along each
    direction, rather than how steep the loss is there. They act on metric coordinates
    w = (θ − θ*)/s, of which there are d, one per moved coordinate with s > 0, in the layout's
    order; only up to a factor does their size matter to a Lebesgue volume.

    Args:
        value: a diagonal: positive, a tensor or array ``[d]`` (or with an entry for every
            coordinate of the layout), or a mapping from parameter name to a number or a tensor
            that broadcasts to that parameter; a matrix ``[d, d]``; an operator on ``[d]``, see
            :class:`Wrapped`; a preconditioner or a curvature of this package; or a
            ``torch.optim`` optimizer that has stepped, see :func:`from_optimizer`.
        layout: the moved parameters.
        scale: s, float64 ``[size]`` on the CPU; 0 where a coordinate does not move.
        model: the model, wrapped or not; an optimizer is matched with it.

    Raises:
        TypeError, ValueError: naming ``preconditioner``.
    """
    moving = scale > 0
    d = int(moving.sum())
    if isinstance(value, (Operator, Curvature)):
        if value.dim != d:
            raise ValueError(
                f"preconditioner acts on {value.dim} coordinates, but {d} coordinates move"
            )
        return value
    if isinstance(value, torch.optim.Optimizer):
        return from_optimizer(value, model, layout, scale).curvature
    if isinstance(value, Mapping):
        return Diagonal(layout.expand(value, "preconditioner")[moving])
    if isinstance(value, (Tensor, np.ndarray)):
        return _from_numbers(value, layout, moving, d)
    if callable(getattr(value, "matvec", None)):
        return Wrapped(value, d, layout.device)
    raise TypeError(f"preconditioner must be {_CHOICES}; got {type(value).__name__}")


def _from_numbers(value: Any, layout: ParameterLayout, moving: Tensor, d: int) -> Preconditioner:
    if tuple(value.shape) == (d, d):
        return Matrix(value)
    if value.ndim == 1 and len(value) == layout.size:
        value = value[moving.numpy() if isinstance(value, np.ndarray) else moving.to(value.device)]
    elif value.ndim != 1 or len(value) != d:
        sizes = f"[{d}]" if d == layout.size else f"[{d}] (one per coordinate with a scale)"
        raise ValueError(
            f"preconditioner must be a diagonal {sizes} or a matrix [{d}, {d}], in metric "
            f"coordinates; got shape {tuple(value.shape)}"
        )
    given = Diagonal(value)
    if bool((given.values < 0).any()):
        raise ValueError(
            "preconditioner: a diagonal must be positive, how far to look along each coordinate; "
            f"{int((given.values < 0).sum())} entries are negative"
        )
    return given
