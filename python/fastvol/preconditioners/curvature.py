"""Curvature at the minimum: exact, Gauss-Newton, diagonal, low-rank, or an optimizer's."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .._layout import ParameterLayout
from .._objective import PREFIX, Objective
from .._state import preserved, unwrap
from ..errors import FastvolError, warn
from .products import NO_GRADIENTS_NEEDED, Kind, Products, Via
from .quadratic import (
    Curvature,
    DenseCurvature,
    DiagonalCurvature,
    DiagonalPlusLowRankCurvature,
    LowRankCurvature,
)

EXACT_DIM = 5000
_KRYLOV = 3
_KRYLOV_BLOCK = 4
_TRACE_PROBES = 24
_ASYMMETRY = 1e-3
_EXACT_ROWS = 512
# Standard errors below 0 at which none of a million entries is taken for negative by chance.
_CERTAIN = 6.0


class Built(NamedTuple):
    """A curvature, what it cost, and how it was made.

    Args:
        curvature: H in metric coordinates w.
        n_grad: gradients of the whole objective; a product with H counts as 2.
        provenance: JSON-ready.
    """

    curvature: Curvature
    n_grad: int
    provenance: dict[str, Any]


def hessian(
    objective: Objective, layout: ParameterLayout, scale: Tensor, *, via: Via = "auto"
) -> Built:
    r"""The Hessian of L with respect to w at θ*, d × d, exact but for rounding: loss per w².

    .. math:: H_{ij} = s_i s_j \, \partial^2 L / \partial\theta_i \partial\theta_j

    From d products with the unit vectors; exact within the arithmetic of the model's dtype, summed
    over batches in float64.

    Args:
        objective: the loss over the data.
        layout: the moved parameters.
        scale: s, float64 ``[size]`` on the CPU; 0 where a coordinate does not move.
        via: who makes the products: ``"curvlinops"``, ``"torch"``, or ``"auto"``: curvlinops where
            it is installed and the problem fits its interface.

    Raises:
        ValueError: d is more than 5,000.
        FastvolError: there are no gradients or second derivatives, they are not finite, or H is 0.
    """
    return _exact(objective, layout, scale, "hessian", via)


def ggn(
    objective: Objective, layout: ParameterLayout, scale: Tensor, *, via: Via = "auto"
) -> Built:
    r"""The generalised Gauss-Newton matrix with respect to w at θ*, d × d: loss per w².

    .. math:: H = S \, \mathrm{mean}(J^T \, \nabla^2_{\mathrm{out}} \ell \, J) \, S, \quad
        J = \partial\,\mathrm{out} / \partial\theta

    Schraudolph (2002). Positive semi-definite where the loss is convex in the model's outputs, and
    equal to the Hessian where the fit is exact or the model linear.

    Args:
        objective, layout, scale, via: as for :func:`hessian`.

    Raises:
        ValueError: there is no ``data=``, or d is more than 5,000.
        FastvolError: as for :func:`hessian`.
    """
    return _exact(objective, layout, scale, "ggn", via)


def diagonal(
    objective: Objective,
    layout: ParameterLayout,
    scale: Tensor,
    *,
    n_probes: int = 50,
    seed: int = 0,
) -> Built:
    r"""The diagonal of the Hessian with respect to w at θ*, ``[d]``: loss per w².

    .. math:: \hat h = \frac1n \sum_p z_p \odot H z_p, \quad z_p \in \{-1, 1\}^d

    Bekas, Kokiopoulou & Saad (2007). An entry's standard error is its row's off-diagonal norm over
    √n, so an entry below its own error is set to that error. Exact where d ≤ n.

    Args:
        objective, layout, scale: as for :func:`hessian`.
        n_probes: n.
        seed: of the probes.

    Raises:
        FastvolError: as for :func:`hessian`.
    """
    with preserved(objective.module.model):
        n_grad = require_gradient(objective, layout, "diagonal")
        products = Products(objective, layout, scale, "hessian", name="diagonal")
        exact = products.dim <= n_probes
        if exact:
            H = products(torch.eye(products.dim, dtype=torch.float64))
            h, error = H.diagonal().clone(), torch.zeros(products.dim, dtype=torch.float64)
        else:
            h, error = _hutchinson(products, n_probes, seed)
        if not bool(h.any()):
            _refuse_zero(objective, layout, scale, "diagonal")
    n_negative = int((h < -torch.maximum(_CERTAIN * error, 1e-8 * h.abs().max())).sum())
    if n_negative:
        warn(
            f"preconditioner='diagonal': {n_negative} of the {len(h)} diagonal entries of the "
            "Hessian are negative: the model does not stand at a minimum; absolute values are used"
        )
    size = torch.maximum(torch.where(h.abs() > error, h.abs(), error), 1e-12 * h.abs().max())
    # Each entry is known to its own last digits, however small it is beside the others.
    curvature = DiagonalCurvature(size)
    provenance = {
        "kind": "diagonal",
        "via": products.via,
        "n_probes": products.dim if exact else n_probes,
        "n_negative": n_negative,
        "n_unresolved": int((h.abs() <= error).sum()),
    }
    return Built(curvature, n_grad + 2 * products.n_products, provenance)


def lowrank(
    objective: Objective,
    layout: ParameterLayout,
    scale: Tensor,
    *,
    rank: int | None = None,
    kind: Kind = "hessian",
    rest: Literal["mean", "parameter"] = "mean",
    seed: int = 0,
    via: Via = "torch",
) -> Built:
    r"""The leading eigenpairs of H in w, and one number (or one a parameter) for the rest.

    .. math:: H \approx U \Lambda U^T + \mathrm{rest} \, (I - U U^T)

    Eigenpairs of largest magnitude by a randomised block Krylov method (Musco & Musco 2015) in a
    space of 3 × rank vectors; ``rest`` is the mean remaining eigenvalue, by Hutchinson probes of
    the trace outside U, and not below 0. With ``rest="parameter"`` it is the mean remaining
    diagonal entry of each parameter tensor instead: H ≈ U Λ Uᵀ + diag(rest).

    Args:
        objective, layout, scale: as for :func:`hessian`.
        rank: how many eigenpairs; min(64, d // 10), at least 1, by default.
        kind: ``"hessian"`` or ``"ggn"``.
        rest: what stands for the remaining spectrum.
        seed: of the first vectors and of the probes.
        via: as for :func:`hessian`. Few products are made at a time, for which PyTorch's kept graph
            is the faster by far: hence the default.

    Raises:
        ValueError: naming ``rank`` or ``rest``; or ``kind="ggn"`` without ``data=``.
        FastvolError: as for :func:`hessian`.
    """
    if rest not in ("mean", "parameter"):
        raise ValueError(f"rest must be 'mean' or 'parameter', got {rest!r}")
    with preserved(objective.module.model):
        products = Products(objective, layout, scale, kind, via, name="lowrank")
        d = products.dim
        wanted = max(1, min(64, d // 10)) if rank is None else int(rank)
        if not 1 <= wanted <= d:
            raise ValueError(f"rank must be from 1 to {d}, got {rank}")
        n_grad = require_gradient(objective, layout, "lowrank")
        eigenvalues, basis = _leading(products, wanted, seed)
        if not bool(eigenvalues.any()):
            _refuse_zero(objective, layout, scale, "lowrank")
        remainder = _remainder(products, eigenvalues, basis, seed) if len(eigenvalues) < d else None
    resolution = _resolution(layout)
    provenance: dict[str, Any] = {
        "kind": "lowrank",
        "matrix": kind,
        "via": products.via,
        "rank": len(eigenvalues),
        "rest": rest,
    }
    curvature: Curvature
    if remainder is None or rest == "mean":
        level = 0.0 if remainder is None else float(remainder.sum()) / (d - len(eigenvalues))
        provenance["rest_value"] = level
        curvature = LowRankCurvature(eigenvalues, basis, max(0.0, level), resolution=resolution)
    else:
        curvature = DiagonalPlusLowRankCurvature(
            eigenvalues, basis, _by_parameter(remainder, layout, scale), resolution=resolution
        )
    _warn_indefinite(curvature, "lowrank", len(eigenvalues))
    return Built(curvature, n_grad + 2 * products.n_products, provenance)


def from_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, layout: ParameterLayout, scale: Tensor
) -> Built:
    r"""The second moments of an Adam-like optimizer, as a diagonal curvature in w, ``[d]``.

    .. math:: h = s^2 \odot \hat v, \quad \hat v = \mathrm{exp\_avg\_sq} / (1 - \beta_2^t)

    A diagonal empirical Fisher matrix, up to a factor that depends on the size of the batches: its
    shape says more than its size. With ``amsgrad`` the running maximum takes the place of v.

    Args:
        optimizer: Adam, AdamW, NAdam, RAdam, or any that keeps ``exp_avg_sq``, after a step.
        model: the model it trains, wrapped or not.
        layout, scale: as for :func:`hessian`.

    Raises:
        ValueError: naming ``preconditioner`` and what is missing.
        FastvolError: the moments are 0 or not finite.
    """
    named = dict(unwrap(model).named_parameters())
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    what = f"preconditioner ({type(optimizer).__name__})"
    moved = [segment for segment in layout.segments if bool(scale[_span(segment)].any())]
    strangers = [s.name for s in moved if id(named.get(s.name)) not in groups]
    if strangers:
        raise ValueError(
            f"{what} does not hold the model's parameters {strangers}; pass the optimizer that "
            "trained this very model (a copy of the model has other parameters)"
        )
    states = {s.name: optimizer.state.get(named[s.name]) or {} for s in moved}
    if not any(states.values()):
        raise ValueError(
            f"{what} has no state yet: it has not stepped (or keeps none, as SGD without momentum "
            "does); pass an Adam-like optimizer after training"
        )
    missing = [name for name, state in states.items() if "exp_avg_sq" not in state]
    if missing:
        raise ValueError(
            f"{what} keeps no exp_avg_sq for {missing}; it has {sorted(_keys(states))}. Adam-like "
            "optimizers that have stepped on every moved parameter can be used; leave other "
            "parameters out with parameters="
        )
    v = torch.zeros(layout.size, dtype=torch.float64)
    for segment in moved:
        v[_span(segment)] = _second_moment(
            states[segment.name], groups[id(named[segment.name])], segment.name, what
        )
    moving = scale > 0
    h = v[moving] * scale[moving].square()
    if not bool(torch.isfinite(h).all()):
        raise FastvolError(f"{what}: its second moments (exp_avg_sq) are not finite")
    if not bool((h > 0).any()):
        raise FastvolError(f"{what}: its second moments (exp_avg_sq) are all 0")
    provenance = {"kind": "optimizer", "via": type(optimizer).__name__}
    return Built(DiagonalCurvature(h.clamp(min=0.0)), 0, provenance)


def require_gradient(objective: Objective, layout: ParameterLayout, preconditioner: str) -> int:
    """Checks that the loss can be differentiated at θ*; returns what that cost, in gradients.

    Args:
        objective, layout: the loss, and the moved parameters.
        preconditioner: its name, for the message.

    Raises:
        FastvolError: the loss is no differentiable function of the parameters, or its gradient is
            not finite.
    """
    if _gradient(objective, layout, layout.flatten(), preconditioner) is None:
        raise FastvolError(
            f"preconditioner={preconditioner!r} needs gradients, but what loss_fn returns does not "
            "depend on the moved parameters by differentiable operations; " + NO_GRADIENTS_NEEDED
        )
    return 1


def _gradient(
    objective: Objective, layout: ParameterLayout, theta: Tensor, name: str
) -> Tensor | None:
    """∇L with respect to θ, float64 on the CPU, or ``None`` where there is no graph to it."""
    total, weight, found = torch.zeros(layout.size, dtype=torch.float64), 0.0, False
    for batch in objective.batches():
        point = theta.clone().requires_grad_()
        weight += batch.weight
        with torch.enable_grad(), warnings.catch_warnings():
            # Of a loss that returns a float; that is refused below.
            warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad")
            value = objective.call(layout.unflatten(point, PREFIX), batch)
        if not isinstance(value, Tensor):
            raise FastvolError(
                f"preconditioner={name!r} needs gradients, but loss_fn returned a "
                f"{type(value).__name__}, not a tensor; " + NO_GRADIENTS_NEEDED
            )
        if not value.requires_grad:
            continue
        try:
            (slope,) = torch.autograd.grad(value.reshape(()), point, allow_unused=True)
        except RuntimeError as error:
            raise FastvolError(
                f"preconditioner={name!r} needs gradients, which PyTorch does not give here "
                f"({error}); {NO_GRADIENTS_NEEDED}"
            ) from error
        if slope is not None:
            found = True
            total += batch.weight * slope.to("cpu", torch.float64)
    if not bool(torch.isfinite(total).all()):
        raise FastvolError(
            f"preconditioner={name!r}: the gradient of loss_fn at the model's parameters is not "
            "finite; " + NO_GRADIENTS_NEEDED
        )
    return total / weight if found else None


def _refuse_zero(objective: Objective, layout: ParameterLayout, scale: Tensor, name: str) -> None:
    """Says why there is no curvature: no gradient anywhere, or a flatter minimum than a parabola.

    Raises:
        FastvolError: always.
    """
    length = _length(layout, scale)
    for factor, seed in itertools.product((0.1, 1.0, 10.0), range(4)):
        step = factor * length * _direction(scale, seed)
        try:
            gradient = _gradient(objective, layout, _moved(layout, scale, step), name)
        except FastvolError:
            continue
        if gradient is not None and bool(gradient[scale > 0].any()):
            raise FastvolError(
                f"preconditioner={name!r}: the curvature of loss_fn at the model's parameters is "
                "0 (a saturated cross-entropy, or a loss that grows faster than a square); use "
                "preconditioner='boundary', which looks where the loss meets the threshold"
            )
    raise FastvolError(
        f"preconditioner={name!r} needs gradients, but the gradient of loss_fn is 0 at the model's "
        "parameters and around them: it is piecewise constant (as an error rate is), or saturated; "
        + NO_GRADIENTS_NEEDED
    )


def _length(layout: ParameterLayout, scale: Tensor) -> float:
    """‖θ*/s‖, or √d where that is no length."""
    moving = scale > 0
    length = float((layout.flatten().to("cpu", torch.float64)[moving] / scale[moving]).norm())
    return length if 0 < length < math.inf else math.sqrt(int(moving.sum()))


def _direction(scale: Tensor, seed: int) -> Tensor:
    """A random unit vector ``[d]``."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(int((scale > 0).sum()), dtype=torch.float64, generator=generator)
    v /= v.norm()
    return v


def _moved(layout: ParameterLayout, scale: Tensor, step: Tensor) -> Tensor:
    """θ* + s ⊙ step ``[size]`` in the working dtype."""
    full = torch.zeros(layout.size, dtype=torch.float64)
    full[scale > 0] = step * scale[scale > 0]
    theta = layout.flatten()
    return theta + full.to(theta)


def _exact(
    objective: Objective, layout: ParameterLayout, scale: Tensor, kind: Kind, via: Via
) -> Built:
    d = int((scale > 0).sum())
    if d > EXACT_DIM:
        raise ValueError(
            f"preconditioner={kind!r} is an exact matrix, for at most {EXACT_DIM} moved "
            f"coordinates; there are {d}: use 'lowrank' or 'diagonal'"
        )
    with preserved(objective.module.model):
        # Before anything is evaluated: without data= there is nothing to do.
        products = Products(objective, layout, scale, kind, via)
        n_grad = require_gradient(objective, layout, kind)
        H = torch.empty((d, d), dtype=torch.float64)
        for start in range(0, d, _EXACT_ROWS):
            rows = torch.zeros((min(_EXACT_ROWS, d - start), d), dtype=torch.float64)
            rows[:, start:].fill_diagonal_(1.0)
            H[start : start + len(rows)] = products(rows)
        if not bool(H.any()):
            _refuse_zero(objective, layout, scale, kind)
    size = float(H.norm())
    asymmetry = float((H - H.T).norm()) / size if size > 0 else 0.0
    resolution = _resolution(layout)
    if asymmetry > max(_ASYMMETRY, resolution):
        warn(
            f"preconditioner={kind!r}: the matrix of second derivatives is not symmetric (relative "
            f"{asymmetry:.2g}): a backward pass of the model is wrong or too coarse; its symmetric "
            "part is used"
        )
    # What differs between H and its transpose is rounding, and measures it.
    curvature = DenseCurvature(H, resolution=max(resolution, min(asymmetry, _ASYMMETRY)))
    _warn_indefinite(curvature, kind, d)
    provenance = {
        "kind": kind,
        "via": products.via,
        "asymmetry": asymmetry,
        "largest": curvature.largest,
        "n_negative": curvature.n_negative,
        "n_zero": curvature.n_zero,
    }
    return Built(curvature, n_grad + 2 * products.n_products, provenance)


def _leading(products: Products, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of largest magnitude ``[k]`` and their vectors ``[d, k]``, by block Krylov.

    The basis is not restarted: the cost is known beforehand, and Ritz vectors that have not
    converged stand for a cluster of eigenvalues, in which any vector will do. At d = 235,146 and
    rank 64, ARPACK takes four times as long, nearly all of it in its own arithmetic on one vector
    at a time; 99.7 % of its Σ|λ| are found here.
    """
    d, size = products.dim, _KRYLOV * rank + _KRYLOV_BLOCK
    if size >= d:
        H = products(torch.eye(d, dtype=torch.float64))
        values, vectors = torch.linalg.eigh(0.5 * (H + H.T))
        order = values.abs().argsort(descending=True)[:rank]
        return values[order], vectors[:, order].contiguous()
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn((_KRYLOV_BLOCK, d), dtype=torch.float64, generator=generator)
    basis = torch.empty((size, d), dtype=torch.float64)
    projected = torch.zeros((size, size), dtype=torch.float64)
    done = 0
    while True:
        known = basis[:done]
        # Twice, since what is left the first time may be rounding alone: then it is a fresh start.
        for _ in range(2):
            block = torch.linalg.qr((block - (block @ known.T) @ known).T).Q.T
        stop = min(done + len(block), size)
        basis[done:stop] = block[: stop - done]
        block = products(basis[done:stop])
        projected[:stop, done:stop] = basis[:stop] @ block.T
        done = stop
        if done == size:
            break
    upper = projected.triu()
    values, mixing = torch.linalg.eigh(upper + upper.triu(1).T)
    order = values.abs().argsort(descending=True)[:rank]
    # Orthonormal to the last digit, whatever the basis has lost.
    return values[order], torch.linalg.qr(basis.T @ mixing[:, order]).Q


def _remainder(products: Products, eigenvalues: Tensor, basis: Tensor, seed: int) -> Tensor:
    """An estimate, ``[d]``, of the diagonal of (I − U Uᵀ) H (I − U Uᵀ)."""
    generator = torch.Generator().manual_seed(seed + 1)
    signs = torch.randint(0, 2, (_TRACE_PROBES, products.dim), generator=generator)
    total, length = torch.zeros(products.dim, dtype=torch.float64), 0.0
    for row in signs.to(torch.float64)[:, None] * 2.0 - 1.0:
        outside = row - (row @ basis) @ basis.T
        length += float(outside.square().sum())
        image = products(outside)
        total += (row * (image - (image @ basis) @ basis.T))[0]
    # By the length of the probes rather than their number: exact where all that is left is equal.
    return total * ((products.dim - basis.shape[1]) / length)


def _by_parameter(remainder: Tensor, layout: ParameterLayout, scale: Tensor) -> Tensor:
    """The mean over each parameter's moved coordinates, not below 0."""
    full = torch.zeros(layout.size, dtype=torch.float64)
    moving = scale > 0
    full[moving] = remainder
    for segment in layout.segments:
        part, moves = full[_span(segment)], moving[_span(segment)]
        if bool(moves.any()):
            part.fill_(max(0.0, float(part[moves].mean())))
    return full[moving]


def _hutchinson(products: Products, n_probes: int, seed: int) -> tuple[Tensor, Tensor]:
    """The diagonal ``[d]`` and its standard error."""
    if n_probes < 2:
        raise ValueError(f"n_probes must be at least 2, got {n_probes}")
    generator = torch.Generator().manual_seed(seed)
    mean = torch.zeros(products.dim, dtype=torch.float64)
    squares = torch.zeros(products.dim, dtype=torch.float64)
    done = 0
    while done < n_probes:
        count = min(_TRACE_PROBES, n_probes - done)
        signs = torch.randint(0, 2, (count, products.dim), generator=generator)
        rows = signs.to(torch.float64) * 2.0 - 1.0
        for sample in rows * products(rows):
            done += 1
            step = sample - mean
            mean += step / done
            squares += step * (sample - mean)
    return mean, (squares / (n_probes * (n_probes - 1.0))).sqrt()


def _second_moment(
    state: Mapping[str, Any], group: Mapping[str, Any], name: str, what: str
) -> Tensor:
    v = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    try:
        step, beta = float(state["step"]), float(group["betas"][1])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{what} keeps exp_avg_sq for {name!r}, but no step or no betas to correct its bias "
            f"with ({type(error).__name__}: {error})"
        ) from error
    correction = 1.0 - beta**step
    if not correction > 0:
        raise ValueError(f"{what} has not stepped on {name!r}: its step is {step}")
    corrected: Tensor = v.detach().to("cpu", torch.float64).reshape(-1) / correction
    return corrected


def _keys(states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {str(key) for state in states.values() for key in state}


def _span(segment: Any) -> slice:
    return slice(segment.start, segment.stop)


def _resolution(layout: ParameterLayout) -> float:
    """The relative size below which an eigenvalue is rounding, in the coarsest dtype."""
    return 10.0 * max(torch.finfo(segment.dtype).eps for segment in layout.segments)


def _warn_indefinite(curvature: Curvature, name: str, known: int) -> None:
    if curvature.n_negative:
        warn(
            f"preconditioner={name!r}: the curvature at the model's parameters has "
            f"{curvature.n_negative} negative among {known} eigenvalues: the model does not stand "
            "at a minimum; absolute values are used"
        )
