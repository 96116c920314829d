"""A pool: the examples that training sets and landscapes are drawn from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pool:
    """Examples with labels, some of them kept for testing.

    Args:
        name: for the user.
        source: where they come from, in words.
        inputs: float32 ``[N, …]``, normalised; for text int64.
        labels: int64 ``[N]``, 0 … classes − 1; for text the next tokens ``[N, length]``.
        test_inputs, test_labels: the same of the test set; empty where the test set is whatever a
            training set leaves over.
        classes: how many labels there are.
        loss: ``"cross_entropy"``, ``"bce"`` (one logit) or ``"mse"`` (on one-hot targets).
    """

    name: str
    source: str
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int
    loss: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        content = hashlib.sha256(self.loss.encode())
        for tensor in (self.inputs, self.labels, self.test_inputs, self.test_labels):
            content.update(str(tuple(tensor.shape)).encode())
            content.update(tensor.contiguous().numpy().tobytes())
        object.__setattr__(self, "digest", content.hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self, labels: Tensor) -> Tensor:
        """What the loss compares the outputs of examples of these labels with."""
        if self.loss == "bce":
            return labels[:, None].to(torch.float32)
        if self.loss == "mse":
            return F.one_hot(labels, self.classes).to(torch.float32)
        return labels

    def right(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Which outputs name the right label, bool ``[N]`` (``[N, length]`` for text)."""
        if self.loss == "bce":
            return (outputs[:, 0] > 0) == (labels == 1)
        return outputs.argmax(1) == labels
