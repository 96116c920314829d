r"""Importance sampling of directions: rays along P u, counted with their density.

log V = log V_d(1) + log|det P| + log E[(ρ‖v‖)^d ‖v‖^−d], v = P u: P never changes the answer, only
how many rays it takes. With P = H^(−1/2) the weights of an ellipsoidal basin are all equal; under
a normal law P = (I + s·H)^(−1/2) in units of its standard deviation, with s such that the tilted
law's mean excess loss is that of the threshold, and shifted to the tilted law's mean where the law
is not centred at the minimum.
"""

from __future__ import annotations

import time
from typing import Any

from .._problem import Problem
from .._proposal import Proposal
from ..result import VolumeEstimate
from ._decisions import Decision, decided
from ._laws import auto_law, given_law
from ._paths import decision_for_rays, laboratory
from ._rays import run_threshold


def run(problem: Problem) -> list[VolumeEstimate]:
    """One estimate per threshold, from the same directions if P is the same."""

    def one(threshold: float) -> VolumeEstimate:
        began = time.perf_counter()
        decision = decided(problem, threshold, ("rays",), lambda: _choose(problem, threshold))
        return run_threshold(problem, problem.engine(), threshold, bar, decision, began)

    with problem.bar() as bar:
        return problem.over_thresholds(one)


def _choose(problem: Problem, threshold: float) -> Decision:
    spec = problem.preconditioner
    automatic = _is(spec, "auto")
    frugal = not (automatic or _is(spec, "boundary"))
    lab = laboratory(problem, problem.engine(), threshold, frugal=frugal)
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
    return decision_for_rays(lab, "preconditioned", law, notes)


def _is(spec: Any, name: str) -> bool:
    # A tensor or an array would compare entry by entry.
    return isinstance(spec, str) and spec == name
