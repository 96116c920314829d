"""Rows of the GPU table: whole runs of small networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch.profiler import ProfilerActivity, profile

from fastvol._precision import products

from .gpu_bench import PATIENCE, PUBLISHED, RTOL, Bench, Row, SkippedError, row


def million(bench: Bench) -> Iterator[Row]:
    """n = 1e6 on the MNIST MLP."""
    problem = bench.problem("mlp")
    few = bench.size(32768, 8)
    first = bench.estimate(problem, few)
    bench.plan = first.plan
    again = bench.estimate(problem, few, plan=first.plan)
    each = again.seconds / few
    result, n = again, few
    # Nor for longer than a row may be silent.
    if not bench.smoke and 1e6 * each < min(0.4 * bench.left, 0.6 * PATIENCE):
        result, n = bench.estimate(problem, 1_000_000), 1_000_000
    spent = result.seconds if n == 1_000_000 else 1e6 * each
    told = "" if n == 1_000_000 else f", extrapolated from {n}"
    yield row(
        "estimate(n=1e6), MLP, 600 images, rtol 1e-3",
        f"{spent:.4g} s{told}: {1e6 * PUBLISHED['mlp'] / spent:.3g} × the published code",
        "≤ 5 s",
        spent <= 5.0,
        seconds=spent,
        n=n,
        losses_per_direction=result.n_loss / n,
        plan=result.plan,
        provenance={k: result.provenance[k] for k in ("loop", "fell_back", "engine", "backend")},
    )
    peer = bench.bisection("mlp")
    yield row(
        "the same by functional_call bisection",
        f"{peer * 1e3:.4g} ms a direction: {1e6 * peer / spent:.4g} ×",
        "≥ 100 ×",
        1e6 * peer / spent >= 100,
        seconds_per_direction=peer,
        ratio=1e6 * peer / spent,
    )


def fused(bench: Bench) -> Iterator[Row]:
    """Noise made inside the layers, against directions that are kept and layers of PyTorch's."""
    problem = bench.problem("mlp")
    n = bench.size(32768, 8)
    plan = dict(bench.estimate(problem, n, engine="layered").plan)
    spent, radii = {}, {}
    for on in (True, False):
        bench.estimate(problem, n, plan={**plan, "fused": on})
        result = bench.estimate(problem, n, plan={**plan, "fused": on})
        spent[on], radii[on] = result.seconds / n, result.log_radii
    away = float(np.abs(radii[True] - radii[False]).max())
    yield row(
        f"MLP fused, {n} directions",
        f"{spent[True] * 1e6:.4g} µs a direction, not fused {spent[False] * 1e6:.4g}; radii "
        f"{away:.2g} apart in log",
        "> 1 ×, within rtol",
        spent[True] < spent[False] and away <= RTOL,
        seconds_fused=spent[True],
        seconds_not_fused=spent[False],
        apart=away,
        chosen=plan["fused"],
        lanes=plan["lanes"],
    )


def cnn(bench: Bench) -> Iterator[Row]:
    """The convolutional network of MNIST."""
    yield _of_images(bench, "cnn", "MNIST CNN, 600 images", 2048)


def cifar(bench: Bench) -> Iterator[Row]:
    """The convolutional network of CIFAR-10."""
    yield _of_images(bench, "cifar", "CIFAR-10 CNN, 2000 images", 1024)


def _of_images(bench: Bench, name: str, title: str, n: int) -> Row:
    """Of the published shape, but quick enough to end in the time there is."""
    if bench.left < 20:
        raise SkippedError("no time left")
    problem = bench.problem(name)
    count = bench.size(n, 4)
    first = bench.estimate(problem, bench.size(64, 4))
    result = bench.estimate(problem, count) if bench.left > 40 else first
    each = result.seconds / result.n
    ratio = bench.bisection(name) / each
    return row(
        title,
        f"{each * 1e3:.4g} ms a direction, {ratio:.4g} × bisection",
        "≥ 30 ×" + (", < 20 ms" if name == "cifar" else ""),
        ratio >= 30 and (name != "cifar" or each < 0.02),
        seconds_per_direction=each,
        ratio=ratio,
        n=result.n,
        plan=result.plan,
        loop=result.provenance["loop"],
    )


def gap(bench: Bench) -> Iterator[Row]:
    """How long the card waits between launches, in the middle of a run."""
    if bench.device.type != "cuda":
        raise SkippedError("needs a GPU")
    problem = bench.problem("mlp")
    plan = bench.plan or bench.estimate(problem, 8192).plan
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        bench.estimate(problem, 24576, plan=plan)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if str(event.device_type).endswith("CUDA")
    ]
    if not spans:
        raise SkippedError("the profiler told of no kernels")
    idle = idle_share(spans)
    yield row("idle between launches", f"{idle:.1%} of the time", "< 10 %", idle < 0.1, share=idle)


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Of the middle half of some spans of time, the share that none of them covers."""
    spans = sorted(spans)
    first, last = spans[0][0], max(end for _, end in spans)
    low, high = first + 0.25 * (last - first), last - 0.25 * (last - first)
    busy, reached = 0.0, low
    for start, end in spans:
        start, end = max(start, reached), min(end, high)
        if end > start:
            busy += end - start
            reached = end
    return 1.0 - busy / (high - low)


def agreement(bench: Bench) -> Iterator[Row]:
    """The same directions on the CPU and on the card, also where PyTorch may round products."""
    problem = bench.problem("mlp")
    n = bench.size(256, 4)
    host = replace(
        problem,
        model=copy.deepcopy(problem.model).cpu(),
        inputs=problem.inputs.cpu(),
        targets=problem.targets.cpu(),
    )
    wanted = bench.estimate(host, n, backend="auto")
    for name, rounded in (("", False), (", tf32 allowed", True)):
        with products(tf32=rounded):
            found = bench.estimate(problem, n)
        away = float(np.abs(found.log_radii - wanted.log_radii).max())
        alike = bool((found.status == wanted.status).all())
        yield row(
            f"radii of CPU and GPU{name}",
            f"{away:.2g} apart in log r, statuses {'equal' if alike else 'differ'}",
            "within rtol, equal",
            away <= RTOL and alike,
            apart=away,
            statuses_equal=alike,
        )
