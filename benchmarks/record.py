"""Keeps a measurement with everything needed to judge it later: ``record(name, payload)``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastvol

RESULTS = Path(__file__).parent / "results"
_REPOSITORY = Path(__file__).parent.parent


def record(name: str, payload: Mapping[str, Any], *, folder: Path = RESULTS) -> Path:
    """Writes ``payload`` with date, commit, machine and versions to ``<folder>/<name>.json``.

    An earlier file of that name is replaced: the history is the repository's.

    Args:
        name: of the file, without its suffix.
        payload: JSON-ready.
        folder: where.

    Returns:
        The path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**circumstances(), **payload}, indent=2) + "\n")
    return path


def circumstances() -> dict[str, Any]:
    """When, from which sources, on what, and with what; no name of a host, user or folder."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _COMMIT,
        "dirty": _DIRTY,
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "threads": torch.get_num_threads(),
        "versions": {
            "fastvol": fastvol.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


# Read at import, as the sources that run were: a long run may see them change. A copy of them
# without their history is told of the commit by the variable COMMIT.
_COMMIT = _git("rev-parse", "HEAD") or os.environ.get("COMMIT")
_CHANGES = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
_DIRTY = None if _CHANGES is None else bool(_CHANGES)
