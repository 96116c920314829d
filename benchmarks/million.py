"""A long run of a small network in a process of its own: ``python -m benchmarks.million N``.

Prints one line of JSON: the seconds of the call, and its peak of memory above what the process held
before it, model and data included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import ours
from .problems import arcs_mlp

RTOL = 1e-3


def measure(n: int, threads: int) -> dict[str, Any]:
    """The run, in a fresh process of this interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.million", str(n), "--threads", str(threads)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the run of {n} directions ended with an error:\n{done.stderr}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def run(n: int) -> dict[str, Any]:
    """The run itself."""
    problem = arcs_mlp()
    before = held()
    result = ours.whole_call(problem, n, RTOL, seed=0)
    return {
        "problem": problem.describe(),
        "n": n,
        "seconds": result.seconds,
        "megabytes_above_model_and_data": (peak() - before) / 1e6,
        "losses_per_direction": result.n_loss / n,
        "engine": result.plan["engine"],
        "lanes": result.plan["lanes"],
    }


def held() -> int:
    """Bytes in memory now; without /proc the most there have been."""
    return _status("VmRSS") or _largest()


def peak() -> int:
    """The most bytes in memory so far.

    Linux lets ``ru_maxrss`` of a child begin with its parent's memory, under which the child's own
    peak would be hidden; ``VmHWM`` starts anew.
    """
    return _status("VmHWM") or _largest()


def _status(name: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None


def _largest() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.million", description=__doc__)
    parser.add_argument("n", type=lambda text: int(float(text)), help="directions")
    parser.add_argument("--threads", type=int, help="PyTorch's; its own choice without it")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(run(options.n)))


if __name__ == "__main__":
    main()
