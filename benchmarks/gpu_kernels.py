"""Rows of the GPU table: the card, and each kernel alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastvol._backend import select
from fastvol._precision import products
from fastvol._reference.search_step import Rule, SearchState

from . import card
from .gpu_bench import Bench, Row, kernels_of, row


def limits(bench: Bench) -> Iterator[Row]:
    """The card itself."""
    device = bench.device
    bench.limits["copy"] = rate = card.copy_rate(device, bench.size(1 << 28, 1 << 10))
    yield row("copy", f"{rate / 1e12:.3g} TB/s", bytes_per_second=rate)
    for precision in ("bf16", "tf32", "fp32"):
        rate = card.matrix_rate(device, precision, bench.size(8192, 16))
        bench.limits[precision] = rate
        yield row(f"dense {precision}", f"{rate / 1e12:.3g} TFLOP/s", flops_per_second=rate)
    bench.limits["normals"] = bound = card.normals_bound(device)
    yield row("normals, by integer units", f"{bound / 1e9:.3g} G/s", normals_per_second=bound)


def perturb(bench: Bench) -> Iterator[Row]:
    """θ₀ + c·s⊙z in one pass."""
    kernels = kernels_of()
    shapes = [(1, bench.size(100_000_000, 300)), (bench.size(64, 2), bench.size(235_146, 61))]
    for lanes, d in shapes:
        theta, scale = torch.randn(2, d, device=bench.device)
        out = torch.empty(lanes, d, device=bench.device)
        ids = torch.arange(lanes, device=bench.device)
        c = torch.ones(lanes, dtype=torch.float64, device=bench.device)
        scales = [("", None), (", scaled", scale)]
        if lanes == 1:
            # As a large model's filters have it.
            scales.append((", a scale a row", scale[: d // bench.size(1000, 100)]))
        for name, s in scales:
            pass_ = partial(kernels.perturb, out, theta, c, 1, 0, ids, scale=s)
            spent = card.kernel_seconds(pass_, bench.device)
            moved = 4 * (d * (lanes + 1) + (0 if s is None else len(s)))
            by_bytes = moved / bench.limits["copy"]
            by_integers = lanes * d / bench.limits["normals"]
            least = by_bytes if math.isnan(by_integers) else max(by_bytes, by_integers)
            share = least / spent
            yield row(
                f"perturb {lanes} × {d}{name}",
                f"{spent * 1e6:.4g} µs, {share:.0%} of the bound",
                "≥ 80 %",
                share >= 0.8,
                seconds=spent,
                share=share,
                by_bytes=by_bytes,
                by_integers=by_integers,
            )


def noise(bench: Bench) -> Iterator[Row]:
    """Normals that never leave the registers."""
    kernels = kernels_of()
    d = bench.size(235_146, 70)
    ids = torch.arange(bench.size(4096, 2), device=bench.device)
    spent = card.kernel_seconds(
        lambda: kernels.direction_reductions(d, 1, 0, ids, device=bench.device), bench.device
    )
    rate = d * len(ids) / spent
    yield row(
        "noise in registers",
        f"{rate / 1e9:.4g} G normals/s",
        "≥ 400",
        rate >= 4e11,
        normals_per_second=rate,
    )


def linear(bench: Bench) -> Iterator[Row]:
    """A perturbed layer, its noise made in the tile, against materialised weights."""
    kernels = kernels_of()
    lanes, device = bench.size(64, 2), bench.device
    shapes = [(784, 256), (256, 128), (1024, 1024)] if not bench.smoke else [(20, 17)]
    for width_in, width_out in shapes:
        for rows in (60, 600, 6000) if not bench.smoke else (5,):
            x = torch.randn(rows, width_in, device=device)
            weight = torch.randn(width_out, width_in, device=device)
            bias = torch.randn(width_out, device=device)
            c = torch.full((lanes,), 0.1, dtype=torch.float64, device=device)
            ids = torch.arange(lanes, device=device)
            z = torch.empty(lanes, width_out, width_in, device=device)
            moved = torch.empty_like(z)
            for precision in ("bf16", "tf32"):
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                few = x.to(dtype)
                many, added = few.expand(lanes, -1, -1), bias.to(dtype)

                ours = partial(
                    kernels.perturbed_linear,
                    few,
                    weight,
                    bias,
                    c,
                    1,
                    0,
                    ids,
                    activation="relu",
                    precision=precision,
                )
                theirs = partial(_materialised, many, weight, added, z, moved)
                with products(tf32=precision == "tf32"):
                    spent, other = (card.kernel_seconds(f, device) for f in (ours, theirs))
                rate = 2 * lanes * rows * width_in * width_out / spent
                share = rate / bench.limits[precision]
                yield row(
                    f"perturbed_linear {lanes} × {rows} × {width_in} → {width_out}, {precision}",
                    f"{spent * 1e6:.4g} µs, {share:.0%} of dense, {other / spent:.2f} × baddbmm",
                    "≥ 50 % (600 rows on), > 1 ×",
                    (share >= 0.5 or rows < 600) and other > spent,
                    seconds=spent,
                    share=share,
                    ratio=other / spent,
                )


def _materialised(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, moved: Tensor) -> Tensor:
    """The layer as one would write it, by PyTorch's own normals."""
    z.normal_()
    torch.add(weight, z, alpha=0.1, out=moved)
    return torch.baddbmm(bias, x, moved.to(x.dtype).mT).relu_()


def parts(bench: Bench) -> Iterator[Row]:
    """What the layered engine spends on a direction of the MNIST MLP, layer by layer."""
    kernels, device = kernels_of(), bench.device
    lanes, rows = bench.size(512, 2), bench.size(600, 5)
    width_in, width, width_out = (784, 256, 128) if not bench.smoke else (20, 9, 3)
    x = torch.randn(rows, width_in, device=device)
    weight = torch.randn(width_out, width, device=device)
    base = torch.randn(rows, width, device=device)
    change = torch.empty(lanes, rows, width, device=device)
    ids = torch.arange(lanes, device=device)
    c = torch.full((lanes,), 0.1, dtype=torch.float64, device=device)

    def told(name: str, flops: float, call: partial[Tensor]) -> Row:
        spent = card.kernel_seconds(call, device)
        return row(
            f"{name}, {lanes} directions",
            f"{spent / lanes * 1e6:.4g} µs a direction, {flops * lanes / spent / 1e12:.4g} TFLOP/s",
            seconds_per_direction=spent / lanes,
            flops_per_second=flops * lanes / spent,
        )

    for precision in ("fp32", "bf16x3", "tf32", "bf16"):
        call = partial(
            kernels.direction_linear, x, width, 1, 0, ids, precision=precision, out=change
        )
        yield told(f"x·Z of {width_in} → {width}, {precision}", 2.0 * rows * width_in * width, call)
        call = partial(
            kernels.perturbed_linear,
            change,
            weight,
            None,
            c,
            1,
            0,
            ids,
            base=base,
            base_activation="relu",
            activation="relu",
            precision=precision,
        )
        yield told(
            f"then relu and {width} → {width_out}, {precision}",
            2.0 * rows * width * width_out,
            call,
        )
    call = partial(kernels.scaled_add, base, change, c, activation="relu")
    spent = card.kernel_seconds(call, device)
    rate = 8 * change.numel() / spent
    yield row(
        f"scaled_add {lanes} × {rows} × {width}",
        f"{spent / lanes * 1e6:.4g} µs a direction, {rate / bench.limits['copy']:.0%} of copying",
        "≥ 80 %",
        rate >= 0.8 * bench.limits["copy"],
        seconds_per_direction=spent / lanes,
    )


def step(bench: Bench) -> Iterator[Row]:
    """One step of the searches from the logits of 600 images."""
    backends = {name: select(name) for name in ("triton", "torch")}
    lanes, rows = bench.size(512, 3), bench.size(600, 9)
    outputs = torch.randn(lanes, rows, 10, device=bench.device)
    target = torch.zeros(rows, dtype=torch.int64, device=bench.device)
    spent = {}
    for name, backend in backends.items():
        state = SearchState.empty(lanes, bench.device)
        # All lie outside, and go on inward.
        rules = {Rule.LOSS0: 0.0, Rule.THRESHOLD: 0.1, Rule.MAX_EVALUATIONS: 1e9, Rule.LIMIT: 1e9}
        state.keep_rules({**dict.fromkeys(Rule, 1.0), **rules})
        where = torch.arange(lanes, device=bench.device)
        start = torch.zeros(lanes, dtype=torch.float64, device=bench.device)
        state.begin(where, start, scan=False)
        move = partial(
            backend.threshold_step, state, outputs, target, kind="cross_entropy", scale=1 / rows
        )
        spent[name] = card.kernel_seconds(move, bench.device, repeats=bench.size(5, 1))
    yield row(
        f"threshold_step {lanes} × {rows} × 10",
        f"{spent['triton'] * 1e6:.4g} µs, operation by operation {spent['torch'] * 1e6:.4g}",
        seconds=spent["triton"],
        seconds_of_torch=spent["torch"],
    )
