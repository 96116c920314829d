"""The noise of the C++ core against its definition in float64, and against published vectors."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from fastvol import _core

TOLERANCE = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-14}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
ONES = 2**64 - 1


def definition(seed: int, stream: int, vector: int, d: int) -> np.ndarray:
    """float64 [d]: Box-Muller as design and docstring state it, word by word."""
    words = _core.philox(seed, stream, vector, 0, -(-d // 4))
    u = ((words >> 9).astype(np.float64) + 0.5) * 2.0**-23
    radius = np.sqrt(-2.0 * np.log(u[:, ::2]))
    angle = 2.0 * np.pi * u[:, 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)[:d]


def normals(dtype: np.dtype, d: int, ids: list[int], seed: int = 5, stream: int = 1, **options):
    out = np.full((len(ids), d), np.nan, dtype)
    norm, dot = _core.normals(out, seed, stream, np.array(ids, dtype=np.uint64), **options)
    return out, norm, dot


@pytest.mark.parametrize(
    ("seed", "stream", "vector", "block", "words"),
    [
        (0, 0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (ONES, 2**32 - 1, ONES, 2**32 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            0x85A308D3,
            0x0370734413198A2E,
            0x243F6A88,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_published_known_answers(seed, stream, vector, block, words):
    assert " ".join(f"{w:08x}" for w in _core.philox(seed, stream, vector, block, 1)[0]) == words


def test_philox_blocks_are_consecutive():
    whole = _core.philox(1, 2, 3, 10, 20)
    assert whole.shape == (20, 4)
    assert whole.dtype == np.uint32
    np.testing.assert_array_equal(whole[7:9], _core.philox(1, 2, 3, 17, 2))
    assert _core.philox(1, 2, 3, 2**32 - 1, 0).shape == (0, 4)


@DTYPES
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 63, 64, 65, 257, 16_384, 16_387])
def test_normals_match_the_definition(dtype, d):
    ids = [0, 3, 2**32 + 1, ONES]
    out, norm, dot = normals(dtype, d, ids)
    for row, vector in enumerate(ids):
        assert np.abs(out[row] - definition(5, 1, vector, d)).max() <= TOLERANCE[dtype]
    np.testing.assert_allclose(norm, np.linalg.norm(out.astype(np.float64), axis=1), rtol=1e-14)
    np.testing.assert_array_equal(dot, 0.0)


@DTYPES
@pytest.mark.slow
def test_normals_match_the_definition_at_many_points(dtype):
    for vector in range(8):
        out, _, _ = normals(dtype, 2_000_000, [vector])
        assert np.abs(out[0] - definition(5, 1, vector, 2_000_000)).max() <= TOLERANCE[dtype]


def test_float32_is_the_float64_value():
    short, _, _ = normals(np.dtype(np.float32), 100_000, [9])
    exact, _, _ = normals(np.dtype(np.float64), 100_000, [9])
    assert np.abs(short - exact).max() <= 1e-6


@DTYPES
def test_scale_and_projection(dtype):
    d = 20_001
    scale = np.linspace(-1.0, 3.0, d).astype(dtype)
    project = np.cos(np.arange(d))
    plain, norm, _ = normals(dtype, d, [4, 7])
    out, norm_scaled, dot = normals(dtype, d, [4, 7], scale=scale, project=project)
    np.testing.assert_array_equal(out, scale * plain)
    np.testing.assert_array_equal(norm, norm_scaled)
    np.testing.assert_allclose(dot, plain.astype(np.float64) @ project, rtol=0, atol=1e-10)


@DTYPES
def test_antithetic_pairs(dtype):
    d = 1_003
    project = np.ones(d)
    single, norm, dot = normals(dtype, d, [0, 2, 3], project=project)
    ids = [0, 1, 5, 4, 7, 1]
    out, pair_norm, pair_dot = normals(dtype, d, ids, antithetic=True, project=project)
    rows, signs = [0, 0, 1, 1, 2, 0], np.array([1, -1, -1, 1, -1, -1])
    np.testing.assert_array_equal(out, signs[:, None].astype(dtype) * single[rows])
    np.testing.assert_array_equal(pair_norm[:4], norm[rows[:4]])
    np.testing.assert_array_equal(pair_dot[:4], signs[:4] * dot[rows[:4]])
    # Vector 3 was asked for above as direction 6 >> 1, here as 7 >> 1.
    np.testing.assert_array_equal(pair_norm[4], normals(dtype, d, [3])[1][0])


@DTYPES
def test_perturb_adds_scaled_noise(dtype):
    d, ids = 5_005, [8, 1, 0, 9]
    rng = np.random.default_rng(0)
    theta0 = rng.normal(size=d).astype(dtype)
    scale = rng.uniform(0.5, 2.0, size=d).astype(dtype)
    coefficient = np.array([0.0, 1e-3, -2.5, 1e4])
    z, _, _ = normals(dtype, d, ids, antithetic=True)
    for used in (None, scale):
        out = np.full((len(ids), d), np.nan, dtype)
        _core.perturb(
            out,
            theta0,
            coefficient,
            5,
            1,
            np.array(ids),
            antithetic=True,
            scale=used,
        )
        factor = coefficient.astype(dtype)[:, None]
        expected = theta0 + (factor if used is None else factor * used) * z
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(out[0], theta0)


@DTYPES
def test_threads_change_nothing(dtype):
    d, ids = 300_007, np.array([0, 1, 2, 7, 6])
    theta0, project = np.ones(d, dtype), np.sin(np.arange(d))
    results = []
    for threads in (1, 2, 3, 16):
        out = np.full((len(ids), d), np.nan, dtype)
        moved = np.full((len(ids), d), np.nan, dtype)
        sums = _core.normals(out, 1, 0, ids, antithetic=True, project=project, threads=threads)
        _core.perturb(moved, theta0, np.arange(5.0), 1, 0, ids, antithetic=True, threads=threads)
        results.append((out, moved, *sums))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, expected)


def test_rows_do_not_depend_on_their_company():
    whole, norm, _ = normals(np.dtype(np.float32), 70_001, [3, 4, 5])
    alone, norm_alone, _ = normals(np.dtype(np.float32), 70_001, [4])
    np.testing.assert_array_equal(whole[1], alone[0])
    assert norm[1] == norm_alone[0]


@DTYPES
@pytest.mark.parametrize("first", [0, 1, 3, 4, 255, 256, 1_022, 65_537])
@pytest.mark.parametrize("d", [1, 2, 5, 255, 256, 257, 1_003, 20_001])
def test_spans_have_the_bits_of_the_whole(dtype, first, d):
    """Also under antithetic pairs, scales, projections and perturbations."""
    ids = np.array([4, 5, 9])
    total = first + d + 3
    rng = np.random.default_rng(1)
    scale, theta0 = rng.uniform(0.5, 2.0, (2, total)).astype(dtype)
    project, coefficient = rng.normal(size=total), np.array([1.0, -0.3, 1e3])
    part = slice(first, first + d)
    whole, span = np.empty((3, total), dtype), np.empty((3, d), dtype)
    for used in (None, scale):
        options = {"antithetic": True, "scale": used}
        own = {"antithetic": True, "scale": None if used is None else used[part], "first": first}
        _core.normals(whole, 1, 2, ids, **options)
        norm, dot = _core.normals(span, 1, 2, ids, **own, project=project[part])
        np.testing.assert_array_equal(span, whole[:, part])
        z = (span if used is None else span / used[part]).astype(np.float64)
        tolerance = 1e-14 if used is None else 4 * np.finfo(dtype).eps
        np.testing.assert_allclose(norm, np.linalg.norm(z, axis=1), rtol=tolerance)
        np.testing.assert_allclose(dot, z @ project[part], rtol=0, atol=tolerance * 10 * d)
        _core.perturb(whole, theta0, coefficient, 1, 2, ids, **options)
        _core.perturb(span, theta0[part], coefficient, 1, 2, ids, **own)
        np.testing.assert_array_equal(span, whole[:, part])


@DTYPES
def test_threads_change_nothing_in_a_span(dtype):
    results = []
    for threads in (1, 2, 5):
        out = np.empty((3, 400_007), dtype)
        ids = np.array([0, 1, 4])
        sums = _core.normals(out, 1, 0, ids, antithetic=True, threads=threads, first=4_321)
        results.append((out, *sums))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, expected)


def test_the_last_coordinates_can_be_made():
    out = np.empty((1, 5))
    _core.normals(out, 7, 0, np.array([2]), first=2**34 - 5)
    words = _core.philox(7, 0, 2, 2**32 - 2, 2)
    u = ((words >> 9).astype(np.float64) + 0.5) * 2.0**-23
    radius, angle = np.sqrt(-2.0 * np.log(u[:, ::2])), 2.0 * np.pi * u[:, 1::2]
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)
    np.testing.assert_allclose(out[0], z[3:], rtol=0, atol=1e-14)


def test_moments():
    z, _, _ = normals(np.dtype(np.float64), 1_000_000, [0])
    n = z.size
    assert abs(z.mean()) < 4.0 / n**0.5
    assert abs((z**2).mean() - 1.0) < 4.0 * (2.0 / n) ** 0.5
    assert abs((z**4).mean() - 3.0) < 4.0 * (96.0 / n) ** 0.5
    assert abs((z[0, ::2] * z[0, 1::2]).mean()) < 4.0 / (n / 2) ** 0.5


def test_empty_batch():
    norm, dot = _core.normals(np.empty((0, 3)), 1, 0, np.empty(0, dtype=np.int64))
    assert norm.shape == dot.shape == (0,)


def test_numpy_integers_are_integers():
    a, _, _ = normals(np.dtype(np.float32), 5, [1], seed=np.int64(7), stream=np.uint32(2))
    b, _, _ = normals(np.dtype(np.float32), 5, [1], seed=7, stream=2)
    np.testing.assert_array_equal(a, b)


def test_the_lock_is_released():
    ticks = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-3)

    other = threading.Thread(target=tick)
    other.start()
    try:
        begin = time.perf_counter()
        normals(np.dtype(np.float64), 8_000_000, [0])
        end = time.perf_counter()
    finally:
        stop.set()
        other.join()
    assert sum(begin < t < end for t in ticks) >= 1


def call_normals(**changes):
    arguments = {
        "out": np.empty((2, 3), np.float32),
        "seed": 0,
        "stream": 0,
        "ids": np.arange(2),
        **changes,
    }
    return _core.normals(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out": [[1.0]]}, TypeError, "out must be a NumPy array, got list"),
        ({"out": np.empty((2, 3), np.float16)}, TypeError, "out must have dtype float32 or"),
        ({"out": np.empty((2, 3), ">f4")}, TypeError, "out must have dtype"),
        ({"out": np.empty((2, 6), np.float32)[:, ::2]}, ValueError, "out must be C-contiguous"),
        ({"out": np.empty(3, np.float32)}, ValueError, r"out must have the shape \[k, d\]"),
        ({"out": np.empty((2, 0), np.float32)}, ValueError, "out must have between 1 and"),
        ({"out": np.broadcast_to(np.float32(0), (2, 3))}, ValueError, "out must be"),
        ({"seed": -1}, ValueError, r"seed must lie in \[0, 18446744073709551615\], got -1"),
        ({"seed": 2**64}, ValueError, "seed must lie in"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got float"),
        ({"seed": True}, TypeError, "seed must be an integer, got bool"),
        ({"stream": 2**32}, ValueError, "stream must lie in"),
        ({"ids": np.arange(3)}, ValueError, r"ids must have the shape \[k\] = \[2\], got \(3,\)"),
        ({"ids": np.array([0, -5])}, ValueError, "ids must not be negative, got -5"),
        ({"ids": np.zeros(2, np.int32)}, TypeError, "ids must have dtype int64 or uint64"),
        ({"scale": np.ones(3)}, TypeError, "scale must have dtype float32, got float64"),
        ({"scale": np.ones(2, np.float32)}, ValueError, r"scale must have the shape \[d\]"),
        ({"project": np.ones(3, np.float32)}, TypeError, "project must have dtype float64"),
        ({"threads": 0}, ValueError, "threads must lie in"),
        ({"first": -1}, ValueError, "first must lie in"),
        ({"first": 2**34 - 2}, ValueError, "first must lie in"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call_normals(**changes)


def test_wrong_arguments_of_perturb_and_philox_are_named():
    out = np.empty((2, 3))
    ids = np.arange(2)
    with pytest.raises(ValueError, match="theta0 must have the shape"):
        _core.perturb(out, np.ones(4), np.ones(2), 0, 0, ids)
    with pytest.raises(TypeError, match="theta0 must have dtype float64"):
        _core.perturb(out, np.ones(3, np.float32), np.ones(2), 0, 0, ids)
    with pytest.raises(ValueError, match="coefficient must have the shape"):
        _core.perturb(out, np.ones(3), np.ones(3), 0, 0, ids)
    with pytest.raises(ValueError, match="n_blocks must lie in"):
        _core.philox(0, 0, 0, 2**32 - 1, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_threads_are_pytorch_s_own_and_others_in_a_child():
    """A child of fork() has none of the threads that wait in its parent, and no use for them."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).exp()
        wanted = normals(np.dtype(np.float32), 300_000, [1, 2, 3], threads=1)
        for _ in range(20):
            found = normals(np.dtype(np.float32), 300_000, [1, 2, 3], threads=2)
            for one, other in zip(found, wanted, strict=True):
                assert np.array_equal(one, other)
    finally:
        torch.set_num_threads(before)
    child = os.fork()
    if child == 0:
        found = normals(np.dtype(np.float32), 300_000, [1, 2, 3], threads=2)
        same = all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for threads that it does not have")
    assert os.waitstatus_to_exitcode(status) == 0
