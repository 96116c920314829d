"""A law of directions as arrays, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch

from .._proposal import Proposal
from ..errors import FastvolError
from ..preconditioners import (
    Composed,
    Diagonal,
    Identity,
    LowRank,
    Matrix,
    Preconditioner,
    Wrapped,
)
from ..preconditioners.operators import Operator

Arrays = dict[str, npt.NDArray[Any]]


def store_law(law: Proposal | None, name: str, arrays: Arrays) -> dict[str, Any] | None:
    """JSON-ready; numbers go to ``arrays`` under names that begin with ``name``.

    An operator of the caller's own is expected from him again.
    """
    if law is None:
        return None
    if law.offset is not None:
        arrays[f"{name}.offset"] = law.offset.numpy()
    return {
        "name": law.name,
        "shifted": law.offset is not None,
        "preconditioner": _store(law.preconditioner, f"{name}.p", arrays),
    }


def restore_law(
    told: Mapping[str, Any] | None, name: str, arrays: Mapping[str, npt.NDArray[Any]], given: Any
) -> Proposal | None:
    """The law that :func:`store_law` wrote.

    Args:
        told: what it returned. name, arrays: as they were given to it.
        given: called without arguments for the caller's own operator.

    Raises:
        FastvolError: that is another one.
    """
    if told is None:
        return None
    offset = torch.from_numpy(arrays[f"{name}.offset"].copy()) if told["shifted"] else None
    made = _restore(told["preconditioner"], f"{name}.p", arrays, given)
    return Proposal(made, offset, name=told["name"])


def _store(made: Preconditioner, name: str, arrays: Arrays) -> dict[str, Any]:
    if isinstance(made, Composed):
        factors = [
            _store(factor, f"{name}{i}", arrays)
            for i, factor in enumerate((made._outer, made._inner))
        ]
        return {"kind": made.kind, "source": made._source, "factors": factors}
    if not isinstance(made, Operator):
        raise TypeError(f"preconditioner of type {type(made).__name__} cannot be kept in a file")
    for i, number in enumerate(made._numbers):
        arrays[f"{name}.{i}"] = number.numpy()
    return {
        "kind": made.kind,
        "dim": made.dim,
        "count": len(made._numbers),
        "source": made._source,
        "logabsdet": made.logabsdet,
    }


def _restore(
    told: Mapping[str, Any], name: str, arrays: Mapping[str, npt.NDArray[Any]], given: Any
) -> Preconditioner:
    kind, source = told["kind"], told["source"]
    if kind == Composed.kind:
        outer, inner = (
            _restore(factor, f"{name}{i}", arrays, given)
            for i, factor in enumerate(told["factors"])
        )
        return Composed(outer, inner, source=source)
    numbers = [torch.from_numpy(arrays[f"{name}.{i}"].copy()) for i in range(told["count"])]
    if kind == Wrapped.kind:
        wrapped: Operator = given()
        # What it does to fixed vectors is all that is known of it.
        if not torch.allclose(wrapped._numbers[0], numbers[0], rtol=1e-5):
            raise FastvolError(
                "checkpoint: preconditioner is not the operator that the folder was made with: it "
                "takes the same vectors elsewhere"
            )
        return wrapped
    made: Operator
    if kind == Identity.kind:
        made = Identity(told["dim"])
    elif kind == Diagonal.kind:
        made = Diagonal(numbers[0], source=source)
    elif kind == Matrix.kind:
        made = Matrix(numbers[0], logabsdet=told["logabsdet"], source=source)
    elif kind == LowRank.kind:
        values, basis, rest, *diagonal = numbers
        made = LowRank(values, basis, float(rest), *diagonal, source=source)
    else:
        raise ValueError(f"a preconditioner of kind {kind!r} is unknown")
    # A sum may be rounded otherwise elsewhere.
    made.logabsdet = told["logabsdet"]
    return made
