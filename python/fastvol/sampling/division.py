"""The rays of one run of chains, divided among the processes of a team.

The rows of an operation fall into parts, by their number and the plan alone, and each part is
evaluated by itself, on the first lanes of an engine with the same plan: so the answer is bit for
bit the same whoever evaluates a part. Moves, random numbers and resampling stay with the process
that owns the run; the others evaluate parts of it while they wait for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from .._problem import Problem
from .._tasks import Tasks
from ..engines import Indexed, open_engine
from ..engines.general import PROBE_STREAM
from .evaluation import Evaluator, Sheet

# A part has no fewer rays: a batch of them is what an engine is fast at.
LEAST_ROWS = 4
# What an operation may put into the store, directions and gradients together.
_MOST_BYTES = 256 << 20
# Losses on so many rays that take no longer than this, seconds, are not divided.
_TRIAL, _SHORTEST = 8, 0.001
# Engines that a process keeps for others: a run has parts of another size than the short one.
_KEPT = 2


class Division:
    """Rays in parts.

    Args:
        problem: of the run.
        lanes: the most rays of the whole that are evaluated together.
        parts: into how many they are divided, where they are enough.
    """

    def __init__(self, problem: Problem, lanes: int, parts: int = 1) -> None:
        self._parts = parts
        # So many rays has a part at the most, also of a few that are not divided.
        self._lanes = max(-(-lanes // parts), min(lanes, 2 * LEAST_ROWS - 1))
        self._own = Evaluator(problem, self._lanes)
        self._tasks = problem.work.tasks if parts > 1 else None

    def spans(self, count: int) -> list[slice]:
        """The parts of some rays."""
        parts = max(1, min(self._parts, count // LEAST_ROWS))
        edges = [i * count // parts for i in range(parts + 1)]
        return [slice(*pair) for pair in pairwise(edges)]

    def answer(self, sheet: Sheet) -> Sheet:
        """As :meth:`Evaluator.answer`."""
        spans = self.spans(len(sheet))
        if len(spans) == 1:
            return self._own.answer(sheet)
        parts = [sheet.take(span) for span in spans]
        assert sheet.vectors is not None
        size = 2 * sheet.vectors.numel() * sheet.vectors.element_size()
        tasks = self._tasks
        if tasks is None:
            return Sheet.join([self._own.answer(part) for part in parts])
        # What pays for many rays, or after some steps, may not for few.
        kind = f"{sheet.info['kind']} {len(parts)} {sheet.info.get('steps', 0)}"
        began = time.perf_counter()
        divided = size <= _MOST_BYTES and tasks.pays(kind)
        if divided:
            whole = self._together(tasks, parts)
        else:
            whole = Sheet.join([self._own.answer(part) for part in parts])
        # The first time of a kind, here or elsewhere, says nothing of the others.
        if not whole.info["fresh"]:
            tasks.note(kind, divided, time.perf_counter() - began, len(sheet))
        return whole

    def _together(self, tasks: Tasks, parts: list[Sheet]) -> Sheet:
        posting = tasks.post(
            [
                Sheet(part.columns, part.vectors, {**part.info, "lanes": self._lanes}).to_bytes()
                for part in parts[1:]
            ]
        )
        answers: dict[int, Sheet] = {}
        mine: int | None = 0
        while mine is not None:
            answers[mine] = self._own.answer(parts[mine])
            mine = posting.claim()
        for number, data in posting.answers().items():
            answers[number] = Sheet.from_bytes(data)
        return Sheet.join([answers[number] for number in range(len(parts))])


def processes_for(setting: tuple[Any, ...], size: int, radius: float) -> int:
    """For how many processes the rays of chains are to be divided: for all, or for one.

    A part too short to be worth its way costs more by itself than as a share of the whole.

    Args:
        setting: what :func:`open_engine` is given; the plan is its fourth.
        size: of the team.
        radius: where the loss is evaluated.
    """
    objective, layout, scale, plan, backend = setting
    plan = replace(plan, lanes=_TRIAL, chunk=min(plan.chunk, _TRIAL))
    engine = open_engine(objective, layout, scale, plan, backend)
    lanes = np.arange(_TRIAL)
    engine.load(lanes, Indexed(0, lanes, stream=PROBE_STREAM))
    seconds = math.inf
    for _ in range(3):
        began = time.perf_counter()
        engine.loss(np.full(_TRIAL, radius), lanes)
        seconds = min(seconds, time.perf_counter() - began)
    return size if seconds > _SHORTEST else 1


@contextmanager
def helping(problem: Problem) -> Iterator[None]:
    """While this process waits for others of its team, within, it evaluates parts for them."""
    work = problem.work
    if work.team is None or problem.plan.processes == 1:
        yield
        return
    evaluators: dict[int, Evaluator] = {}

    def answer(data: bytes) -> bytes:
        sheet = Sheet.from_bytes(data)
        info = dict(sheet.info)
        lanes = info.pop("lanes")
        if lanes not in evaluators:
            while len(evaluators) >= _KEPT:
                # The oldest.
                del evaluators[next(iter(evaluators))]
            evaluators[lanes] = Evaluator(problem, lanes)
        return evaluators[lanes].answer(Sheet(sheet.columns, sheet.vectors, info)).to_bytes()

    work.tasks = Tasks(work.team, answer)
    work.team.meanwhile = work.tasks.help
    try:
        yield
    finally:
        work.team.meanwhile = None
        work.tasks.close()
        work.tasks = None
