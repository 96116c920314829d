"""LogMeanExp of the C++ core against NumPy on all weights at once."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from fastvol._core import LogMeanExp


def filled(log_weights) -> LogMeanExp:
    mean = LogMeanExp()
    mean.update(np.asarray(log_weights, dtype=np.float64))
    return mean


def assert_matches(mean: LogMeanExp, log_weights: np.ndarray) -> None:
    w = np.exp(log_weights - log_weights.max())
    n = len(w)
    assert mean.count == n
    assert mean.log_mean == pytest.approx(log_weights.max() + math.log(w.mean()), abs=1e-12)
    assert mean.stderr == pytest.approx(w.std(ddof=1) / math.sqrt(n) / w.mean(), rel=1e-11)
    assert mean.ess == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-11)
    assert mean.max_share == pytest.approx(w.max() / w.sum(), rel=1e-12)


@pytest.mark.parametrize("spread", [1e-6, 1.0, 20.0, 600.0])
@pytest.mark.parametrize("offset", [0.0, -2.4e6])
def test_matches_numpy(spread, offset):
    log_weights = offset + spread * np.random.default_rng(1).normal(size=10_001)
    assert_matches(filled(log_weights), log_weights)


def test_any_split_and_order():
    rng = np.random.default_rng(2)
    log_weights = 30.0 * rng.normal(size=5_000)
    log_weights[rng.integers(0, 5_000, 500)] = -np.inf
    for seed in range(5):
        order = np.random.default_rng(seed)
        cuts = np.sort(order.integers(0, 5_000, 6))
        parts = [filled(part) for part in np.split(log_weights, cuts)]
        order.shuffle(parts)
        whole = LogMeanExp()
        for part in parts:
            whole.merge(part)
        assert_matches(whole, log_weights)


def test_zero_weights():
    mean = filled([-np.inf, -np.inf])
    assert mean.count == 2
    assert mean.log_mean == -np.inf
    assert mean.ess == 0.0
    assert mean.stderr == np.inf
    assert math.isnan(mean.max_share)
    mean.update(np.array([3.0]))
    assert mean.log_mean == pytest.approx(3.0 - math.log(3.0))
    assert mean.max_share == 1.0


def test_empty_and_single():
    mean = LogMeanExp()
    mean.update(np.empty(0))
    assert mean.count == 0
    assert math.isnan(mean.log_mean)
    mean.update(np.array([-7.0]))
    assert (mean.log_mean, mean.ess, mean.max_share, mean.stderr) == (-7.0, 1.0, 1.0, np.inf)


def test_constant_weight_has_no_error():
    mean = filled(np.full(1000, -5e8))
    assert mean.log_mean == -5e8
    assert mean.stderr == 0.0


def test_state_round_trip():
    mean = filled([0.5, -2.0, 3.0])
    for copy in (LogMeanExp.from_state(mean.state()), pickle.loads(pickle.dumps(mean))):
        assert copy.state() == mean.state()
        copy.update(np.array([9.0]))
        assert mean.count == 3
    assert LogMeanExp.from_state(LogMeanExp().state()).count == 0


@pytest.mark.parametrize(
    ("log_weights", "error", "message"),
    [
        (np.array([0.0, np.nan]), ValueError, "log_weights must be below inf and not nan"),
        (np.array([np.inf]), ValueError, "log_weights must be below inf"),
        (np.ones(2, np.float32), TypeError, "log_weights must have dtype float64"),
        ([1.0], TypeError, "log_weights must be a NumPy array"),
        (np.ones((2, 2)), ValueError, "log_weights must have the shape"),
    ],
)
def test_wrong_weights_are_named(log_weights, error, message):
    mean = filled([1.0])
    with pytest.raises(error, match=message):
        mean.update(log_weights)
    assert mean.count == 1


@pytest.mark.parametrize(
    "state", [(1, 0.0, 1.0), (-1, 0.0, 1.0, 0.0), (1, np.nan, 1.0, 0.0), (2, 0.0, 1.0, -1.0)]
)
def test_wrong_states_are_refused(state):
    with pytest.raises(ValueError, match="state"):
        LogMeanExp.from_state(state)
