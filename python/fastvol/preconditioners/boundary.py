"""A preconditioner learned from the boundary of the basin: points on it and their normals."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FastvolError
from .operators import Diagonal, Identity, Matrix, Operator, Preconditioner, compose

FULL_DIM = 4000
# Scales of one direction beside another's: where the normals never point, nothing else bounds P.
_WIDEST = 1e10
_RANK = 1e-8


def from_boundary(
    points: Tensor,
    normals: Tensor,
    *,
    power: float = 1.0,
    previous: Preconditioner | None = None,
) -> Preconditioner:
    r"""P from n points x on the boundary and the normals g there; x in metric coordinates.

    With g scaled so that g·x = 1, and the second moments of both over the points, taken at unit
    length (u = x/‖x‖ with g/‖x‖, so that no far point outweighs the others),

    .. math:: X C_g X = C_x, \quad X = C_x \# C_g^{-1}, \quad P = X^{\mathrm{power}/2}

    # the geometric mean of positive matrices (Bhatia 2007). On an ellipsoid {xᵀAx = c}, g = A x/c
    for every point, so X = c A⁻¹ solves this whatever the points are, and rays along P z, z
    isotropic, all have one radius. Rounding aside that is exact from n = d points on; elsewhere
    n ≥ 1.25 d is enough and more than 2 d gains little. There is no shrinkage: towards the diagonal
    it was measured to cost rotated bodies more than it gives others, at any n > d.

    Where the loss meets the threshold as the p-th power of coordinates, one update takes an error
    of log P by the factor 1 − power·p/2: ``power=1`` is right for ellipsoids (p = 2), but turns
    the error of an l4 ball or of a singular minimum Σ(ab)² into its opposite (p = 4), where
    ``power=0.5`` is right at once; p = 1 takes several updates. One set of
    points does not tell p (the growth of the loss along rays, d log(L − L*)/d log r, suggests it):
    try 1 and 0.5, and keep what has the smaller spread of log radii.

    Where the points do not span all of d, or d > 4,000, P is diagonal:
    :math:`P_{ii} = (C_{x,ii} / C_{g,ii})^{\mathrm{power}/4}`. Pairs ± of one point on a symmetric
    body count once.

    Args:
        points: x ``[n, d]``; with ``previous`` z ``[n, d]``, x = previous z, which for rays is
            radius times the direction before the previous P.
        normals: g ``[n, d]``, any positive multiple of ∇L with respect to ``points`` (with
            ``previous`` that is Pᵀ ∇L, its ``rmatvec``). Rows that are not finite, or that do not
            point outward (g·x ≤ 0), are left out together with their points.
        power: how far to go, > 0.
        previous: the P that made the rays; the result is ``previous`` times the update.

    Returns:
        P; ``describe()["source"]`` says how many rows were used, and left out, and the form.

    Raises:
        ValueError: the shapes do not fit, or ``power`` is not positive.
        FastvolError: no usable row is left.
    """
    if points.dim() != 2 or points.shape != normals.shape or 0 in points.shape:
        raise ValueError(
            f"points and normals must both have shape [n, d], got {tuple(points.shape)} and "
            f"{tuple(normals.shape)}"
        )
    if not 0 < power < float("inf"):
        raise ValueError(f"power must be positive and finite, got {power}")
    x, g = _usable(points, normals)
    d = points.shape[1]
    # In units in which the diagonal solution is 1.
    unit = _diagonal(x, g)
    root = None
    if len(x) >= d and d <= FULL_DIM:
        root = _full(x / unit, g * unit)
    source = {
        "from": "boundary",
        "form": "diagonal" if root is None else "full",
        "power": float(power),
        "n_used": len(x),
        "n_dropped": len(points) - len(x),
    }
    update: Operator
    if root is None:
        update = Diagonal(unit**power, source=source)
    else:
        vectors, sizes, _ = torch.linalg.svd(unit[:, None] * root)
        P = (vectors * sizes**power) @ vectors.T
        update = Matrix(P, logabsdet=power * float(sizes.log().sum()), source=source)
    if previous is None or isinstance(previous, Identity):
        return update
    return compose(previous, update, source=source)


def _usable(points: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (x, g)/‖x‖ with g·x = 1 beforehand, float64 on the CPU."""
    x = points.detach().to("cpu", torch.float64)
    g = normals.detach().to("cpu", torch.float64)
    finite = torch.isfinite(x).all(dim=1) & torch.isfinite(g).all(dim=1)
    x, g = x[finite], g[finite]
    # Scaled first, so that no product over- or underflows.
    length, steepness = x.abs().amax(dim=1, keepdim=True), g.abs().amax(dim=1, keepdim=True)
    nonzero = ((length > 0) & (steepness > 0)).flatten()
    x, g, length = x[nonzero] / length[nonzero], g[nonzero] / steepness[nonzero], length[nonzero]
    norm = x.norm(dim=1, keepdim=True)
    outward = (x * g).sum(dim=1, keepdim=True)
    kept = (outward > 0).flatten()
    if not bool(kept.any()):
        raise FastvolError(
            "preconditioner='boundary': of the gradients at the threshold none is finite and "
            "points outward; there is nothing to learn a preconditioner from"
        )
    x, g, norm, outward, length = (t[kept] for t in (x, g, norm, outward, length))
    far = length * norm
    return x / norm, g / outward / length / far


def _diagonal(x: Tensor, g: Tensor) -> Tensor:
    """√X of the diagonal solution ``[d]``, within 10^±5 of its median."""
    spread, slope = x.square().mean(dim=0).sqrt(), g.square().mean(dim=0).sqrt()
    width = spread / slope
    known = width[(spread > 0) & (slope > 0)]
    middle = float(known.median()) if len(known) else 1.0
    width = torch.nan_to_num(width, nan=middle, posinf=torch.inf)
    return width.clamp(middle / _WIDEST, middle * _WIDEST).sqrt()


def _full(x: Tensor, g: Tensor) -> Tensor | None:
    """A P with P Pᵀ = C_x # C_g⁻¹, ``[d, d]``, or ``None`` where the points do not span."""
    d = x.shape[1]
    # Moments are never formed: their condition number is the square of the rows'.
    of_x = torch.linalg.qr(x, mode="r").R
    sizes = torch.linalg.svdvals(of_x)
    if float(sizes[-1]) <= _RANK * float(sizes[0]):
        return None
    least = float(g.norm()) / (d**0.5 * _WIDEST)
    padded = torch.cat([g, least * torch.eye(d, dtype=g.dtype)])
    of_g = torch.linalg.qr(padded, mode="r").R
    # With C_x = Rₓᵀ Rₓ and C_g = R_gᵀ R_g: P = R_g⁻¹ (R_g C_x R_gᵀ)^¼.
    _, sizes, right = torch.linalg.svd(of_x @ of_g.T)
    quarter = (right.T * sizes.sqrt()) @ right
    root: Tensor = torch.linalg.solve_triangular(of_g, quarter, upper=True)
    return root
