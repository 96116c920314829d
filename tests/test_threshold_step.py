"""Steps of the search as arrays, against the search; their kernels, against both."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastvol._reference import search as reference_search
from fastvol._reference import threshold_step as reference
from fastvol._reference.losses import ray_losses
from fastvol._reference.search_step import Mark, Number, Phase, Rule, SearchState, search_step

pytest.importorskip("triton")
from fastvol.kernels import losses as loss_kernels
from fastvol.kernels import threshold_step as kernels

# The interpreter computes what masks will hide.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ONE = slice(2, 3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("cross_entropy", "mse", "bce_with_logits", "given")
# Relative, of a sum; by the dtype of the outputs.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float64: 1e-13}
NUMBERS = [n for n in Number if n != Number.TOTAL]

OPTIONS: dict[str, float] = {
    "loss0": 0.0,
    "threshold": 1.0,
    "xtol": 1e-4,
    "log_cap": 4.0,
    "slope": 2.0,
    "max_evaluations": 200,
    "scan_span": math.log(8.0),
    "scan_points": 32,
}


def rules(limit: float = math.inf, **changes: float) -> dict[Rule, float]:
    values = {**OPTIONS, **changes, "limit": limit}
    return {rule: values[rule.name.lower()] for rule in Rule}


def begun(lanes: int, limit: float = math.inf, **changes: float) -> SearchState:
    """Lanes that all wait for a loss, with two idle ones before and three after; NaN elsewhere."""
    state = SearchState.empty(lanes + 5, DEVICE)
    state.numbers.fill_(math.nan)
    state.keep_rules(rules(limit, **changes))
    where = torch.arange(2, 2 + lanes, device=DEVICE)
    state.begin(where, torch.zeros(lanes, dtype=torch.float64, device=DEVICE), scan=False)
    return state


class Rays:
    """Losses of random shapes: powers with waves, walls of NaN and inf, stairs, bounds, hollows."""

    def __init__(self, n: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.start = draw.normal(0, 2, n)
        self._power, self._centre = draw.uniform(0.3, 8, n), draw.normal(0, 2, n)
        self._wave = draw.uniform(0, 1, n) * (draw.random(n) < 0.5)
        self._angle, self._kind = draw.uniform(0, 6, n), draw.integers(0, 8, n)
        self._items: dict[int, int] = {}

    def at(self, items: Any, radii: Any) -> tuple[Any, Any]:
        with np.errstate(all="ignore"):
            x = np.log(radii) - self._centre[items]
            value = np.exp(np.clip(self._power[items] * x, -700, 700))
            value *= 1 + self._wave[items] * np.sin(5 * x + self._angle[items])
            kind = self._kind[items]
            value = np.where(kind == 1, np.where(x > 0.3, np.nan, 0.5 * value), value)
            value = np.where(kind == 2, np.where(x > 0, np.inf, -0.1), value)
            value = np.where(kind == 3, np.floor(4 * value) / 4, value)
            value = np.where(kind == 4, 1e-9 * value, value)
            value = np.where(kind == 5, -value, value)
            return value, value > 50

    def load(self, lanes: Any, items: Any) -> None:
        self._items.update(zip(lanes.tolist(), items.tolist(), strict=True))

    def loss(self, lanes: Any, radii: Any) -> tuple[Any, Any]:
        return self.at(np.array([self._items[lane] for lane in lanes.tolist()]), radii)


def rounds(
    rays: Rays, step: Callable[[SearchState], None], mode: str, options: dict[str, Any]
) -> Iterator[SearchState]:
    """The state after each round, until all lanes are settled."""
    n = len(rays.start)
    items = np.arange(n)
    state = SearchState.empty(n, DEVICE)
    state.keep_rules(rules(**options))
    state.begin(
        torch.from_numpy(items).to(DEVICE),
        torch.from_numpy(rays.start).to(DEVICE),
        scan=mode == "scan",
    )
    while int(state.settled) < n:
        value, beyond = rays.at(items, state.radii.cpu().numpy())
        state.numbers[Number.TOTAL] = torch.from_numpy(value).to(DEVICE)
        state.marks[Mark.BEYOND] = torch.from_numpy(beyond).to(DEVICE, torch.int32)
        step(state)
        yield state


@pytest.mark.parametrize("mode", ["search", "scan"])
@pytest.mark.parametrize(
    "options",
    [
        {"xtol": 1e-3},
        {"loss0": 0.2, "xtol": 1e-9},
        {"loss0": -1.0, "threshold": 0.5, "max_evaluations": 9},
        {"loss0": 1.0},
        {"threshold": 0.0, "xtol": 1e-6, "slope": 7.0},
    ],
)
def test_steps_are_those_of_the_search(mode: str, options: dict[str, Any]) -> None:
    rays = Rays(300, seed=len(options))
    merged = {**OPTIONS, **options}
    merged["max_evaluations"] = int(merged["max_evaluations"])
    merged["scan_points"] = int(merged["scan_points"])
    wanted = reference_search.search(rays, rays.start, lanes=300, mode=mode, **merged)
    *_, state = rounds(rays, search_step, mode, options)
    found = state.numbers[Number.X].cpu().numpy()
    np.testing.assert_allclose(found, wanted[0], rtol=1e-12, atol=1e-12)
    for mark, values in zip(
        (Mark.STATUS, Mark.EVALUATIONS, Mark.REENTRANT), wanted[1:], strict=True
    ):
        np.testing.assert_array_equal(state.marks[mark].cpu().numpy(), values)
    # Not all alike.
    assert len(np.unique(wanted[1])) > 1


@pytest.mark.parametrize(("n", "mode"), [(63, "search"), (1, "search"), (65, "scan")])
def test_the_kernel_moves_as_the_step_does(n: int, mode: str) -> None:
    rays, options = Rays(n, seed=n), {"loss0": 0.2, "xtol": 1e-6, "max_evaluations": 12}
    both = zip(
        rounds(rays, search_step, mode, options),
        rounds(rays, kernels.move, mode, options),
        strict=True,
    )
    for wanted, found in both:
        assert torch.equal(found.marks, wanted.marks)
        assert int(found.settled) == int(wanted.settled)
        torch.testing.assert_close(
            found.numbers, wanted.numbers, rtol=1e-12, atol=1e-12, equal_nan=True
        )


def batch(
    kind: str, dtype: torch.dtype, rays: int, examples: int, classes: int
) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(examples)
    outputs = torch.randn(rays, examples, classes, generator=generator).mul(2).to(dtype)
    target: Tensor | None = None
    if kind == "cross_entropy":
        target = torch.randint(0, classes, (examples,), generator=generator)
        target[examples // 4] = -100
    else:
        outputs = outputs.reshape(rays, -1)
        if kind != "given":
            target = torch.rand(examples * classes, generator=generator).to(dtype)
    return outputs.to(DEVICE), None if target is None else target.to(DEVICE)


def compare(
    kind: str, outputs: Tensor, target: Tensor | None, limit: float, first: Any, second: Any
) -> tuple[SearchState, SearchState]:
    """Two batches, the second of other weight, by two functions; equal within the tolerance."""
    rays = outputs.shape[0]
    terms = outputs[0].numel()
    states = []
    for step in (first, second):
        state = begun(rays, limit)
        middle = rays // 2
        for i, lanes in enumerate((slice(2, 2 + middle), slice(2 + middle, 2 + rays))):
            part = outputs[lanes.start - 2 : lanes.stop - 2]
            options: dict[str, Any] = {"kind": kind, "lanes": lanes}
            step(state, part, target, scale=1 / (2 * terms), last=False, **options)
            step(state, part, target, scale=1 / (3 * terms), first=False, last=i == 1, **options)
        states.append(state)
    wanted, found = states
    assert torch.equal(found.marks, wanted.marks)
    beyond = wanted.marks[Mark.BEYOND] != 0
    inside = slice(2, 2 + rays)
    assert bool((found.numbers[Number.TOTAL][beyond] > limit).all())
    for numbers in (wanted.numbers, found.numbers):
        # A lower bound may be any.
        numbers[Number.TOTAL][beyond] = numbers[Number.OUTSIDE_LOSS][beyond] = 0.0
    tolerance = TOLERANCE[outputs.dtype]
    torch.testing.assert_close(
        found.numbers[:, inside],
        wanted.numbers[:, inside],
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )
    return wanted, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "rays", "examples", "classes", "limit"),
    [
        (torch.float32, 13, 60, 10, 0.9),
        (torch.bfloat16, 3, 63, 1, math.inf),
        (torch.bfloat16, 2, 3, 257, 1.0),
        (torch.float64, 1, 257, 3, math.inf),
    ],
)
def test_the_kernel_is_the_reference(
    kind: str, dtype: torch.dtype, rays: int, examples: int, classes: int, limit: float
) -> None:
    outputs, target = batch(kind, dtype, rays, examples, classes)
    compare(kind, outputs, target, limit, reference.threshold_step, kernels.threshold_step)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite(kind: str) -> None:
    outputs, target = batch(kind, torch.float32, 6, 20, 3)
    flat = outputs.view(6, -1)
    flat[0, 30] = math.nan
    flat[1, 30] = math.inf
    flat[2, 30] = -math.inf
    # The limit is met before the NaN, and after it.
    flat[3, 0], flat[3, -1] = 1e8, math.nan
    flat[4, 0], flat[4, -1] = math.nan, 1e8
    if kind == "cross_entropy" and target is not None:
        target[0], target[-1] = 1, 0
    wanted, _ = compare(
        kind, outputs, target, 50.0, reference.threshold_step, kernels.threshold_step
    )
    total = wanted.numbers[Number.TOTAL, 2:8]
    assert bool(total[0].isnan())
    assert bool(total[4].isnan())
    assert bool(wanted.marks[Mark.BEYOND, 5]) == (kind != "given")
    assert int(wanted.marks[Mark.PHASE, 2]) == Phase.BRACKET


@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
@pytest.mark.parametrize("limit", [math.inf, 0.7])
def test_many_examples_are_summed_in_stretches(
    kind: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_kernels, "_TILE", 32)
    monkeypatch.setattr(loss_kernels, "_TILES", 1)
    outputs, target = batch(kind, torch.float32, 2, 63, 3)
    compare(kind, outputs, target, limit, reference.threshold_step, kernels.threshold_step)


@pytest.mark.parametrize("step", [reference.threshold_step, kernels.threshold_step])
def test_sums_are_float64(step: Any) -> None:
    outputs = torch.tensor([[1.0, 1e-9, 1e-12] * 21], device=DEVICE)
    state = begun(1)
    step(state, outputs, None, kind="given", lanes=ONE, last=False)
    exact = math.fsum(outputs.double().flatten().tolist())
    assert abs(float(state.numbers[Number.TOTAL, 2]) - exact) < 1e-14 * exact
    step(state, outputs, None, kind="given", scale=1 / 3, lanes=ONE, last=False)
    assert abs(float(state.numbers[Number.TOTAL, 2]) - exact / 3) < 1e-14 * exact


@pytest.mark.parametrize("step", [reference.threshold_step, kernels.threshold_step])
def test_small_losses_keep_their_digits(step: Any) -> None:
    outputs = torch.tensor([[20.0, 15.0, 10.0]], device=DEVICE)
    state, target = begun(1), torch.ones(3, device=DEVICE)
    step(state, outputs, target, kind="bce_with_logits", lanes=ONE, last=False)

    exact = sum(math.log1p(math.exp(-x)) for x in (20.0, 15.0, 10.0))
    assert abs(float(state.numbers[Number.TOTAL, 2]) - exact) < 1e-6 * exact


@pytest.mark.parametrize("step", [reference.threshold_step, kernels.threshold_step])
def test_no_example_counts(step: Any) -> None:
    state = begun(2)
    target = torch.full((5,), -100, device=DEVICE)
    outputs = torch.randn(2, 5, 3, device=DEVICE)
    step(state, outputs, target, kind="cross_entropy", lanes=slice(2, 4), last=False)
    assert state.numbers[Number.TOTAL, 2:4].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("step", [reference.threshold_step, kernels.threshold_step])
def test_idle_lanes_stay_as_they_are(step: Any) -> None:
    state = begun(2)
    before = [state.numbers.clone(), state.marks.clone()]
    outputs = torch.full((7, 4), math.nan, device=DEVICE)
    outputs[2:4] = 0.5
    step(state, outputs, torch.zeros(4, device=DEVICE), kind="mse", scale=1 / 4)
    idle = [0, 1, 4, 5, 6]
    kept = [int(n) for n in NUMBERS]
    assert torch.equal(state.marks[: Mark.BEYOND, idle], before[1][: Mark.BEYOND, idle])
    assert state.numbers[kept][:, idle].isnan().all()
    assert state.marks[Mark.EVALUATIONS, 2:4].tolist() == [1, 1]
    assert int(state.settled) == 0


@pytest.mark.parametrize("kind", KINDS[:3])
def test_ray_losses_with_a_limit_for_each(kind: str) -> None:
    outputs, target = batch(kind, torch.float32, 5, 60, 3)
    assert target is not None
    limit = np.array([0.0, 5.0, 40.0, 100.0, math.inf])
    found, beyond = loss_kernels.ray_losses(outputs, target, kind=kind, limit=limit)
    wanted, outside = ray_losses(outputs, target, kind=kind, limit=limit)  # type: ignore[arg-type]
    np.testing.assert_array_equal(beyond, outside)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert 0 < outside.sum() < 5


@pytest.mark.parametrize(
    ("kind", "outputs", "target"),
    [
        ("hinge", (2, 5), torch.zeros(5)),
        ("mse", (2, 5), torch.zeros(4)),
        ("mse", (2, 5), None),
        ("bce_with_logits", (2, 5), torch.full((5,), 1.5)),
        ("cross_entropy", (2, 5), torch.zeros(5, dtype=torch.int64)),
        ("cross_entropy", (2, 5, 3), torch.full((5,), 3)),
        ("cross_entropy", (2, 5, 3), torch.full((5,), -1)),
    ],
)
def test_targets_are_checked_once(kind: str, outputs: Any, target: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"target|kind"):
        reference.check_target(torch.zeros(outputs), target, kind=kind)


def test_the_kernel_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        kernels.threshold_step(begun(1), torch.zeros(6, 2, device=DEVICE), None, kind="hinge")
    whole = torch.zeros(6, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="outputs must be floating-point"):
        kernels.threshold_step(begun(1), whole, None, kind="given")
    with pytest.raises(ValueError, match="outputs must hold 6 rays"):
        kernels.threshold_step(begun(1), torch.zeros(5, 2, device=DEVICE), None, kind="given")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan", [False, True])
def test_the_reference_reads_nothing_on_the_host(kind: str, scan: bool) -> None:
    # Tensors without values: whatever asks for one fails.
    state = SearchState.empty(5, "meta")
    lanes = torch.empty(3, dtype=torch.int64, device="meta")
    state.begin(lanes, torch.empty(3, dtype=torch.float64, device="meta"), scan=scan)
    outputs, target = batch(kind, torch.float32, 5, 7, 3)
    there = None if target is None else target.to("meta")
    reference.threshold_step(state, outputs.to("meta"), there, kind=kind)
    assert state.settled.is_meta


_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastvol.kernels.losses import combine_kernel, sum_kernel
from fastvol.kernels.threshold_step import move_kernel

pointers = {"target": "*i64", "phases": "*i32", "base_marks": "*i32", "stopped": "*i32",
            "part_marks": "*i32", "marks": "*i32", "settled_count": "*i32"}
doubles = ("base", "limits", "sums", "parts", "numbers", "rules")
jobs = [
    (sum_kernel, {"outputs": "*fp32"}, dict(KIND=1, FIRST=True, SEARCHING=True, LIMITS=0,
     SPLIT=False, DOUBLE=False, BLOCK_N=128, BLOCK_C=16)),
    (sum_kernel, {"outputs": "*bf16", "target": "*bf16"}, dict(KIND=3, FIRST=False, SEARCHING=False,
     LIMITS=1, SPLIT=True, DOUBLE=False, BLOCK_N=256, BLOCK_C=1)),
    (combine_kernel, {}, dict(FIRST=False, BOUNDED=True, LIMITS=1, BLOCK=128)),
    (move_kernel, {}, dict(BLOCK=128)),
]
for kernel, own, constants in jobs:
    signature = {}
    for name in kernel.arg_names:
        kind = "fp32" if name.startswith("scale") else "i32"
        kind = "*fp64" if name in doubles else pointers.get(name, kind)
        signature[name] = "constexpr" if name in constants else own.get(name, kind)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    print(len(made.asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_the_kernels_compile_for_a_card_that_is_not_there(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("rays", "examples", "classes"),
    [(257, 600, 10), (64, 6000, 63), pytest.param(3, 2048, 5003, id="vocabulary")],
)
@pytest.mark.parametrize("limit", [math.inf, 2.0])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_sizes(
    kind: str, dtype: torch.dtype, rays: int, examples: int, classes: int, limit: float
) -> None:
    outputs, target = batch(kind, dtype, rays, examples, classes)
    compare(kind, outputs, target, limit, reference.threshold_step, kernels.threshold_step)
