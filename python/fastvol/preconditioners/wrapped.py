"""A user's operator as a preconditioner, after probing that it can be one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .operators import Operator, log_abs_det

# What P does to each row of a block: [k, d] -> [k, d].
_RowMap = Callable[[Tensor], Tensor]

_ADJOINT = 1e-4
# Up to this size an operator's matrix is formed, and what it says of its determinant is checked.
_DENSE_CHECK = 512
_PROBE_SEED = 20_111


class Wrapped(Operator):
    """A user's operator, after probing that it is linear, invertible and its own adjoint's adjoint.

    ``obj`` needs ``matvec``, ``rmatvec`` and ``logabsdet`` (a number, or a method that returns
    one), and may have ``logabsdet_error``. Its methods may take rows ``[k, d]`` or one vector
    ``[d]``, as PyTorch tensors or NumPy arrays (a SciPy ``LinearOperator``): which, is found by
    probing, and rows are converted to what the operator takes where it cannot take them as they
    come.

    Args:
        obj: the operator.
        dim: d.
        device: where the operator's own tensors may lie, besides the CPU.

    Raises:
        TypeError: a method or ``logabsdet`` is missing or of a wrong kind.
        ValueError: the operator fails a probe. Up to d = 512 its matrix is formed, and
            ``logabsdet`` compared with it. Both name ``preconditioner``.
    """

    kind = "operator"

    def __init__(self, obj: Any, dim: int, device: torch.device | str | None = None) -> None:
        for name in ("matvec", "rmatvec"):
            if not callable(getattr(obj, name, None)):
                raise TypeError(
                    f"preconditioner ({type(obj).__name__}) must have a method {name}; an operator "
                    "needs matvec, rmatvec and logabsdet"
                )
        shape = getattr(obj, "shape", None)
        if shape is not None and tuple(shape) != (dim, dim):
            raise ValueError(
                f"preconditioner has shape {tuple(shape)}, where {(dim, dim)} moves all coordinates"
            )
        logabsdet = _attribute_or_method(obj, "logabsdet")
        if logabsdet is None:
            raise TypeError(
                f"preconditioner ({type(obj).__name__}) must have logabsdet, the logarithm of "
                "|det P|, as a number or as a method that returns it; without it no volume follows"
            )
        self._apply = {
            name: _as_row_map(getattr(obj, name), name, dim, torch.device(device or "cpu"))
            for name in ("matvec", "rmatvec")
        }
        self._obj = obj
        self._forms: dict[tuple[str, torch.device, torch.dtype], _RowMap] = {}
        probe = _probe(dim)
        image = self._apply["matvec"](probe)
        # An operator has no numbers to take a digest of, but what it does to fixed vectors.
        super().__init__(dim, logabsdet, (image,))
        self.logabsdet_error = _attribute_or_method(obj, "logabsdet_error") or 0.0
        if not 0 <= self.logabsdet_error < math.inf:
            raise ValueError(
                f"preconditioner: logabsdet_error must be at least 0, got {self.logabsdet_error}"
            )
        self._check(probe, image)

    def matvec(self, rows: Tensor) -> Tensor:
        return self._form("matvec", rows)(rows)

    def rmatvec(self, rows: Tensor) -> Tensor:
        return self._form("rmatvec", rows)(rows)

    def _form(self, name: str, rows: Tensor) -> _RowMap:
        """The operator as it takes rows of this dtype on this device."""
        self._check_rows(rows)
        key = (name, rows.device, rows.dtype)
        if key not in self._forms:
            exact = self._apply[name]

            def converted(rows: Tensor) -> Tensor:
                return exact(rows).to(rows)

            # As it comes, if that works and agrees: a copy to the CPU may cost more than P.
            probe = _probe(self.dim)
            direct = getattr(self._obj, name)
            given = _attempt(direct, probe.to(rows))
            agrees = (
                given is not None
                and given.device == rows.device
                and given.dtype == rows.dtype
                and _close(given.to("cpu", torch.float64), exact(probe), rows.dtype)
            )
            self._forms[key] = direct if agrees else converted
        return self._forms[key]

    def _check(self, probe: Tensor, image: Tensor) -> None:
        apply, adjoint = self._apply["matvec"], self._apply["rmatvec"]
        other = probe.flip(0)
        mixed = apply(2.0 * probe + other)
        if not _close(mixed, 2.0 * image + image.flip(0), torch.float32):
            raise ValueError("preconditioner.matvec is not linear: P(2x + y) is not 2 P x + P y")
        if bool((image.norm(dim=1) == 0).any()):
            raise ValueError("preconditioner is singular: P x is 0 for a random x")
        back = adjoint(other)
        left, right = (image * other).sum(dim=1), (probe * back).sum(dim=1)
        allowed = max(_ADJOINT / math.sqrt(self.dim), 1e-6)
        size = image.norm(dim=1) * other.norm(dim=1) + probe.norm(dim=1) * back.norm(dim=1)
        if bool(((left - right).abs() > allowed * size).any()):
            raise ValueError(
                "preconditioner.rmatvec is not the transpose of matvec: ⟨P x, y⟩ is not ⟨x, Pᵀ y⟩ "
                f"({float(left[0]):.6g} and {float(right[0]):.6g} for random x and y)"
            )
        if not math.isfinite(self.logabsdet):
            raise ValueError(f"preconditioner.logabsdet must be finite, got {self.logabsdet}")
        if self.dim <= _DENSE_CHECK:
            exact = log_abs_det(apply(torch.eye(self.dim, dtype=torch.float64)).T)
            allowed = 1e-4 * self.dim + 6.0 * self.logabsdet_error
            if abs(exact - self.logabsdet) > allowed:
                raise ValueError(
                    f"preconditioner.logabsdet is {self.logabsdet:.6g}, but the matrix that matvec "
                    f"stands for has log |det P| = {exact:.6g}"
                )


def _attribute_or_method(obj: Any, name: str) -> float | None:
    value = getattr(obj, name, None)
    if value is None:
        return None
    try:
        return float(value() if callable(value) else value)
    except Exception as error:
        raise TypeError(
            f"preconditioner.{name} must be a number, or a method that returns one: {error}"
        ) from error


def _probe(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    # As many rows as coordinates could not be told from a matrix of columns.
    count = 3 if dim != 3 else 4
    return torch.randn(count, dim, dtype=torch.float64, generator=generator)


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e3 * torch.finfo(dtype).eps
    return bool(((a - b).norm(dim=1) <= tolerance * b.norm(dim=1)).all())


def _attempt(call: Callable[[Any], Any], rows: Any) -> Tensor | None:
    """What ``call`` returns, if it is a tensor or array of the shape of ``rows``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A tensor and an array that meet may work by a mechanism that NumPy gives up.
        warnings.simplefilter("error", DeprecationWarning)
        try:
            result = call(rows)
        except Exception:
            return None
    if isinstance(rows, np.ndarray) and isinstance(result, np.ndarray):
        result = torch.as_tensor(result) if result.dtype.kind in "fiu" else None
    return result if isinstance(result, Tensor) and result.shape == rows.shape else None


def _as_row_map(call: Callable[[Any], Any], name: str, dim: int, device: torch.device) -> _RowMap:
    """``call`` as a map to float64 rows on the CPU, however it takes its argument."""

    def on_rows(rows: Tensor) -> Tensor:
        result: Tensor = call(rows)
        return result

    def on_vectors(rows: Tensor) -> Tensor:
        return torch.stack([call(row) for row in rows])

    def on_arrays(rows: Tensor) -> Tensor:
        return torch.stack([torch.as_tensor(call(row.numpy())) for row in rows])

    def form(probe: Tensor) -> _RowMap | None:
        together, alone = _attempt(call, probe), _attempt(call, probe[:1])
        if (
            together is not None
            and alone is not None
            and _close(alone, together[:1], torch.float32)
        ):
            return on_rows
        if _attempt(call, probe[0]) is not None:
            return on_vectors
        on_cpu = probe.device.type == "cpu"
        return on_arrays if on_cpu and _attempt(call, probe[0].numpy()) is not None else None

    for where in {torch.device("cpu"): None, device: None}:
        for dtype in (torch.float64, torch.float32):
            probe = _probe(dim).to(where, dtype)
            found = form(probe)
            if found is None:
                continue
            if not bool(torch.isfinite(found(probe)).all()):
                raise ValueError(f"preconditioner.{name} gives values that are not finite")
            return _converted(found, where, dtype)
    try:
        call(_probe(dim)[0])
        reason = f"it returned no tensor or array of shape ({dim},)"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    raise TypeError(
        f"preconditioner.{name} takes neither rows [k, {dim}] nor a vector [{dim}], as a tensor or "
        f"a NumPy array ({reason})"
    )


def _converted(apply: _RowMap, device: torch.device, dtype: torch.dtype) -> _RowMap:
    return lambda rows: apply(rows.to(device, dtype)).detach().to("cpu", torch.float64)
