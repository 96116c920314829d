"""Runs units of work, each kept as soon as it is done, and estimates the time that is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cache import Cache, Outcome

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Unit:
    """One training, or one measurement.

    Args:
        kind: folder of the cache.
        config: JSON-ready: all that decides the outcome.
        cost: in any unit that is common to a sweep; only the estimate of the time hangs on it.
        work: makes the outcome; may call what it is given with the share that is done.
    """

    kind: str
    config: dict[str, Any]
    cost: float
    work: Callable[[Tick], Outcome]


def sweep(cache: Cache, units: Sequence[Unit], label: str, *, quiet: bool = False) -> list[Outcome]:
    """Every unit's outcome, in order: from the cache, or made now and kept.

    An interrupted sweep loses the unit it was at, nothing else.

    Args:
        label: of the progress bar.
        quiet: no bar.
    """
    from tqdm.auto import tqdm

    found = [cache.read(unit.kind, unit.config) for unit in units]
    todo = [index for index, outcome in enumerate(found) if outcome is None]
    terminal = sys.stderr.isatty()
    # In seconds of nothing: a rate and the time that is left follow from shares of the cost.
    with tqdm(
        total=sum(units[index].cost for index in todo),
        desc=label,
        disable=quiet or not todo,
        bar_format="{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left {postfix}",
        smoothing=0.05,
        mininterval=0.2 if terminal else 20.0,
        leave=False,
    ) as bar:
        for done, index in enumerate(todo):
            unit, reached = units[index], 0.0
            bar.set_postfix_str(
                f"({done} of {len(todo)} to do, {len(units)} in all)", refresh=False
            )

            def tick(share: float, unit: Unit = unit) -> None:
                nonlocal reached
                bar.update(max(share - reached, 0.0) * unit.cost)
                reached = max(share, reached)

            # The same unit may stand twice in a sweep.
            outcome = cache.read(unit.kind, unit.config) if done else None
            if outcome is None:
                began = time.perf_counter()
                outcome = unit.work(tick)
                outcome = replace(outcome, seconds=round(time.perf_counter() - began, 3))
                cache.write(unit.kind, unit.config, outcome)
            tick(1.0)
            found[index] = outcome
    return [outcome for outcome in found if outcome is not None]
