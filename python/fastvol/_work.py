"""The pieces of a run: which are there already, who makes the others, and where they are kept.

A piece (a block of directions, a group of scans, a run of chains) depends on the config, the plan
and its number only. So it does not matter when it is made, nor by whom.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from ._processes import Team
from ._sharding import Group
from ._tasks import Tasks
from .checkpoints.files import Piece
from .checkpoints.folder import Folder

Compute = Callable[[int], Piece]
Fits = Callable[[int, Piece], bool]
Numbered = Generator[tuple[int, Piece], None, None]

# A snapshot of a run of chains is written after this many times what writing the last one took.
_SNAPSHOT_PAUSE = 100.0


def _always(number: int, piece: Piece) -> bool:
    del number, piece
    return True


class Work:
    """Where pieces come from and go to.

    Args:
        folder: keeps them; ``None`` keeps nothing.
        on_interrupt: ``"raise"`` or ``"return"``.
        team: the processes that share the work; ``None`` where there are none.
        group: the processes that make every piece together, each with its part of the model.
    """

    def __init__(
        self,
        folder: Folder | None = None,
        on_interrupt: str = "raise",
        team: Team | None = None,
        group: Group | None = None,
    ) -> None:
        self.folder = folder
        self.on_interrupt = on_interrupt
        self.team = team
        self.group = group or Group()
        # What the processes do for each other meanwhile.
        self.tasks: Tasks | None = None
        # PyTorch's, in every thread that computes.
        self.threads: int | None = None
        # For the error that an interrupt ends in.
        self.n_done = self.n = 0
        self.unit = "directions"
        # Whether a result was cut short by an interrupt.
        self.interrupted = False
        self._stopped = threading.Event()
        self._next_snapshot = 0.0

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all: shows progress, calls callbacks, has the folder."""
        return self.group.is_first if self.team is None else self.team.leads

    @property
    def alone(self) -> bool:
        """Whether no other process takes part."""
        return self.team is None and self.group.alone

    @property
    def kept_in(self) -> str:
        """The folder, or ""."""
        return "" if self.folder is None else str(self.folder.path)

    def check(self) -> None:
        """Raises where this run has to end: another part of it has failed.

        Raises:
            StoppedError: within a thread, whose error nobody sees.
            FastvolError: another process has failed.
        """
        if self._stopped.is_set():
            raise StoppedError
        if self.team is not None:
            self.team.check()

    def note(self, n_done: int, n: int, unit: str = "directions") -> None:
        """Says how much is done."""
        self.n_done, self.n, self.unit = n_done, n, unit

    def told(self, make: Callable[[], Any]) -> Any:
        """What the leading process makes, JSON-ready, on every process."""
        if self.alone:
            return make()
        value = None

        def made() -> bytes:
            nonlocal value
            value = make()
            return json.dumps(value).encode()

        data = self._said(made)
        return value if self.leads else json.loads(data)

    def _said(self, make: Callable[[], bytes]) -> bytes:
        """What the leading process makes, on every process."""
        if self.team is None:
            return self.group.told(make)
        if not self.team.leads:
            return self.team.receive()
        data = make()
        self.team.publish(data)
        return data

    def open(self, path: Any) -> None:
        """Opens the folder, where this process leads.

        Raises:
            FastvolError: it cannot be had, on every process.
        """

        def opened() -> bytes:
            self.folder = Folder(path)
            return b""

        if not self.group.alone:
            self.group.told(opened)
        elif self.leads:
            opened()

    def agreed(self, places: Sequence[str], make: Callable[[], tuple[str, Piece]]) -> Piece:
        """A piece that is made once, whoever asks.

        Args:
            places: where it may be kept; the first that there is counts.
            make: makes it, and says where it is to be kept.
        """
        if not self.group.alone:
            return self._agreed_together(places, make)
        if self.team is not None and not self.team.leads:
            return Piece.from_bytes(self.team.receive())
        piece = self._first(places)
        if piece is None:
            place, piece = make()
            if self.folder is not None:
                self.folder.write(place, piece)
                # The pieces that follow from it would mean nothing without it.
                self.folder.flush()
        if self.team is not None:
            self.team.publish(piece.to_bytes())
        return piece

    def _agreed_together(
        self, places: Sequence[str], make: Callable[[], tuple[str, Piece]]
    ) -> Piece:
        def kept() -> bytes:
            piece = self._first(places)
            return b"" if piece is None else piece.to_bytes()

        data = self.group.told(kept)
        if not data:
            place, piece = make()

            def keep() -> bytes:
                self._keep(place, piece)
                if self.folder is not None:
                    self.folder.flush()
                return piece.to_bytes()

            # The first one's, should another's differ in the time that it took.
            data = self.group.told(keep)
        return Piece.from_bytes(data)

    def _first(self, places: Sequence[str]) -> Piece | None:
        if self.folder is not None:
            for place in places:
                found = self.folder.read(place)
                if found is not None:
                    return found
        return None

    def pieces(
        self, place: str, count: int, computes: Sequence[Compute], fits: Fits = _always
    ) -> Numbered:
        """All pieces of a kind, in the order in which they are there.

        Args:
            place: where the pieces are kept, each under its number.
            count: how many.
            computes: make one, each on a thread of its own where there are several.
            fits: whether a piece that is kept can be used; else it is made again.
        """
        if not self.group.alone:
            return self._together(place, count, computes[0], fits)
        if self.team is None:
            return self._alone(place, count, computes, fits)
        if self.team.leads:
            return self._leading(self.team, place, count, computes, fits)
        return self._following(self.team, place, computes)

    def _alone(self, place: str, count: int, computes: Sequence[Compute], fits: Fits) -> Numbered:
        missing: list[int] = []
        for number in range(count):
            piece = self._kept(place, number, fits)
            if piece is not None:
                yield number, piece
            elif len(computes) == 1:
                yield number, self._keep(_place(place, number), computes[0](number))
            else:
                missing.append(number)
        waiting = iter(missing)
        for number, piece in self._made(lambda: next(waiting, None), computes):
            yield number, self._keep(_place(place, number), piece)

    def _together(self, place: str, count: int, compute: Compute, fits: Fits) -> Numbered:
        """Every piece by all processes, and kept by the first."""
        for number in range(count):

            def kept(number: int = number) -> bytes:
                piece = self._kept(place, number, fits)
                return b"" if piece is None else piece.to_bytes()

            data = self.group.told(kept)
            if data:
                yield number, Piece.from_bytes(data)
                continue
            piece = compute(number)

            def keep(number: int = number, piece: Piece = piece) -> bytes:
                self._keep(_place(place, number), piece)
                return b""

            # So that a full disk ends all.
            self.group.told(keep)
            yield number, piece

    def _leading(
        self, team: Team, place: str, count: int, computes: Sequence[Compute], fits: Fits
    ) -> Numbered:
        everything: list[tuple[int, Piece]] = []

        def seen(number: int, piece: Piece) -> tuple[int, Piece]:
            everything.append((number, piece))
            return number, piece

        missing = []
        for number in range(count):
            piece = self._kept(place, number, fits)
            if piece is None:
                missing.append(number)
            else:
                yield seen(number, piece)
        team.publish(json.dumps(missing).encode())
        job, outstanding = team.job(), set(missing)

        def arrived() -> Numbered:
            for number in sorted(outstanding):
                data = team.collect(job, number)
                if data is not None:
                    outstanding.remove(number)
                    piece = Piece.from_bytes(data)
                    # Its maker may not see this folder.
                    if (
                        self.folder is not None
                        and not self.folder.file(_place(place, number)).exists()
                    ):
                        self._keep(_place(place, number), piece)
                    yield seen(number, piece)

        for number, piece in self._made(_claims(team, job, missing), computes):
            outstanding.remove(number)
            yield seen(number, self._keep(_place(place, number), piece))
            yield from arrived()
        times = 0
        while outstanding:
            before = len(outstanding)
            yield from arrived()
            times = 0 if len(outstanding) < before else times + 1
            team.pause(times)
        team.publish(_packed(everything))

    def _following(self, team: Team, place: str, computes: Sequence[Compute]) -> Numbered:
        missing = json.loads(team.receive())
        job = team.job()
        for number, piece in self._made(_claims(team, job, missing), computes):
            self._keep(_place(place, number), piece)
            team.send(job, number, piece.to_bytes())
        yield from _unpacked(team.receive())

    def _kept(self, place: str, number: int, fits: Fits) -> Piece | None:
        if self.folder is None:
            return None
        piece = self.folder.read(_place(place, number))
        return piece if piece is not None and fits(number, piece) else None

    def _keep(self, place: str, piece: Piece) -> Piece:
        if self.folder is not None:
            self.folder.write(place, piece)
        return piece

    def _made(self, claim: Callable[[], int | None], computes: Sequence[Compute]) -> Numbered:
        """What this process makes of the numbers that ``claim`` gives, until it gives ``None``."""
        if len(computes) == 1:
            while (number := claim()) is not None:
                yield number, computes[0](number)
            return
        done: queue.SimpleQueue[tuple[int, Piece] | BaseException | None] = queue.SimpleQueue()
        lock = threading.Lock()

        def work(compute: Compute) -> None:
            try:
                if self.threads is not None:
                    torch.set_num_threads(self.threads)
                while not self._stopped.is_set():
                    with lock:
                        number = claim()
                    if number is None:
                        break
                    done.put((number, compute(number)))
                done.put(None)
            except BaseException as error:
                done.put(error)

        threads = [threading.Thread(target=work, args=(c,), daemon=True) for c in computes]
        for thread in threads:
            thread.start()
        try:
            working = len(threads)
            while working:
                found = done.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    working -= 1
                else:
                    yield found
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join()
            self._stopped.clear()

    def snapshot(self, place: str, make: Callable[[], Piece]) -> None:
        """Keeps the state of something that is not finished, if the last time is long enough ago.

        Args:
            place: where.
            make: makes the piece.
        """
        if self.folder is None or time.perf_counter() < self._next_snapshot:
            return
        began = time.perf_counter()
        self.folder.write(place, make())
        self.folder.flush()
        ended = time.perf_counter()
        self._next_snapshot = ended + _SNAPSHOT_PAUSE * (ended - began)

    def recalled(self, place: str) -> Piece | None:
        """What :meth:`snapshot` kept."""
        return None if self.folder is None else self.folder.read(place)

    def forget(self, place: str) -> None:
        """Removes what :meth:`snapshot` kept."""
        if self.folder is not None:
            self.folder.remove(place)

    def close(self) -> None:
        """Nothing is written after this."""
        if self.folder is not None:
            self.folder.close()


class StoppedError(Exception):
    """Ends a thread whose result nobody wants any more."""


def section(threshold: float) -> str:
    """The place of all that belongs to a threshold."""
    return f"threshold-{threshold!r}"


def _place(place: str, number: int) -> str:
    return f"{place}/{number:08d}"


def _claims(team: Team, job: str, numbers: Sequence[int]) -> Callable[[], int | None]:
    def claim() -> int | None:
        position = team.claim(job)
        return numbers[position] if position < len(numbers) else None

    return claim


def _packed(pieces: Sequence[tuple[int, Piece]]) -> bytes:
    parts = []
    for number, piece in pieces:
        data = piece.to_bytes()
        parts += [number.to_bytes(8, "little"), len(data).to_bytes(8, "little"), data]
    return b"".join(parts)


def _unpacked(data: bytes) -> Numbered:
    position = 0
    while position < len(data):
        number, length = (
            int.from_bytes(data[at : at + 8], "little") for at in (position, position + 8)
        )
        position += 16 + length
        yield number, Piece.from_bytes(data[position - length : position])
