"""What a resumed run holds in memory: ``python -m benchmarks.proofs.resumed FOLDER N``.

Goes on with the directions in FOLDER until there are N, and prints one line of JSON: the peak of
memory above what the process held before the call, in bytes, and the seconds that the call took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..inplace_memory import forget_peak
from ..million import held, peak
from .interrupted import PLAN, rays

# Many rays at once, and large files, so that ten million take minutes.
_LANES = 1024


def run(folder: Path, n: int) -> dict[str, Any]:
    """The run, in this process."""
    torch.set_num_threads(1)
    plan = {**PLAN, "lanes": _LANES, "chunk": _LANES, "block": 8 * _LANES}
    # What is loaded at the first call stays.
    rays(None, n=300, plan=plan)
    forget_peak()
    before, began = held(), time.perf_counter()
    result = rays(folder, n=n, plan=plan)
    seconds = time.perf_counter() - began
    return {"n": result.n, "bytes": peak() - before, "seconds": seconds}


def main() -> None:
    """The command line."""
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))))


if __name__ == "__main__":
    main()
