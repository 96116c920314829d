"""The quadratic model of a basin: curvature H, and the preconditioners that follow from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .._layout import digest
from ..errors import FastvolError
from .operators import Diagonal, Identity, LowRank, Matrix, Preconditioner

# Relative to the largest eigenvalue: what counts as none, and what strength=inf takes for none.
_ZERO = 1e-8
_FLOOR = 1e-10
# The smallest curvature that a square root and a reciprocal leave finite.
_LEAST = 1e-200


class Curvature(ABC):
    r"""A symmetric H ``[d, d]`` in metric coordinates w: the loss is about L(θ*) + ½ wᵀ H w.

    Where H is indefinite, |H| (the same eigenvectors, absolute eigenvalues) takes its place
    throughout.

    Args:
        dim: d.
        resolution: the relative size below which an eigenvalue is rounding.
    """

    kind: str

    def __init__(self, dim: int, resolution: float) -> None:
        self.dim = dim
        self.resolution = resolution

    @property
    @abstractmethod
    def largest(self) -> float:
        """The largest |eigenvalue|, loss per squared unit of w."""

    @property
    @abstractmethod
    def n_negative(self) -> int:
        """How many eigenvalues are negative beyond 1e-8 of the largest, or beyond rounding."""

    @property
    @abstractmethod
    def n_zero(self) -> int:
        """How many eigenvalues are within 1e-8 of the largest, or within rounding, of 0."""

    def preconditioner(self, strength: float) -> Preconditioner:
        r"""P with :math:`P P^T = (I + \mathrm{strength}\,|H|)^{-1}`, and :math:`|H|^{-1}` at ∞.

        The unit normal law tilted by exp(−strength · ½ wᵀ|H|w) is that of P z, z ~ N(0, I): 0 is
        the identity, ∞ makes an ellipsoidal basin round. At ∞ eigenvalues are floored at 1e-10 of
        the largest, or at their rounding where that is more: a flat direction is then looked at
        10⁵ (in float32: 10³) times as far as the sharpest, and P stays finite.

        Args:
            strength: in [0, ∞], in reciprocal units of the loss.

        Raises:
            ValueError: ``strength`` is negative or NaN.
            FastvolError: at ∞, where H is 0.
        """
        if not strength >= 0:
            raise ValueError(f"strength must be at least 0, got {strength}")
        if strength == 0:
            return Identity(self.dim)
        source = {"from": "curvature", "curvature": self.kind, "strength": _json(strength)}
        if strength < math.inf:
            return self._root(1.0, strength, 0.0, source)
        if self.largest <= 0:
            raise FastvolError("preconditioner: the curvature is 0; there is nothing to scale by")
        return self._root(0.0, 1.0, max(_FLOOR, self.resolution) * self.largest, source)

    def mean_excess(self, strength: float, mu: Tensor | None = None) -> float:
        r"""Mean of ½ wᵀ|H|w under the unit normal law, tilted by ``strength``: nats, or loss.

        .. math:: \tfrac12 \mathrm{tr}(|H| A^{-1}) + \tfrac12 m^T |H| m, \quad
            A = I + \mathrm{strength}\,|H|, \; m = A^{-1} \mu

        It falls from its value at 0 towards 0 as ``strength`` grows.

        Args:
            strength: in [0, ∞).
            mu: the centre of the law, float64 ``[d]``; 0 by default.

        Raises:
            ValueError: naming ``strength`` or ``mu``.
        """
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be finite and at least 0, got {strength}")
        return self._mean_excess(strength, None if mu is None else self._centre(mu))

    def tilted_offset(self, strength: float, mu: Tensor) -> Tensor:
        r"""The m of a proposal w = P z, z ~ N(m, I), whose mean is (I + strength·|H|)⁻¹ μ.

        With P = :meth:`preconditioner`, m = Pᵀ μ: :math:`(I + \mathrm{strength}|H|)^{-1/2} \mu`
        where P is symmetric.

        Args:
            strength: in [0, ∞).
            mu: the centre of the law, ``[d]``.

        Returns:
            float64 ``[d]`` on the CPU.
        """
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be finite and at least 0, got {strength}")
        return self.preconditioner(strength).rmatvec(self._centre(mu)[None])[0]

    def describe(self) -> dict[str, Any]:
        """JSON-ready: kind, dim, a digest of the numbers, and what the spectrum looks like."""
        return {
            "kind": self.kind,
            "dim": self.dim,
            "sha256": digest(*self._numbers()),
            "largest": self.largest,
            "n_negative": self.n_negative,
            "n_zero": self.n_zero,
        }

    @abstractmethod
    def _root(
        self, one: float, strength: float, floor: float, source: dict[str, Any]
    ) -> Preconditioner:
        """P with P Pᵀ = (one · I + strength · max(|H|, floor))⁻¹."""

    @abstractmethod
    def _mean_excess(self, strength: float, mu: Tensor | None) -> float: ...

    @abstractmethod
    def _numbers(self) -> tuple[Tensor, ...]: ...

    def _centre(self, mu: Tensor) -> Tensor:
        mu = mu.detach().to("cpu", torch.float64)
        if mu.shape != (self.dim,):
            raise ValueError(f"mu must have shape ({self.dim},), got {tuple(mu.shape)}")
        return mu


class _Spectral(Curvature):
    """Known by its eigenvalues, each with a multiplicity."""

    def __init__(
        self, eigenvalues: Tensor, multiplicity: Tensor, dim: int, resolution: float
    ) -> None:
        super().__init__(dim, resolution)
        self._eigenvalues = eigenvalues
        self._multiplicity = multiplicity

    @property
    def largest(self) -> float:
        present = self._eigenvalues[self._multiplicity > 0]
        return float(present.abs().max()) if len(present) else 0.0

    @property
    def n_negative(self) -> int:
        return int(self._multiplicity[self._eigenvalues < -self._none].sum())

    @property
    def n_zero(self) -> int:
        return int(self._multiplicity[self._eigenvalues.abs() <= self._none].sum())

    @property
    def _none(self) -> float:
        return max(_ZERO, self.resolution) * self.largest

    def _mean_excess(self, strength: float, mu: Tensor | None) -> float:
        size = self._eigenvalues.abs()
        shrunk = 1.0 / (1.0 + strength * size)
        excess = self._multiplicity * size * shrunk
        if mu is not None:
            excess = excess + size * shrunk.square() * self._squares(mu)
        return 0.5 * float(excess.sum())

    @abstractmethod
    def _squares(self, mu: Tensor) -> Tensor:
        """The squared length of μ in each eigenspace."""

    def _values(self, one: float, strength: float, floor: float) -> Tensor:
        return (one + strength * self._eigenvalues.abs().clamp(min=floor)).rsqrt()


class DiagonalCurvature(_Spectral):
    """H = diag(h).

    Args:
        h: ``[d]``, finite.
        resolution: see :class:`Curvature`.
    """

    kind = "diagonal"

    def __init__(self, h: Tensor, *, resolution: float = 0.0) -> None:
        h = _checked(h, "h", dims=1)
        super().__init__(h, torch.ones_like(h), len(h), resolution)

    def _root(
        self, one: float, strength: float, floor: float, source: dict[str, Any]
    ) -> Preconditioner:
        return Diagonal(self._values(one, strength, floor), source=source)

    def _squares(self, mu: Tensor) -> Tensor:
        return mu.square()

    def _numbers(self) -> tuple[Tensor, ...]:
        return (self._eigenvalues,)


class DenseCurvature(_Spectral):
    """A full symmetric H, decomposed once in float64.

    Args:
        H: ``[d, d]``; its symmetric part is used.
        resolution: see :class:`Curvature`.
    """

    kind = "dense"

    def __init__(self, H: Tensor, *, resolution: float = 0.0) -> None:
        H = _checked(H, "H", dims=2)
        if H.shape[0] != H.shape[1]:
            raise ValueError(f"H must be square, got {tuple(H.shape)}")
        # A power of two leaves every digit, and no square inside the decomposition overflows.
        unit = 2.0 ** math.floor(math.log2(float(H.abs().max()) or 1.0))
        self._basis: Tensor
        eigenvalues, self._basis = torch.linalg.eigh((H / unit + H.T / unit) / 2.0)
        super().__init__(
            eigenvalues * unit, torch.ones(len(H), dtype=torch.float64), len(H), resolution
        )

    def _root(
        self, one: float, strength: float, floor: float, source: dict[str, Any]
    ) -> Preconditioner:
        values = self._values(one, strength, floor)
        # The symmetric root: eigenvectors of equal eigenvalues are arbitrary, P is not.
        P = (self._basis * values) @ self._basis.T
        return Matrix(P, logabsdet=float(values.log().sum()), source=source)

    def _squares(self, mu: Tensor) -> Tensor:
        return (self._basis.T @ mu).square()

    def _numbers(self) -> tuple[Tensor, ...]:
        return self._eigenvalues, self._basis


class LowRankCurvature(_Spectral):
    r"""H = U diag(eigenvalues) Uᵀ + rest (I − U Uᵀ).

    Args:
        eigenvalues: ``[k]``, of either sign.
        basis: U ``[d, k]`` with orthonormal columns.
        rest: the curvature of every other direction, at least 0.
        resolution: see :class:`Curvature`.
    """

    kind = "lowrank"

    def __init__(
        self, eigenvalues: Tensor, basis: Tensor, rest: float, *, resolution: float = 0.0
    ) -> None:
        eigenvalues, self._basis = _checked_pairs(eigenvalues, basis)
        dim, rank = self._basis.shape
        if not 0 <= rest < math.inf:
            raise ValueError(f"rest must be finite and at least 0, got {rest}")
        self.rest = float(rest)
        everything = torch.cat([eigenvalues, torch.tensor([self.rest], dtype=torch.float64)])
        multiplicity = torch.ones_like(everything)
        multiplicity[-1] = dim - rank
        super().__init__(everything, multiplicity, dim, resolution)

    def _root(
        self, one: float, strength: float, floor: float, source: dict[str, Any]
    ) -> Preconditioner:
        values = self._values(one, strength, floor)
        return LowRank(values[:-1], self._basis, float(values[-1]), source=source)

    def _squares(self, mu: Tensor) -> Tensor:
        inside = self._basis.T @ mu
        outside = (mu - self._basis @ inside).square().sum()
        return torch.cat([inside.square(), outside[None]])

    def _numbers(self) -> tuple[Tensor, ...]:
        return self._eigenvalues, self._basis


class DiagonalPlusLowRankCurvature(Curvature):
    r"""H = diag(diagonal) + U diag(eigenvalues) Uᵀ, for remainders that differ between coordinates.

    Args:
        eigenvalues: ``[k]``; absolute values are used.
        basis: U ``[d, k]`` with orthonormal columns.
        diagonal: ``[d]``, at least 0.
        resolution: see :class:`Curvature`.
    """

    kind = "diagonal+lowrank"

    def __init__(
        self, eigenvalues: Tensor, basis: Tensor, diagonal: Tensor, *, resolution: float = 0.0
    ) -> None:
        self._eigenvalues, self._basis = _checked_pairs(eigenvalues, basis)
        self._diagonal = _checked(diagonal, "diagonal", dims=1)
        if len(self._diagonal) != len(self._basis) or bool((self._diagonal < 0).any()):
            raise ValueError(
                f"diagonal must have {len(self._basis)} entries, none of them negative"
            )
        super().__init__(len(self._basis), resolution)

    @property
    def largest(self) -> float:
        # Exact where the largest eigenvector and the largest diagonal entry coincide, else more.
        top = float(self._eigenvalues.abs().max()) if len(self._eigenvalues) else 0.0
        return top + float(self._diagonal.max())

    @property
    def n_negative(self) -> int:
        return int((self._eigenvalues < -self._none).sum())

    @property
    def n_zero(self) -> int:
        """How many are 0 in the diagonal, less those that the low-rank part may lift."""
        return max(0, int((self._diagonal <= self._none).sum()) - len(self._eigenvalues))

    @property
    def _none(self) -> float:
        return max(_ZERO, self.resolution) * self.largest

    def _factors(self, one: float, strength: float, floor: float) -> tuple[Tensor, Tensor, Tensor]:
        """D, Q, v with P = D (Q diag(v) Qᵀ + I − Q Qᵀ): what makes the diagonal 1, then the rest.

        With B = √strength D U √|Λ|, the inverse of P Pᵀ is D⁻¹ (I + B Bᵀ) D⁻¹.
        """
        outer = (one + strength * self._diagonal.clamp(min=floor)).rsqrt()
        weights = (strength * self._eigenvalues.abs()).sqrt()
        orthonormal, upper = torch.linalg.qr(outer[:, None] * self._basis * weights)
        left, sizes, _ = torch.linalg.svd(upper)
        return outer, orthonormal @ left, (1.0 + sizes.square()).rsqrt()

    def _root(
        self, one: float, strength: float, floor: float, source: dict[str, Any]
    ) -> Preconditioner:
        outer, basis, values = self._factors(one, strength, floor)
        return LowRank(values, basis, 1.0, outer, source=source)

    def _mean_excess(self, strength: float, mu: Tensor | None) -> float:
        outer, basis, values = self._factors(1.0, strength, 0.0)
        shrink = values.square() - 1.0
        # The diagonal of (I + strength·H)⁻¹, and what it leaves of each eigenvector.
        inverse = outer.square() * (1.0 + basis.square() @ shrink)
        scaled = outer[:, None] * self._basis
        inside = basis.T @ scaled
        left = scaled.square().sum(dim=0) + shrink @ inside.square()
        size = self._eigenvalues.abs()
        excess = float(self._diagonal @ inverse + size @ left)
        if mu is not None:
            mean = outer * mu
            mean = outer * (mean + basis @ (shrink * (basis.T @ mean)))
            excess += float(self._diagonal @ mean.square() + size @ (self._basis.T @ mean).square())
        return 0.5 * excess

    def _numbers(self) -> tuple[Tensor, ...]:
        return self._eigenvalues, self._basis, self._diagonal


def match_threshold(curvature: Curvature, gap: float, mu: Tensor | None = None) -> float:
    r"""The strength s ≥ 0 at which the tilted law's mean excess loss is ``gap``, in 1/loss.

    A proposal of that strength has its mass where the loss crosses the threshold. 0 where the
    untilted law's mean already lies below.

    Args:
        curvature: H in the coordinates in which the law is the unit normal one.
        gap: τ − L(θ*) > 0.
        mu: the law's centre, see :meth:`Curvature.mean_excess`.

    Raises:
        ValueError: ``gap`` is not positive and finite.
        FastvolError: the mean excess is not finite.
    """
    if not 0 < gap < math.inf:
        raise ValueError(f"gap must be positive and finite: the threshold's excess, got {gap}")
    untilted = curvature.mean_excess(0.0, mu)
    if not math.isfinite(untilted):
        raise FastvolError(f"preconditioner: the mean excess of the quadratic model is {untilted}")
    if untilted <= gap:
        return 0.0
    # No mean falls faster than (1 + s λ)⁻² with the largest λ, nor slower than these two terms,
    # of which λ / (1 + s λ) ≤ 1/s and λ / (1 + s λ)² ≤ 1/(4 s) give half of gap each.
    low = (math.sqrt(untilted / gap) - 1.0) / curvature.largest
    length = 0.0 if mu is None else float(mu.to(torch.float64).square().sum())
    high = curvature.dim / gap + length / (4.0 * gap)

    def log_ratio(log_strength: float) -> float:
        # An excess that underflows is only ever too small.
        return math.log(max(curvature.mean_excess(math.exp(log_strength), mu), _LEAST) / gap)

    log_low, log_high = math.log(max(low, _LEAST)), math.log(high)
    # Both ends hold but for their rounding.
    if log_ratio(log_low) <= 0:
        return math.exp(log_low)
    if log_ratio(log_high) >= 0:
        return math.exp(log_high)
    # Slow to import.
    from scipy.optimize import brentq

    return math.exp(brentq(log_ratio, log_low, log_high, xtol=1e-10))


def _json(strength: float) -> float | str:
    return "inf" if strength == math.inf else float(strength)


def _checked(values: Tensor, name: str, dims: int) -> Tensor:
    if values.dim() != dims or len(values) == 0:
        raise ValueError(f"{name} must have {dims} axes and entries, got {tuple(values.shape)}")
    exact = values.detach().to("cpu", torch.float64).contiguous()
    if not bool(torch.isfinite(exact).all()):
        raise FastvolError(f"preconditioner: the curvature ({name}) is not finite")
    return torch.where(exact.abs() < _LEAST, 0.0, exact)


def _checked_pairs(eigenvalues: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    basis = _checked(basis, "basis", dims=2)
    if eigenvalues.shape != (basis.shape[1],) or basis.shape[1] > basis.shape[0]:
        raise ValueError(
            f"eigenvalues must have one entry per column of the basis {tuple(basis.shape)}, at "
            f"most one per row; got shape {tuple(eigenvalues.shape)}"
        )
    exact = eigenvalues.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(exact).all()):
        raise FastvolError("preconditioner: the curvature (eigenvalues) is not finite")
    return exact, basis
