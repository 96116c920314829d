"""Coverage of the interval of the two samplers, per body, all runs counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from . import bodies, compounds
from .runs import each, seeded, verdict

COVERAGE_LEAST = 0.85
FLAGGED_LEAST = 0.99
# What the normal law itself leaves beyond three errors, of all runs.
CHANCE = 0.0027
# So few runs of a body with coverage 0.95 fall below by chance once in five hundred.
SHORT_SLACK = 0.2


def run(short: bool) -> dict[str, Any]:
    """Every body by every method. Raises AssertionError where an interval does not hold."""
    rows = each(_case, len(_cases(short)), short)
    least = COVERAGE_LEAST - (SHORT_SLACK if short else 0.0)
    problems = [f"coverage: {row['case']}" for row in rows if row["coverage"] < least]
    misses = sum(row["misses_beyond_3"] for row in rows)
    flagged = sum(row["of_them_flagged"] for row in rows)
    runs = sum(len(row["seeds"]) for row in rows)
    # An exact normal interval would miss 0.3 % of the runs in silence.
    if misses - flagged > max((1.0 - FLAGGED_LEAST) * misses, CHANCE * runs):
        problems.append(f"{misses} misses in {runs} runs, of which {flagged} were flagged")
    found = {
        "level": 0.95,
        "runs": runs,
        "misses_beyond_3": misses,
        "of_them_flagged": flagged,
        "cases": rows,
    }
    return verdict(found, problems)


def _without_gradient(model: nn.Module) -> float:
    return float(model().detach())


def _cases(short: bool) -> list[tuple[str, Callable[[], bodies.Body], float]]:
    shapes: list[Callable[[], bodies.Body]] = [
        functools.partial(bodies.rotated_ellipsoid, 20, 100.0),
        functools.partial(bodies.l1_ball, 10),
        functools.partial(bodies.simplex, 10),
        functools.partial(bodies.singular, 20),
        functools.partial(compounds.polynomial, 6),
        functools.partial(bodies.star, 10, 3.0),
        functools.partial(bodies.lp_ball, 15, 4.0, bodies.geometric(15, 1.0, 10.0), 0),
    ]
    if short:
        shapes = shapes[:1] + shapes[4:5]
    n = 2e3 if short else 4e3
    everything = [(method, body, n) for body in shapes for method in ("annealed", "splitting")]
    # One ray at a time, so only a little of it.
    if not short:
        everything.append(("annealed, no gradient", functools.partial(bodies.l1_ball, 5), 500.0))
    return everything


def _case(index: int, short: bool) -> dict[str, Any]:
    method, make, n = _cases(short)[index]
    body = make()
    name, _, rest = method.partition(",")
    return seeded(
        f"{method}, {body.name}",
        body.model(),
        body.log_volume,
        range(15 if short else 100),
        loss=_without_gradient if rest else bodies.loss,
        method=name,
        n=n,
        preconditioner=None,
        threshold=1.0,
    )
