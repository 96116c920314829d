"""The loop over a device's lanes: the core's against its reference, on lanes made of numbers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastvol import _core
from fastvol._reference import rounds

LOOPS = [pytest.param(_core.run_rounds, id="cpp"), pytest.param(rounds.run_rounds, id="torch")]
Loop = Callable[..., None]


class Lanes:
    """A group whose searches take as many rounds as their items say; it notes who calls what."""

    def __init__(self, name: int, lanes: int, items: int, calls: list[Any]) -> None:
        self.name, self.calls, self.items = name, calls, items
        self.left, self.item = np.zeros(lanes, dtype=int), np.full(lanes, -1)
        self.done: list[int] = []
        self.waits = False

    def refill(self, first: int) -> int:
        assert not self.waits
        free = np.flatnonzero(self.left == 0)
        self.done += [int(item) for item in self.item[free] if item >= 0]
        self.item[free] = -1
        taken = free[: self.items - first]
        self.item[taken] = np.arange(first, first + len(taken))
        self.left[taken] = 1 + self.item[taken] * 7919 % 13
        self.calls.append((self.name, "refill", first, len(taken)))
        return len(taken)

    def begin(self) -> None:
        assert not self.waits
        self.waits = True
        self.left = np.maximum(self.left - 1, 0)
        self.calls.append((self.name, "begin"))

    def settled(self) -> int:
        assert self.waits
        self.waits = False
        count = int(((self.left == 0) & (self.item >= 0)).sum())
        self.calls.append((self.name, "settled", count))
        return count


def run(loop: Loop, sizes: list[int], items: int, share: float) -> tuple[list[Any], list[int]]:
    calls: list[Any] = []
    groups = [Lanes(i, size, items, calls) for i, size in enumerate(sizes)]
    loop(groups, items=items, refill_share=share)
    return calls, sorted(item for group in groups for item in group.done)


@pytest.mark.parametrize("share", [1 / 16, 0.3, 1.0])
@pytest.mark.parametrize("items", [0, 1, 9, 257])
@pytest.mark.parametrize("sizes", [[1], [8, 7], [3, 60, 1]])
def test_both_loops_make_the_same_calls(sizes: list[int], items: int, share: float) -> None:
    calls, done = run(_core.run_rounds, sizes, items, share)
    assert done == list(range(items))
    assert (calls, done) == run(rounds.run_rounds, sizes, items, share)
    # One group's round runs while another's is looked at.
    kinds = [call[:2] for call in calls]
    if items > 60 and len(sizes) == 2:
        assert kinds.index((1, "begin")) < kinds.index((0, "settled"))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_group_is_refilled_when_its_share_has_settled(loop: Loop) -> None:
    often, _ = run(loop, [32], 400, 1 / 16)
    seldom, _ = run(loop, [32], 400, 0.5)

    def refills(calls: list[Any]) -> int:
        return sum(call[1] == "refill" for call in calls)

    assert refills(often) > 2 * refills(seldom)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("method", "answer", "words"),
    [
        ("settled", 99, "more lanes have settled"),
        ("refill", 99, "items that there are not"),
        ("refill", 0, "no group of lanes took an item"),
    ],
)
def test_numbers_that_cannot_be(loop: Loop, method: str, answer: int, words: str) -> None:
    group = Lanes(0, 4, 20, [])
    setattr(group, method, lambda *_: answer)
    with pytest.raises(RuntimeError, match=words):
        loop([group], items=20, refill_share=0.5)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("method", ["refill", "begin", "settled"])
def test_what_a_group_raises_is_passed_on(loop: Loop, method: str) -> None:
    def fail(*_: int) -> int:
        raise OSError("here")

    group = Lanes(0, 4, 20, [])
    setattr(group, method, fail)
    with pytest.raises(OSError, match="here"):
        loop([group], items=20, refill_share=0.5)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_interrupt_ends_it(loop: Loop) -> None:
    group = Lanes(0, 4, 10**6, [])
    begin = group.begin

    def interrupted() -> None:
        begin()
        if len(group.calls) > 20:
            os.kill(os.getpid(), signal.SIGINT)

    group.begin = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop([group], items=10**6, refill_share=0.5)
    assert len(group.calls) < 60


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"items": -1}, ValueError, "items must lie in"),
        ({"items": 2.5}, TypeError, "items must be"),
        ({"refill_share": 0.0}, ValueError, "refill_share must be above 0"),
        ({"refill_share": float("nan")}, ValueError, "refill_share must be above 0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    options: dict[str, Any] = {"items": 20, "refill_share": 0.5, **change}
    with pytest.raises(error, match=words):
        _core.run_rounds([Lanes(0, 4, 20, [])], **options)


@pytest.mark.parametrize("answer", [None, 1.5, -1])
def test_an_answer_that_is_no_count(answer: Any) -> None:
    group = Lanes(0, 4, 20, [])
    group.settled = lambda: answer  # type: ignore[method-assign]
    with pytest.raises((TypeError, ValueError), match="what settled returns"):
        _core.run_rounds([group], items=20, refill_share=0.5)
