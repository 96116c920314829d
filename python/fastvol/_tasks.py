"""Parts of one process's operation that others evaluate while they wait for it.

An operation is *posted*: the owner puts its parts into the store, under a name of its own, and
tells that name in a slot that all others look at. Whoever waits for anything claims parts, one by
one, by a counter; so does the owner, once it has evaluated its own, until none is left. What is
claimed is answered, or the call ends. The owner removes everything, so that nothing in the store
grows. Where all processes are on one machine, the data stay in the owner's memory, and only their
place is in the store.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ._processes import Team
from .errors import FastvolError

# How often to look for a task, seconds: after a tenth of the time for which there was none.
_SOONEST, _LATEST, _IDLE_SHARE = 0.001, 0.02, 0.1
# The slower of two ways is not tried again for so many times what it lost.
_PAUSE = 100.0
# Room for the numbers that an answer has beside what it was asked with, bytes.
_NUMBERS = 1 << 16
# In place of a path in memory.
_STORE = "-"
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
        # Seconds a ray of each kind of operation, alone and divided; when to try the slower way.
        self._rates: dict[str, dict[bool, float]] = {}
        self._retry: dict[str, float] = {}
        # A file that all processes write to forgets nothing.
        self.possible = not _in_a_file(team.store)
        self._memory = Memory()
        # Whether all can reach each other's memory; None while that is not known.
        self._near: bool | None = None
        with team.line():
            team.store.set(f"memory/{team.rank}", f"{_machine()} {self._memory.path}")

    def close(self) -> None:
        """Gives the memory back."""
        self._memory.close()

    def help(self) -> float:
        """Evaluates a part for another process, if one is posted.

        Returns:
            Seconds after which it may be called again.
        """
        found = self._find()
        now = time.monotonic()
        if found is None:
            return min(max(_IDLE_SHARE * (now - self._last), self._soonest), _LATEST)
        name, part, path = found
        name, own = f"{name}/answer/{part}", f"{name}/{part}"
        with self.team.line():
            told = self.team.get(own)
        if path == _STORE:
            answer = self._answer(told)
        else:
            first, size = map(int, told.split())
            done = self._answer(self._memory.read(first, size, path))
            answer = f"{self._memory.write(first + size, done, path)} {len(done)}".encode()
        with self.team.line():
            self.team.put(name, answer)
        self.taken += 1
        self._last = time.monotonic()
        return 0.0

    def _find(self) -> tuple[str, int, str] | None:
        """A part that is this process's now: its posting, its number, and whose memory it is in."""
        with self.team.line():
            store = self.team.store
            latest = store.add("postings", 0)
            for number in range(max(self._seen + 1, latest - self._slots + 1), latest + 1):
                slot = f"posting/{number % self._slots}"
                if not store.check([slot]):
                    # Its owner is about to write it.
                    return None
                told, name, count, path = store.get(slot).decode().split()
                if int(told) < number:
                    return None
                if int(told) == number:
                    part = store.add(f"{name}/next", 1)
                    if part < int(count):
                        if store.check([f"{name}/{part}"]):
                            return name, part, path
                        # It was over, and its counter with it, until just now.
                        store.delete_key(f"{name}/next")
                self._seen = number
        return None

    def post(self, parts: Sequence[bytes]) -> Posting:
        """Gives parts away, numbered from 1; number 0 is the owner's own, and not among them."""
        self._postings += 1
        name = f"task/{self.team.rank}.{self._postings}"
        near, first = self._is_near(), 0
        for number, data in enumerate(parts, 1):
            if near:
                self._memory.write(first, data)
                told = f"{first} {len(data)}".encode()
                # Its answer comes behind it, in a wider dtype perhaps.
                first += 3 * len(data) + _NUMBERS
            with self.team.line():
                self.team.put(f"{name}/{number}", told if near else data)
        with self.team.line():
            number = self.team.store.add("postings", 1)
            path = self._memory.path if near else _STORE
            told_all = f"{number} {name} {len(parts) + 1} {path}"
            self.team.store.set(f"posting/{number % self._slots}", told_all)
        return Posting(self, name, len(parts) + 1, self._memory if near else None)

    def _is_near(self) -> bool:
        """Whether all processes can reach this one's memory, as far as is known."""
        if self._near is None:
            names = [f"memory/{rank}" for rank in range(self.team.size)]
            with self.team.line():
                if not self.team.store.check(names):
                    return False
                told = [self.team.store.get(name).decode().split() for name in names]
            machines, paths = zip(*told, strict=True)
            # What this one can do with theirs, they can do with its own.
            self._near = machines == machines[:1] * self.team.size and all(
                os.access(path.partition(":")[0], os.R_OK | os.W_OK) for path in paths
            )
        return self._near

    def pays(self, kind: str) -> bool:
        """Whether an operation of some kind is to be divided now: what was faster lately.

        The other way is tried again from time to time.
        """
        rates = self._rates.setdefault(kind, {})
        for way in (False, True):
            if way not in rates:
                return way and self.possible
        better = rates[True] < rates[False]
        retry = time.monotonic() >= self._retry.get(kind, 0.0)
        return self.possible and better != retry

    def note(self, kind: str, divided: bool, seconds: float, rows: int) -> None:
        """Notes what an operation of some kind took.

        Args:
            kind: of it.
            divided: which way.
            seconds: all of it.
            rows: its rays.
        """
        rates, rate = self._rates.setdefault(kind, {}), seconds / rows
        rates[divided] = 0.5 * (rates.get(divided, rate) + rate)
        if len(rates) == 2:
            lost = rates[divided] - rates[not divided]
            if lost >= 0:
                self._retry[kind] = time.monotonic() + _PAUSE * lost * rows


class Posting:
    """An operation that is posted.

    Args:
        tasks: of its owner.
        name: in the store.
        count: of its parts, the owner's own among them.
        memory: where the data are; ``None`` is the store.
    """

    def __init__(self, tasks: Tasks, name: str, count: int, memory: Memory | None) -> None:
        self._tasks, self._name, self._count, self._memory = tasks, name, count, memory
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
                        told = team.get(name)
                        team.delete(name)
                        found[part] = told
                        if self._memory is not None:
                            first, size = map(int, told.split())
                            found[part] = self._memory.read(first, size)
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


class Memory:
    """Memory of a process that others of the same machine can reach; it goes with the process.

    Attributes:
        path: under which they find it.
    """

    def __init__(self) -> None:
        self.path = _STORE
        # Of this process's own, and of those that have been reached.
        self._files: dict[str, int] = {}
        with contextlib.suppress(AttributeError, OSError):
            name = f"fastvol-{uuid.uuid4().hex}"
            own = os.memfd_create(name)
            self.path = f"/proc/{os.getpid()}/fd/{own}:{name}"
            self._files[self.path] = own

    def write(self, first: int, data: bytes, path: str = "") -> int:
        """Writes from a byte on, into this process's own memory or another's; returns ``first``."""
        file, left, position = self._file(path), memoryview(data), first
        while left:
            done = os.pwrite(file, left, position)
            left, position = left[done:], position + done
        return first

    def read(self, first: int, size: int, path: str = "") -> bytes:
        """What was written there."""
        parts, file = [], self._file(path)
        while size:
            parts.append(os.pread(file, size, first))
            if not parts[-1]:
                raise FastvolError("what another process wrote into memory is not there")
            first, size = first + len(parts[-1]), size - len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Lets go of it."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, path: str) -> int:
        path = path or self.path
        if path not in self._files:
            place, _, name = path.partition(":")
            file = os.open(place, os.O_RDWR | os.O_CLOEXEC)
            # The number may be another file's by now, of a process that has let go of its memory.
            if not os.readlink(f"/proc/self/fd/{file}").startswith(f"/memfd:{name}"):
                os.close(file)
                raise FastvolError("another process has let go of its memory")
            self._files[path] = file
        return self._files[path]


def _machine() -> str:
    """The same for processes that see each other, as far as can be told; else a word of its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _in_a_file(store: Any) -> bool:
    kinds: Any = dist
    while isinstance(store, kinds.PrefixStore):
        store = store.underlying_store
    return isinstance(store, kinds.FileStore)
