"""Losses for ``data=`` beyond those of PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


def error_rate(output: Tensor, target: Tensor) -> Tensor:
    """1 − accuracy: the share of examples whose largest logit is not the target's class.

    Args:
        output: logits ``[n, classes]``.
        target: classes ``[n]``, integers.
    """
    return (output.argmax(dim=-1) != target).to(torch.get_default_dtype()).mean()


error_rate.nonnegative = True  # type: ignore[attr-defined]


class KLDivergence:
    r"""Mean over the data of KL(p* ‖ p), p* the predictions at the unperturbed parameters.

    .. math:: L(\theta) = \frac1n \sum_i \sum_c p^*_{ic} (\log p^*_{ic} - \log p_{ic})

    The loss of Scherlis & Belrose (arXiv 2501.18812): it is 0 at the minimum, whatever the labels.
    The targets of ``data=`` are not used; the outputs at θ* are computed once, before the run, and
    kept (one tensor of logits per batch). Classes are the last dimension of the output, or of its
    ``.logits``; every position counts, padding too.
    """

    nonnegative = True

    def reference_target(self, output: Any) -> Tensor:
        """The log probabilities that later outputs are compared with."""
        return F.log_softmax(_logits(output), dim=-1)

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        log_p = F.log_softmax(_logits(output), dim=-1)
        divergence = (target.exp() * (target - log_p)).sum(dim=-1)
        return divergence.mean()


class ModelLoss:
    """The loss that a model returns by itself when it is given labels, as Hugging Face's models do.

    For ``data=`` of dicts, which go to the model as keyword arguments (``input_ids``,
    ``attention_mask``, ``labels``, …); the loss is the output's ``.loss``. Batches are weighted by
    the labels that the model's mean is over: not those that are −100, and for causal language
    models, which shift the labels by one, not the first of a row. Labels that are no integers, or
    go by another name than ``labels``, count by examples.

    Raises:
        ValueError: the output has no loss.
    """

    def __call__(self, output: Any, batch: Any) -> Any:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                "the model's output has no loss; Hugging Face's models return one where the batch "
                "has labels"
            )
        return loss

    def batch_weight(self, model: nn.Module, batch: Any, examples: int) -> float:
        """The labels that the mean over a batch is taken over."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return float(examples)
        kept = labels != IGNORED
        if labels.dim() > 1 and _shifts_labels(model):
            kept = kept[..., 1:]
        return float(kept.sum())

    def nonnegative(self, model: nn.Module) -> bool:
        """Whether the model's loss is a cross-entropy, or a squared error."""
        return _loss_name(model) in _NONNEGATIVE


model_loss = ModelLoss()

_NONNEGATIVE = (
    "ForCausalLMLoss",
    "ForMaskedLMLoss",
    "ForSequenceClassificationLoss",
    "ForTokenClassification",
    "ForQuestionAnsweringLoss",
)


def _loss_name(model: nn.Module) -> str:
    return getattr(getattr(model, "loss_function", None), "__name__", "")


def _shifts_labels(model: nn.Module) -> bool:
    # Encoder-decoders of the same name predict each label in its own place.
    config = getattr(model, "config", None)
    return _loss_name(model) == "ForCausalLMLoss" and not getattr(
        config, "is_encoder_decoder", False
    )


def _logits(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits
