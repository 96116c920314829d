"""Where the search of a ray begins: on a screen, a part of the data or coarser arithmetic.

A screen only chooses where to look. The search on all data in full precision then starts from
there, and its own bracket is what counts: a screen changes what a radius costs, not what it is
beyond the tolerance. It pays where radii differ much from ray to ray and an evaluation is dear;
:func:`with_screen` measures whether it does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .._problem import Problem
from .._proposal import Proposal
from .._reference.search import Status
from ..engines import Engine, GeneralEngine
from ..engines.parallel import ParallelEngine
from ._decisions import Decision
from ._search import Pilot, RayLoss, pilot_source, settle

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

# Directions that a choice is made from, where the lanes are no more; on a GPU, where a few take no
# less time than many, as many as fill them.
_TRIAL = 16
_COARSE = ("tf32", "bfloat16")
# Of the run's own time, what the choice may take; shorter runs, in seconds, go without.
_SHARE, _SHORT_RUN = 0.03, 2.0
_LEAST_EXAMPLES = 32
_PARTS = (16, 64, 4)
_BETTER = 0.9
# A search that spends fewer losses a direction than this has nothing to gain: from a start within
# a few per cent it still needs about four.
_DEAR = 6.0
# A screen says where to look, not where the boundary is.
_XTOL = 0.01


class Screen:
    """A search of its own for each ray, on the screen of a plan.

    Args:
        problem: the call; its plan says what the screen is.
        pilot: of the law of the directions.
        threshold: of the run.
        stream: which family of directions.
        proposal: their law.

    Raises:
        ValueError: the plan's screen cannot be had with these data.
    """

    def __init__(
        self,
        problem: Problem,
        pilot: Pilot,
        threshold: float,
        stream: int,
        proposal: Proposal | None,
    ) -> None:
        plan, objective = problem.plan, problem.objective
        if plan.screen_examples:
            thinned = objective.thinned(plan.screen_examples)
            if thinned is None:
                raise ValueError(
                    f"plan: a screen of {plan.screen_examples} examples needs twice as many in "
                    "memory, in batches made of rows"
                )
            objective = thinned
        engine = problem.engine(objective=objective)
        if not isinstance(engine, (GeneralEngine, ParallelEngine)):
            raise ValueError(f"plan: the {plan.engine} engine has no screen")
        engine.coarse = next((c for c in _COARSE if plan.screening.endswith(c)), "")
        self._problem, self._threshold = problem, threshold
        self._pilot = replace(pilot, rtol=max(_XTOL, pilot.rtol))
        self._offset = plan.screen_offset
        self._loss = RayLoss(problem, engine, stream, proposal)
        self._share = objective.examples / max(problem.objective.examples, 1)

    @property
    def n_loss(self) -> int:
        """Losses spent, each counted as the part of the data that it saw."""
        return math.ceil(self._loss.n_loss * self._share)

    @property
    def seconds(self) -> float:
        """Spent in the screen's engine."""
        return self._loss.seconds

    def starts(self, ids: Int) -> Float:
        """Log multiples of v at which to begin the search of the rays ``ids``, ``[k]``."""
        log_radii, status = settle(self._problem, self._loss, self._pilot, self._threshold, ids)
        start = log_radii - self._loss.log_norm + self._offset
        lost = ~np.isfinite(start) | (status == Status.FAILED)
        start[lost] = self._pilot.start_log_radius
        return np.minimum(start, self._pilot.log_cap)


def with_screen(problem: Problem, engine: Engine, threshold: float, decision: Decision) -> Decision:
    """A decision for independent rays, with the screen that makes a direction cheapest.

    It is measured on the pilot's directions, unless the plan says already what it is.

    Args:
        problem, engine, threshold: of the run.
        decision: with the law of the directions, and its pilot.
    """
    if problem.plan.screening != "unmeasured":
        return decision
    found = _measured(problem, engine, decision.pilot, threshold, decision.law)
    if found is None:
        return decision
    screen, n_loss = found
    return replace(decision, screen=screen, n_loss=decision.n_loss + n_loss)


def _measured(
    problem: Problem,
    engine: Engine,
    pilot: Pilot,
    threshold: float,
    proposal: Proposal | None,
) -> tuple[dict[str, Any], int] | None:
    """What a plan says of the cheapest screen, and the losses spent; ``None`` if none is to be."""
    # Another part of the data has another row space, and so other directions; what does not fit
    # into memory twice does not fit with a screen beside it.
    has_room = problem.noise == "full" and problem.plan.engine != "inplace"
    on_cpu = problem.layout.device.type == "cpu"
    count = _TRIAL if on_cpu else max(_TRIAL, engine.lanes)
    if problem.n * _SHARE < 2 * count or not has_room:
        return None
    ids = np.arange(count)
    source = pilot_source(problem, engine, proposal)
    spent = 0

    def full(start: Float | None) -> tuple[float, Float]:
        """Seconds for the rays, of two attempts, and their log multiples of v."""
        best = math.inf
        for _ in range(2):
            began = time.perf_counter()
            log_radii, status = settle(problem, source, pilot, threshold, ids, start)
            best = min(best, time.perf_counter() - began)
        found = np.where(status == Status.CONVERGED, log_radii - source.log_norm, np.nan)
        return best, found

    plain, roots = full(None)
    run, price = plain / count * problem.n, source.n_loss / (2 * count)
    if run < _SHORT_RUN or price < _DEAR or not np.isfinite(roots).any():
        return {"screening": "off"}, source.n_loss
    deadline = time.perf_counter() + _SHARE * run
    choice: dict[str, Any] = {"screening": "off"}
    fastest = _BETTER * plain
    for screening, examples in _candidates(problem):
        if time.perf_counter() > deadline:
            break
        change: dict[str, Any] = {"screening": screening, "screen_examples": examples}
        trial = replace(problem, plan=replace(problem.plan, **change))
        try:
            screen = Screen(trial, pilot, threshold, source.stream, proposal)
            # What has to be compiled or captured first says nothing of the run.
            screen.starts(ids[:2] if on_cpu else ids)
            seconds = math.inf
            for _ in range(2):
                began = time.perf_counter()
                starts = screen.starts(ids)
                seconds = min(seconds, time.perf_counter() - began)
        except (ValueError, RuntimeError):
            # Not with these data, this model, or this processor.
            continue
        spent += screen.n_loss
        offset = float(np.nanmedian(roots - starts))
        own, _ = full(np.minimum(starts + offset, pilot.log_cap))
        if seconds + own < fastest:
            fastest = seconds + own
            choice = {**change, "screen_offset": offset}
    return choice, spent + source.n_loss


def _candidates(problem: Problem) -> Iterator[tuple[str, int]]:
    """Screens to try: what they are, and of how many examples."""
    size = problem.objective.examples
    parts = [size // part for part in _PARTS if size // part >= _LEAST_EXAMPLES]
    yield from (("subset", part) for part in parts)
    if problem.layout.device.type == "cuda" and problem.layout.dtype == torch.float32:
        yield "tf32", 0
    if _has_bfloat16(problem):
        yield "bfloat16", 0
        yield from (("subset in bfloat16", part) for part in parts[:1])


def _has_bfloat16(problem: Problem) -> bool:
    if problem.layout.dtype != torch.float32:
        return False
    if problem.layout.device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
