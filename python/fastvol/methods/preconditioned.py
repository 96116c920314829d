r"""Importance sampling of directions: rays along P u, counted with their density.

log V = log V_d(1) + log|det P| + log E[(ρ‖v‖)^d ‖v‖^−d], v = P u: P never changes the answer, only
how many rays it takes. With P = H^(−1/2) the weights of an ellipsoidal basin are all equal; under
a normal law P = (I + s·H)^(−1/2) in units of its standard deviation, with s such that the tilted
law's mean excess loss is that of the threshold, and shifted to the tilted law's mean where the law
is not centred at the minimum.
"""

from __future__ import annotations

from typing import Any

from .._problem import Problem
from .._proposal import Proposal
from ..result import VolumeEstimate
from ._laws import auto_law, given_law
from ._paths import laboratory
from ._rays import run_threshold


def run(problem: Problem) -> list[VolumeEstimate]:
    """One estimate per threshold, from the same directions if P is the same."""
    with problem.bar() as bar:
        return [_run_threshold(problem, threshold, bar) for threshold in problem.thresholds]


def _run_threshold(problem: Problem, threshold: float, bar: Any) -> VolumeEstimate:
    engine = problem.engine()
    spec = problem.preconditioner
    automatic = _is(spec, "auto")
    lab = laboratory(problem, engine, threshold, frugal=not (automatic or _is(spec, "boundary")))
    notes: tuple[str, ...] = ()
    law: Proposal | None
    if automatic:
        law, tried = auto_law(lab)
        if law is None:
            notes = (
                "no preconditioner made the pilot's log weights more even (standard deviation, "
                f"nats: {', '.join(tried)}); the directions are isotropic",
            )
    else:
        law = given_law(lab)
    return run_threshold(
        problem,
        engine,
        threshold,
        bar,
        method="preconditioned",
        proposal=law,
        pilot=lab.pilot(law)[0],
        n_loss=lab.budget.n_loss,
        n_grad=lab.budget.n_grad,
        notes=(*lab.remarks, *notes),
    )


def _is(spec: Any, name: str) -> bool:
    # A tensor or an array would compare entry by entry.
    return isinstance(spec, str) and spec == name
