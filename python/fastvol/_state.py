"""Leaves the caller's model and random generators as they were, whatever happens in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ._layout import ParameterLayout
from ._sharding import is_sharded, reshard
from .errors import FastvolError


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and (Distributed)DataParallel wrappers.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


@contextmanager
def preserved(model: nn.Module, layout: ParameterLayout | None = None) -> Iterator[None]:
    """Evaluation mode inside; parameters, buffers, modes and random generators restored after.

    The generators are not used by this package; a loss or a data loader may use them. Of parameters
    only those are copied that an engine writes to, which keeps them in ``layout``.

    Raises:
        FastvolError: the loss wrote in place to a parameter that does not move.
    """
    reshard(model)
    versions = [(name, p, p._version) for name, p in model.named_parameters()]
    modules = [
        (module, module.training, dict(module._parameters), dict(module._buffers))
        for module in model.modules()
    ]
    parameters = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    generators = _generator_states()
    try:
        model.eval()
        for parameter, *_ in parameters:
            # A loss that calls backward() would add to the caller's gradients in place.
            parameter.grad = None
        yield
        for name, parameter, version in versions:
            if parameter._version != version:
                raise FastvolError(
                    f"loss_fn (or the model inside it) wrote in place to parameter {name!r}; its "
                    "values are no longer those that came, and the result would mean nothing"
                )
    finally:
        reshard(model)
        if layout is not None:
            layout.restore()
        for module, training, own_parameters, own_buffers in modules:
            module.training = training
            # A forward pass may assign a buffer anew instead of writing to it.
            _reset(module._parameters, own_parameters)
            _reset(module._buffers, own_buffers)
        for parameter, data, grad, requires_grad in parameters:
            # The storage of a shard is not to be asked for, and nobody replaces it.
            if not is_sharded(parameter) and parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if parameter.grad is not grad:
                parameter.grad = grad
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        _restore_generators(generators)


def _reset(registry: dict[str, Any], before: dict[str, Any]) -> None:
    if not isinstance(registry, dict):
        # Of a module of TorchScript, whose parameters nobody can replace.
        return
    if any(registry.get(name) is not value for name, value in before.items()) or len(
        registry
    ) != len(before):
        registry.clear()
        registry.update(before)


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the caller's state, not ours
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.random.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
