"""Many processes as one run, over the store of ``torch.distributed``.

Every process makes the same call. Pieces are claimed from a counter, so that a slow process makes
fewer; rank 0 collects them and hands the whole to all. Nothing waits in a collective operation: a
process that waits looks for others that have failed, or have not been heard of.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from .errors import FastvolError

# The store takes no message that is much longer.
_CHUNK = 4 << 20
_BEAT = 2.0
# Without a word for so long a process is dead. Longer than any one operation holds Python's lock.
_PATIENCE = 30.0
_ROLL_CALL = 300.0
_POLL = 0.002
_SLOWEST_POLL = 0.1

_calls = 0


class Team:
    """The processes of one call.

    Args:
        store: shared by them, for this call alone.
        rank, size: of this process, and of all.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._message = self._job = 0
        self._trouble = ""
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._store.set(f"beat/{rank}", "0")
        self._roll_call()
        self._thread = threading.Thread(target=self._listen, name="fastvol team", daemon=True)
        self._thread.start()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def check(self) -> None:
        """Raises where another process has failed.

        Raises:
            FastvolError: it says which, and why.
        """
        if self._trouble:
            raise FastvolError(self._trouble)

    def fail(self, why: str) -> None:
        """Tells the others that this process ends."""
        # The store may have gone first.
        with contextlib.suppress(Exception), self._line():
            if not self._store.check(["failed"]):
                self._store.set("failed", f"rank {self.rank}: {why}")

    def publish(self, data: bytes) -> None:
        """Rank 0 tells all others."""
        name = self._next_message()
        with self._line():
            self._put(name, data)

    def receive(self) -> bytes:
        """What rank 0 told, on any other rank."""
        name = self._next_message()
        self._wait(name)
        with self._line():
            data = self._get(name)
            if self._store.add(f"{name}/read", 1) == self.size - 1:
                self._delete(name)
        return data

    def job(self) -> str:
        """The name of the next kind of work, the same on every rank."""
        self._job += 1
        return f"job/{self._job}"

    def claim(self, job: str) -> int:
        """The next number of a job, from 0, that nobody has claimed."""
        self.check()
        with self._line():
            return int(self._store.add(f"{job}/next", 1)) - 1

    def send(self, job: str, number: int, data: bytes) -> None:
        """Gives rank 0 what a piece of work gave."""
        with self._line():
            self._put(f"{job}/{number}", data)

    def collect(self, job: str, number: int) -> bytes | None:
        """What another rank has given for a number, once, on rank 0; ``None`` if not yet."""
        name = f"{job}/{number}"
        with self._line():
            if not self._store.check([name]):
                return None
            data = self._get(name)
            self._delete(name)
        return data

    def pause(self, times: int) -> None:
        """A moment, longer after many of them."""
        self.check()
        time.sleep(min(_POLL * 1.5**times, _SLOWEST_POLL))

    def close(self, failure: BaseException | None) -> None:
        """Ends the call; rank 0, who may keep the store, ends last.

        Args:
            failure: that ends it, if one does.
        """
        try:
            if failure is not None:
                if not self._trouble:
                    self.fail(f"{type(failure).__name__}: {failure}")
                return
            with self._line():
                self._store.set(f"done/{self.rank}", "")
            if self.leads:
                for rank in range(1, self.size):
                    self._wait(f"done/{rank}")
        finally:
            self._closing.set()
            self._thread.join()

    def _next_message(self) -> str:
        self._message += 1
        return f"message/{self._message}"

    def _put(self, name: str, data: bytes) -> None:
        parts = range(0, len(data), _CHUNK)
        for i, first in enumerate(parts):
            self._store.set(f"{name}/part/{i}", data[first : first + _CHUNK])
        self._store.set(name, str(len(parts)))

    def _get(self, name: str) -> bytes:
        count = int(self._store.get(name))
        return b"".join(self._store.get(f"{name}/part/{i}") for i in range(count))

    def _delete(self, name: str) -> None:
        # Some kinds of store cannot.
        with contextlib.suppress(RuntimeError, NotImplementedError):
            for i in range(int(self._store.get(name))):
                self._store.delete_key(f"{name}/part/{i}")
            self._store.delete_key(name)

    def _wait(self, name: str) -> None:
        times = 0
        while True:
            with self._line():
                if self._store.check([name]):
                    return
            self.pause(times)
            times += 1

    @contextlib.contextmanager
    def _line(self) -> Iterator[None]:
        """The store, for one thread at a time."""
        with self._lock:
            try:
                yield
            except RuntimeError as error:
                raise FastvolError(self._trouble or _gone(error)) from error

    def _roll_call(self) -> None:
        """Waits until every process has made the call."""
        deadline = time.monotonic() + _ROLL_CALL
        for rank in range(self.size):
            while not self._store.check([f"beat/{rank}"]):
                if time.monotonic() > deadline:
                    raise FastvolError(
                        f"rank {rank} of {self.size} has not made the same call within "
                        f"{_ROLL_CALL:.0f} s: in a process group every process has to, unless "
                        "distributed=False"
                    )
                time.sleep(0.01)

    def _listen(self) -> None:
        """Says that this process lives, and notes when another one does not."""
        others = {rank: ("", time.monotonic()) for rank in range(self.size) if rank != self.rank}
        beat = 0
        while not self._closing.wait(_BEAT):
            beat += 1
            try:
                with self._lock:
                    self._store.set(f"beat/{self.rank}", str(beat))
                    failed = self._store.check(["failed"])
                    if failed:
                        self._trouble = _text(self._store.get("failed"))
                        return
                    beats = {rank: _text(self._store.get(f"beat/{rank}")) for rank in others}
                    now = time.monotonic()
                    for rank, heard in beats.items():
                        before, since = others[rank]
                        if heard != before:
                            others[rank] = heard, now
                        elif now - since > _PATIENCE:
                            if self._store.check([f"done/{rank}"]):
                                del others[rank]
                                break
                            self._trouble = (
                                f"rank {rank} has not been heard of for {_PATIENCE:.0f} s: it is "
                                "taken for dead. With checkpoint= the same call continues"
                            )
                            return
            except Exception as error:
                if not self._closing.is_set():
                    self._trouble = _gone(error)
                return


@contextlib.contextmanager
def team() -> Iterator[Team | None]:
    """The processes that make this call together; ``None`` where this one is alone.

    Those of the default process group, or those that ``torchrun`` (or a scheduler) has prepared the
    environment for: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    found = _shared_store() if dist.is_available() else None
    if found is None:
        yield None
        return
    global _calls
    _calls += 1
    store, rank, size = found
    prefixed: Any = dist.distributed_c10d.PrefixStore
    made = Team(prefixed(f"fastvol/{_calls}", store), rank, size)
    try:
        yield made
    except BaseException as error:
        made.close(error)
        raise
    made.close(None)


def _shared_store() -> tuple[Any, int, int] | None:
    """A store that all processes share, with this one's rank and their number."""
    if dist.is_initialized():
        if dist.get_world_size() == 1:
            return None
        store: Any = dist.distributed_c10d._get_default_store()
        # A connection of its own, where there is such a thing.
        with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
            store = store.clone()
        return store, dist.get_rank(), dist.get_world_size()
    return _store_of_environment() if _prepared() else None


@functools.cache
def _store_of_environment() -> tuple[Any, int, int]:
    from torch.distributed.rendezvous import rendezvous

    # Once a process: a store that goes and comes again at one address is a race. Nothing but the
    # store is needed, so that no process group is opened.
    meeting = rendezvous("env://", timeout=datetime.timedelta(seconds=_ROLL_CALL))
    store, rank, size = next(iter(meeting))
    return store, rank, size


def _prepared() -> bool:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    try:
        return all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1
    except ValueError:
        return False


def _gone(error: Exception) -> str:
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        "the store of the process group is gone, and with it the process that kept it "
        f"({told}). With checkpoint= the same call continues"
    )


def _text(data: Any) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else str(data)
