"""How parameter space is weighted: Lebesgue volume, or the mass of a normal law."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

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
        if isinstance(self.max_radius, bool) or not isinstance(self.max_radius, (int, float)):
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
        if isinstance(self.std, bool) or not isinstance(
            self.std, (int, float, Mapping, torch.Tensor)
        ):
            raise TypeError(
                "std must be a number, a mapping from parameter name to numbers or tensors, or a "
                f"tensor, got {type(self.std).__name__}"
            )
        if isinstance(self.std, (int, float)):
            if not 0 < self.std <= sys.float_info.max:
                raise ValueError(f"std must be positive and finite, got {self.std}")
            object.__setattr__(self, "std", float(self.std))

    def describe(self) -> dict[str, Any]:
        """The measure as JSON-ready values, for the config of a result."""
        std: Any
        if isinstance(self.std, float):
            std = self.std
        elif isinstance(self.std, Mapping):
            std = {
                name: torch.as_tensor(value, dtype=torch.float64, device="cpu").tolist()
                for name, value in self.std.items()
            }
        else:
            assert isinstance(self.std, torch.Tensor)
            std = self.std.tolist()
        return {"kind": self.kind, "std": std, "center": self.center}


Measure = Lebesgue | Gaussian


def _cpu_tensor(values: list[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def measure_from(description: Mapping[str, Any]) -> Measure:
    """The measure that :meth:`describe` wrote down."""
    if description["kind"] == "lebesgue":
        return Lebesgue(description["max_radius"])
    if description["kind"] == "gaussian":
        std = description["std"]
        if isinstance(std, Mapping):
            std = {
                name: _cpu_tensor(value) if isinstance(value, list) else value
                for name, value in std.items()
            }
        elif isinstance(std, list):
            std = _cpu_tensor(std)
        return Gaussian(std, description["center"])
    raise FastvolError(f"unknown measure {description['kind']!r}")
