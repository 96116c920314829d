"""Plain Monte Carlo over directions: the mean of the radial integral over isotropic rays.

With r(u) the radius along the unit vector u in metric coordinates,
log V = log V_d(1) + log E[r(u)^d]; under a normal law the mass is E of the law's radial integral.
Unbiased before the logarithm, and short by the weight of the directions that were never drawn:
the gate says when that matters.
"""

from __future__ import annotations

from .._problem import Problem
from ..result import VolumeEstimate
from ._rays import run_threshold


def run(problem: Problem, notes: tuple[str, ...] = ()) -> list[VolumeEstimate]:
    """One estimate per threshold, from the same directions; ``notes`` go to the warnings."""
    engine = problem.engine()
    with problem.bar() as bar:
        return [
            run_threshold(problem, engine, threshold, bar, method="radial", notes=notes)
            for threshold in problem.thresholds
        ]
