"""Many processes as one run, over the store of ``torch.distributed``.

Every process makes the same call. Pieces are claimed from a counter, so that a slow process makes
fewer; rank 0 collects them and hands the whole to all. Nothing waits in a collective operation: a
process that waits looks for others that have failed, or have not been heard of.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
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


class Members:
    """The processes that share a store, as this one sees them: from its first call on it says,
    also between two calls, that it lives.

    The store may hold what earlier processes have left: a launcher that starts all anew keeps its
    own. So these meet under a name that nobody has had before.

    Args:
        store: shared by all.
        rank, size: of this process, and of all.

    Raises:
        FastvolError: some do not come.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.calls = 0
        # The call that is going on here.
        self.team: Team | None = None
        # Why the store can be used no more.
        self.trouble = ""
        # The store, for one thread at a time.
        self.lock = threading.Lock()
        self._process = os.getpid()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._live, name="fastvol members", daemon=True)
        deadline = time.monotonic() + _ROLL_CALL
        try:
            name = self._named(store, deadline)
            self.store = _below(name, store)
            self.store.set(f"beat/{rank}", "0")
            self._thread.start()
            if rank == 0:
                self._welcome(store, name, deadline)
        except BaseException as error:
            self._ending.set()
            if isinstance(error, RuntimeError):
                raise FastvolError(_gone(error)) from error
            raise

    def _named(self, store: Any, deadline: float) -> str:
        """The name: rank 0's own word, and for another one the answer to its word."""
        word = uuid.uuid4().hex
        if self.rank == 0:
            return word
        store.set(f"hello/{self.rank}", word)
        while not store.check([f"welcome/{word}"]):
            _wait_for(0, self.size, deadline)
        return _text(store.get(f"welcome/{word}"))

    def _welcome(self, store: Any, name: str, deadline: float) -> None:
        """Answers all others, until they have met."""
        heard = dict.fromkeys(range(1, self.size), "")
        while heard:
            for rank, before in list(heard.items()):
                with self.lock:
                    if self.beat(rank) is not None:
                        del heard[rank]
                    elif store.check([f"hello/{rank}"]):
                        # A word that is there already may be that of a dead one.
                        word = heard[rank] = _text(store.get(f"hello/{rank}"))
                        if word != before:
                            store.set(f"welcome/{word}", name)
            if heard:
                _wait_for(min(heard), self.size, deadline)

    def _live(self) -> None:
        beat = 0
        while not self._ending.wait(_BEAT):
            beat += 1
            try:
                with self.lock:
                    self.store.set(f"beat/{self.rank}", str(beat))
                    if self.team is not None:
                        self.team.listen()
            except Exception as error:
                self.trouble = _gone(error)
                return

    def beat(self, rank: int) -> str | None:
        """The last sign of life of a process; ``None`` where there is none yet."""
        name = f"beat/{rank}"
        return _text(self.store.get(name)) if self.store.check([name]) else None

    def has_left(self, rank: int) -> bool:
        """Whether a process has ended, and has said so."""
        return bool(self.store.check([f"left/{rank}"]))

    def leave(self) -> None:
        """Says no more."""
        # A process that was forked off this one has no part in it.
        if os.getpid() != self._process or self._ending.is_set():
            return
        self._ending.set()
        self._thread.join(_PATIENCE)
        # The store may have gone first.
        with contextlib.suppress(Exception):
            self.store.set(f"left/{self.rank}", "")


class Team:
    """The processes of one call.

    Args:
        members: all of them.

    Raises:
        FastvolError: one has ended, or makes no call.
    """

    def __init__(self, members: Members) -> None:
        self.rank, self.size = members.rank, members.size
        members.calls += 1
        self._members = members
        self.store = _below(f"call/{members.calls}", members.store)
        self._message = self._job = 0
        self._trouble = ""
        # Called while this process waits for others; it says in how many seconds to call it again.
        self.meanwhile: Callable[[], float] | None = None
        now = time.monotonic()
        self._heard = {rank: ("", now) for rank in range(self.size) if rank != self.rank}
        members.team = self
        try:
            self._roll_call()
        except BaseException:
            members.team = None
            raise

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def check(self) -> None:
        """Raises where another process has failed.

        Raises:
            FastvolError: it says which, and why.
        """
        trouble = self._trouble or self._members.trouble
        if trouble:
            raise FastvolError(trouble)

    def fail(self, why: str) -> None:
        """Tells the others that this process ends."""
        # The store may have gone first.
        with contextlib.suppress(Exception), self.line():
            if not self.store.check(["failed"]):
                self.store.set("failed", f"rank {self.rank}: {why}")

    def publish(self, data: bytes) -> None:
        """Rank 0 tells all others."""
        name = self._next_message()
        with self.line():
            self.put(name, data)

    def receive(self) -> bytes:
        """What rank 0 told, on any other rank."""
        name = self._next_message()
        self._wait(name)
        with self.line():
            data = self.get(name)
            if self.store.add(f"{name}/read", 1) == self.size - 1:
                self.delete(name)
        return data

    def job(self) -> str:
        """The name of the next kind of work, the same on every rank."""
        self._job += 1
        return f"job/{self._job}"

    def claim(self, job: str) -> int:
        """The next number of a job, from 0, that nobody has claimed."""
        self.check()
        with self.line():
            return int(self.store.add(f"{job}/next", 1)) - 1

    def send(self, job: str, number: int, data: bytes) -> None:
        """Gives rank 0 what a piece of work gave."""
        with self.line():
            self.put(f"{job}/{number}", data)

    def collect(self, job: str, number: int) -> bytes | None:
        """What another rank has given for a number, once, on rank 0; ``None`` if not yet."""
        name = f"{job}/{number}"
        with self.line():
            if not self.store.check([name]):
                return None
            data = self.get(name)
            self.delete(name)
        return data

    def pause(self, times: int) -> None:
        """A moment, longer after many of them; it may be spent on something for others."""
        self.check()
        # A power of a long wait's count would overflow.
        moment = min(_POLL * 1.5 ** min(times, 20), _SLOWEST_POLL)
        if self.meanwhile is not None:
            moment = min(moment, self.meanwhile())
        time.sleep(moment)

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
            with self.line():
                self.store.set(f"done/{self.rank}", "")
            if self.leads:
                for rank in range(1, self.size):
                    self._wait(f"done/{rank}")
        finally:
            self._members.team = None

    def _next_message(self) -> str:
        self._message += 1
        return f"message/{self._message}"

    def put(self, name: str, data: bytes) -> None:
        """Writes data of any length; within :meth:`line`."""
        parts = range(0, len(data), _CHUNK)
        for i, first in enumerate(parts):
            self.store.set(f"{name}/part/{i}", data[first : first + _CHUNK])
        self.store.set(name, str(len(parts)))

    def get(self, name: str) -> bytes:
        """What :meth:`put` wrote; within :meth:`line`."""
        count = int(self.store.get(name))
        return b"".join(self.store.get(f"{name}/part/{i}") for i in range(count))

    def delete(self, name: str) -> None:
        """Removes it; within :meth:`line`."""
        # Some kinds of store cannot.
        with contextlib.suppress(RuntimeError, NotImplementedError):
            for i in range(int(self.store.get(name))):
                self.store.delete_key(f"{name}/part/{i}")
            self.store.delete_key(name)

    def _wait(self, name: str) -> None:
        times = 0
        while True:
            with self.line():
                if self.store.check([name]):
                    return
            self.pause(times)
            times += 1

    @contextlib.contextmanager
    def line(self) -> Iterator[None]:
        """The store, for one thread at a time."""
        with self._members.lock:
            try:
                yield
            except RuntimeError as error:
                raise FastvolError(self._trouble or _gone(error)) from error

    def _roll_call(self) -> None:
        """Waits until every process has made the call."""
        with self.line():
            self.store.set(f"here/{self.rank}", "")
        deadline = time.monotonic() + _ROLL_CALL
        for rank in range(self.size):
            while True:
                with self.line():
                    if self.store.check([f"here/{rank}"]):
                        break
                    gone = self._members.has_left(rank)
                if gone:
                    raise FastvolError(
                        f"rank {rank} of {self.size} has ended without making this call"
                    )
                _wait_for(rank, self.size, deadline)
                self.check()

    def listen(self) -> None:
        """Notes when another process has failed, or says nothing any more; within the lock."""
        if self._trouble:
            return
        if self.store.check(["failed"]):
            self._trouble = _text(self.store.get("failed"))
            return
        now = time.monotonic()
        for rank, (before, since) in list(self._heard.items()):
            heard = self._members.beat(rank)
            if heard is None:
                # It has not come yet, which the roll call waits for.
                continue
            if heard != before:
                self._heard[rank] = heard, now
            elif now - since > _PATIENCE:
                if self.store.check([f"done/{rank}"]):
                    del self._heard[rank]
                    continue
                self._trouble = (
                    f"rank {rank} has not been heard of for {_PATIENCE:.0f} s: it is taken for "
                    "dead. With checkpoint= the same call continues"
                )
                return


@contextlib.contextmanager
def team() -> Iterator[Team | None]:
    """The processes that make this call together; ``None`` where this one is alone.

    Those of the default process group, or those that ``torchrun`` (or a scheduler) has prepared the
    environment for: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    members = _members() if dist.is_available() else None
    if members is None:
        yield None
        return
    made = Team(members)
    try:
        yield made
    except BaseException as error:
        made.close(error)
        raise
    made.close(None)


# Those of the last call, and the store that they met over.
_known: tuple[Any, Members] | None = None


def _members() -> Members | None:
    """The processes that this one is among, the same ones as long as their store lives."""
    global _known
    found = _shared_store()
    if found is None:
        return None
    store, rank, size = found
    if _known is not None:
        known, members = _known
        if known() is store:
            return members
        members.leave()
        atexit.unregister(members.leave)
    own = store
    # A connection of its own, where there is such a thing.
    with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
        own = store.clone()
    members = Members(_below("fastvol", own), rank, size)
    atexit.register(members.leave)
    # A process group takes its store with it when it is destroyed.
    _known = weakref.ref(store), members
    return members


def _shared_store() -> tuple[Any, int, int] | None:
    """A store that all processes share, with this one's rank and their number."""
    if dist.is_initialized():
        if dist.get_world_size() == 1:
            return None
        store: Any = dist.distributed_c10d._get_default_store()
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


def _below(name: str, store: Any) -> Any:
    prefixed: Any = dist.distributed_c10d.PrefixStore
    return prefixed(name, store)


def _wait_for(rank: int, size: int, deadline: float) -> None:
    """A moment.

    Raises:
        FastvolError: it was the last one.
    """
    if time.monotonic() > deadline:
        raise FastvolError(
            f"rank {rank} of {size} has not made the same call within {_ROLL_CALL:.0f} s: in a "
            "process group every process has to, unless distributed=False"
        )
    time.sleep(0.01)


def _gone(error: Exception) -> str:
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        "the store of the process group is gone, and with it the process that kept it "
        f"({told}). With checkpoint= the same call continues"
    )


def _text(data: Any) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else str(data)
