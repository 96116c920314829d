"""Preconditioners: invertible linear maps P on metric coordinates, with their log |det P|."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .._layout import digest

_ORTHONORMAL = 1e-6


@runtime_checkable
class Preconditioner(Protocol):
    """An invertible P on the d moved metric coordinates; rays leave θ* along s ⊙ P z.

    ``logabsdet`` is log |det P| in nats, and ``logabsdet_error`` its standard error (0 where it is
    exact).
    """

    dim: int
    logabsdet: float
    logabsdet_error: float

    def matvec(self, rows: Tensor) -> Tensor:
        """P applied to every row: ``[k, d] -> [k, d]``, in the rows' dtype and on their device."""
        ...

    def rmatvec(self, rows: Tensor) -> Tensor:
        """Pᵀ applied to every row: ``[k, d] -> [k, d]``."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-ready: kind, dim, a digest of the numbers, log |det P|."""
        ...


class Operator(ABC):
    """What this package's own preconditioners share: exact numbers, cast once per device and dtype.

    Args:
        dim: d.
        logabsdet: log |det P|, nats.
        numbers: what P is made of, float64 on the CPU.
        source: where P comes from, JSON-ready; part of :meth:`describe`.
    """

    kind: str
    logabsdet_error: float = 0.0

    def __init__(
        self,
        dim: int,
        logabsdet: float,
        numbers: tuple[Tensor, ...],
        source: Mapping[str, Any] | None = None,
    ) -> None:
        self.dim = dim
        self.logabsdet = logabsdet
        self._numbers = numbers
        self._source = dict(source or {})
        self._cast: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    @abstractmethod
    def matvec(self, rows: Tensor) -> Tensor:
        """See :class:`Preconditioner`."""

    @abstractmethod
    def rmatvec(self, rows: Tensor) -> Tensor:
        """See :class:`Preconditioner`."""

    def describe(self) -> dict[str, Any]:
        """See :class:`Preconditioner`."""
        described = {
            "kind": self.kind,
            "dim": self.dim,
            "sha256": digest(*self._numbers),
            "logabsdet": self.logabsdet,
        }
        if self.logabsdet_error:
            described["logabsdet_error"] = self.logabsdet_error
        if self._source:
            described["source"] = self._source
        return described

    def _numbers_for(self, rows: Tensor) -> tuple[Tensor, ...]:
        self._check_rows(rows)
        key = (rows.device, rows.dtype)
        if key not in self._cast:
            self._cast[key] = tuple(number.to(*key) for number in self._numbers)
        return self._cast[key]

    def _check_rows(self, rows: Tensor) -> None:
        if rows.dim() != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"rows must have shape [k, {self.dim}], got {tuple(rows.shape)}")


class Identity(Operator):
    """P = I.

    Args:
        dim: d.
    """

    kind = "identity"

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 0.0, ())

    def matvec(self, rows: Tensor) -> Tensor:
        self._check_rows(rows)
        return rows

    def rmatvec(self, rows: Tensor) -> Tensor:
        self._check_rows(rows)
        return rows


class Diagonal(Operator):
    """P = diag(values).

    Args:
        values: ``[d]``, finite and not 0.
        source: see :class:`Operator`.

    Raises:
        ValueError: naming ``preconditioner``.
    """

    kind = "diagonal"

    def __init__(self, values: Tensor, *, source: Mapping[str, Any] | None = None) -> None:
        values = _numbers(values, "a diagonal", dims=1)
        _refuse_zeros(values, "a diagonal")
        super().__init__(len(values), float(values.abs().log().sum()), (values,), source)
        self.values = values

    def matvec(self, rows: Tensor) -> Tensor:
        (values,) = self._numbers_for(rows)
        return rows * values

    def rmatvec(self, rows: Tensor) -> Tensor:
        return self.matvec(rows)


class Matrix(Operator):
    """A dense P.

    Args:
        P: ``[d, d]``, finite and not singular.
        logabsdet: log |det P| where it is known; else from an LU decomposition.
        source: see :class:`Operator`.

    Raises:
        ValueError: naming ``preconditioner``.
    """

    kind = "matrix"

    def __init__(
        self,
        P: Tensor,
        *,
        logabsdet: float | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        P = _numbers(P, "a matrix", dims=2)
        if P.shape[0] != P.shape[1]:
            raise ValueError(f"preconditioner must be a square matrix, got {tuple(P.shape)}")
        if logabsdet is None:
            logabsdet = log_abs_det(P)
        super().__init__(len(P), logabsdet, (P,), source)

    def matvec(self, rows: Tensor) -> Tensor:
        (P,) = self._numbers_for(rows)
        return rows @ P.T

    def rmatvec(self, rows: Tensor) -> Tensor:
        (P,) = self._numbers_for(rows)
        return rows @ P


class LowRank(Operator):
    r"""P = D (U diag(values) Uᵀ + rest (I − U Uᵀ)), D = diag(diagonal) or I.

    Args:
        values: ``[k]``, not 0.
        basis: U ``[d, k]`` with orthonormal columns.
        rest: what P multiplies everything else by, not 0; without effect where k = d.
        diagonal: ``[d]``, not 0, or ``None``.
        source: see :class:`Operator`.

    Raises:
        ValueError: naming ``preconditioner``.
    """

    kind = "lowrank"

    def __init__(
        self,
        values: Tensor,
        basis: Tensor,
        rest: float,
        diagonal: Tensor | None = None,
        *,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        values = _numbers(values, "the values of a low-rank operator", dims=1, least=0)
        basis = _numbers(basis, "the basis of a low-rank operator", dims=2, least=0)
        dim, rank = basis.shape
        if len(values) != rank or rank > dim or dim == 0:
            raise ValueError(
                "preconditioner: a low-rank operator needs one value per column of its basis, and "
                f"at most one per row; got {len(values)} values, basis {tuple(basis.shape)}"
            )
        rest = float(rest)
        spread = torch.cat([values, torch.tensor([rest], dtype=torch.float64)])
        if not bool(torch.isfinite(spread).all()):
            raise ValueError(f"preconditioner: rest must be finite, got {rest}")
        _refuse_zeros(spread if rank < dim else values, "a low-rank operator")
        gram = basis.T @ basis - torch.eye(rank, dtype=torch.float64)
        if rank and float(gram.abs().max()) > _ORTHONORMAL:
            raise ValueError(
                "preconditioner: the basis of a low-rank operator must have orthonormal columns; "
                f"they miss it by {float(gram.abs().max()):.2g}"
            )
        logabsdet = float(values.abs().log().sum())
        if rank < dim:
            logabsdet += (dim - rank) * math.log(abs(rest))
        if diagonal is not None:
            diagonal = _numbers(diagonal, "the diagonal of a low-rank operator", dims=1)
            if len(diagonal) != dim:
                raise ValueError(
                    f"preconditioner: diagonal must have {dim} entries, got {len(diagonal)}"
                )
            _refuse_zeros(diagonal, "the diagonal of a low-rank operator")
            logabsdet += float(diagonal.abs().log().sum())
        numbers = (values, basis, torch.tensor(rest, dtype=torch.float64))
        super().__init__(
            dim, logabsdet, numbers if diagonal is None else (*numbers, diagonal), source
        )

    def matvec(self, rows: Tensor) -> Tensor:
        values, basis, rest, *diagonal = self._numbers_for(rows)
        rows = _low_rank(rows, values, basis, rest)
        return rows * diagonal[0] if diagonal else rows

    def rmatvec(self, rows: Tensor) -> Tensor:
        values, basis, rest, *diagonal = self._numbers_for(rows)
        return _low_rank(rows * diagonal[0] if diagonal else rows, values, basis, rest)


def _low_rank(rows: Tensor, values: Tensor, basis: Tensor, rest: Tensor) -> Tensor:
    return rest * rows + ((values - rest) * (rows @ basis)) @ basis.T


class Composed(Operator):
    """P = outer · inner.

    Args:
        outer, inner: preconditioners of one size.
        source: see :class:`Operator`.
    """

    kind = "composed"

    def __init__(
        self,
        outer: Preconditioner,
        inner: Preconditioner,
        *,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(outer.dim, outer.logabsdet + inner.logabsdet, (), source)
        self.logabsdet_error = math.hypot(outer.logabsdet_error, inner.logabsdet_error)
        self._outer, self._inner = outer, inner

    def matvec(self, rows: Tensor) -> Tensor:
        return self._outer.matvec(self._inner.matvec(rows))

    def rmatvec(self, rows: Tensor) -> Tensor:
        return self._inner.rmatvec(self._outer.rmatvec(rows))

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        parts = [self._outer.describe(), self._inner.describe()]
        text = json.dumps(parts, sort_keys=True).encode()
        return {**described, "sha256": hashlib.sha256(text).hexdigest(), "factors": parts}


def compose(
    outer: Preconditioner, inner: Preconditioner, *, source: Mapping[str, Any] | None = None
) -> Preconditioner:
    """outer · inner, as one diagonal or one matrix where both are.

    Args:
        outer, inner: preconditioners of one size.
        source: see :class:`Operator`.
    """
    if outer.dim != inner.dim:
        raise ValueError(f"preconditioners of {outer.dim} and {inner.dim} coordinates do not fit")
    if isinstance(outer, Diagonal) and isinstance(inner, Diagonal):
        return Diagonal(outer.values * inner.values, source=source)
    if isinstance(outer, Matrix | Diagonal) and isinstance(inner, Matrix | Diagonal):
        P = outer.matvec(inner.matvec(torch.eye(inner.dim, dtype=torch.float64)))
        logabsdet = outer.logabsdet + inner.logabsdet
        return Matrix(P.T, logabsdet=logabsdet, source=source)
    return Composed(outer, inner, source=source)


def _numbers(values: Any, what: str, dims: int, least: int = 1) -> Tensor:
    """A float64 copy on the CPU."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiu":
        values = torch.as_tensor(values)
    if not isinstance(values, Tensor):
        raise TypeError(
            f"preconditioner: {what} must be a real tensor, got {type(values).__name__}"
        )
    if values.is_complex() or values.is_meta or values.layout != torch.strided:
        raise ValueError(f"preconditioner: {what} must be a dense real tensor that holds values")
    if values.dim() != dims or values.shape[0] < least:
        raise ValueError(
            f"preconditioner: {what} must have {dims} axes and not be empty, got shape "
            f"{tuple(values.shape)}"
        )
    exact = values.detach().to("cpu", torch.float64, copy=True).contiguous()
    if not bool(torch.isfinite(exact).all()):
        raise ValueError(f"preconditioner: {what} has values that are not finite")
    return exact


def _refuse_zeros(values: Tensor, what: str) -> None:
    if bool((values == 0).any()):
        raise ValueError(
            f"preconditioner is singular: {what} has {int((values == 0).sum())} zeros; P must "
            "reach every moved coordinate"
        )


def log_abs_det(P: Tensor) -> float:
    """log |det P| of a matrix, nats.

    Raises:
        ValueError: P is singular to rounding; naming ``preconditioner``.
    """
    # Balanced first: what is singular does not depend on the units of a coordinate.
    rows = P.norm(dim=1)
    if bool((rows == 0).any()):
        raise ValueError("preconditioner is singular: it has rows of zeros")
    balanced = P / rows[:, None]
    columns = balanced.norm(dim=0)
    if bool((columns == 0).any()):
        raise ValueError("preconditioner is singular: it has columns of zeros")
    lu = torch.linalg.lu_factor_ex(balanced / columns).LU.diagonal().abs()
    if float(lu.min()) <= len(P) * torch.finfo(torch.float64).eps * float(lu.max()):
        raise ValueError(
            "preconditioner is singular to rounding: its columns are linearly dependent"
        )
    return float(lu.log().sum() + rows.log().sum() + columns.log().sum())
