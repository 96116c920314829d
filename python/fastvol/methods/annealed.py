r"""Annealed sampling over directions: from isotropic ones to those that hold the volume.

Targets W(u)^β with W the radial integral of a ray, β from 0 to 1 (``fastvol.sampling``): log Z of
the last is the log mean of W over directions, which plain sampling cannot reach once nearly all of
it is carried by directions that are never drawn. Moves are geodesic Hamiltonian Monte Carlo, or
great-circle slices where the loss has no gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .._path_estimate import final_log_scale
from .._problem import Problem
from .._proposal import Proposal
from ..engines import Engine
from ..errors import warn
from ..result import VolumeEstimate
from ..sampling.learning import perturbed
from ..sampling.moves import CrankNicolson, GreatCircleSlice, Hamiltonian, Move, Switching
from ..sampling.tempering import tilt
from ._decisions import Decision
from ._laws import given_law
from ._paths import (
    Laboratory,
    decision_for_chains,
    laboratory_of,
    over_thresholds,
    run_paths,
)

# From this dimension on moves of one loss come first, and gradients where their step collapses.
_LARGE = 50_000


def run(problem: Problem) -> list[VolumeEstimate]:
    """One estimate per threshold."""
    return over_thresholds(problem, choose_annealing, anneal)


def choose_annealing(
    lab: Laboratory, start: Proposal | None = None, remarks: tuple[str, ...] = ()
) -> Decision:
    """The law of the directions to begin with, learned from the boundary where that pays.

    Args:
        lab: problem and budget.
        start: the law to learn from, where the call names none.
        remarks: further warnings.
    """
    trouble = lab.no_gradients
    start = start or given_law(lab)
    notes = list(remarks)
    if trouble:
        notes.append(
            f"the loss has no gradient to go by ({trouble}): moves are great-circle slices, about "
            "ten times as expensive"
        )
        warn(f"loss_fn: {notes[-1]}")
    law = start if lab.problem.preconditioner is None else lab.improve(start, 32, 0)
    return decision_for_chains(lab, "annealed", law, tuple(notes), start)


def anneal(
    problem: Problem, engine: Engine, threshold: float, decision: Decision, bar: Any
) -> VolumeEstimate:
    """The estimate by annealing, within the budget.

    Args:
        problem, engine, threshold: of the run.
        decision: what :func:`choose_annealing` made.
        bar: progress, in runs.
    """
    lab = laboratory_of(problem, engine, threshold, decision)
    trouble, start = decision.trouble, decision.start

    def other_law(first: Proposal | None, index: int) -> Proposal | None:
        if first is not start:
            again = lab.improve(start, 32, 100 * index)
            if again is not start:
                return again
        # The first one's seed as it would be without an index.
        seed = [problem.seed & 0xFFFFFFFF, 29, index - 1]
        return perturbed(first, problem.dim, np.random.default_rng(seed))

    def make_move(generator: torch.Generator, rng: np.random.Generator) -> Move:
        if trouble:
            return GreatCircleSlice(generator, rng)
        if problem.dim >= _LARGE:
            return Switching(CrankNicolson(generator, rng), Hamiltonian(generator, rng))
        return Hamiltonian(generator, rng)

    return run_paths(
        lab,
        decision.law,
        tilt(final_log_scale(problem.measure)),
        make_move,
        method="annealed",
        other_law=other_law,
        remarks=list(decision.notes),
        bar=bar,
    )
