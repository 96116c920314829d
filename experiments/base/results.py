"""What an experiment leaves: a JSON file, and figures drawn from it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .cache import Outcome
from .errors import ExperimentError
from .provenance import circumstances


def prepare(path: Path) -> None:
    """Makes sure, before the work, that results can be written.

    Raises:
        ExperimentError: they cannot.
    """
    if path.suffix != ".json":
        raise ExperimentError(f"--json: {path} must end in .json; the figures lie beside it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}.part")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExperimentError(f"--json: {path} cannot be written: {error}") from error


def write(path: Path, payload: Mapping[str, Any], outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Writes the results with their circumstances, aside first; what was written.

    Args:
        path: of the JSON file.
        payload: JSON-ready but for numbers that are not finite, which become null.
        outcomes: all units of work that went into it: the commits that made them are named.
    """
    kept = list(outcomes)
    made_by = {
        "units": len(kept),
        "unit_seconds": round(sum(outcome.seconds for outcome in kept), 1),
        "commits": sorted({outcome.commit or "unknown" for outcome in kept}),
        "dirty": any(outcome.dirty for outcome in kept),
    }
    results: dict[str, Any] = _finite({**circumstances(), "made_by": made_by, **payload})
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return results


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote.

    Raises:
        ExperimentError: there is no such file, or it is not JSON.
    """
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise ExperimentError(f"--json: {path} cannot be read: {error}") from error
    except ValueError as error:
        raise ExperimentError(f"--json: {path} is not JSON: {error}") from error
    return loaded


def checksum(path: Path) -> str:
    """SHA-256 of the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
