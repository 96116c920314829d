"""Which rays of a run are scanned for an earlier crossing."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .._problem import Problem
from ..result import Rays
from ._search import SCAN_POINTS

Float = npt.NDArray[np.float64]

_LEADERS = 64
_LEADER_SHARE_TIMES_N = 10.0
_LEADING_WEIGHT = 0.99
_SPOT_CHECK_COST = 0.10
_LEAST_CHECKS = 8
_CHECKED_OF = 16
_AUDIT_COST = 0.10


class Scans(Protocol):
    """Scans rays and corrects their radii."""

    n_loss: int

    def __call__(self, ids: npt.NDArray[np.int64]) -> None:
        """The rays ``ids``, ascending."""
        ...


def audit(problem: Problem, scans: Scans, rays: Rays, search_loss: int) -> None:
    """Scans the rays that carry the weight, and a random few, for an earlier crossing.

    Always the 64 largest (of fewer than 1,024 rays a sixteenth, at least 8), as many at random, and
    every ray with ten times the mean weight, re-ranked until all of them are audited; then, from
    the largest down, the rest of 99 % of the weight, as far as a tenth of the search's evaluations
    goes. Where no ray stands out, no single radius can matter, and the random few bound what the
    others might do.
    """
    n = rays.n
    generator = np.random.default_rng([problem.seed & 0xFFFFFFFF, problem.seed >> 32, n])
    affordable = int(_SPOT_CHECK_COST * search_loss / (SCAN_POINTS + 1))
    least = min(n, max(_LEAST_CHECKS, min(_LEADERS, n // _CHECKED_OF)))
    spot_checks = min(n, max(least, affordable))
    sample = np.sort(generator.choice(n, size=spot_checks, replace=False))
    before = _weights(problem, rays)
    scans(sample)
    rays.sampled[sample] = True

    budget = scans.n_loss + int(_AUDIT_COST * search_loss)
    while True:
        weights = _weights(problem, rays)
        order = np.argsort(-weights, kind="stable")
        share = (
            np.exp(weights[order] - weights[order[0]])
            if np.isfinite(weights[order[0]])
            else np.zeros(n)
        )
        total = float(share.sum())
        if total == 0:
            break
        share /= total
        must = np.arange(n) < least
        must |= share > _LEADER_SHARE_TIMES_N / n
        todo = order[must & ~rays.audited[order]]
        if not len(todo):
            if scans.n_loss >= budget:
                break
            heavy = np.concatenate([[True], np.cumsum(share)[:-1] < _LEADING_WEIGHT])
            todo = order[heavy & ~rays.audited[order]]
            room = max(1, (budget - scans.n_loss) // (SCAN_POINTS + 1))
            todo = todo[:room]
            if not len(todo):
                break
        scans(np.sort(todo))

    # What the unaudited rays carry too much, by the change that the random ones showed.
    after = _weights(problem, rays)
    top = float(before.max())
    kept = float(np.exp(after - top).sum()) if math.isfinite(top) else 0.0
    if kept > 0:
        unaudited = ~rays.audited
        heaviest = float(after[unaudited].max()) if unaudited.any() else -math.inf
        # Heavier ones among the random rays would have been audited in any case.
        alike = sample[before[sample] <= heaviest]
        if len(alike):
            excess = np.exp(before[alike] - top) - np.exp(after[alike] - top)
            scale = int(unaudited.sum()) / kept
            rays.reentrant_share = float(excess.mean()) * scale
            rays.reentrant_error = float(excess.std()) / math.sqrt(len(alike)) * scale


def _weights(problem: Problem, rays: Rays) -> Float:
    weights, _ = rays.log_weights(problem.measure, problem.dim)
    return weights
