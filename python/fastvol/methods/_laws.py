"""From ``preconditioner=`` to a law of directions; candidates are judged by a pilot."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch

from .. import preconditioners
from .._proposal import Proposal
from ..errors import FastvolError, FastvolWarning
from ..measures import Gaussian
from ..preconditioners import Built, Curvature, Preconditioner, match_threshold
from ._paths import GRADIENT_COST, Laboratory

NAMES = ("diagonal", "hessian", "ggn", "lowrank", "boundary")

# Log weights whose standard deviation is below this need no better law.
_GOOD = 0.5
# Curvatures beside the largest at which a Lebesgue law stops looking further along flat directions.
_DAMPING = (1e8, 1e6, 1e4, 1e2)
_FACTORS = (1.0, 3.0, 1.0 / 3.0, 10.0, 0.1, 30.0, 1.0 / 30.0, 100.0, 0.01)
_CURVATURE_SHARE = 0.35
_LOWRANK_PRODUCTS = 200
_DIAGONAL_PRODUCTS = 50


def given_law(lab: Laboratory) -> Proposal | None:
    """The law that the call asks for; the isotropic one for ``"auto"`` and ``None``.

    Raises:
        TypeError, ValueError, FastvolError: naming ``preconditioner``.
    """
    problem = lab.problem
    spec = problem.preconditioner
    if spec is None or (isinstance(spec, str) and spec == "auto"):
        return None
    if isinstance(spec, str):
        return named_law(lab, spec)
    made = preconditioners.as_preconditioner(
        spec, problem.layout, problem.ray_scale.flat, problem.objective.module.model
    )
    if isinstance(made, Curvature):
        return curvature_law(lab, made, "optimizer")
    return _shifted(lab, made, "given")


def named_law(lab: Laboratory, name: str) -> Proposal | None:
    """The law of one of :data:`NAMES`."""
    problem = lab.problem
    if lab.no_gradients:
        raise FastvolError(
            f"preconditioner={name!r} needs gradients of the loss, and there is none to go by "
            f"({lab.no_gradients}); take preconditioner=None, a diagonal, a matrix or an operator"
        )
    if name == "boundary":
        learned = lab.improve(None, 32, 0)
        if learned is None:
            lab.remarks.append(
                "preconditioner='boundary' made the pilot's log weights no more even; the "
                "directions are isotropic"
            )
        return learned
    arguments = (problem.objective, problem.layout, problem.ray_scale.flat)
    build: dict[str, Callable[[], Built]] = {
        "hessian": lambda: preconditioners.hessian(*arguments),
        "ggn": lambda: preconditioners.ggn(*arguments),
        "diagonal": lambda: preconditioners.diagonal(*arguments),
        "lowrank": lambda: preconditioners.lowrank(*arguments),
    }
    built = build[name]()
    lab.budget.add(0, built.n_grad)
    return curvature_law(lab, built.curvature, name)


def curvature_law(lab: Laboratory, curvature: Curvature, name: str) -> Proposal:
    """The best law of a curvature's family (I + s|H|)^(−1/2), by the bound of its pilot."""
    problem = lab.problem
    gap = lab.threshold - problem.loss0
    strengths: list[float]
    if isinstance(problem.measure, Gaussian):
        matched = match_threshold(curvature, gap, problem.offset) if gap > 0 else 0.0
        # Where the law as it stands already lies within the basin, it is tried as it is.
        matched = matched or 0.1 / max(curvature.largest, 1e-300)
        strengths = [matched * factor for factor in _FACTORS]
    else:
        largest = max(curvature.largest, 1e-300)
        strengths = [math.inf, *(damping / largest for damping in _DAMPING)]
        if math.isfinite(problem.measure.max_radius) and gap > 0:
            # The ball is close to a normal law of variance R²/d.
            variance = problem.measure.max_radius**2 / problem.dim
            matched = match_threshold(curvature, gap / variance)
            strengths = [matched * factor for factor in _FACTORS if matched > 0] + strengths

    best, best_bound, worse = None, -math.inf, 0
    for strength in strengths:
        offset = None
        if problem.offset is not None:
            offset = curvature.tilted_offset(strength, problem.offset)
        law = Proposal(curvature.preconditioner(strength), offset, name=name)
        bound = lab.bound(law)
        worse = worse + 1 if bound <= best_bound else 0
        if bound > best_bound or best is None:
            best, best_bound = law, bound
        if lab.pilot(best)[0].log_weight_sd < _GOOD or worse == 4:
            break
    assert best is not None
    return best


def auto_law(lab: Laboratory) -> tuple[Proposal | None, list[str]]:
    """The best of what the dimension and the budget allow, and what was tried, in words."""
    problem = lab.problem
    best: Proposal | None = None
    best_sd = lab.pilot(None)[0].log_weight_sd
    tried = [f"none {best_sd:.3g}"]
    if lab.no_gradients or best_sd < _GOOD:
        return best, tried
    affordable = _CURVATURE_SHARE * lab.budget.total
    products = {
        "hessian": problem.dim if problem.dim <= preconditioners.EXACT_DIM else math.inf,
        "diagonal": _DIAGONAL_PRODUCTS,
        "lowrank": _LOWRANK_PRODUCTS,
    }
    for name, count in products.items():
        cost = 2 * GRADIENT_COST * count
        if cost > affordable:
            continue
        affordable -= cost
        try:
            with warnings.catch_warnings():
                # Nobody asked for this curvature; the pilot judges what it is worth.
                warnings.simplefilter("ignore", FastvolWarning)
                law = named_law(lab, name)
        except (FastvolError, ValueError, RuntimeError) as error:
            tried.append(f"{name} failed ({str(error).splitlines()[0]})")
            continue
        sd = lab.pilot(law)[0].log_weight_sd
        tried.append(f"{name} {sd:.3g}")
        if sd < best_sd:
            best, best_sd = law, sd
        if name == "hessian" or best_sd < _GOOD:
            # The others know less of the same curvature.
            break
    if best_sd >= _GOOD:
        improved = lab.improve(best, 32, 0)
        if improved is not best:
            best, best_sd = improved, lab.pilot(improved)[0].log_weight_sd
            tried.append(f"boundary {best_sd:.3g}")
    return best, tried


def _shifted(lab: Laboratory, preconditioner: Preconditioner, name: str) -> Proposal:
    """A given P; under an off-centre law with the shift and size that suit it best."""
    mean = lab.problem.offset
    if mean is None:
        return Proposal(preconditioner, name=name)
    best = Proposal(preconditioner, name=name)
    for factor in _FACTORS:
        size = preconditioners.Diagonal(
            torch.full((preconditioner.dim,), factor, dtype=torch.float64)
        )
        scaled = preconditioners.compose(preconditioner, size)
        law = Proposal(scaled, scaled.rmatvec(mean[None])[0], name=name)
        if lab.bound(law) > lab.bound(best):
            best = law
    return best
