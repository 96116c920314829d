"""Plain Monte Carlo over directions: the mean of the radial integral over isotropic rays.

With r(u) the radius along the unit vector u in metric coordinates,
log V = log V_d(1) + log E[r(u)^d]; under a normal law the mass is E of the law's radial integral.
Unbiased before the logarithm, and short by the weight of the directions that were never drawn:
the gate says when that matters.
"""

from __future__ import annotations

import time

from .._problem import Problem
from ..result import VolumeEstimate
from ._decisions import Decision, decided
from ._rays import run_threshold
from ._screen import with_screen
from ._search import make_pilot, pilot_source


def run(problem: Problem, notes: tuple[str, ...] = ()) -> list[VolumeEstimate]:
    """One estimate per threshold, from the same directions; ``notes`` go to the warnings."""
    engine = problem.engine()

    def choose(threshold: float) -> Decision:
        source = pilot_source(problem, engine)
        pilot, _ = make_pilot(problem, source, threshold)
        decision = Decision(
            "radial", None, pilot, source.n_loss, notes=notes, seconds=source.seconds
        )
        return with_screen(problem, engine, threshold, decision)

    def one(threshold: float) -> VolumeEstimate:
        began = time.perf_counter()
        decision = decided(problem, threshold, ("rays",), lambda: choose(threshold))
        return run_threshold(problem, engine, threshold, bar, decision, began)

    with problem.bar() as bar:
        return problem.over_thresholds(one)
