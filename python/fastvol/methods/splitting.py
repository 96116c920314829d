r"""Splitting (subset simulation): a ladder of balls, or of widths of a normal law.

φ(R), the log fraction of the ball of radius R that the basin fills, is built up from level to
level (Au & Beck 2001, Probab. Eng. Mech. 16, 263–277), each of which starts from the states of the
last. The Crank–Nicolson move needs one loss a step and no gradient, and its acceptance does not
fall with d; where its step collapses, gradients take over if there are any.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .._path_estimate import final_log_scale
from .._problem import Problem
from .._proposal import Proposal
from ..engines import Engine
from ..errors import FastvolError
from ..result import VolumeEstimate
from ..sampling.moves import CrankNicolson, Hamiltonian, Move, Switching
from ..sampling.tempering import ladder
from ._decisions import Decision
from ._laws import given_law
from ._paths import (
    Laboratory,
    decision_for_chains,
    laboratory_of,
    over_thresholds,
    run_paths,
)


def run(problem: Problem) -> list[VolumeEstimate]:
    """One estimate per threshold."""
    if problem.offset is not None:
        raise FastvolError(
            "method='splitting' widens a law around the minimum; for Gaussian(center='origin') use "
            "method='annealed' or 'preconditioned', or fastvol.prior_mass for all minima together"
        )
    return over_thresholds(problem, choose_splitting, split)


def choose_splitting(lab: Laboratory, remarks: tuple[str, ...] = ()) -> Decision:
    """The law of the directions that the call asks for.

    Args:
        lab: problem and budget.
        remarks: further warnings.
    """
    return decision_for_chains(lab, "splitting", given_law(lab), remarks)


def split(
    problem: Problem, engine: Engine, threshold: float, decision: Decision, bar: Any
) -> VolumeEstimate:
    """The estimate by splitting, within the budget.

    Args:
        problem, engine, threshold: of the run.
        decision: what :func:`choose_splitting` made.
        bar: progress, in runs.
    """
    lab = laboratory_of(problem, engine, threshold, decision)

    def make_move(generator: torch.Generator, rng: np.random.Generator) -> Move:
        crank_nicolson = CrankNicolson(generator, rng)
        if decision.trouble:
            return crank_nicolson
        return Switching(crank_nicolson, Hamiltonian(generator, rng))

    def same_law(first: Proposal | None, index: int) -> Proposal | None:
        del index
        return first

    return run_paths(
        lab,
        decision.law,
        ladder(final_log_scale(problem.measure)),
        make_move,
        method="splitting",
        other_law=same_law,
        remarks=list(decision.notes),
        bar=bar,
    )
