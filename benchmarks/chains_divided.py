"""One run of chains on one process and on two, each of one thread, with the same plan.

    python -m benchmarks.chains_divided [--short] [--results DIR]

Annealing with ``replicates=1``, whose chains are divided in two parts either way: a network that
is moderately heavy, 784-64-10 on 2,000 generated examples, and a tiny one, whose parts are shorter
than their way to another process. One process and two take turns, the two started as ``torchrun``
starts them; the seconds are those of the runs, on rank 0, without what comes before: processes that
have not started at one moment wait for each other there. No ratio is printed where the results are
not bit for bit the same.

Kept in ``results/chains_divided.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastvol

from .record import RESULTS, record

# Widths, examples, n, and the standard deviation of the normal law.
WORKS: dict[str, tuple[tuple[int, ...], int, int, float]] = {
    "784-64-10, 2,000 examples": ((784, 64, 10), 2000, 60, 0.1),
    "4-8-3, 50 examples": ((4, 8, 3), 50, 4000, 1.0),
}
SHORT = "4-8-3, 50 examples"
PROCESSES = 2


def build(work: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A network trained on examples that another one has labelled."""
    widths, examples, _, _ = WORKS[work]
    torch.manual_seed(0)

    def network() -> nn.Sequential:
        first, hidden, last = widths
        return nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last))

    x = torch.randn(examples, widths[0])
    y = network()(3 * x).argmax(dim=1)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x, y)


def run(work: str, plan: dict[str, Any] | None, n: int | None = None) -> dict[str, Any]:
    """The call, in this process; without a plan only one is measured, by a few plain rays."""
    torch.set_num_threads(1)
    model, data = build(work)
    _, _, own_n, std = WORKS[work]
    result = fastvol.estimate(
        model,
        F.cross_entropy,
        16 if plan is None else n or own_n,
        data=data,
        increase=0.1,
        measure=fastvol.Gaussian(std),
        engine="layered" if plan is None else "auto",
        method="radial" if plan is None else "annealed",
        preconditioner=None,
        replicates=1,
        plan=plan,
        progress=False,
    )
    return {
        "seconds": result.provenance["run_seconds"],
        "log_volume": result.log_volume,
        "log_radii": hashlib.sha256(result.log_radii.tobytes()).hexdigest(),
        "n_loss": result.n_loss,
        "n_grad": result.n_grad,
        "dim": result.dim,
        "parts": result.provenance.get("parts"),
        "plan": result.plan,
    }


def measure(work: str, plan: dict[str, Any] | None, processes: int, n: int | None) -> Any:
    """The call in so many fresh processes; what rank 0 says of it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = []
    for rank in range(processes):
        own = {**group, "RANK": str(rank)} if processes > 1 else {}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.chains_divided", "--one", work, json.dumps(plan),
                 json.dumps(n)],
                cwd=Path(__file__).parent.parent,
                env={**os.environ, **own, "OMP_NUM_THREADS": "1"},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    said = [process.communicate() for process in started]
    for process, (_, trouble) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process of {work} ended with an error:\n{trouble}")
    return json.loads(said[0][0].splitlines()[-1])


def compare(work: str, rounds: int, n: int | None = None) -> dict[str, Any]:
    """One process and several in turn, with one plan."""
    plan = {**measure(work, None, 1, n)["plan"], "processes": PROCESSES, "screening": "off"}
    runs: dict[int, list[dict[str, Any]]] = {1: [], PROCESSES: []}
    for _ in range(rounds):
        for processes, made in runs.items():
            made.append(measure(work, plan, processes, n))
    first = runs[1][0]
    told = ("log_volume", "log_radii", "n_loss", "n_grad")
    for made in (*runs[1], *runs[PROCESSES]):
        if any(made[name] != first[name] for name in told):
            raise SystemExit(f"{work}: the results differ")
    alone, together = (median(made["seconds"] for made in each) for each in runs.values())
    return {
        "work": work,
        **{name: first[name] for name in ("dim", *told)},
        "plan": plan,
        "seconds": {str(p): [made["seconds"] for made in each] for p, each in runs.items()},
        "parts": runs[PROCESSES][-1]["parts"],
        "ratio": alone / together,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chains_divided")
    parser.add_argument("--short", action="store_true", help="the tiny one; keeps nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work, plan, n = options.one
        print(json.dumps(run(work, json.loads(plan), json.loads(n))))
        return
    rows = []
    for work in [SHORT] if options.short else WORKS:
        row = compare(work, 1 if options.short else options.rounds, 300 if options.short else None)
        rows.append(row)
        alone, together = (median(row["seconds"][p]) for p in ("1", str(PROCESSES)))
        print(
            f"{work}: {alone:.2f} s on 1 process, {together:.2f} s on {PROCESSES}, "
            f"{row['ratio']:.2f} times as fast; {row['parts']['given']} parts given away",
            flush=True,
        )
    if not options.short:
        record("chains_divided", {"rows": rows}, folder=options.results)


if __name__ == "__main__":
    main()
