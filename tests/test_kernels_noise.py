"""The noise kernels against their definitions: in the interpreter, and on a GPU at real sizes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from kernel_tolerances import NORMAL, assert_close, assert_reduced, point  # noqa: E402

from fastvol import kernels  # noqa: E402
from fastvol._backend import select  # noqa: E402
from fastvol._reference import noise  # noqa: E402
from fastvol.kernels import philox as device  # noqa: E402
from fastvol.kernels.launch import interpreted, signed_word  # noqa: E402
from fastvol.kernels.noise import perturb_kernel  # noqa: E402

INTERPRETED = interpreted(perturb_kernel)
DEVICE = "cpu" if INTERPRETED else "cuda"
SIZES = pytest.mark.parametrize("d", [1, 60, 63, 257])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
IDS = np.array([3, 2**62 + 2**32], dtype=np.int64)
SEED, STREAM = 2**64 - 3, 2**32 - 2


def poisoned(rows: int, d: int, dtype: torch.dtype, stride: int | None = None) -> Tensor:
    buffer = torch.full((rows, stride or d), float("nan"), dtype=dtype, device=DEVICE)
    return buffer[:, :d]


@triton.jit
def _words_kernel(out, blocks, vector, seed_low, seed_high, stream, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    id_ = tl.load(vector)
    w0, w1, w2, w3 = device.philox(
        tl.load(blocks + i).to(tl.uint32),
        stream.to(tl.uint32, bitcast=True),
        id_.to(tl.uint32),
        (id_ >> 32).to(tl.uint32),
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
    )
    tl.store(out + 4 * i, w0.to(tl.int64))
    tl.store(out + 4 * i + 1, w1.to(tl.int64))
    tl.store(out + 4 * i + 2, w2.to(tl.int64))
    tl.store(out + 4 * i + 3, w3.to(tl.int64))


@triton.jit
def _box_muller_kernel(out, words, DOUBLE: tl.constexpr, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    length = tl.load(words + 2 * i).to(tl.uint32)
    angle = tl.load(words + 2 * i + 1).to(tl.uint32)
    if DOUBLE:
        one, other = device.box_muller_double(length, angle)
    else:
        one, other = device.box_muller(length, angle)
    tl.store(out + 2 * i, one)
    tl.store(out + 2 * i + 1, other)


def box_muller(words: Tensor, dtype: torch.dtype) -> Tensor:
    count = min(len(words), 65536)
    out = torch.full(words.shape, float("nan"), dtype=dtype, device=DEVICE)
    grid = (len(words) // count,)
    _box_muller_kernel[grid](out, words.to(DEVICE), DOUBLE=dtype == torch.float64, COUNT=count)
    return out.cpu()


def definition(words: Tensor) -> Tensor:
    u = ((words >> 9).double() + 0.5) * 2.0**-23
    length = (-2.0 * u[:, 0].log()).sqrt()
    angle = 2.0 * torch.pi * u[:, 1]
    return torch.stack((length * angle.cos(), length * angle.sin()), dim=1)


@pytest.mark.parametrize(
    ("seed", "vector", "stream"),
    [(0, 0, 0), (2**64 - 1, 2**63 - 1, 2**32 - 1), (0x299F31D0A4093822, 0x370734413198A2E, 5)],
)
def test_words_are_those_of_the_reference(seed, vector, stream):
    first = 2**32 - 64
    blocks = torch.arange(first, first + 64, device=DEVICE)
    out = torch.empty((64, 4), dtype=torch.int64, device=DEVICE)
    low, high = signed_word(seed), signed_word(seed >> 32)
    ids = torch.tensor([vector], device=DEVICE)
    _words_kernel[(1,)](out, blocks, ids, low, high, signed_word(stream), COUNT=64)
    torch.testing.assert_close(
        out.cpu(), noise.philox(seed, stream, vector, first, 64), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_uniforms(dtype):
    """Every length within 256 steps of 0, 1, √½ and the powers of 2, at every octant of angles."""
    near = torch.arange(-256, 256)
    middles = [0, 2**23, round(2**22.5), *(2**i for i in range(9, 23))]
    lengths = torch.cat([(m + near).clamp(0, 2**23 - 1) for m in middles]).unique() << 9
    octants = torch.cat([((i << 29) + torch.tensor([-512, 0, 511])) % 2**32 for i in range(8)])
    # The bits that count for nothing are set in half of the words.
    words = torch.cartesian_prod(lengths, octants) + torch.tensor([511, 0])
    words = torch.cat([words, words[: -len(words) % 65536]])
    assert_close(box_muller(words, dtype), definition(words).to(dtype), NORMAL[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normals_of_many_words(dtype):
    words = torch.randint(0, 2**32, (2**17, 2))
    z = box_muller(words, dtype)
    assert_close(z, definition(words).to(dtype), NORMAL[dtype])
    # What is off has no preferred sign: the sum of squares keeps to the definition.
    ratio = z.double().square().sum() / definition(words).square().sum()
    assert abs(ratio - 1) <= 0.02 * NORMAL[dtype] + 1e-15


@SIZES
@DTYPES
@pytest.mark.parametrize("antithetic", [False, True])
def test_normals(d, dtype, antithetic):
    scale = torch.rand(d, device=DEVICE).to(dtype) + 0.5
    project = torch.randn(d, dtype=torch.float64, device=DEVICE)
    options = {"antithetic": antithetic, "scale": scale, "project": project}
    out, wanted = poisoned(2, d, dtype), poisoned(2, d, dtype)
    norm, dot = kernels.normals(out, SEED, STREAM, IDS, **options)
    true_norm, true_dot = noise.normals(wanted, SEED, STREAM, IDS, **options)
    assert_close(out, wanted, point(dtype))
    assert_reduced(norm, true_norm, d, dtype)
    assert_reduced(dot, true_dot, d, dtype)
    if dtype != torch.bfloat16:
        # Of the very numbers that were written.
        z = (out / scale).double().cpu().numpy()
        np.testing.assert_allclose(norm, np.linalg.norm(z, axis=1), rtol=4e-7)


@SIZES
@DTYPES
def test_reductions_without_rows(d, dtype):
    project = torch.randn(d, dtype=torch.float64, device=DEVICE)
    options = {"antithetic": True, "project": project, "dtype": dtype, "device": DEVICE}
    norm, dot = kernels.direction_reductions(d, SEED, STREAM, IDS, **options)
    true_norm, true_dot = noise.direction_reductions(d, SEED, STREAM, IDS, **options)
    assert_reduced(norm, true_norm, d, dtype)
    assert_reduced(dot, true_dot, d, dtype)


def test_reductions_over_several_programs():
    d = 4 * 256 * 8 + 1027
    out = poisoned(2, d, torch.float32)
    norm, _ = kernels.normals(out, 5, 0, IDS)
    assert not out.isnan().any()
    exact = np.linalg.norm(out.double().cpu().numpy(), axis=1)
    np.testing.assert_allclose(norm, exact, rtol=1e-8)


@SIZES
@DTYPES
@pytest.mark.parametrize("antithetic", [False, True])
def test_perturb(d, dtype, antithetic):
    theta0 = torch.randn(d, device=DEVICE).to(dtype)
    scale = torch.rand(d, device=DEVICE).to(dtype)
    c = np.array([0.0, 10.0])
    for options in ({"scale": scale}, {}):
        out, wanted = poisoned(2, d, dtype), poisoned(2, d, dtype)
        kernels.perturb(out, theta0, c, SEED, STREAM, IDS, antithetic=antithetic, **options)
        noise.perturb(wanted, theta0, c, SEED, STREAM, IDS, antithetic=antithetic, **options)
        for row, row_wanted in zip(out, wanted, strict=True):
            assert_close(row, row_wanted, point(dtype))
        assert torch.equal(out[0], theta0)


@DTYPES
@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize(("rows", "width"), [(1, 63), (21, 3), (257, 9), (3, 2051), (4, 1024)])
def test_perturb_with_a_scale_a_row(rows, width, first, dtype):
    """Tiles within a row, of two rows, of many; the rows' ends fall anywhere."""
    d, c = rows * width, np.array([0.0, 10.0])
    theta0 = torch.randn(d, device=DEVICE).to(dtype)
    scale = torch.rand(rows, device=DEVICE).to(dtype) + 0.5
    by_entry = scale.repeat_interleave(width)
    out, same = poisoned(2, d, dtype), poisoned(2, d, dtype)
    wanted = poisoned(2, d, dtype)
    kernels.perturb(out, theta0, c, SEED, STREAM, IDS, scale=scale, first=first)
    kernels.perturb(same, theta0, c, SEED, STREAM, IDS, scale=by_entry, first=first)
    noise.perturb(wanted, theta0, c, SEED, STREAM, IDS, scale=scale, first=first)
    assert torch.equal(out, same)
    for row, row_wanted in zip(out, wanted, strict=True):
        assert_close(row, row_wanted, point(dtype))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_scale_a_row_without_kernels(backend):
    theta0, scale = torch.randn(63), torch.rand(9)
    out, wanted = torch.empty(2, 63), torch.empty(2, 63)
    perturb, c = select(backend).perturb, np.array([0.5, 2.0])
    perturb(out, theta0, c, SEED, STREAM, IDS, scale=scale)
    perturb(wanted, theta0, c, SEED, STREAM, IDS, scale=scale[:, None].expand(9, 7).reshape(-1))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("first", [1, 6, 1027, 2**34 - 3000])
@pytest.mark.parametrize("d", [1, 63, 2053])
def test_spans_of_whole_vectors(d, first):
    """Two tiles at the most, whose first has columns that come before the span."""
    c, theta0 = np.array([0.5, 10.0]), torch.randn(d, device=DEVICE)
    scale = torch.rand(d, device=DEVICE) + 0.5
    project = torch.randn(d, dtype=torch.float64, device=DEVICE)
    out, wanted = poisoned(2, d, torch.float32), poisoned(2, d, torch.float32)
    kernels.perturb(out, theta0, c, SEED, STREAM, IDS, scale=scale, first=first)
    noise.perturb(wanted, theta0, c, SEED, STREAM, IDS, scale=scale, first=first)
    assert_close(out, wanted, point(torch.float32))
    options = {"antithetic": True, "scale": scale, "project": project, "first": first}
    out, wanted = poisoned(2, d, torch.float32), poisoned(2, d, torch.float32)
    norm, dot = kernels.normals(out, SEED, STREAM, IDS, **options)
    true_norm, true_dot = noise.normals(wanted, SEED, STREAM, IDS, **options)
    assert_close(out, wanted, point(torch.float32))
    assert_reduced(norm, true_norm, d, torch.float32)
    assert_reduced(dot, true_dot, d, torch.float32)


@pytest.mark.parametrize("stride", [257, 258, 260, 272])
def test_perturb_writes_its_rows_only(stride):
    buffer = torch.full((2, stride), float("nan"), device=DEVICE)
    theta0 = torch.zeros(257, device=DEVICE)
    kernels.perturb(buffer[:, :257], theta0, np.ones(2), 5, 0, IDS)
    assert not buffer[:, :257].isnan().any()
    assert buffer[:, 257:].isnan().all()


def test_numbers_of_lanes_may_be_tensors():
    theta0 = torch.zeros(63, device=DEVICE)
    out, wanted = poisoned(2, 63, torch.float32), poisoned(2, 63, torch.float32)
    ids = torch.tensor([4, 9], device=DEVICE)
    c = torch.tensor([1.0, 2.0], dtype=torch.float64, device=DEVICE)
    kernels.perturb(out, theta0, c, 5, 0, ids)
    kernels.perturb(wanted, theta0, c.cpu().numpy(), 5, 0, ids.cpu().numpy())
    assert torch.equal(out, wanted)


def test_fastvol_does_without_triton():
    code = "import sys; sys.modules['triton'] = None; import fastvol; fastvol.estimate"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_refused():
    out = torch.empty((2, 60), device=DEVICE)
    with pytest.raises(ValueError, match="ids must name one direction a row"):
        kernels.normals(out, 5, 0, np.arange(3))
    with pytest.raises(ValueError, match="scale must be contiguous"):
        kernels.normals(out, 5, 0, IDS, scale=torch.ones(59, device=DEVICE))
    for size in (0, 7, 61):
        scale = torch.ones(size, device=DEVICE)
        with pytest.raises(ValueError, match="scale must be contiguous with one number"):
            kernels.perturb(out, out[0], np.ones(2), 5, 0, IDS, scale=scale)
    with pytest.raises(ValueError, match="neighbours in a row side by side"):
        kernels.normals(out.t(), 5, 0, np.arange(60))
    with pytest.raises(ValueError, match="project must be float64"):
        kernels.normals(out, 5, 0, IDS, project=torch.ones(60, device=DEVICE))
    with pytest.raises(ValueError, match="out must be one of"):
        kernels.normals(torch.empty((2, 60), dtype=torch.int64, device=DEVICE), 5, 0, IDS)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@DTYPES
@pytest.mark.parametrize("stride", [235_146, 235_152])
def test_a_batch_of_real_size_on_a_gpu(dtype, stride):
    d, ids, c = 235_146, np.arange(64), np.geomspace(1e-3, 10, 64)
    theta0, scale = torch.randn(2, d, device="cuda").to(dtype)
    out, wanted = poisoned(64, d, dtype, stride), poisoned(64, d, dtype)
    kernels.perturb(out, theta0, c, SEED, STREAM, ids, scale=scale, antithetic=True)
    noise.perturb(wanted, theta0, c, SEED, STREAM, ids, scale=scale, antithetic=True)
    for row, row_wanted in zip(out, wanted, strict=True):
        assert_close(row, row_wanted, point(dtype))
    norm, _ = kernels.normals(out, SEED, STREAM, ids)
    true_norm, _ = noise.normals(wanted, SEED, STREAM, ids)
    assert_close(out, wanted, point(dtype))
    assert_reduced(norm, true_norm, d, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_one_row_of_1e8_on_a_gpu():
    d = 100_000_003
    out = poisoned(1, d, torch.float32)
    theta0 = torch.zeros(d, device="cuda")
    kernels.perturb(out, theta0, np.ones(1), SEED, STREAM, IDS[1:])
    for start in (0, 2**26, d - 4099):
        stop = min(start + 4099, d)
        wanted = noise.coordinates(SEED, STREAM, IDS[1:], start, stop, False, torch.device("cuda"))
        assert_close(out[:, start:stop], wanted.float(), point(torch.float32))
    kernels.set_tuning(True)
    try:
        tuned = poisoned(1, d, torch.float32)
        kernels.perturb(tuned, theta0, np.ones(1), SEED, STREAM, IDS[1:])
    finally:
        kernels.set_tuning(False)
    assert torch.equal(tuned, out)
