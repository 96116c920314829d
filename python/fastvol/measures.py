"""How parameter space is weighted: Lebesgue volume, or the mass of a normal law."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ._layout import digest
from .errors import FastvolError


@dataclass(frozen=True)
class Lebesgue:
    r"""Volume of the star basin inside a ball, :math:`\log \mathrm{vol}(S \cap B_R)`.

    Args:
        max_radius: R > 0, in metric coordinates (the units of ``log_radii``). Infinite by default;
            then a ray that never crosses the threshold makes the volume a lower bound.

    Raises:
        ValueError: ``max_radius`` is not a positive number.
    """

    max_radius: float = math.inf

    kind: ClassVar[str] = "lebesgue"

    def __post_init__(self) -> None:
        if isinstance(self.max_radius, bool) or not isinstance(self.max_radius, numbers.Real):
            raise TypeError(f"max_radius must be a number, got {type(self.max_radius).__name__}")
        if not self.max_radius > 0:
            raise ValueError(f"max_radius must be positive, got {self.max_radius}")
        try:
            object.__setattr__(self, "max_radius", float(self.max_radius))
        except OverflowError as error:
            raise ValueError("max_radius is too large for a float; use math.inf") from error

    def describe(self) -> dict[str, Any]:
        """The measure as JSON-ready values, for the config of a result."""
        return {"kind": self.kind, "max_radius": self.max_radius}


@dataclass(frozen=True, eq=False)
class Gaussian:
    r"""Probability of the star basin under a normal law of the parameters.

    With ``center="minimum"`` the law is :math:`N(\theta^*, \mathrm{std}^2)`, with
    ``center="origin"`` it is :math:`N(0, \mathrm{std}^2)`: with the standard deviation of the
    initialisation that is the "local volume" of Scherlis & Belrose (arXiv 2501.18812), and minus
    its logarithm is a description length in nats. The mass does not depend on the metric.

    Args:
        std: standard deviation in parameter coordinates: a positive number, a mapping from
            parameter name to a number or a tensor that broadcasts to that parameter, or one tensor
            with an entry per moved coordinate.
        center: ``"minimum"`` or ``"origin"``.

    Raises:
        TypeError, ValueError: ``std`` is not positive and finite, or ``center`` is unknown.
    """

    std: float | Mapping[str, float | torch.Tensor] | torch.Tensor
    center: Literal["minimum", "origin"] = "minimum"

    kind: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        if self.center not in ("minimum", "origin"):
            raise ValueError(f"center must be 'minimum' or 'origin', got {self.center!r}")
        std: Any = self.std
        if isinstance(std, numbers.Real) and not isinstance(std, bool):
            try:
                std = float(std)
            except OverflowError as error:
                raise ValueError("std is too large for a float") from error
            if not 0 < std < math.inf:
                raise ValueError(f"std must be positive and finite, got {std}")
        elif isinstance(std, Mapping):
            # Copies: the caller may go on to change his tensors.
            std = {name: _copy(value) for name, value in std.items()}
        elif isinstance(std, (torch.Tensor, np.ndarray)):
            std = _copy(std)
        else:
            raise TypeError(
                "std must be a number, a mapping from parameter name to numbers or tensors, or a "
                f"tensor, got {type(std).__name__}"
            )
        object.__setattr__(self, "std", std)

    def describe(self) -> dict[str, Any]:
        """The measure as JSON-ready values, for the config of a result; tensors by their digest."""
        std: Any = self.std
        if isinstance(std, Mapping):
            std = {str(name): _described(value) for name, value in std.items()}
        return {"kind": self.kind, "std": _described(std), "center": self.center}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of ``std`` by the names that a file gives them."""
        if isinstance(self.std, torch.Tensor):
            return {STD_PREFIX: self.std}
        if not isinstance(self.std, Mapping):
            return {}
        return {
            f"{STD_PREFIX}.{name}": value
            for name, value in self.std.items()
            if isinstance(value, torch.Tensor)
        }


Measure = Lebesgue | Gaussian

STD_PREFIX = "std"


def measure_from(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Measure:
    """The measure of a description and of the tensors that belong to it."""
    if description["kind"] == "lebesgue":
        return Lebesgue(description["max_radius"])
    if description["kind"] != "gaussian":
        raise FastvolError(f"unknown measure {description['kind']!r}")
    std = description["std"]
    if STD_PREFIX in tensors:
        std = tensors[STD_PREFIX]
    elif isinstance(std, Mapping):
        std = {name: tensors.get(f"{STD_PREFIX}.{name}", value) for name, value in std.items()}
    return Gaussian(std, description["center"])


def _copy(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray, list, tuple)):
        try:
            tensor = torch.as_tensor(value, device="cpu")
            if not tensor.is_complex():
                return tensor.detach().to(torch.float64).clone()
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            pass  # named when the values are laid out over the parameters
    return value


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"sha256": digest(value), "shape": list(value.shape)}
    return value if isinstance(value, (dict, str)) else float(value)
