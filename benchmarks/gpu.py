"""The table of the GPU path: ``benchmarks/gpu.sh``, or ``python -m benchmarks.gpu``.

Every row stands alone: one that fails is reported, and the others go on. ``--smoke`` runs all of
them at tiny sizes, on a CPU in Triton's interpreter: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fastvol

from .gpu_bench import Bench, Row, SkippedError
from .gpu_kernels import limits, linear, noise, parts, perturb, step
from .gpu_language import language
from .gpu_runs import agreement, fused, gap, million, networks_of_images
from .record import RESULTS, record

ROWS: tuple[Callable[[Bench], Iterator[Row]], ...] = (
    limits,
    perturb,
    noise,
    linear,
    parts,
    step,
    agreement,
    million,
    fused,
    gap,
    networks_of_images,
    language,
)


def run(bench: Bench, only: list[str]) -> list[Row]:
    """All rows, printed as they come."""
    rows: list[Row] = []
    for function in ROWS:
        if only and function.__name__ not in only and function is not limits:
            continue
        try:
            if bench.left < 0:
                raise SkippedError("no time left")
            for row in function(bench):
                rows.append(row)
                verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
                print(
                    f"| {row['work']} | {row['measured']} | {row['goal']} | {verdict} |", flush=True
                )
        except SkippedError as reason:
            rows.append({"work": function.__name__, "skipped": str(reason)})
            print(f"| {function.__name__} | skipped: {reason} | | |", flush=True)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            rows.append({"work": function.__name__, "failed": text})
            print(f"| {function.__name__} | FAILED: {text.splitlines()[0]} | | |", flush=True)
            traceback.print_exc()
        if bench.device.type == "cuda":
            # The next row starts with the memory of all before it.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; keeps nothing")
    parser.add_argument("--only", nargs="*", default=[], help="rows, by the functions' names")
    parser.add_argument("--seconds", type=float, default=240.0, help="no row begins later")
    parser.add_argument("--tests", type=int, help="how pytest -m gpu ended, to be kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args(arguments)
    if options.smoke and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if not torch.cuda.is_available() and not options.smoke:
        raise SystemExit("PyTorch sees no GPU; --smoke runs tiny sizes without one")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    print(f"{name}, PyTorch {torch.__version__}, fastvol {fastvol.__version__}")
    bench = Bench(device, options.smoke, time.perf_counter() + options.seconds)
    rows = run(bench, options.only)
    if not options.smoke:
        payload = {"card": name, "pytest_gpu": options.tests, "rows": rows}
        slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        print(record(f"gpu_{slug}", payload, folder=options.out))
    return rows


if __name__ == "__main__":
    main()
