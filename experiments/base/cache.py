"""One file a unit of work, named by the digest of all that decides its outcome.

A unit's JSON file holds its config, its facts and a checksum. What is too large for it (weights, or
the radii of a volume) lies beside it in one safetensors file, which is written first and whose
checksum the JSON file holds. Both are written aside and renamed, so a unit is there whole or not at
all; what does not match its checksum is as good as missing, and is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastvol

from .errors import ExperimentError
from .provenance import COMMIT, DIRTY

_FORMAT = 1


@dataclass(frozen=True)
class Outcome:
    """What a unit of work found.

    Args:
        facts: JSON-ready; not-a-number and infinities are allowed.
        tensors: by name.
        volume: a result of fastvol; a unit has tensors or a volume, not both.
        seconds: that it took, wall clock.
        commit, dirty: of the sources that made it.
    """

    facts: dict[str, Any]
    tensors: Mapping[str, Tensor] | None = None
    volume: fastvol.VolumeEstimate | None = None
    seconds: float = 0.0
    commit: str | None = COMMIT
    dirty: bool = DIRTY


def config_digest(config: Mapping[str, Any]) -> str:
    """Sixteen bytes in hex: equal for equal configs, whatever their order."""
    return hashlib.sha256(_canonical(config).encode()).hexdigest()[:32]


class Cache:
    """A folder of outcomes.

    Args:
        folder: made where it is missing.

    Raises:
        ExperimentError: it cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ExperimentError(f"--cache: {folder} cannot be written to: {error}") from error

    def path(self, kind: str, config: Mapping[str, Any]) -> Path:
        """Where the JSON file of this unit is, or would be."""
        return self.folder / kind / f"{config_digest(config)}.json"

    def read(self, kind: str, config: Mapping[str, Any]) -> Outcome | None:
        """The outcome that was kept; ``None`` where there is none, or a damaged one."""
        path = self.path(kind, config)
        try:
            entry = json.loads(path.read_text())
            facts = entry["facts"]
            if entry["format"] != _FORMAT or entry["sha256"] != _checksum(config, facts):
                return None
            beside = entry["beside"]
            tensors, volume = None, None
            if beside is not None:
                companion = path.with_suffix(".safetensors")
                if beside["sha256"] != _file_checksum(companion):
                    return None
                if beside["kind"] == "volume":
                    volume = fastvol.load(companion)
                else:
                    tensors = load_file(companion)
            made = (float(entry["seconds"]), entry["commit"], bool(entry["dirty"]))
            return Outcome(facts, tensors, volume, *made)
        except (OSError, ValueError, LookupError, TypeError, SafetensorError, fastvol.FastvolError):
            return None

    def write(self, kind: str, config: Mapping[str, Any], outcome: Outcome) -> None:
        """Keeps an outcome, whole or not at all."""
        path = self.path(kind, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = None
        companion = path.with_suffix(".safetensors")
        if outcome.volume is not None:
            with _aside(companion) as part:
                outcome.volume.save(part)
            beside = {"kind": "volume", "sha256": _file_checksum(companion)}
        elif outcome.tensors is not None:
            with _aside(companion) as part:
                save_file(dict(outcome.tensors), part)
            beside = {"kind": "tensors", "sha256": _file_checksum(companion)}
        entry = {
            "format": _FORMAT,
            "config": dict(config),
            "facts": outcome.facts,
            "sha256": _checksum(config, outcome.facts),
            "beside": beside,
            "seconds": outcome.seconds,
            "commit": outcome.commit,
            "dirty": outcome.dirty,
        }
        with _aside(path) as part:
            part.write_text(json.dumps(entry, indent=1) + "\n")


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when all went well."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _checksum(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical([config, facts]).encode()).hexdigest()


def _file_checksum(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()
