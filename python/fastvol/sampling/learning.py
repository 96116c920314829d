"""A law of directions learned from the boundary, round by round.

One set of points and normals on the boundary does not tell the power with which the loss grows, on
which the right step depends (see :func:`fastvol.preconditioners.from_boundary`); so several are
tried, and the one whose fresh rays have the highest mean log weight is kept: that bounds the log
volume from below in expectation, by as much as the law of the directions is wrong (the
Kullback–Leibler divergence).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._proposal import Proposal
from ..errors import FastvolError
from ..preconditioners import Diagonal, Preconditioner, compose, from_boundary
from .field import RayField

# Dense moments need two rays a coordinate, and the cube of their number of operations.
MOST_DENSE = 2000
_DIAGONAL_RAYS = 256
_POWERS = (0.25, 0.5, 1.0)
_ROUNDS = 4
# Nats; a smaller gain is not worth another round.
_GAIN = 0.01
# Log weights this even cannot be told from even ones by so few rays.
_EVEN = 0.05


def learn(
    open_field: Callable[[Proposal | None], RayField],
    judge: Callable[[Proposal | None], tuple[float, float]],
    start: Proposal | None,
    *,
    affordable: Callable[[int], bool],
    charge: Callable[[RayField], None],
    stream: int,
) -> Proposal | None:
    """Improves the law of the directions while that raises the bound of its pilot.

    Args:
        open_field: the rays of a law.
        judge: what the pilot of a law expects of the log mean at the least (the mean of its log
            weights, constants included), and their standard deviation, nats.
        start: the law to begin with; one that is not shifted.
        affordable: whether so many rays, each with its gradient, may still be paid for.
        charge: told what has been spent.
        stream: which family of counters the rays come from.

    Returns:
        ``start`` itself where nothing was gained.
    """
    best = start
    best_bound, sd = judge(start)
    for round_number in range(_ROUNDS):
        field = open_field(best)
        count = 2 * field.dim if field.dim <= MOST_DENSE else _DIAGONAL_RAYS
        count = max(count, 64)
        if sd < _EVEN or not affordable(count):
            break
        points, normals = boundary(field, count, stream + round_number)
        charge(field)
        previous = None if best is None else best.preconditioner
        gained = False
        for power in _POWERS:
            try:
                learned = from_boundary(points, normals, power=power, previous=previous)
            except (FastvolError, ValueError, RuntimeError):
                break
            if not math.isfinite(learned.logabsdet):
                continue
            law = Proposal(learned, name="boundary")
            bound, spread = judge(law)
            # The pilot knows its mean to sd / √32.
            if bound > best_bound + max(_GAIN, 0.2 * spread):
                best, best_bound, sd, gained = law, bound, spread, True
        if not gained:
            break
    return best


def boundary(field: RayField, count: int, stream: int) -> tuple[Tensor, Tensor]:
    """Ends ρu of some rays and Pᵀ∇L there, ``[k, d]`` each; only of rays that cross."""
    points, normals = [], []
    for first in range(0, count, field.lanes):
        ids = np.arange(first, min(first + field.lanes, count))
        units = field.isotropic(ids, stream)
        ends = field.measure(units)
        gradient = field.gradient(units, ends.log_multiples)
        crossed = torch.from_numpy(ends.status == 0)
        length = torch.from_numpy(np.exp(ends.log_multiples))[:, None]
        points.append((units.to("cpu", torch.float64) * length)[crossed])
        normals.append(gradient.to("cpu", torch.float64)[crossed])
    return torch.cat(points), torch.cat(normals)


def perturbed(law: Proposal | None, dim: int, rng: np.random.Generator) -> Proposal:
    """A law of directions a little different from ``law``: a second opinion on the same answer."""
    sd = min(0.2, 2.0 / math.sqrt(dim))
    inner: Preconditioner = Diagonal(torch.from_numpy(np.exp(sd * rng.standard_normal(dim))))
    if law is None:
        return Proposal(inner, name="perturbed")
    # w = P D z′ keeps its mean where m′ = D⁻¹ m.
    offset = law.offset
    if offset is not None:
        ones = torch.ones(1, dim, dtype=torch.float64)
        offset = offset / inner.matvec(ones)[0]
    return Proposal(compose(law.preconditioner, inner), offset, name=f"{law.name}, perturbed")
