"""One piece of work in one file: safetensors with a checksum, written aside and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SUFFIX = ".safetensors"
_ASIDE = ".part"
_KEY = "fastvol"
# Files that may wait for the disk before the run waits for them.
_WAITING = 16


class DamagedError(Exception):
    """A file that is not what was written."""


@dataclass(frozen=True)
class Piece:
    """What a piece of work gave.

    Args:
        arrays: by name.
        info: JSON-ready.
    """

    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As the content of a file."""
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        header = {"info": self.info, "sha256": _checksum(arrays, self.info)}
        data: bytes = save(arrays, metadata={_KEY: json.dumps(header)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Piece:
        """The piece that :meth:`to_bytes` wrote.

        Raises:
            DamagedError: it is something else.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
            piece = cls(load(data), header["info"])
            if _checksum(piece.arrays, piece.info) != header["sha256"]:
                raise DamagedError("its checksum is another one")
        except (SafetensorError, LookupError, TypeError, ValueError, OverflowError) as error:
            raise DamagedError(f"it cannot be read: {error}") from error
        return piece


def _checksum(arrays: Mapping[str, npt.NDArray[Any]], info: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def read_piece(path: Path) -> Piece:
    """What a file holds.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it is not what was written.
    """
    return Piece.from_bytes(path.read_bytes())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file aside, waits until it is on the disk, and renames it."""
    aside = os.path.join(path.parent, f".{path.name}.{uuid.uuid4().hex}{_ASIDE}")
    # In as few calls as can be: each hands Python's lock over twice while a run computes.
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


def is_aside(path: Path) -> bool:
    """Whether a file was being written when a run ended."""
    return path.name.startswith(".") and path.name.endswith(_ASIDE)


class Writer:
    """Writes files on a thread of its own, so that a run does not wait for the disk.

    A failure to write is raised by the next call.
    """

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Path, Piece] | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def put(self, path: Path, piece: Piece) -> None:
        """Has a file written soon.

        Raises:
            OSError: an earlier one could not be.
        """
        self._raise()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fastvol writer", daemon=True)
            self._thread.start()
        self._queue.put((path, piece))

    def flush(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            OSError: a file could not be written.
        """
        self._queue.join()
        self._raise()

    def close(self) -> None:
        """Writes what is waiting, and ends the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            entry = self._queue.get()
            try:
                if entry is None:
                    return
                if self._error is None:
                    path, piece = entry
                    data = piece.to_bytes()
                    try:
                        write_bytes(path, data)
                    except FileNotFoundError:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_bytes(path, data)
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
