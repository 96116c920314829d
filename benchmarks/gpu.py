"""The table of the GPU path: ``benchmarks/gpu.sh``, or ``python -m benchmarks.gpu``.

Every row stands alone: one that fails is reported, and the others go on. ``--smoke`` runs all of
them at tiny sizes, on a CPU in Triton's interpreter: its figures mean nothing. What is measured is
kept after every row.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fastvol

from .gpu_bench import PATIENCE, Bench, Row, SkippedError
from .gpu_kernels import limits, linear, noise, parts, perturb, step
from .gpu_language import language
from .gpu_runs import agreement, cifar, cnn, fused, gap, million
from .record import RESULTS, record

ROWS: tuple[Callable[[Bench], Iterator[Row]], ...] = (
    limits,
    perturb,
    noise,
    linear,
    agreement,
    million,
    gap,
    cnn,
    cifar,
    language,
    # What tells more than the goals ask for, if there is time left.
    fused,
    parts,
    step,
)


# How a process ends that has lost its card.
_CARD_LOST = 3


def run(bench: Bench, only: list[str], tell: Callable[[Row], object] = lambda row: None) -> bool:
    """All rows, printed as they come.

    Args:
        bench: what they share.
        only: the functions' names; all where it is empty.
        tell: is called with each row, and before those of a function with ``{"begun": its name}``.

    Returns:
        Whether the card still answers: a kernel that fails may have broken the process's context.
    """
    for function in ROWS:
        if only and function.__name__ not in only and function is not limits:
            continue
        tell({"begun": function.__name__})
        try:
            if bench.left < 0:
                raise SkippedError("no time left")
            for row in function(bench):
                tell(row)
                verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
                print(
                    f"| {row['work']} | {row['measured']} | {row['goal']} | {verdict} |", flush=True
                )
        except SkippedError as reason:
            tell({"work": function.__name__, "skipped": str(reason)})
            print(f"| {function.__name__} | skipped: {reason} | | |", flush=True)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            tell({"work": function.__name__, "failed": text})
            print(f"| {function.__name__} | FAILED: {text.splitlines()[0]} | | |", flush=True)
            traceback.print_exc()
        if bench.device.type == "cuda":
            try:
                torch.cuda.synchronize(bench.device)
                # The next row starts with the memory of all before it.
                torch.cuda.empty_cache()
            except RuntimeError:
                return False
    return True


def supervised(
    names: list[str],
    command: Callable[[list[str], Path, float], list[str]],
    seconds: float,
    keep: Callable[[list[Row]], object],
    patience: float = PATIENCE,
) -> list[Row]:
    """Rows from processes of their own: one that breaks or hangs takes no other row with it.

    Args:
        names: of the functions.
        command: that runs some of them, writes what :func:`run` tells to a file, a line each, and
            begins none after so many seconds.
        seconds: for all.
        keep: is called with all rows so far.
        patience: seconds until the next line.
    """
    rows: list[Row] = []
    ends = time.perf_counter() + seconds
    while names:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows"
            file.touch()
            process = subprocess.Popen(command(names, file, ends - time.perf_counter()))
            begun, read, heard = names[0], 0, time.perf_counter()
            while True:
                ended = process.poll() is not None
                lines = file.read_text().splitlines(keepends=True)
                for line in lines[read:]:
                    if not line.endswith("\n"):
                        break
                    read, heard, told = read + 1, time.perf_counter(), json.loads(line)
                    begun = told.get("begun", begun)
                    # The limits are measured again by every process.
                    if "begun" not in told and told["work"] not in {r["work"] for r in rows}:
                        rows.append(told)
                        keep(rows)
                if ended:
                    break
                if time.perf_counter() - heard > patience:
                    process.kill()
                time.sleep(0.1)
        if process.returncode == 0:
            break
        if process.returncode != _CARD_LOST:
            how = f"its process ended with {process.returncode}"
            rows.append({"work": begun, "failed": how})
            keep(rows)
            print(f"| {begun} | FAILED: {how} | | |", flush=True)
        # What every row needs is tried once more, if anything was told after it.
        names = names[names.index(begun) + 1 :] if begun in names else names[1:]
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; keeps nothing")
    parser.add_argument("--only", nargs="*", default=[], help="rows, by the functions' names")
    parser.add_argument("--seconds", type=float, default=240.0, help="no row begins later")
    parser.add_argument("--tests", type=int, help="how pytest -m gpu ended, to be kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smoke and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if not torch.cuda.is_available() and not options.smoke:
        raise SystemExit("PyTorch sees no GPU; --smoke runs tiny sizes without one")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    if options.told is None:
        print(f"{name}, PyTorch {torch.__version__}, fastvol {fastvol.__version__}", flush=True)
    if options.smoke or options.told:
        bench = Bench(device, options.smoke, time.perf_counter() + options.seconds)
        return _here(bench, options.only, options.told)
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")

    def command(names: list[str], file: Path, seconds: float) -> list[str]:
        own = [sys.executable, "-m", "benchmarks.gpu", "--told", str(file)]
        return [*own, "--seconds", str(seconds), "--only", *names]

    def keep(rows: list[Row]) -> None:
        payload = {"card": name, "pytest_gpu": options.tests, "rows": rows}
        record(f"gpu_{slug}", payload, folder=options.out)

    names = [f.__name__ for f in ROWS if not options.only or f.__name__ in options.only]
    rows = supervised(names, command, options.seconds, keep)
    print(options.out / f"gpu_{slug}.json")
    return rows


def _here(bench: Bench, only: list[str], told: Path | None) -> list[Row]:
    """Rows from this process, which ends if it has lost its card."""
    rows: list[Row] = []

    def tell(row: Row) -> None:
        if "begun" not in row:
            rows.append(row)
        if told is not None:
            with told.open("a") as file:
                file.write(json.dumps(row) + "\n")

    if not run(bench, only, tell):
        sys.stdout.flush()
        # Nothing that needs the card can be cleared up.
        os._exit(_CARD_LOST)
    return rows


if __name__ == "__main__":
    main()
