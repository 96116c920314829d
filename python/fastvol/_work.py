"""The pieces of a run: which are there already, who makes the others, and where they are kept.

A piece (a block of directions, a group of scans, a run of chains) depends on the config, the plan
and its number only. So it does not matter when it is made, nor by whom.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence

from .checkpoints.files import Piece
from .checkpoints.folder import Folder

Compute = Callable[[int], Piece]
Fits = Callable[[int, Piece], bool]

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
    """

    def __init__(self, folder: Folder | None = None, on_interrupt: str = "raise") -> None:
        self.folder = folder
        self.on_interrupt = on_interrupt
        # For the error that an interrupt ends in.
        self.n_done = self.n = 0
        self.unit = "directions"
        # Whether a result was cut short by an interrupt.
        self.interrupted = False
        self._stopped = threading.Event()
        self._next_snapshot = 0.0

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all: shows progress, calls callbacks."""
        return True

    @property
    def kept_in(self) -> str:
        """The folder, or ""."""
        return "" if self.folder is None else str(self.folder.path)

    def check(self) -> None:
        """Raises where this run has to end: another part of it has failed.

        Raises:
            StoppedError: within a thread, whose error nobody sees.
        """
        if self._stopped.is_set():
            raise StoppedError

    def note(self, n_done: int, n: int, unit: str = "directions") -> None:
        """Says how much is done."""
        self.n_done, self.n, self.unit = n_done, n, unit

    def agreed(self, places: Sequence[str], make: Callable[[], tuple[str, Piece]]) -> Piece:
        """A piece that is made once, whoever asks.

        Args:
            places: where it may be kept; the first that there is counts.
            make: makes it, and says where it is to be kept.
        """
        if self.folder is not None:
            for place in places:
                found = self.folder.read(place)
                if found is not None:
                    return found
        place, piece = make()
        if self.folder is not None:
            self.folder.write(place, piece)
            # The pieces that follow from it would mean nothing without it.
            self.folder.flush()
        return piece

    def pieces(
        self, place: str, count: int, computes: Sequence[Compute], fits: Fits = _always
    ) -> Generator[tuple[int, Piece], None, None]:
        """All pieces of a kind, in the order in which they are there.

        Args:
            place: where the pieces are kept, each under its number.
            count: how many.
            computes: make one, each on a thread of its own where there are several.
            fits: whether a piece that is kept can be used; else it is made again.
        """
        missing = []
        for number in range(count):
            piece = self._kept(place, number, fits)
            if piece is None:
                missing.append(number)
                if len(computes) == 1:
                    piece = self._keep(place, number, computes[0](number))
            if piece is not None:
                yield number, piece
        if len(computes) > 1:
            for number, piece in self._threaded(missing, computes):
                yield number, self._keep(place, number, piece)

    def _kept(self, place: str, number: int, fits: Fits) -> Piece | None:
        if self.folder is None:
            return None
        piece = self.folder.read(_place(place, number))
        return piece if piece is not None and fits(number, piece) else None

    def _keep(self, place: str, number: int, piece: Piece) -> Piece:
        if self.folder is not None:
            self.folder.write(_place(place, number), piece)
        return piece

    def _threaded(
        self, numbers: Sequence[int], computes: Sequence[Compute]
    ) -> Generator[tuple[int, Piece], None, None]:
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in numbers:
            waiting.put(number)
        done: queue.SimpleQueue[tuple[int, Piece | BaseException]] = queue.SimpleQueue()

        def work(compute: Compute) -> None:
            while not self._stopped.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((number, compute(number)))
                except BaseException as error:
                    done.put((number, error))
                    return

        threads = [threading.Thread(target=work, args=(c,), daemon=True) for c in computes]
        for thread in threads:
            thread.start()
        try:
            for _ in numbers:
                number, found = done.get()
                if isinstance(found, BaseException):
                    raise found
                yield number, found
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join()
            self._stopped.clear()

    def snapshot(self, place: str, make: Callable[[], Piece], *, now: bool = False) -> None:
        """Keeps the state of something that is not finished, if the last time is long enough ago.

        Args:
            place: where.
            make: makes the piece.
            now: whatever the time is.
        """
        if self.folder is None or not (now or time.perf_counter() >= self._next_snapshot):
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
