r"""Where rays are sent: the law of their directions, and what each direction counts for it.

Rays leave along v = P u, u = z/‖z‖ with z ~ N(m, I) in R^d; P = I and m = 0 is the isotropic law.
With ρ the ray's end in multiples of v, x = log(ρ‖v‖) its log length, the volume is

.. math:: \log V = \log V_d(1) + \log|\det P| + \log E[(\rho\|v\|)^d \|v\|^{-d}],

and the mass of a normal law with mean μ (in units of its standard deviation, from θ*) is

.. math:: \log E[I_d(\rho\|v\|, b)\,\|v\|^{-d} / I_d(\infty, a)]
          + \log|\det P| + \|m\|^2/2 - \|\mu\|^2/2,

with b = ⟨v, μ⟩/‖v‖, a = ⟨u, m⟩ and I_d the radial integral (``log_radial_gaussian``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .preconditioners import Preconditioner

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Proposal:
    """The law of the directions.

    Args:
        preconditioner: P.
        offset: m, float64 ``[d]`` on the CPU, or ``None`` for 0.
        name: how P was made, in a word or two.
    """

    preconditioner: Preconditioner
    offset: Tensor | None = None
    name: str = "given"

    @property
    def log_constant(self) -> float:
        """log|det P| + ‖m‖²/2, nats."""
        half = 0.0 if self.offset is None else 0.5 * float(self.offset.square().sum())
        return self.preconditioner.logabsdet + half

    @property
    def log_constant_error(self) -> float:
        """Standard error of :attr:`log_constant`, nats; 0 where the determinant is exact."""
        return float(self.preconditioner.logabsdet_error)

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **self.preconditioner.describe(),
            "name": self.name,
            "shifted": self.offset is not None,
        }

    def directions(self, normals: Tensor) -> Directions:
        """Rays of some standard normal vectors ``[k, d]``."""
        z = normals
        if self.offset is not None:
            z = z + self.offset.to(z)
        return self.of_units(z / z.norm(dim=1, keepdim=True))

    def of_units(self, units: Tensor) -> Directions:
        """Rays of some unit vectors u, ``[k, d]``."""
        v = self.preconditioner.matvec(units)
        log_norm = v.to(torch.float64).norm(dim=1).log().cpu().numpy()
        proposal_shift = np.zeros(len(units))
        if self.offset is not None:
            exact = units.to(torch.float64)
            proposal_shift = (exact @ self.offset.to(exact.device)).cpu().numpy()
        return Directions(v, log_norm, proposal_shift)


@dataclass(frozen=True)
class Directions:
    """Some rays: v ``[k, d]``, log‖v‖ ``[k]`` and a = ⟨u, m⟩ ``[k]``."""

    v: Tensor
    log_norm: Float
    proposal_shift: Float

    def take(self, rows: npt.NDArray[np.int64]) -> Directions:
        """Some of them."""
        index = torch.from_numpy(rows).to(self.v.device)
        return Directions(self.v[index], self.log_norm[rows], self.proposal_shift[rows])

    def shift(self, mean: Tensor | None) -> Float:
        """b = ⟨v, μ⟩/‖v‖, ``[k]``; zeros without a mean."""
        if mean is None:
            return np.zeros(len(self.log_norm))
        exact = self.v.to(torch.float64)
        dot: Float = (exact @ mean.to(exact.device)).cpu().numpy()
        return dot * np.exp(-self.log_norm)
