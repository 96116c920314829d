"""Sums of a loss over the examples, for many rays at once, each up to a limit."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor


def ray_losses(
    outputs: Tensor,
    target: Tensor,
    *,
    kind: Literal["cross_entropy", "mse", "bce_with_logits"],
    limit: npt.NDArray[np.float64] | None = None,
    ignore_index: int = -100,
    threads: int = 1,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Sum of a loss over the examples, for each ray, in nats or squared units of the outputs.

    Per example: ``cross_entropy`` log Σⱼ exp xⱼ − x_target, 0 where the target is ignored; ``mse``
    (x − t)²; ``bce_with_logits`` log(1 + exp(−x)) + (1 − t)·x. All are ≥ 0, so a partial sum bounds
    a ray's loss from below.

    Args:
        outputs: logits ``[k, n, c]`` for ``cross_entropy``, else ``[k, ...]``, read as ``[k, m]``.
            Below float32 they are computed with in float32.
        target: int64 classes ``[n]``; else m values in the dtype of the outputs, in any shape, for
            ``bce_with_logits`` in [0, 1].
        kind: which loss.
        limit: float64 ``[k]``, or ``None`` for none: what a sum need not exceed.
        ignore_index: the class that does not count.
        threads: unused here.

    Returns:
        sums, float64 ``[k]``, of values in the dtype of the outputs; outside, bool ``[k]``: a
        partial sum exceeded the limit, and is what stands in ``sums``. Where NaN is met before
        that, the sum is NaN and outside false.

    Raises:
        ValueError: an unknown kind, shapes that do not fit, a class or probability out of range.
    """
    del threads
    if outputs.dtype not in (torch.float32, torch.float64):
        outputs = outputs.to(torch.float32)
    if kind == "cross_entropy":
        values = _cross_entropy(outputs, target, ignore_index)
    elif kind in ("mse", "bce_with_logits"):
        flat = outputs.reshape(outputs.shape[0], -1) if outputs.numel() else outputs.flatten(1)
        if target.numel() != flat.shape[1]:
            raise ValueError(
                f"target must have the shape [m] = [{flat.shape[1]}], got {tuple(target.shape)}"
            )
        wanted = target.reshape(-1).to(flat.dtype).expand_as(flat)
        if kind == "mse":
            values = (flat - wanted).to(torch.float64).square()
        else:
            if not bool(((target >= 0) & (target <= 1)).all()):
                raise ValueError("target must hold probabilities in [0, 1] for bce_with_logits")
            values = F.binary_cross_entropy_with_logits(flat, wanted, reduction="none")
    else:
        raise ValueError(f"kind must be 'cross_entropy', 'mse' or 'bce_with_logits', got {kind!r}")
    values = values.to(torch.float64)
    sums = values.sum(dim=1)
    outside = torch.zeros_like(sums, dtype=torch.bool)
    if limit is not None:
        partial = values.cumsum(dim=1)
        above = partial > torch.as_tensor(limit, device=values.device)[:, None]
        outside = above.any(dim=1)
        if values.shape[1]:
            first = above.to(torch.uint8).argmax(dim=1, keepdim=True)
            sums = torch.where(outside, partial.gather(1, first)[:, 0], sums)
    return sums.cpu().numpy(), outside.cpu().numpy()


def _cross_entropy(outputs: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The loss of each example, ``[k, n]``."""
    if outputs.dim() != 3:
        raise ValueError(
            f"outputs must have the shape [k, n, c] = [any, any, any], got {tuple(outputs.shape)}"
        )
    k, n, c = outputs.shape
    if target.shape != (n,):
        raise ValueError(f"target must have the shape [n] = [{n}], got {tuple(target.shape)}")
    if c == 0:
        raise ValueError("outputs must have at least one class, got [k, n, 0]")
    target = target.to(torch.int64)
    wrong = ((target < 0) | (target >= c)) & (target != ignore_index)
    if bool(wrong.any()):
        raise ValueError(
            f"target must hold classes in [0, {c}) or ignore_index = {ignore_index}, got "
            f"{int(target[wrong][0])}"
        )
    losses = F.cross_entropy(
        outputs.reshape(k * n, c), target.repeat(k), reduction="none", ignore_index=ignore_index
    )
    return losses.reshape(k, n)
