"""The cheapest method that a pilot expects to pass the gate within the budget, else the best bound.

The pilot's spread of log weights decides. Even weights need no more than isotropic rays; weights
that some law of directions makes even need that law; all others need annealing, or splitting where
there is no gradient, if n pays for it. Where nothing is expected to pass, plain rays give a bound
and the profile as far as they reach.
"""

from __future__ import annotations

import math
import time
from typing import Any

from .._problem import Problem
from .._proposal import Proposal
from ..measures import Lebesgue
from ..result import VolumeEstimate
from . import radial
from ._decisions import CHAINS, Decision, decided
from ._laws import auto_law, given_law
from ._paths import Laboratory, decision_for_rays, laboratory
from ._rays import run_threshold
from .annealed import anneal, choose_annealing
from .splitting import choose_splitting, split

# Standard deviation of log weights up to which plain averages pass the gate: at 1.8 the Pareto
# shape of an ellipsoid's weights is 0.2, at 3.7 it is 0.8.
_EVEN = 1.8
# What annealing costs at the least, in losses, for each nat of that deviation.
_LOSSES_A_NAT = 15_000
_LOSSES_A_NAT_WITHOUT_GRADIENT = 60_000


def run(problem: Problem) -> list[VolumeEstimate]:
    """One estimate per threshold, each by the method that suits it."""
    if not problem.holds_directions:
        return radial.run(
            problem, ("no method beyond plain rays was tried: directions are not kept",)
        )

    def one(threshold: float) -> VolumeEstimate:
        began = time.perf_counter()
        engine = problem.engine()
        decision = decided(
            problem,
            threshold,
            ("chains", "rays"),
            lambda: _choose(laboratory(problem, engine, threshold)),
        )
        if decision.method in CHAINS:
            sample = anneal if decision.method == "annealed" else split
            return sample(problem, engine, threshold, decision, _Runs(bar, problem))
        return run_threshold(problem, engine, threshold, bar, decision, began)

    with problem.bar() as bar:
        return problem.over_thresholds(one)


def _choose(lab: Laboratory) -> Decision:
    problem = lab.problem
    sd = lab.pilot(None)[0].log_weight_sd
    asked = not (problem.preconditioner is None or _automatic(problem))
    if sd <= _EVEN and not asked:
        return _rays(lab, None)

    law: Proposal | None
    tried: list[str]
    if asked:
        law = given_law(lab)
        tried = [f"none {sd:.3g}", f"given {lab.pilot(law)[0].log_weight_sd:.3g}"]
    elif problem.preconditioner is None or lab.budget.total < _LOSSES_A_NAT:
        law, tried = None, [f"none {sd:.3g}"]
    else:
        law, tried = auto_law(lab)
    best_sd = lab.pilot(law)[0].log_weight_sd
    found = f"standard deviation of the pilot's log weights, nats: {', '.join(tried)}"
    if best_sd <= _EVEN or problem.antithetic or problem.first_crossing:
        return _rays(lab, law)
    price = _LOSSES_A_NAT_WITHOUT_GRADIENT if lab.no_gradients else _LOSSES_A_NAT
    needed = price * best_sd
    if lab.budget.total >= needed:
        if lab.no_gradients and _has_ladder(problem):
            return choose_splitting(lab, (f"splitting, without gradients ({found})",))
        return choose_annealing(lab, law, (f"annealed ({found})",))
    if not math.isfinite(needed):
        note = f"no method beyond plain rays was tried ({found})"
    else:
        n = problem.n * needed / lab.budget.total
        note = f"annealing was not tried, since it would need n of about {n:.1g} ({found})"
    return _rays(lab, law if asked else None, (note,))


def _rays(lab: Laboratory, law: Proposal | None, notes: tuple[str, ...] = ()) -> Decision:
    return decision_for_rays(lab, "radial" if law is None else "preconditioned", law, notes)


def _has_ladder(problem: Problem) -> bool:
    """Whether there is a cap, or a width, to build a ladder to."""
    if isinstance(problem.measure, Lebesgue):
        return math.isfinite(problem.measure.max_radius)
    return problem.offset is None


def _automatic(problem: Problem) -> bool:
    return isinstance(problem.preconditioner, str) and problem.preconditioner == "auto"


class _Runs:
    """A bar that counts directions, told of runs."""

    def __init__(self, bar: Any, problem: Problem) -> None:
        self._bar = bar
        self._share = problem.n / (1 + problem.replicates)

    def update(self, runs: int) -> None:
        """Moves on by some runs."""
        self._bar.update(int(runs * self._share))

    def set_postfix_str(self, text: str) -> None:
        """Says how far the current run is."""
        self._bar.set_postfix_str(text)
