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
from ..errors import FastvolError
from ..result import VolumeEstimate
from ..sampling.moves import CrankNicolson, Hamiltonian, Move, Switching
from ..sampling.tempering import ladder
from ._laws import given_law
from ._paths import Laboratory, laboratory, run_paths


def run(problem: Problem) -> list[VolumeEstimate]:
    """One estimate per threshold."""
    if problem.offset is not None:
        raise FastvolError(
            "method='splitting' widens a law around the minimum; for Gaussian(center='origin') use "
            "method='annealed' or 'preconditioned', or fastvol.prior_mass for all minima together"
        )
    with problem.bar(unit="run", total=1 + problem.replicates) as bar:
        return [
            split(laboratory(problem, problem.engine(), threshold), bar)
            for threshold in problem.thresholds
        ]


def split(lab: Laboratory, bar: Any, remarks: tuple[str, ...] = ()) -> VolumeEstimate:
    """The estimate by splitting, within the laboratory's budget.

    Args:
        lab: problem and budget.
        bar: progress, in runs.
        remarks: further warnings.
    """
    problem = lab.problem
    law = given_law(lab)

    def make_move(generator: torch.Generator, rng: np.random.Generator) -> Move:
        crank_nicolson = CrankNicolson(generator, rng)
        if lab.no_gradients:
            return crank_nicolson
        return Switching(crank_nicolson, Hamiltonian(generator, rng))

    def same_law(first: Proposal | None, index: int) -> Proposal | None:
        del index
        return first

    return run_paths(
        lab,
        law,
        ladder(final_log_scale(problem.measure)),
        make_move,
        method="splitting",
        other_law=same_law,
        remarks=list(remarks),
        bar=bar,
    )
