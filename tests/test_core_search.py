"""The compiled lane loop on engines written in Python, well behaved and not."""

from __future__ import annotations

import gc
import math
import signal
import weakref

import numpy as np
import pytest
import torch

from fastvol import _core

CONVERGED, UNBOUNDED, NONFINITE, FAILED = range(4)


class Engine:
    """loss(item, radius) of each ray; answer turns the losses into what the engine returns."""

    def __init__(self, loss, answer=lambda losses: losses):
        self.of_item, self.answer = loss, answer
        self.items = {}
        self.calls = []

    def load(self, lanes, items):
        self.calls.append("load")
        assert lanes.dtype == items.dtype == np.int64
        self.items.update(zip(lanes.tolist(), items.tolist(), strict=True))

    def loss(self, lanes, radii):
        self.calls.append("loss")
        assert lanes.dtype == np.int64
        assert radii.dtype == np.float64
        pairs = zip(lanes.tolist(), radii.tolist(), strict=True)
        return self.answer(np.array([self.of_item(self.items[lane], r) for lane, r in pairs]))


def search(engine, start=(0.0,), **changes):
    options = {
        "lanes": 4,
        "mode": "search",
        "loss0": 0.0,
        "threshold": 1.0,
        "xtol": 1e-4,
        "log_cap": 12.0,
        "slope": 2.0,
        **changes,
    }
    return _core.search(engine, np.asarray(start, dtype=np.float64), **options)


def square(_item, r):
    return r * r


def test_results_have_the_stated_types():
    results = search(Engine(square), np.zeros(5))
    assert [r.dtype for r in results] == [np.float64, np.uint8, np.int32, np.uint8]
    assert all(r.shape == (5,) for r in results)


@pytest.mark.parametrize("exponent", [0.3, 1.0, 2.0, 7.0, 30.0])
@pytest.mark.parametrize("xtol", [1e-2, 1e-6, 1e-12])
def test_homogeneous_losses_from_anywhere(exponent, xtol):
    engine = Engine(lambda item, r: 3.0 + (r / math.exp(0.1 * item)) ** exponent)
    start = np.linspace(-5.0, 8.0, 30)
    found, status, evaluations, reentrant = search(
        engine, start, loss0=3.0, threshold=4.0, xtol=xtol, slope=exponent
    )
    np.testing.assert_allclose(found, 0.1 * np.arange(30), rtol=0, atol=xtol)
    assert not status.any()
    assert not reentrant.any()
    assert evaluations.max() <= 25


def test_a_round_is_one_call():
    engine = Engine(square)
    _, _, evaluations, _ = search(engine, np.zeros(3), lanes=3)
    assert engine.calls == ["load", *["loss"] * int(evaluations.max())]


def test_unbounded_rays_end_at_the_cap():
    found, status, _, _ = search(Engine(lambda _, r: 0.5), [0.0, 20.0], log_cap=3.0)
    np.testing.assert_array_equal(found, 3.0)
    np.testing.assert_array_equal(status, UNBOUNDED)


@pytest.mark.parametrize("wall", [math.nan, math.inf, -math.inf])
def test_walls_of_losses_that_are_not_finite(wall):
    engine = Engine(lambda _, r: 0.1 if r < 5.0 else wall)
    found, status, _, _ = search(engine, [0.0, 4.0])
    np.testing.assert_allclose(found, math.log(5.0), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(status, NONFINITE)


def test_infinite_cap_and_overflowing_radii():
    engine = Engine(lambda _, r: 0.0 if math.isfinite(r) else math.nan)
    found, status, _, _ = search(engine, log_cap=math.inf, max_evaluations=2000)
    assert status[0] == NONFINITE
    assert abs(found[0] - math.log(np.finfo(np.float64).max)) < 1e-3


def test_lower_bounds_are_not_interpolated():
    engine = Engine(square, lambda losses: (np.minimum(losses, 1.2), losses > 1.2))
    found, status, _, _ = search(engine, [3.0, 0.05, -3.0])
    np.testing.assert_allclose(found, 0.0, rtol=0, atol=1e-4)
    assert not status.any()


def test_flagged_losses_below_the_threshold_are_outside():
    engine = Engine(square, lambda losses: (losses, losses > 0.25))
    found, _, _, _ = search(engine)
    np.testing.assert_allclose(found, math.log(0.5), rtol=0, atol=1e-4)


def test_all_outside_fails():
    found, status, evaluations, _ = search(Engine(lambda _, r: 2.0), [1.0], max_evaluations=9)
    assert (status[0], evaluations[0]) == (FAILED, 9)
    assert found[0] < 1.0


def test_noisy_loss_ends():
    rng = np.random.default_rng(0)
    engine = Engine(lambda _, r: r * r + 0.01 * rng.normal())
    found, status, evaluations, _ = search(engine, np.zeros(50), xtol=1e-6)
    assert np.abs(found).max() < 0.1
    assert set(status) <= {CONVERGED, FAILED}
    assert evaluations.max() <= 200


def test_zero_gap_and_negative_excess():
    found, _, _, _ = search(Engine(lambda _, r: r * (r - 2.0)), threshold=0.0)
    np.testing.assert_allclose(found, math.log(2.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("hole", [(0.9, 1.1), (0.02, 0.04), (3.0, 3.5)])
def test_scan_finds_the_first_crossing(hole):
    low, high = hole
    engine = Engine(lambda _, r: 2.0 if low < r < high or r > 4.0 else 0.5)
    known = math.log(4.0)
    found, status, evaluations, reentrant = search(engine, [known], mode="scan", scan_span=5.5)
    np.testing.assert_allclose(found, math.log(low), rtol=0, atol=1e-4)
    assert (status[0], reentrant[0]) == (CONVERGED, 1)
    assert evaluations[0] < 60


def test_scan_that_finds_nothing_returns_the_known_radius():
    found, status, evaluations, reentrant = search(
        Engine(square), [0.0, -1e-9], mode="scan", scan_points=17
    )
    np.testing.assert_array_equal(found, [0.0, -1e-9])
    assert not status.any()
    assert not reentrant.any()
    np.testing.assert_array_equal(evaluations, 17)


def test_no_items():
    engine = Engine(square)
    assert all(r.shape == (0,) for r in search(engine, []))
    assert engine.calls == []


@pytest.mark.parametrize(
    "answer",
    [
        lambda losses: losses.tolist(),
        lambda losses: losses.astype(np.float32),
        lambda losses: (losses.tolist(), [False] * len(losses)),
        lambda losses: np.repeat(losses, 2)[::2],
        torch.from_numpy,
    ],
    ids=["list", "float32", "lists", "strided", "tensor"],
)
def test_what_an_engine_may_return(answer):
    found, _, _, _ = search(Engine(square, answer), np.zeros(3))
    np.testing.assert_allclose(found, 0.0, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda losses: None, TypeError, r"engine.loss must return float64 \[2\].*got NoneType"),
        (lambda losses: losses[:1], ValueError, r"float64 \[2\].*shape \(1,\)"),
        (lambda losses: losses[None], ValueError, r"shape \(1, 2\)"),
        (lambda losses: losses + 1j, TypeError, "complex128"),
        (lambda losses: ["a", "b"], TypeError, "got list"),
        (lambda losses: [[0.0], [0.0, 1.0]], TypeError, "got list"),
        (lambda losses: torch.ones(2, requires_grad=True), TypeError, "got Tensor"),
        (lambda losses: (losses, losses, losses), ValueError, "a tuple of 3"),
        (lambda losses: (losses, losses), TypeError, r"bool \[2\]"),
        (lambda losses: (losses, np.zeros(3, bool)), ValueError, r"bool \[2\].*shape \(3,\)"),
    ],
)
def test_what_an_engine_may_not_return(answer, error, message):
    with pytest.raises(error, match=message):
        search(Engine(square, answer), np.zeros(2))


def test_errors_of_the_engine_are_passed_on_unchanged():
    error = ArithmeticError("singular")

    def loss(_item, _r):
        raise error

    with pytest.raises(ArithmeticError) as caught:
        search(Engine(loss))
    assert caught.value is error


def test_interrupts_are_seen_once_a_round():
    def loss(_item, _r):
        signal.raise_signal(signal.SIGINT)
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        search(Engine(loss), log_cap=1e9, max_evaluations=10**6)


def test_the_engine_is_let_go():
    engine = Engine(square)
    reference = weakref.ref(engine)
    search(engine, np.zeros(3))
    del engine
    gc.collect()
    assert reference() is None


def test_an_engine_may_search():
    inner = []

    def loss(_item, r):
        inner.append(search(Engine(square))[0][0])
        return r * r

    found, _, _, _ = search(Engine(loss))
    assert abs(found[0]) < 1e-4
    assert max(inner) == min(inner)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"xtol": 0.0}, ValueError, "xtol must be positive and finite, got 0.0"),
        ({"xtol": math.nan}, ValueError, "xtol must be positive"),
        ({"slope": -1.0}, ValueError, "slope must be positive"),
        ({"lanes": 0}, ValueError, "lanes must lie in"),
        ({"lanes": 1.5}, TypeError, "lanes must be an integer, got float"),
        ({"threshold": -0.5}, ValueError, "threshold must be finite and at least loss0 = 0.0"),
        ({"threshold": math.inf}, ValueError, "threshold must be finite"),
        ({"loss0": math.nan}, ValueError, "loss0 must be finite"),
        ({"log_cap": math.nan}, ValueError, "log_cap must be"),
        ({"mode": "sweep"}, ValueError, "mode must be 'search' or 'scan', got 'sweep'"),
        ({"max_evaluations": 0}, ValueError, "max_evaluations must lie in"),
        ({"scan_span": 0.0}, ValueError, "scan_span must be positive"),
        ({"scan_points": 0}, ValueError, "scan_points must lie in"),
        ({"start": [math.inf]}, ValueError, "start must be finite"),
        ({"start": [[0.0]]}, ValueError, r"start must have the shape \[n\]"),
    ],
)
def test_wrong_options_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        search(Engine(square), **changes)


def test_an_engine_without_its_methods():
    with pytest.raises(AttributeError, match="load"):
        search(object())
