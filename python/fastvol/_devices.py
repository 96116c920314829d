"""Several devices of one process: a copy of the model on each, and a thread that works with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ._layout import ParameterLayout, ParameterSelector
from ._objective import PREFIX, Objective
from ._problem import Problem
from .errors import FastvolError


def read_devices(device: Any, own: torch.device) -> tuple[torch.device, ...]:
    """The devices that ``device`` names, the model's own first.

    Args:
        device: ``None``, one, a sequence, or ``"all"``: every device of the model's kind.
        own: where the model stands.

    Raises:
        ValueError: naming ``device``.
    """
    if isinstance(device, str) and device == "all":
        if own.type != "cuda":
            return (own,)
        others = (torch.device("cuda", i) for i in range(torch.cuda.device_count()))
        return (own, *(other for other in others if other.index != (own.index or 0)))
    if not isinstance(device, (list, tuple)):
        if device is not None and not _same(_device(device), own):
            raise ValueError(
                f"device is {_device(device)} but the model stands on {own}; move it there first, "
                f"with its data: model.to({str(_device(device))!r})"
            )
        return (own,)
    asked = [_device(each) for each in device]
    mine = next((i for i, each in enumerate(asked) if _same(each, own)), None)
    if mine is None:
        raise ValueError(
            f"device names {[str(each) for each in asked]}, but not {own}, where the model stands"
        )
    if any(each.type != own.type for each in asked):
        raise ValueError(
            f"device names {[str(each) for each in asked]}: they must be of one kind, since a "
            "direction is rounded in its own way on each kind"
        )
    return (own, *asked[:mine], *asked[mine + 1 :])


def elsewhere(
    problem: Problem,
    devices: Sequence[torch.device],
    loss_fn: Callable[..., Any],
    data: Any,
    parameters: ParameterSelector,
) -> tuple[Problem, ...]:
    """The problem on further devices.

    Args:
        problem: on the model's own.
        devices: the further ones.
        loss_fn, data, parameters: of the call.

    Raises:
        FastvolError: the model cannot be copied.
    """
    problems = []
    for device in devices:
        try:
            model = copy.deepcopy(problem.objective.module.model).to(device)
            loss = copy.deepcopy(loss_fn).to(device) if isinstance(loss_fn, nn.Module) else loss_fn
        except Exception as error:
            raise FastvolError(
                f"device: the model or loss_fn cannot be copied to {device} "
                f"({type(error).__name__}: {error}); use one device a process, with torchrun"
            ) from error
        layout = ParameterLayout(model, parameters)
        objective = Objective(model, loss, data, device)
        objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
        problems.append(replace(problem, objective=objective, layout=layout))
    return tuple(problems)


def _device(value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"device {value!r} is not a device: {error}") from error


def _same(wanted: torch.device, own: torch.device) -> bool:
    return wanted.type == own.type and wanted.index in (None, own.index or 0)
