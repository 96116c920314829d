"""Sums of losses over many rays: the C++ core and its reference against float64 PyTorch."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastvol import _backend, _core
from fastvol._reference import losses as reference

SIZES = (1, 3, 10, 63, 257)
CLASSES = (1, 2, 10, 56, 57, 112, 113, 1000)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
KINDS = ("mse", "bce_with_logits")


def cpp(outputs: torch.Tensor, target: torch.Tensor, **options: object) -> tuple:
    return _core.ray_losses(outputs.numpy(), target.numpy(), **options)


BACKENDS = pytest.mark.parametrize("losses", [cpp, reference.ray_losses], ids=["cpp", "torch"])


def definition(
    outputs: torch.Tensor, target: torch.Tensor, kind: str, ignore_index: int = -100
) -> np.ndarray:
    """Sums by PyTorch in float64, of the same inputs: float64 [k]."""
    x = outputs.double()
    if kind == "cross_entropy":
        return torch.stack(
            [F.cross_entropy(ray, target, reduction="sum", ignore_index=ignore_index) for ray in x]
        ).numpy()
    t = target.double().expand_as(x)
    if kind == "mse":
        return (x - t).square().flatten(1).sum(1).numpy()
    values = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    return values.flatten(1).sum(1).numpy()


def classifier(n: int, c: int, dtype: torch.dtype, k: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a few nats, and classes."""
    return 3.0 * torch.randn(k, n, c, dtype=dtype), torch.randint(0, c, (n,))


@BACKENDS
@DTYPES
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("c", CLASSES)
def test_cross_entropy(losses, dtype, n, c):
    x, target = classifier(n, c, dtype)
    sums, outside = losses(x, target, kind="cross_entropy")
    assert sums.dtype == np.float64
    assert outside.dtype == np.bool_
    # PyTorch subtracts two numbers of the size of the logits.
    absolute = 0.0 if losses is cpp else n * 4 * torch.finfo(dtype).eps
    np.testing.assert_allclose(
        sums, definition(x, target, "cross_entropy"), rtol=TOLERANCE[dtype], atol=absolute
    )
    assert not outside.any()


@BACKENDS
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (3,), (10, 1), (63,), (257,), (5, 7, 31), (3000,)])
def test_losses_by_element(losses, dtype, kind, shape):
    x = 4.0 * torch.randn(3, *shape, dtype=dtype)
    target = torch.rand(shape, dtype=dtype)
    sums, outside = losses(x, target, kind=kind)
    np.testing.assert_allclose(sums, definition(x, target, kind), rtol=TOLERANCE[dtype], atol=0)
    assert not outside.any()


@BACKENDS
@pytest.mark.parametrize("c", [10, 300])
def test_ignored_rows_count_nothing(losses, c):
    x, target = classifier(100, c, torch.float32)
    target[::3] = -1
    # Whatever stands in an ignored row.
    x[:, 3] = math.nan
    x[:, 99] = math.inf
    sums, _ = losses(x, target, kind="cross_entropy", ignore_index=-1)
    np.testing.assert_allclose(
        sums, definition(x, target, "cross_entropy", ignore_index=-1), rtol=2e-6
    )
    # A class can be the one that is ignored.
    x, target = classifier(100, c, torch.float32)
    sums, _ = losses(x, target, kind="cross_entropy", ignore_index=1)
    np.testing.assert_allclose(
        sums, definition(x, target, "cross_entropy", ignore_index=1), rtol=2e-6
    )
    target[:] = 1
    np.testing.assert_array_equal(
        losses(x, target, kind="cross_entropy", ignore_index=1)[0], np.zeros(3)
    )


@DTYPES
@pytest.mark.parametrize("c", [2, 10, 300])
def test_tiny_losses_keep_their_digits(dtype, c):
    """PyTorch's own float32 cross-entropy rounds these to multiples of 1e-7."""
    x, target = classifier(64, c, dtype)
    x[:, torch.arange(64), target] += 35.0
    sums, _ = cpp(x, target, kind="cross_entropy")
    exact = x.double()
    others = torch.exp(exact - exact.gather(2, target.expand(3, 64)[..., None]))
    others[:, torch.arange(64), target] = 0.0
    wanted = torch.log1p(others.sum(2)).sum(1).numpy()
    assert wanted.max() < 1e-6
    # Rounding a difference of 35 nats costs 2e-6 of its exponential.
    np.testing.assert_allclose(sums, wanted, rtol=5e-6 if dtype == torch.float32 else 1e-10)


@DTYPES
@pytest.mark.parametrize("c", [2, 10, 300])
def test_huge_logits(dtype, c):
    x, target = classifier(70, c, dtype)
    x *= 1e4
    sums, _ = cpp(x, target, kind="cross_entropy")
    np.testing.assert_allclose(sums, definition(x, target, "cross_entropy"), rtol=TOLERANCE[dtype])


@BACKENDS
@DTYPES
@pytest.mark.parametrize("c", [3, 10, 200])
@pytest.mark.parametrize("chosen", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("other", [math.nan, math.inf, -math.inf, 0.0])
def test_nan_and_infinite_logits(losses, dtype, c, chosen, other):
    x, target = classifier(65, c, dtype, k=2)
    target[:] = 1
    x[0, 40, 1], x[0, 40, 2] = chosen, other
    sums, outside = losses(x, target, kind="cross_entropy", limit=np.full(2, np.inf))
    wanted = definition(x, target, "cross_entropy")
    np.testing.assert_allclose(sums, wanted, rtol=TOLERANCE[dtype])
    assert not outside.any()
    x[0] = chosen
    np.testing.assert_allclose(
        losses(x, target, kind="cross_entropy")[0],
        definition(x, target, "cross_entropy"),
        rtol=TOLERANCE[dtype],
    )


@BACKENDS
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("wanted", [0.0, 0.25, 1.0])
def test_nan_and_infinite_outputs(losses, dtype, kind, value, wanted):
    x = torch.zeros(2, 70, dtype=dtype)
    x[0, 66] = value
    target = torch.full((70,), wanted, dtype=dtype)
    sums, outside = losses(x, target, kind=kind)
    np.testing.assert_allclose(sums, definition(x, target, kind), rtol=TOLERANCE[dtype])
    assert not outside.any()


@BACKENDS
@DTYPES
@pytest.mark.parametrize("kind", ["cross_entropy", *KINDS])
def test_limits(losses, dtype, kind):
    if kind == "cross_entropy":
        x, target = classifier(5000, 10, dtype, k=6)
    else:
        x, target = torch.randn(6, 5000, dtype=dtype), torch.rand(5000, dtype=dtype)
    whole, _ = losses(x, target, kind=kind)
    # The reference adds up in another order with a limit than without.
    equal = whole[3] if losses is cpp else (1 + 1e-12) * whole[3]
    limit = np.array([math.inf, -1.0, whole[2] / 2, equal, math.nan, 2 * whole[5]])
    sums, outside = losses(x, target, kind=kind, limit=limit)
    assert outside.tolist() == [False, True, True, False, False, False]
    np.testing.assert_array_equal(sums[~outside], whole[~outside])
    assert limit[2] < sums[2] < 0.8 * whole[2]
    assert 0.0 <= sums[1] < 0.5 * whole[1]
    # NaN beyond the limit is not reached, before it it is what is told.
    x[:, 4900] = math.nan
    sums, outside = losses(x, target, kind=kind, limit=limit)
    assert outside[2]
    assert np.isfinite(sums[2])
    assert np.isnan(sums[[0, 3, 4, 5]]).all()
    assert not outside[[0, 3, 4, 5]].any()


def test_a_limit_saves_time():
    x, target = classifier(20_000, 10, torch.float32, k=4)
    seconds = {}
    for name, limit in (("whole", None), ("cut", np.full(4, 10.0))):
        best = math.inf
        for _ in range(5):
            began = time.perf_counter()
            cpp(x, target, kind="cross_entropy", limit=limit)
            best = min(best, time.perf_counter() - began)
        seconds[name] = best
    assert seconds["cut"] < 0.5 * seconds["whole"]


@DTYPES
@pytest.mark.parametrize("kind", ["cross_entropy", *KINDS])
def test_threads_change_nothing(dtype, kind):
    if kind == "cross_entropy":
        x, target = classifier(9000, 10, dtype, k=9)
    else:
        x, target = torch.randn(9, 90_000, dtype=dtype), torch.rand(90_000, dtype=dtype)
    limit = np.where(np.arange(9) % 2 == 0, np.inf, 3000.0)
    alone = cpp(x, target, kind=kind, limit=limit)
    assert alone[1].any()
    for threads in (2, 4, 100):
        for got, wanted in zip(
            cpp(x, target, kind=kind, limit=limit, threads=threads), alone, strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


@BACKENDS
def test_nothing_to_sum(losses):
    sums, outside = losses(torch.zeros(3, 0, 4), torch.zeros(0, dtype=int), kind="cross_entropy")
    assert sums.tolist() == [0.0, 0.0, 0.0]
    assert not outside.any()
    sums, outside = losses(torch.zeros(0, 5), torch.zeros(5), kind="mse", limit=np.zeros(0))
    assert sums.shape == outside.shape == (0,)


@BACKENDS
def test_wrong_values_are_named(losses):
    x, target = classifier(5, 4, torch.float32)
    for wrong in (4, -1, -100, 2**40):
        target[3] = wrong
        with pytest.raises(ValueError, match=rf"classes in \[0, 4\) or .* = -3, got {wrong}"):
            losses(x, target, kind="cross_entropy", ignore_index=-3)
    with pytest.raises(ValueError, match=r"target must have the shape \[n\] = \[5\], got \(4,\)"):
        losses(x, target[:4], kind="cross_entropy")
    with pytest.raises(ValueError, match=r"outputs must have the shape \[k, n, c\]"):
        losses(x[0], target, kind="cross_entropy")
    with pytest.raises(ValueError, match="outputs must have at least one class"):
        losses(x[:, :, :0].contiguous(), target, kind="cross_entropy")
    with pytest.raises(ValueError, match=r"kind must be 'cross_entropy', 'mse' or .* got 'l1'"):
        losses(x, target, kind="l1")
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"target must have the shape \[m\] = \[20\]"):
            losses(x, torch.zeros(19), kind=kind)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"probabilities in \[0, 1\] for bce_with_logits"):
            losses(x, torch.full((20,), wrong), kind="bce_with_logits")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"outputs": [1.0]}, TypeError, "outputs must be a NumPy array, got list"),
        ({"outputs": np.zeros((2, 5, 4), np.float16)}, TypeError, "outputs must have dtype float"),
        ({"outputs": np.zeros((2, 5, 8))[..., ::2]}, ValueError, "outputs must be C-contiguous"),
        ({"target": np.zeros(5, np.int32)}, TypeError, "target must have dtype int64, got int32"),
        ({"limit": np.zeros(3)}, ValueError, r"limit must have the shape \[k\] = \[2\]"),
        ({"limit": np.zeros(2, np.float32)}, TypeError, "limit must have dtype float64"),
        ({"threads": 0}, ValueError, "threads must lie in"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
        ({"kind": None}, ValueError, "kind must be 'cross_entropy', .* got None"),
        ({"kind": "mse"}, ValueError, r"target must have the shape \[m\] = \[20\], got \(5,\)"),
        ({"kind": "mse", "target": np.zeros(20, np.float32)}, TypeError, "target must have dtype"),
        ({"kind": "mse", "outputs": np.zeros(())}, ValueError, r"outputs must have the shape"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {
        "outputs": np.zeros((2, 5, 4)),
        "target": np.zeros(5, np.int64),
        "kind": "cross_entropy",
        **changes,
    }
    with pytest.raises(error, match=message):
        _core.ray_losses(arguments.pop("outputs"), arguments.pop("target"), **arguments)


def test_backends_agree_and_take_what_the_core_does_not():
    x, target = classifier(50, 10, torch.float32)
    limit = np.array([1.0, np.inf, 30.0])
    ours = _backend.select("cpp").ray_losses(
        x, target, kind="cross_entropy", limit=limit, threads=2
    )
    theirs = _backend.select("torch").ray_losses(x, target, kind="cross_entropy", limit=limit)
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_allclose(ours[0][1], theirs[0][1], rtol=2e-6)
    # A part of a tensor, one that needs gradients, half precision, and 32-bit classes.
    backend = _backend.select("cpp")
    wide = torch.randn(3, 10, 50).transpose(1, 2).requires_grad_()
    wanted = definition(wide.detach(), target, "cross_entropy")
    np.testing.assert_allclose(
        backend.ray_losses(wide, target, kind="cross_entropy")[0], wanted, rtol=2e-6
    )
    half = x.to(torch.bfloat16)
    np.testing.assert_allclose(
        backend.ray_losses(half, target.int(), kind="cross_entropy")[0],
        definition(half, target, "cross_entropy"),
        rtol=2e-6,
    )
