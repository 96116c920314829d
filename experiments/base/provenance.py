"""From which sources, on what, and with what a result was made."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastvol

_REPOSITORY = Path(__file__).parent.parent.parent
# Fresh results do not make the sources differ from the commit.
_RESULTS = (":(exclude,glob)experiments/*/results/**", ":(exclude)benchmarks/results")


def circumstances() -> dict[str, Any]:
    """When, from which sources, on what, and with what; no name of a host, user or folder."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": COMMIT,
        "dirty": DIRTY,
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
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


# Read at import, as the sources that run were: a long run may see them change.
COMMIT = _git("rev-parse", "HEAD")
DIRTY = bool(_git("status", "--porcelain", "--", ".", *_RESULTS))
