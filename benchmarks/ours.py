"""How the benchmarks call fastvol: the public function, on a problem's network and data."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F

import fastvol
from fastvol import Progress, VolumeEstimate

from .problems import Problem

# The most that a search evaluates a direction, roughly, and what a short call evaluates besides.
_SEARCH, _PILOT, _SCAN = 8, 250, 33
_BLOCK = 1024


def whole_call(
    problem: Problem, n: int, rtol: Any, seed: int, plan: Mapping[str, Any] | None = None
) -> VolumeEstimate:
    """``fastvol.estimate`` with everything that belongs to it: plan, pilot, search, audit."""
    return _estimate(problem, n, rtol, seed, plan, [])


def first_crossings(
    problem: Problem, plan: Mapping[str, Any], n: int, rtol: Any, seed: int
) -> npt.NDArray[np.float64]:
    """Log radii of the first ``n`` directions with every ray scanned, float64 ``[n]``."""
    return _estimate(problem, n, rtol, seed, plan, [], first_crossing=True).log_radii


def affordable_call(
    problem: Problem, seconds_per_loss: float, seconds: float, least: int, rtol: Any
) -> VolumeEstimate:
    """A whole call of as many directions, up to 1024, as ``seconds`` allow; of ``least`` at least.

    Its plan is that of a long run, whose lanes are no more than its directions.
    """
    for n in (_BLOCK, 256, 64, 32, 16, least):
        scans = max(16, min(128, n // 8))
        if (_SEARCH * n + _SCAN * scans + _PILOT) * seconds_per_loss <= seconds:
            break
    return whole_call(problem, n, rtol, seed=0)


def seconds_per_direction(result: VolumeEstimate) -> float:
    """Roughly what a direction of the search takes, by the cost of an evaluation in ``result``."""
    return _SEARCH * float(result.provenance["engine_seconds"]) / result.n_loss


def block_size(result: VolumeEstimate, seconds: float) -> int:
    """Directions of a block that lasts about so long, with its lanes busy for most of that time.

    Lanes run dry at a block's end. fastvol's own blocks have 1024 directions, so that blocks as
    short as these are a little slower than a long run's.
    """
    lanes = int(result.plan["lanes"])
    each = seconds_per_direction(result)
    fill = lanes * (4 if 4 * lanes * each <= 4 * seconds else 1)
    wanted = max(fill, math.ceil(seconds / each))
    return min(_BLOCK, lanes * math.ceil(wanted / lanes))


def search_blocks(
    problem: Problem,
    plan: Mapping[str, Any],
    block: int,
    blocks: int,
    rtol: Any,
    seed: int,
    between: Callable[[Progress, list[float]], None] = lambda progress, seconds: None,
) -> list[float]:
    """Seconds of each of ``blocks`` blocks after a first one, which the pilot precedes.

    The run is ended from its callback before the audit, whose cost does not grow like n in runs as
    short as these.

    Args:
        problem: what is measured.
        plan: of an earlier result.
        block: directions a block.
        blocks: timed.
        rtol: tolerance of a radius.
        seed: of the directions.
        between: called after each block, the untimed first one included, with the run's state and
            the seconds so far; what it takes does not count.
    """
    seconds: list[float] = []
    resumed = math.nan

    def mark(progress: Progress) -> None:
        nonlocal resumed
        now = time.perf_counter()
        if not math.isnan(resumed):
            seconds.append(now - resumed)
        between(progress, seconds)
        if progress.n_done == progress.n:
            raise _SearchedError
        resumed = time.perf_counter()

    with contextlib.suppress(_SearchedError):
        _estimate(problem, block * (blocks + 1), rtol, seed, {**plan, "block": block}, [mark])
    return seconds


class _SearchedError(Exception):
    """Every direction has its radius."""


def _estimate(
    problem: Problem,
    n: int,
    rtol: Any,
    seed: int,
    plan: Mapping[str, Any] | None,
    callbacks: list[Any],
    first_crossing: bool = False,
) -> VolumeEstimate:
    return fastvol.estimate(
        problem.model,
        F.cross_entropy,
        n,
        data=(problem.inputs, problem.targets),
        threshold=problem.threshold,
        metric="filter",
        method="radial",
        rtol=rtol,
        seed=seed,
        first_crossing=first_crossing,
        plan=plan,
        progress=False,
        callbacks=callbacks,
    )
