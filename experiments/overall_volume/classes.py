"""Which solutions are one another's copies, or joined to them by a straight line below a threshold.

Solutions are networks with one hidden layer of tanh units, as flat vectors: weights in ``[h, i]``,
biases ``[h]``, weights out ``[1, h]``, bias ``[1]``. Permuting the units, or flipping the sign of
all weights of one, leaves such a network as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def aligned(solution: Tensor, reference: Tensor, units: int, inputs: int) -> Tensor:
    """The copy of ``solution`` whose units lie nearest to those of ``reference``, flat ``[d]``."""
    from scipy.optimize import linear_sum_assignment

    mine, theirs = (_units(flat, units, inputs) for flat in (solution, reference))
    plus, minus = torch.cdist(theirs, mine), torch.cdist(theirs, -mine)
    _, order = linear_sum_assignment(torch.minimum(plus, minus).square().numpy())
    order = torch.as_tensor(order)
    places = torch.arange(units)
    sign = torch.where(plus[places, order] <= minus[places, order], 1.0, -1.0)
    return _flat(sign[:, None] * mine[order], solution[-1:], inputs)


def joined(
    a: Tensor, b: Tensor, losses: Callable[[Tensor], Tensor], threshold: float, points: int = 33
) -> bool:
    """Whether the loss stays at or below the threshold on the straight line from a to b.

    Args:
        losses: of points ``[k, d]``.
    """
    share = torch.linspace(0, 1, points, dtype=a.dtype)[:, None]
    return bool((losses((1 - share) * a + share * b) <= threshold).all())


def components(links: Tensor) -> list[int]:
    """Sizes of the classes that links join, largest first.

    Args:
        links: bool ``[k, k]``, symmetric.
    """
    left, sizes = set(range(len(links))), []
    while left:
        reached, front = set(), {left.pop()}
        while front:
            node = front.pop()
            reached.add(node)
            near = {int(k) for k in links[node].nonzero()[:, 0]}
            front |= near & left
            left -= near
        sizes.append(len(reached))
    return sorted(sizes, reverse=True)


def _units(flat: Tensor, units: int, inputs: int) -> Tensor:
    """Each unit's weights in, bias and weight out, ``[h, i + 2]``."""
    weights, rest = flat[: units * inputs].reshape(units, inputs), flat[units * inputs :]
    return torch.cat([weights, rest[:units, None], rest[units : 2 * units, None]], 1)


def _flat(rows: Tensor, bias: Tensor, inputs: int) -> Tensor:
    return torch.cat([rows[:, :inputs].reshape(-1), rows[:, inputs], rows[:, inputs + 1], bias])
