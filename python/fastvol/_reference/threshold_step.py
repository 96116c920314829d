"""One round of the device loop: outputs to losses, losses to a sum, the sum to the next radius."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .search_step import Mark, Number, Rule, SearchState, search_step

KINDS = ("cross_entropy", "mse", "bce_with_logits", "given")


def threshold_step(
    state: SearchState,
    outputs: Tensor,
    target: Tensor | None,
    *,
    kind: str,
    scale: float = 1.0,
    ignore_index: int = -100,
    lanes: slice | None = None,
    first: bool = True,
    last: bool = True,
) -> None:
    """Adds a batch's losses to each lane's sum, and after the last batch moves the searches.

    Per example, in the dtype of the outputs but at least float32: ``cross_entropy``
    log Σⱼ exp xⱼ − x_target, 0 where the target is ignored; ``mse`` (x − t)²; ``bce_with_logits``
    log(1 + exp(−x)) + (1 − t)·x; ``given`` x itself. The sum over the examples is float64. Of the
    first three all terms are ≥ 0: a lane whose partial sum exceeds ``Rule.LIMIT`` is marked
    ``Mark.BEYOND``, keeps that lower bound and is summed no further. Where NaN is met before that,
    the sum is NaN. Nothing is read by the host, and nothing is written but the state.

    Args:
        state: of the searches; of a lane that waits for no loss nothing but the sum changes.
        outputs: logits ``[k, n, c]`` for ``cross_entropy``, else ``[k, ...]``, read as ``[k, m]``.
        target: classes ``[n]``, or m values, on the device of the outputs, of which
            :func:`check_target` approves; ``None`` for ``given``.
        kind: which loss.
        scale: what the sum is multiplied with: the batch's weight over its number of terms.
        ignore_index: the class that does not count.
        lanes: whose outputs these are; all by default.
        first: whether the sums begin with this batch.
        last: whether the loss is complete, so that the searches move.
    """
    part = slice(None) if lanes is None else lanes
    values = _values(outputs, target, kind, ignore_index) * scale
    numbers, marks = state.numbers[:, part], state.marks[:, part]
    total = numbers[Number.TOTAL]
    beyond = marks[Mark.BEYOND] != 0
    if first:
        total, beyond = torch.zeros_like(total), torch.zeros_like(beyond)
    partial = total[:, None] + values.cumsum(dim=1)
    sums = total + values.sum(dim=1)
    if kind != "given" and values.shape[1]:
        above = partial > state.rules[Rule.LIMIT]
        first_above = above.to(torch.uint8).argmax(dim=1, keepdim=True)
        stopped = above.any(dim=1)
        sums = torch.where(stopped, partial.gather(1, first_above)[:, 0], sums)
        marks[Mark.BEYOND] = (beyond | stopped).to(torch.int32)
    else:
        marks[Mark.BEYOND] = beyond.to(torch.int32)
    numbers[Number.TOTAL] = torch.where(beyond, total, sums)
    if last:
        search_step(state)


def check_target(
    outputs: Tensor, target: Tensor | None, *, kind: str, ignore_index: int = -100
) -> None:
    """Refuses once, before the rounds, what a round would not notice.

    Raises:
        ValueError: an unknown kind, shapes that do not fit, a class or probability out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    if kind == "given":
        return
    if target is None:
        raise ValueError(f"target must be a tensor for kind={kind!r}, got None")
    if kind == "cross_entropy":
        if outputs.dim() != 3 or target.shape != outputs.shape[1:2]:
            raise ValueError(
                "outputs must have the shape [k, n, c] and target [n], got "
                f"{tuple(outputs.shape)} and {tuple(target.shape)}"
            )
        wrong = ((target < 0) | (target >= outputs.shape[2])) & (target != ignore_index)
        if bool(wrong.any()):
            raise ValueError(
                f"target must hold classes in [0, {outputs.shape[2]}) or ignore_index = "
                f"{ignore_index}, got {int(target[wrong][0])}"
            )
        return
    if outputs.shape[0] and target.numel() != outputs.numel() // outputs.shape[0]:
        raise ValueError(
            f"target must hold one value for each of a ray's {outputs[0].numel()} outputs, got "
            f"{target.numel()}"
        )
    if kind == "bce_with_logits" and not bool(((target >= 0) & (target <= 1)).all()):
        raise ValueError("target must hold probabilities in [0, 1] for bce_with_logits")


def _values(outputs: Tensor, target: Tensor | None, kind: str, ignore_index: int) -> Tensor:
    """The loss of each example, float64 ``[k, n]``."""
    if outputs.dtype not in (torch.float32, torch.float64):
        outputs = outputs.to(torch.float32)
    flat = outputs.reshape(outputs.shape[0], math.prod(outputs.shape[1:]))
    if kind == "given":
        return flat.to(torch.float64)
    assert target is not None
    if kind == "cross_entropy":
        k, n, c = outputs.shape
        each = F.cross_entropy(
            outputs.reshape(k * n, c),
            target.to(torch.int64).repeat(k),
            reduction="none",
            ignore_index=ignore_index,
        )
        return each.view(k, n).to(torch.float64)
    wanted = target.reshape(-1).to(flat.dtype).expand_as(flat)
    if kind == "mse":
        return (flat - wanted).to(torch.float64).square()
    return F.binary_cross_entropy_with_logits(flat, wanted, reduction="none").to(torch.float64)
