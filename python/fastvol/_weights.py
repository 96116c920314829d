"""What is known of a loss: its sign, and what the mean that it takes over a batch divides by."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_CLASSES: tuple[Any, ...] = (F.cross_entropy, F.nll_loss)
_CLASS_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)
_NONNEGATIVE: tuple[Any, ...] = (
    F.cross_entropy,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.multi_margin_loss,
)
_NONNEGATIVE_MODULES = (
    nn.CrossEntropyLoss,
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.MultiMarginLoss,
)


def takes_classes(loss_fn: Any) -> bool:
    """Whether it is one of PyTorch's classification losses, also inside ``functools.partial``."""
    inner = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    return isinstance(inner, _CLASS_MODULES) or _is_one_of(inner, _CLASSES)


def mean_weight(loss_fn: Any, model: nn.Module, target: Any, examples: int) -> float:
    """What the mean that ``loss_fn`` takes over one batch divides by.

    The examples; for PyTorch's classification losses, also inside ``functools.partial``, the
    targets that are not ignored, times their class weights. A loss with a method
    ``batch_weight(model, target, examples)`` tells by itself.

    Args:
        loss_fn: as it was given.
        model: that it is applied to.
        target: what it is called with beside the output.
        examples: of the batch.
    """
    if hasattr(loss_fn, "batch_weight"):
        return float(loss_fn.batch_weight(model, target, examples))
    if not takes_classes(loss_fn):
        return float(examples)
    options: Mapping[str, Any] = {}
    if isinstance(loss_fn, functools.partial):
        loss_fn, options = loss_fn.func, loss_fn.keywords
    if isinstance(loss_fn, _CLASS_MODULES):
        options = {"ignore_index": loss_fn.ignore_index, "weight": loss_fn.weight}
    if not isinstance(target, Tensor) or target.is_floating_point():
        return float(examples)
    kept = target != options.get("ignore_index", -100)
    class_weight = options.get("weight")
    if class_weight is not None:
        return float(class_weight.to(target.device)[target[kept]].sum())
    return float(kept.sum())


def is_nonnegative(loss_fn: Any, model: nn.Module) -> bool:
    """Whether the loss of a batch is known to be at least 0, wherever the parameters are.

    A loss may say so by an attribute ``nonnegative``, a value or a function of the model.
    """
    if hasattr(loss_fn, "nonnegative"):
        told = loss_fn.nonnegative
        return bool(told(model) if callable(told) else told)
    inner = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    return isinstance(inner, _NONNEGATIVE_MODULES) or _is_one_of(inner, _NONNEGATIVE)


def _is_one_of(value: Any, functions: tuple[Any, ...]) -> bool:
    # By identity: what a caller brings may have an equality of its own.
    return any(value is function for function in functions)
