"""Preconditioners P: along which directions rays leave the minimum. They never change the answer.

``operators`` are the linear maps, ``quadratic`` what follows from a curvature, ``curvature`` and
``boundary`` where one comes from, ``given`` what a user hands in.
"""

from __future__ import annotations

from .boundary import from_boundary
from .curvature import (
    EXACT_DIM,
    Built,
    diagonal,
    from_optimizer,
    ggn,
    hessian,
    lowrank,
    require_gradient,
)
from .given import as_preconditioner
from .operators import (
    Composed,
    Diagonal,
    Identity,
    LowRank,
    Matrix,
    Preconditioner,
    compose,
)
from .products import Products
from .quadratic import (
    Curvature,
    DenseCurvature,
    DiagonalCurvature,
    DiagonalPlusLowRankCurvature,
    LowRankCurvature,
    match_threshold,
)
from .wrapped import Wrapped

__all__ = [
    "EXACT_DIM",
    "Built",
    "Composed",
    "Curvature",
    "DenseCurvature",
    "Diagonal",
    "DiagonalCurvature",
    "DiagonalPlusLowRankCurvature",
    "Identity",
    "LowRank",
    "LowRankCurvature",
    "Matrix",
    "Preconditioner",
    "Products",
    "Wrapped",
    "as_preconditioner",
    "compose",
    "diagonal",
    "from_boundary",
    "from_optimizer",
    "ggn",
    "hessian",
    "lowrank",
    "match_threshold",
    "require_gradient",
]
