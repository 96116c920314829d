"""The folder itself: one manifest, and one subfolder for each threshold.

::

    DIR/manifest.json                     what the run is, and how it is carried out
    DIR/threshold-0.1/rays.safetensors    pilot and law of the directions
    DIR/threshold-0.1/blocks/00000000.safetensors, …
    DIR/threshold-0.1/audit-N/…           scans for earlier crossings, of n = N directions
    DIR/threshold-0.1/chains-N/…          runs of chains with the budget of n = N directions

A file is there or not: whatever is missing, or damaged, is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import FastvolError, warn
from .files import SUFFIX, DamagedError, Piece, Writer, is_aside, read_piece, write_bytes
from .identity import Identity

FORMAT = "fastvol checkpoint"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_LOCK = ".lock"

# Folders that this process may hold the lock of.
_open: weakref.WeakSet[Folder] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked process: workers that read data may outlive a run that is killed."""
    for folder in list(_open):
        folder._release()


os.register_at_fork(after_in_child=_let_go)


class Folder:
    """A checkpoint folder.

    Args:
        path: of the folder; it, but not its parent, may be missing.
        owner: whether this process tidies up and writes the manifest: one of many does.

    Raises:
        TypeError, ValueError, FileNotFoundError, NotADirectoryError: naming ``checkpoint``.
        FastvolError: the folder holds something else, is damaged or of another format, or is
            being written to by another run.
    """

    def __init__(self, path: str | PathLike[str], *, owner: bool = True) -> None:
        self.path = folder_path(path)
        self.owner = owner
        self.writer = Writer()
        self._lock: int | None = None
        if owner:
            self.path.mkdir(exist_ok=True)
            self._take_lock()
        try:
            self.manifest: dict[str, Any] | None = read_manifest(self.path)
            if self.manifest is None:
                self._refuse_others()
            if owner:
                self._tidy()
        except BaseException:
            self.close()
            raise

    @property
    def plan(self) -> dict[str, Any]:
        """How the run is carried out."""
        assert self.manifest is not None
        plan: dict[str, Any] = self.manifest["plan"]
        return plan

    def verify(self, identity: Identity) -> None:
        """Refuses a run that is not the folder's.

        Raises:
            FastvolError: it says what differs.
        """
        assert self.manifest is not None
        differing = identity.differences(self.manifest["identity"])
        if differing:
            raise FastvolError(
                f"checkpoint: {self.path} belongs to another run: {'; '.join(differing)}. Take "
                "another folder, or make the call that it belongs to"
            )

    def create(self, identity: Identity, plan: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        """Writes the manifest of a new folder.

        Args:
            identity: of the run.
            plan: how it is carried out.
            told: for people: versions, device.
        """
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "identity": identity.describe(),
            "plan": dict(plan),
            "made_with": dict(told),
        }
        manifest["sha256"] = _checksum(manifest)
        self.manifest = manifest
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        write_bytes(self.path / MANIFEST, text.encode())
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, place: str) -> Piece | None:
        """The piece kept at a place; ``None`` where there is none, or a damaged one.

        Args:
            place: below the folder, without a suffix.
        """
        path = self.file(place)
        try:
            return read_piece(path)
        except FileNotFoundError:
            return None
        except DamagedError as error:
            warn(
                f"checkpoint: {path} is damaged ({error}); it is made again",
            )
            return None

    def write(self, place: str, piece: Piece) -> None:
        """Has a piece written to a place soon."""
        self.writer.put(self.file(place), piece)

    def remove(self, place: str) -> None:
        """Removes what is kept at a place, once everything before is on the disk."""
        self.writer.flush()
        self.file(place).unlink(missing_ok=True)

    def file(self, place: str) -> Path:
        """Where a piece lies."""
        return self.path / (place + SUFFIX)

    def flush(self) -> None:
        """Waits until everything is on the disk."""
        self.writer.flush()

    def close(self) -> None:
        """Writes what is waiting, and lets others have the folder."""
        self.writer.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FastvolError(
                f"checkpoint: another run is writing to {self.path}; wait for it, or take another "
                "folder"
            ) from None
        except OSError:
            # A file system without locks.
            os.close(descriptor)
            return
        self._lock = descriptor
        _open.add(self)

    def _tidy(self) -> None:
        for path in self.path.rglob(".*"):
            if is_aside(path):
                path.unlink(missing_ok=True)

    def _refuse_others(self) -> None:
        if not self.path.is_dir():
            return
        others = sorted(
            path.name for path in self.path.iterdir() if path.name != _LOCK and not is_aside(path)
        )
        if others:
            raise FastvolError(
                f"checkpoint: {self.path} holds {', '.join(others[:3])} but no {MANIFEST}: it is "
                "not a checkpoint; take an empty folder"
            )


def folder_path(path: Any) -> Path:
    """The path of a folder to work in.

    Raises:
        TypeError, ValueError, FileNotFoundError, NotADirectoryError: naming ``checkpoint``.
    """
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"checkpoint must be the path of a folder, got {type(path).__name__}")
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"checkpoint must be the path of a folder, got {path!r}")
    target = Path(text)
    try:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"checkpoint: {target} is a file, not a folder")
        if not target.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"checkpoint: there is no folder {target.absolute().parent} to make it in"
            )
    except OSError as error:
        if isinstance(error, (NotADirectoryError, FileNotFoundError)) and error.errno is None:
            raise
        raise ValueError(f"checkpoint: {text!r} cannot be a folder: {error}") from error
    return target


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or ``None`` where there is none.

    Raises:
        FastvolError: it is damaged, or of another format.
    """
    file = path / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
        version = manifest["format_version"]
    except FileNotFoundError:
        return None
    except (LookupError, TypeError, ValueError) as error:
        raise FastvolError(f"checkpoint: {file} is not a manifest: {error}") from error
    if version != FORMAT_VERSION:
        raise FastvolError(
            f"checkpoint: {path} has format version {version!r}; this version reads "
            f"{FORMAT_VERSION}"
        )
    if manifest.pop("sha256", None) != _checksum(manifest):
        raise FastvolError(
            f"checkpoint: {file} is damaged: its checksum is another one. The blocks beside it may "
            "be whole, but nothing says what they belong to"
        )
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
