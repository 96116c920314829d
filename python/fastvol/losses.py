"""Losses for ``data=`` beyond those of PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def error_rate(output: Tensor, target: Tensor) -> Tensor:
    """1 − accuracy: the share of examples whose largest logit is not the target's class.

    Args:
        output: logits ``[n, classes]``.
        target: classes ``[n]``, integers.
    """
    return (output.argmax(dim=-1) != target).to(torch.get_default_dtype()).mean()


class KLDivergence:
    r"""Mean over the data of KL(p* ‖ p), p* the predictions at the unperturbed parameters.

    .. math:: L(\theta) = \frac1n \sum_i \sum_c p^*_{ic} (\log p^*_{ic} - \log p_{ic})

    The loss of Scherlis & Belrose (arXiv 2501.18812): it is 0 at the minimum, whatever the labels.
    The targets of ``data=`` are not used; the outputs at θ* are computed once, before the run, and
    kept (one tensor of logits per batch). Classes are the last dimension of the output.
    """

    def reference_target(self, output: Tensor) -> Tensor:
        """The log probabilities that later outputs are compared with."""
        return F.log_softmax(output, dim=-1)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(output, dim=-1)
        divergence = (target.exp() * (target - log_p)).sum(dim=-1)
        return divergence.mean()
