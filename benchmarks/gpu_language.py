"""Rows of the GPU table: a language model that is too large to batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvol

from . import card
from .gpu_bench import Bench, Row, SkippedError, kernels_of, row


def language(bench: Bench) -> Iterator[Row]:
    """A GPT-2 that is too large to batch."""
    try:
        fastvol.engines.check_name("inplace")
    except fastvol.FastvolError as error:
        raise SkippedError("this version has no engine for it") from error
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise SkippedError("needs transformers") from error
    if bench.left < 60 and not bench.smoke:
        raise SkippedError("no time left")
    kernels, device = kernels_of(), bench.device
    small = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 20, "n_positions": 8}
    torch.manual_seed(0)
    config: Any = GPT2Config
    model: Any = GPT2LMHeadModel(config(**(small if bench.smoke else {})))
    model.to(device).eval()
    batch, length = bench.size(64, 2), bench.size(256, 8)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), device=device)

    def loss(m: Any) -> Tensor:
        total = torch.zeros((), device=device)
        for part in torch.split(tokens, 8):
            logits = m(part).logits[:, :-1]
            total = total + F.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            )
        return total / (batch * (length - 1))

    with torch.no_grad():
        forward = card.seconds(partial(loss, model), device, repeats=3)
    d = sum(p.numel() for p in model.parameters())
    theta = torch.randn(d, device=device)
    out = torch.empty(1, d, device=device)
    one = torch.ones(1, dtype=torch.float64, device=device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    moving = card.kernel_seconds(partial(kernels.perturb, out, theta, one, 1, 0, first), device)
    del theta, out
    held = 4 * d
    activations = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            loss(model)
        activations = torch.cuda.max_memory_allocated(device) - held
    title = f"GPT-2, {d / 1e6:.4g}M parameters, {batch} × {length} tokens"
    for metric in ("euclidean", "filter"):
        if bench.left < 30 and not bench.smoke:
            raise SkippedError(f"no time left for metric={metric!r}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # Of few rays: all are scanned, with 32 losses each.
        result = fastvol.estimate(
            model, loss, n=2, engine="inplace", method="radial", metric=metric, progress=False
        )
        # Making the directions, writing them, putting the parameters back: all but the forward
        # pass.
        evaluation = result.provenance["engine_seconds"] / result.n_loss
        beside = evaluation / forward - 1
        numbers = {
            "seconds_forward": forward,
            "seconds_evaluation": evaluation,
            "seconds_of_kernel": moving,
            "parameters": d,
        }
        told = (
            f"an evaluation takes {beside:.2%} more than the forward pass "
            f"({forward * 1e3:.4g} ms), the kernel's share {moving / forward:.2%}"
        )
        met = beside < 0.05
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            allowed = 2 * held + activations
            met = met and peak <= allowed
            told += f", {peak / 1e9:.3g} GB of {allowed / 1e9:.3g}"
            numbers.update(peak=peak, allowed=allowed)
        yield row(
            f"{title}, metric={metric!r}",
            f"{told}, {result.seconds / result.n:.3g} s a direction",
            "< 5 %, ≤ 2 × model + activations",
            met,
            **numbers,
        )
