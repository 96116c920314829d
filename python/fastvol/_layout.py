"""Which parameters move, and where each one lies in the flat vector."""

from __future__ import annotations

import fnmatch
import hashlib
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._sharding import Group, Local, group_of, local_part
from .errors import FastvolError

# Entries looked at together where a whole parameter would take too much memory.
_AT_ONCE = 1 << 20

ParameterSelector = Iterable[str] | str | Callable[[str, nn.Parameter], bool] | None


@dataclass(frozen=True)
class Segment:
    """One parameter's place in the flat vector: coordinates ``start`` to ``stop``."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    stop: int


class ParameterLayout:
    """The flat layout of the parameters that move, in ``model.named_parameters()`` order.

    A tied parameter appears once, under its first name. Frozen parameters are left out. Of a
    sharded module the layout is that of the whole.

    Args:
        model: the module.
        parameters: ``None`` (every parameter with ``requires_grad``), a name or shell-style
            pattern, several of them, or a predicate ``(name, parameter) -> bool``.

    Raises:
        TypeError: ``model`` is not a module, ``parameters`` has a wrong type, or a parameter is
            not a dense floating-point tensor.
        ValueError: nothing is left to move, a name matches nothing or names a frozen parameter,
            a parameter is not finite, or the parameters lie on several devices.
    """

    def __init__(self, model: nn.Module, parameters: ParameterSelector = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        chosen = _select(model, parameters)
        segments = []
        offset = 0
        for name, parameter in chosen.items():
            _check_kind(name, parameter)
            stop = offset + parameter.numel()
            segments.append(Segment(name, parameter.shape, parameter.dtype, offset, stop))
            offset = stop
        if offset == 0:
            raise ValueError(
                "model has no parameter to move: it has none with requires_grad=True and at least "
                "one element, or parameters= selects none"
            )
        devices = {parameter.device for parameter in chosen.values()}
        if len(devices) > 1:
            raise ValueError(
                f"model has its parameters on several devices ({sorted(map(str, devices))}); move "
                "it to one, or choose a subset with parameters="
            )
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.size: int = offset
        self.device: torch.device = devices.pop()
        double = any(segment.dtype == torch.float64 for segment in segments)
        self.dtype: torch.dtype = torch.float64 if double else torch.float32
        self._parameters = chosen
        self._kept: list[Tensor] | None = None
        self.group: Group = group_of(chosen.items(), self.device)
        for segment, part in zip(self.segments, self.local, strict=True):
            # All processes are to stop together.
            if self.group.any(not _is_finite(part.values)):
                raise ValueError(
                    f"model parameter {segment.name!r} contains values that are not finite"
                )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The model's own, one for each segment."""
        return list(self._parameters.values())

    @cached_property
    def local(self) -> list[Local]:
        """What this process holds of each segment; all of it, but for sharded modules."""
        return [local_part(name, p, self.group) for name, p in self._parameters.items()]

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold parts of the module."""
        return not self.group.alone

    def keep(self) -> list[Tensor]:
        """Copies of what is here of each parameter, made at the first call, for :meth:`restore`."""
        if self._kept is None:
            self._kept = [
                part.values.clone(memory_format=torch.contiguous_format) for part in self.local
            ]
        return self._kept

    def restore(self) -> None:
        """Puts back what was kept, bit for bit; without :meth:`keep` there is nothing to do."""
        if self._kept is not None:
            with torch.no_grad():
                for part, kept in zip(self.local, self._kept, strict=True):
                    part.values.copy_(kept)

    def flatten(self) -> Tensor:
        """The parameters as they stand: a new ``[size]`` tensor in the working dtype.

        Raises:
            FastvolError: the module is sharded.
        """
        if self.is_sharded:
            raise FastvolError(
                "the parameters are sharded over processes and are not brought together; of a "
                "sharded module only method='radial' (or 'auto') is available"
            )
        with torch.no_grad():
            return torch.cat(
                [p.detach().reshape(-1).to(self.dtype) for p in self._parameters.values()]
            )

    def unflatten(self, flat: Tensor, prefix: str = "") -> dict[str, Tensor]:
        """Views of ``flat`` ``[..., size]`` by name, ``[..., *shape]`` each.

        A parameter whose own dtype is not the working dtype is a cast copy instead of a view.
        """
        lead = flat.shape[:-1]
        views = {}
        for s in self.segments:
            view = flat[..., s.start : s.stop].view(lead + s.shape)
            views[prefix + s.name] = view if s.dtype == self.dtype else view.to(s.dtype)
        return views

    @property
    def is_single_dtype(self) -> bool:
        """Whether every parameter has the working dtype, so that ``unflatten`` never copies."""
        return all(segment.dtype == self.dtype for segment in self.segments)

    def expand(self, value: Any, argument: str) -> Tensor:
        """One positive finite value per coordinate: a float64 ``[size]`` tensor.

        Args:
            value: a number, a mapping from parameter name to a number or a tensor that broadcasts
                to that parameter, or a tensor with ``size`` entries.
            argument: the name that an error message gives to ``value``.
        """
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.as_tensor(value, device="cpu")
        if isinstance(value, Mapping):
            flat = self._expand_mapping(value, argument)
        elif isinstance(value, Tensor):
            if value.is_complex() or value.numel() not in (1, self.size):
                raise ValueError(
                    f"{argument} must be a real tensor with one entry or {self.size} entries (one "
                    f"per moved coordinate), got {value.dtype} of shape {tuple(value.shape)}"
                )
            if value.is_meta or value.layout != torch.strided:
                raise ValueError(f"{argument} must be a dense tensor that holds values")
            flat = value.detach().to("cpu", torch.float64).reshape(-1).expand(self.size).clone()
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            flat = torch.full((self.size,), _as_float(value), dtype=torch.float64, device="cpu")
        else:
            raise TypeError(
                f"{argument} must be a number, a mapping from parameter name to values, or a "
                f"tensor, got {type(value).__name__}"
            )
        # What underflows in the working dtype could not move.
        working = flat.to(self.dtype)
        if not bool(torch.isfinite(working).all()) or not bool((working > 0).all()):
            raise ValueError(
                f"{argument} must be positive and finite in every coordinate, as {self.dtype}"
            )
        return flat

    def _expand_mapping(self, value: Mapping[str, Any], argument: str) -> Tensor:
        known = {segment.name for segment in self.segments}
        unknown = sorted(map(str, set(value) - known))
        missing = sorted(known - set(value))
        if unknown or missing:
            raise ValueError(
                f"{argument} must name every moved parameter and no other; missing {missing}, "
                f"unknown {unknown}"
            )
        flat = torch.empty(self.size, dtype=torch.float64, device="cpu")
        for segment in self.segments:
            try:
                given = value[segment.name]
                if torch.as_tensor(given, device="cpu").is_complex():
                    raise TypeError("it is complex")
                entry = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
                entry = entry.expand(segment.shape)
            except (RuntimeError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"{argument}[{segment.name!r}] must be a number or broadcast to shape "
                    f"{tuple(segment.shape)}: {error}"
                ) from error
            flat[segment.start : segment.stop] = entry.reshape(-1)
        return flat

    def describe(self) -> list[list[Any]]:
        """Names and shapes in order, JSON-ready: what a direction's coordinates mean."""
        return [[segment.name, list(segment.shape)] for segment in self.segments]


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the values of some tensors, in their own dtypes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _select(model: nn.Module, parameters: ParameterSelector) -> dict[str, nn.Parameter]:
    everything = dict(model.named_parameters())
    if parameters is None:
        return {name: p for name, p in everything.items() if p.requires_grad and _has_entries(p)}
    if callable(parameters):
        try:
            return {
                name: p
                for name, p in everything.items()
                if p.requires_grad and _has_entries(p) and parameters(name, p)
            }
        except Exception as error:
            raise FastvolError(
                f"parameters: the predicate raised {type(error).__name__}: {error}"
            ) from error
    patterns = [parameters] if isinstance(parameters, str) else parameters
    if not isinstance(patterns, Iterable):
        raise TypeError(
            "parameters must be None, a name, an iterable of names or patterns, or a predicate "
            f"(name, parameter) -> bool, got {type(parameters).__name__}"
        )
    # A tied parameter answers to each of its names.
    first = {id(p): name for name, p in everything.items()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    wanted: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"parameters must contain strings, got {type(pattern).__name__}")
        matches = {names[name] for name in fnmatch.filter(names, pattern)}
        if pattern in names:
            matches = {names[pattern]}
        if not matches:
            raise ValueError(
                f"parameters: {pattern!r} matches no parameter of model; it has {list(everything)}"
            )
        frozen = sorted(name for name in matches if not everything[name].requires_grad)
        if frozen:
            raise ValueError(
                f"parameters: {pattern!r} selects {frozen}, which are frozen "
                "(requires_grad=False); unfreeze them to move them"
            )
        wanted |= matches
    return {name: p for name, p in everything.items() if name in wanted and _has_entries(p)}


def _has_entries(parameter: nn.Parameter) -> bool:
    # One that is not initialised yet has no size to ask for; it is refused later, by name.
    return isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.numel() > 0


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _check_kind(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"model parameter {name!r} is uninitialised; run one forward pass first")
    if not parameter.is_floating_point():
        raise TypeError(
            f"model parameter {name!r} has dtype {parameter.dtype}; only real floating-point "
            "parameters can move (leave it out with parameters=)"
        )
    if parameter.layout != torch.strided:
        raise TypeError(f"model parameter {name!r} is {parameter.layout}, not a dense tensor")
    if parameter.is_meta:
        raise ValueError(f"model parameter {name!r} is on the meta device and holds no values")


def _is_finite(values: Tensor) -> bool:
    # In parts: the temporaries of a large parameter would be as large as itself.
    parts = torch.split(values.reshape(-1), _AT_ONCE) if values.is_contiguous() else [values]
    return all(bool(torch.isfinite(part).all()) for part in parts)
