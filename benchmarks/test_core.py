"""The C++ core on its own: normals and radial integrals a second, the losses of many rays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from .conftest import Report

core = pytest.importorskip("fastvol._core", reason="the C++ core is not built")

_DIM = 235_146
_ROWS = 8


@pytest.fixture(scope="module")
def measured(report: Report) -> Iterator[list[dict[str, Any]]]:
    entries: list[dict[str, Any]] = []
    yield entries
    report.keep("core", {"measured": entries})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_normals(
    dtype: str,
    threads: int,
    benchmark: Any,
    measured: list[dict[str, Any]],
    report: Report,
    short: bool,
) -> None:
    out = np.empty((_ROWS, _DIM), dtype=dtype)
    theirs = torch.empty((_ROWS, _DIM), dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    ids = np.arange(_ROWS)
    seconds: list[float] = []
    torch_seconds: list[float] = []

    def one_round() -> None:
        began = time.perf_counter()
        core.normals(out, 1, 0, ids, threads=threads)
        middle = time.perf_counter()
        theirs.normal_(generator=generator)
        seconds.append(middle - began)
        torch_seconds.append(time.perf_counter() - middle)

    benchmark.pedantic(one_round, rounds=5 if short else 40, warmup_rounds=1, iterations=1)
    rate = out.size / median(seconds)
    ratio = median(b / a for a, b in zip(seconds, torch_seconds, strict=True))
    payload = {
        "dtype": dtype,
        "threads": threads,
        "normals_per_second": rate,
        "torch_normal_time_over_ours": ratio,
    }
    benchmark.extra_info.update(payload)
    report.lines.append(
        f"Core: {rate / 1e6:.0f} million {dtype} normals a second on {threads} thread(s), with "
        f"norms; torch's normal_ takes {ratio:.2f} times as long"
    )
    measured.append(payload)


_LOSSES = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the best of three calls: the first pays for what the others left behind."""
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("cross_entropy", (60, 10)),
        ("cross_entropy", (600, 10)),
        ("cross_entropy", (6000, 10)),
        ("cross_entropy", (8, 50_000)),
        ("mse", (6000,)),
        ("bce_with_logits", (6000,)),
    ],
    ids=str,
)
def test_ray_losses(
    kind: str,
    shape: tuple[int, ...],
    benchmark: Any,
    measured: list[dict[str, Any]],
    report: Report,
    short: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(_ROWS, *shape, generator=generator)
    if kind == "cross_entropy":
        target = torch.randint(0, shape[1], shape[:1], generator=generator)
    else:
        target = torch.rand(shape, generator=generator)
    loss_fn = _LOSSES[kind]

    def ours() -> Any:
        return core.ray_losses(outputs.numpy(), target.numpy(), kind=kind)[0]

    def theirs() -> list[float]:
        return [loss_fn(ray, target, reduction="sum").item() for ray in outputs]

    np.testing.assert_allclose(ours(), theirs(), rtol=1e-5)
    seconds: list[float] = []
    # One thread is often the faster: so small a loss ends before the others have started.
    threads = sorted({1, torch.get_num_threads()}, reverse=True)
    torch_seconds: dict[int, list[float]] = {n: [] for n in threads}

    def one_round() -> None:
        for n in threads:
            torch.set_num_threads(n)
            torch_seconds[n].append(_fastest(theirs))
        seconds.append(_fastest(ours))

    try:
        benchmark.pedantic(one_round, rounds=10 if short else 100, warmup_rounds=2, iterations=1)
    finally:
        torch.set_num_threads(threads[0])
    ratio = min(
        median(b / a for a, b in zip(seconds, theirs_seconds, strict=True))
        for theirs_seconds in torch_seconds.values()
    )
    payload = {
        "loss": kind,
        "rays": _ROWS,
        "shape": list(shape),
        "seconds": median(seconds),
        "torch_loop_time_over_ours": ratio,
    }
    benchmark.extra_info.update(payload)
    report.lines.append(
        f"Core: {kind} of {_ROWS} rays, {shape} float32 outputs each, in "
        f"{1e6 * median(seconds):.0f} us; PyTorch, ray by ray, takes {ratio:.1f} times as long"
    )
    measured.append(payload)


@pytest.mark.parametrize("shift", ["centred", "shifted"])
@pytest.mark.parametrize("dim", [10, _DIM])
def test_radial_integrals(
    dim: int,
    shift: str,
    benchmark: Any,
    measured: list[dict[str, Any]],
    report: Report,
    short: bool,
) -> None:
    generator = np.random.default_rng(0)
    n = 1000
    radii = np.sqrt(dim) * np.exp(0.1 * generator.standard_normal(n))
    linear = generator.standard_normal(n) if shift == "shifted" else None
    benchmark.pedantic(
        lambda: core.log_radial_gaussian(dim, radii, linear),
        rounds=3 if short else 30,
        warmup_rounds=1,
        iterations=1,
    )
    rate = n / benchmark.stats.stats.median if benchmark.stats else float("nan")
    payload = {"dim": dim, "law": shift, "integrals_per_second": rate}
    benchmark.extra_info.update(payload)
    report.lines.append(f"Core: {rate:,.0f} radial integrals a second, d = {dim}, {shift} law")
    measured.append(payload)
