"""One case over several seeds: errors, costs, and what the interval said of them."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import nn

import fastvol

from . import bodies

# A miss must be beyond rounding too, which a constant weight's error is made of.
_ROUNDING = 1e-6
_APART = 3.0


class ProofError(AssertionError):
    """A proof that did not hold, with all that it found."""

    def __init__(self, problems: Sequence[Any], found: dict[str, Any]) -> None:
        super().__init__(problems)
        self.found = {"failed": [str(problem) for problem in problems], **found}


def verdict(found: dict[str, Any], problems: Sequence[Any]) -> dict[str, Any]:
    """``found``, if there are no problems; they are raised with it else."""
    if problems:
        raise ProofError(problems, found)
    return found


def seeded(
    name: str,
    model: nn.Module,
    exact: float,
    seeds: Sequence[int],
    *,
    loss: Callable[..., Any] = bodies.loss,
    **call: Any,
) -> dict[str, Any]:
    """A row: the errors of one call under every seed, nats, and its cost.

    Args:
        name: of the case, in the row and on the screen.
        model, loss, call: what is estimated, and how.
        exact: the answer, nats.
        seeds: of the runs.
    """
    began = time.perf_counter()
    results, plan = [], None
    for seed in seeds:
        result = quietly(model, loss, seed=seed, plan=plan, **call)
        plan = result.plan
        results.append(result)
    seconds = (time.perf_counter() - began) / len(results)
    errors = np.array([result.log_volume - exact for result in results])
    inside = [low <= exact <= high for low, high in (result.ci(0.95) for result in results)]
    misses = [missed(result, exact) for result in results]
    row = {
        "case": name,
        "d": results[0].dim,
        "method": str(call.get("method")),
        "n": call.get("n"),
        "log_volume": exact,
        "seeds": list(seeds),
        "errors": errors.tolist(),
        "stderrs": [result.stderr for result in results],
        "reliable": [result.reliable for result in results],
        "max_abs_error": float(np.abs(errors).max()),
        "rms_error": float(np.sqrt(np.square(errors).mean())),
        "mean_error": float(errors.mean()),
        "coverage": float(np.mean(inside)),
        "misses_beyond_3": sum(misses),
        "of_them_flagged": sum(
            miss and not result.reliable for miss, result in zip(misses, results, strict=True)
        ),
        "n_loss": max(result.n_loss for result in results),
        "n_grad": max(result.n_grad for result in results),
        "seconds_a_run": seconds,
        "warnings": sorted({text for result in results for text in result.warnings}),
    }
    print(
        f"  {name}, d = {row['d']}: |error| ≤ {row['max_abs_error']:.3g} (rms "
        f"{row['rms_error']:.2g}, stated {np.median(row['stderrs']):.2g}), reliable "
        f"{sum(row['reliable'])}/{len(results)}, L {row['n_loss']} G {row['n_grad']}, "
        f"{seconds:.1f} s a run",
        flush=True,
    )
    return row


def missed(result: fastvol.VolumeEstimate, exact: float) -> bool:
    """Whether a result is off by more than three of its errors."""
    allowed = max(_APART * result.stderr, _ROUNDING * max(1.0, abs(exact)))
    return not abs(result.log_volume - exact) <= allowed


def apart(a: fastvol.VolumeEstimate, b: fastvol.VolumeEstimate) -> float:
    """By how many joint errors two results differ."""
    joint = max(math.hypot(a.stderr, b.stderr), _ROUNDING * max(1.0, abs(a.log_volume)))
    return abs(a.log_volume - b.log_volume) / joint


def quietly(model: nn.Module, loss: Callable[..., Any], **call: Any) -> fastvol.VolumeEstimate:
    """The public call without a progress bar; its warnings are in the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastvol.FastvolWarning)
        return fastvol.estimate(model, loss, progress=False, **call)


def each(case: Callable[[int, bool], dict[str, Any]], count: int, short: bool) -> list[Any]:
    """``case(index, short)`` for every index: a process to a core in the full form."""
    if short:
        return [case(index, short) for index in range(count)]
    # The runs are too small for threads.
    workers = min(count, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_one_thread)
    with pool:
        futures = [pool.submit(case, index, short) for index in range(count)]
        return [future.result() for future in futures]


def _one_thread() -> None:
    torch.set_num_threads(1)
