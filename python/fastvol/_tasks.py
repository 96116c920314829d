"""Parts of one process's operation that others evaluate while they wait for it.

An operation is *posted*: the owner puts its parts into the store, under a name of its own, and
tells that name in a slot that all others look at. Whoever waits for anything claims parts, one by
one, by a counter; so does the owner, once it has evaluated its own, until none is left. What is
claimed is answered, or the call ends. The owner removes everything, so that nothing in the store
grows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from ._processes import Team

# How often to look for a task, seconds: after a tenth of the time for which there was none.
_SOONEST, _LATEST, _IDLE_SHARE = 0.001, 0.02, 0.1
# An operation of a kind whose division has cost time is not divided for so many times that time.
_PAUSE = 100.0
# While an answer is awaited.
_QUICK, _SLOW = 0.0003, 0.005


class Tasks:
    """What this process gives to others of its team, and does for them.

    Args:
        team: the processes of one call.
        answer: evaluates a part, from bytes to bytes.

    Attributes:
        given: parts that others have evaluated for this process.
        taken: parts that this process has evaluated for others.
    """

    def __init__(self, team: Team, answer: Callable[[bytes], bytes]) -> None:
        self.team = team
        self.given = self.taken = 0
        self._answer = answer
        self._postings = 0
        # The last posting, of all processes, of which nothing is left.
        self._seen = 0
        # A process has one posting at a time, so that this many are open at most.
        self._slots = 2 * team.size
        self._soonest = max(_SOONEST, _SOONEST * team.size / 16)
        self._last = time.monotonic()
        self._not_before: dict[str, float] = {}
        # A file that all processes write to forgets nothing.
        self.possible = not _in_a_file(team.store)

    def help(self) -> float:
        """Evaluates a part for another process, if one is posted.

        Returns:
            Seconds after which it may be called again.
        """
        found = self._find()
        now = time.monotonic()
        if found is None:
            return min(max(_IDLE_SHARE * (now - self._last), self._soonest), _LATEST)
        name, part, data = found
        answer = self._answer(data)
        with self.team.line():
            self.team.put(f"{name}/answer/{part}", answer)
        self.taken += 1
        self._last = time.monotonic()
        return 0.0

    def _find(self) -> tuple[str, int, bytes] | None:
        """A part that is this process's to evaluate from now on: its posting, number and data."""
        with self.team.line():
            store = self.team.store
            latest = store.add("postings", 0)
            for number in range(max(self._seen + 1, latest - self._slots + 1), latest + 1):
                slot = f"posting/{number % self._slots}"
                if not store.check([slot]):
                    # Its owner is about to write it.
                    return None
                told, name, count = store.get(slot).decode().split()
                if int(told) < number:
                    return None
                if int(told) == number:
                    part = store.add(f"{name}/next", 1)
                    if part < int(count):
                        if store.check([f"{name}/{part}"]):
                            return name, part, self.team.get(f"{name}/{part}")
                        # It was over, and its counter with it, until just now.
                        store.delete_key(f"{name}/next")
                self._seen = number
        return None

    def post(self, parts: Sequence[bytes]) -> Posting:
        """Gives parts away, numbered from 1; number 0 is the owner's own, and not among them."""
        self._postings += 1
        name = f"task/{self.team.rank}.{self._postings}"
        for number, data in enumerate(parts, 1):
            with self.team.line():
                self.team.put(f"{name}/{number}", data)
        with self.team.line():
            number = self.team.store.add("postings", 1)
            told = f"{number} {name} {len(parts) + 1}"
            self.team.store.set(f"posting/{number % self._slots}", told)
        return Posting(self, name, len(parts) + 1)

    def pays(self, kind: str) -> bool:
        """Whether an operation of some kind is to be divided now."""
        return self.possible and time.monotonic() >= self._not_before.get(kind, 0.0)

    def judge(self, kind: str, together: float, alone: float) -> None:
        """Notes what the division of an operation of some kind brought.

        Args:
            kind: of it.
            together: seconds that it took.
            alone: seconds that it would have taken.
        """
        lost = together - alone
        if lost > 0:
            self._not_before[kind] = time.monotonic() + _PAUSE * lost


class Posting:
    """An operation that is posted.

    Args:
        tasks: of its owner.
        name: in the store.
        count: of its parts, the owner's own among them.
    """

    def __init__(self, tasks: Tasks, name: str, count: int) -> None:
        self._tasks, self._name, self._count = tasks, name, count
        self._elsewhere = set(range(1, count))

    def claim(self) -> int | None:
        """The next part that nobody has begun; ``None`` where there is none."""
        team = self._tasks.team
        team.check()
        with team.line():
            part = int(team.store.add(f"{self._name}/next", 1))
        if part >= self._count:
            return None
        self._elsewhere.remove(part)
        return part

    def answers(self) -> dict[int, bytes]:
        """What others have made of their parts, by number; then nothing is left of the posting.

        Raises:
            FastvolError: another process has failed.
        """
        team = self._tasks.team
        found: dict[int, bytes] = {}
        began = time.monotonic()
        while True:
            for part in sorted(self._elsewhere - found.keys()):
                name = f"{self._name}/answer/{part}"
                with team.line():
                    if team.store.check([name]):
                        found[part] = team.get(name)
                        team.delete(name)
            if len(found) == len(self._elsewhere):
                break
            team.check()
            waited = time.monotonic() - began
            time.sleep(min(max(0.05 * waited, _QUICK), _SLOW))
        with team.line():
            for part in range(1, self._count):
                team.delete(f"{self._name}/{part}")
            # Last: who claims a part that is gone takes it for a posting that is over.
            team.store.delete_key(f"{self._name}/next")
        self._tasks.given += len(found)
        return found


def _in_a_file(store: Any) -> bool:
    kinds: Any = dist
    while isinstance(store, kinds.PrefixStore):
        store = store.underlying_store
    return isinstance(store, kinds.FileStore)
