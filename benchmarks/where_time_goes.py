"""Where the time of a direction goes: ``python -m benchmarks.where_time_goes [--data DIR] …``.

For two networks of the table, with the plan they get: noise, what is made once a direction
(for most nets x·Z), and a loss at a further radius, in ms a direction; and their sum with as many
losses as a search takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import fastvol
from fastvol import _backend
from fastvol._layout import ParameterLayout
from fastvol._objective import PREFIX, Objective
from fastvol._scale import Scale
from fastvol.engines import Indexed, Plan, open_engine
from fastvol.metrics import metric_scale

from .data import Sources
from .problems import Problem, mnist_mlp, transformer
from .record import RESULTS, record

RTOL = 1e-3


def measured(problem: Problem, n: int) -> dict[str, Any]:
    """One network."""
    call: dict[str, Any] = {
        "data": (problem.inputs, problem.targets),
        "threshold": problem.threshold,
        "metric": "filter",
        "measure": fastvol.Lebesgue(1e3),
        "method": "radial",
        "rtol": RTOL,
        "progress": False,
        "engine": "layered",
    }
    run = fastvol.estimate(problem.model, F.cross_entropy, n, **call)
    plan = Plan.from_description(run.plan)
    layout = ParameterLayout(problem.model)
    backend = _backend.select("auto")
    objective = Objective(problem.model, F.cross_entropy, call["data"], layout.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        problem.model.eval()
        objective.prepare(layout.unflatten(layout.flatten(), PREFIX))
        scale: Scale = metric_scale("filter", layout, used=True)[0]
        engine = open_engine(objective, layout, scale, plan, backend)
        ids = np.arange(engine.lanes)
        radii = np.full(engine.lanes, float(np.exp(np.median(run.log_radii))))
        rows = torch.empty((engine.lanes, layout.size))

        def load() -> None:
            engine.load(ids, Indexed(0, ids))

        def load_and_loss() -> None:
            load()
            engine.loss(radii)

        def noise() -> None:
            backend.normals(rows, 0, 0, ids, threads=plan.noise_threads)

        each = {
            "noise": _ms(noise),
            "load": _ms(load),
            "load and first loss": _ms(load_and_loss),
            "loss": _ms(lambda: engine.loss(radii)),
        }
        each = {name: value / engine.lanes for name, value in each.items()}
    finally:
        torch.set_num_threads(threads)
    # The pilot and the audit apart: what a search of one direction takes.
    losses = _losses_a_direction(problem, call, run.plan, n)
    once = each["load and first loss"] - each["loss"] - each["load"]
    return {
        "problem": problem.describe(),
        "plan": run.plan,
        "ms": {
            "noise": each["noise"],
            "rest of loading": each["load"] - each["noise"],
            "once a direction": once,
            "a loss": each["loss"],
            "losses": losses * each["loss"],
        },
        "losses_a_direction": losses,
        "sum_ms": each["load"] + once + losses * each["loss"],
    }


def _losses_a_direction(
    problem: Problem, call: dict[str, Any], plan: dict[str, Any], n: int
) -> float:
    """The slope of ``n_loss`` in n, without what is spent whatever n is."""
    spent = []
    for count in (n, 2 * n):
        options = {**call, "plan": plan, "engine": "auto", "first_crossing": False}
        run = fastvol.estimate(problem.model, F.cross_entropy, count, **options)
        # Scans of the audit are counted apart: every scanned ray takes 33.
        scanned = int(run._rays.audited.sum())
        spent.append(run.n_loss - 33 * scanned)
    return (spent[1] - spent[0]) / n


def _ms(work: Callable[[], None]) -> float:
    """The best of several, milliseconds."""
    work()
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return 1e3 * best


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.where_time_goes")
    parser.add_argument("--data", type=Path, help="folder of MNIST's train.parquet; else generated")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    sources = Sources(mnist=options.data)
    works: dict[str, tuple[Callable[[], Problem], int]] = {
        "MLP, 600 images": (lambda: mnist_mlp(sources), 64),
        "transformer, 64 sequences": (lambda: transformer(sources), 32),
    }
    rows = {}
    for name, (make, n) in works.items():
        rows[name] = measured(make(), n)
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in rows[name]["ms"].items())
        print(
            f"{name}: {rows[name]['sum_ms']:.2f} ms a direction: {parts} "
            f"({rows[name]['losses_a_direction']:.2f} losses)",
            flush=True,
        )
    print(record("where_time_goes", {"rtol": RTOL, "works": rows}, folder=options.results).name)


if __name__ == "__main__":
    main()
