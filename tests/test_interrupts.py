"""Ctrl-C, SIGTERM and memory that runs out: nothing is lost, and the error says where it lies."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvol
from benchmarks.proofs import bodies
from fastvol import FastvolError, FastvolWarning, VolumeEstimate
from fastvol._memory import ran_out

BLOCK = 16
PLAN: dict[str, Any] = {
    "engine": "general",
    "chunk": 4,
    "lanes": 8,
    "keep_rows": True,
    "dtype": "float64",
    "threads": 1,
    "noise_threads": 1,
    "backend": "cpp",
    "block": BLOCK,
}

Problem = tuple[nn.Module, tuple[Tensor, Tensor]]


def call(problem: Problem, **options: Any) -> VolumeEstimate:
    model, data = problem
    settings = {
        "n": 100, "increase": 1.0, "method": "radial", "plan": PLAN, "progress": False, **options,
    }  # fmt: skip
    loss_fn = settings.pop("loss_fn", F.mse_loss)
    result: VolumeEstimate = fastvol.estimate(model, loss_fn, data=data, **settings)
    return result


class Sending:
    """A loss that sends this process a signal within a given block."""

    def __init__(self, number: int, block: int) -> None:
        self.number, self.block = number, block
        self.calls_in_block = 0
        self.block_now = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls_in_block += 1
        if self.block_now == self.block and self.calls_in_block == 3:
            os.kill(os.getpid(), self.number)
        return F.mse_loss(output, target)

    def settled(self, progress: fastvol.Progress) -> None:
        self.block_now, self.calls_in_block = progress.n_done // BLOCK, 0


SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_run_and_says_how_far_it_is(
    number: int, regression: Problem, tmp_path: Path
) -> None:
    whole = call(regression)
    handlers = [signal.getsignal(each) for each in SIGNALS]
    before = [parameter.clone() for parameter in regression[0].parameters()]
    loss = Sending(number, 3)
    how = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    pattern = rf"{how} after 48 of 100 directions; they lie in {tmp_path}, and the same call"
    with pytest.raises(KeyboardInterrupt, match=pattern) as caught:
        call(regression, loss_fn=loss, callbacks=[loss.settled], checkpoint=tmp_path)
    error = caught.value
    assert isinstance(error, fastvol.Interrupted)
    assert (error.n_done, error.n, error.checkpoint) == (48, 100, str(tmp_path))
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert all(map(torch.equal, before, regression[0].parameters()))
    resumed = call(regression, loss_fn=Sending(number, 99), checkpoint=tmp_path)
    np.testing.assert_array_equal(resumed.log_radii, whole.log_radii)
    assert resumed.n_loss == whole.n_loss


def test_without_a_folder_it_says_that_nothing_is_kept(regression: Problem) -> None:
    loss = Sending(signal.SIGINT, 2)
    with pytest.raises(fastvol.Interrupted, match=r"after 32 of 100 .*checkpoint=DIR") as caught:
        call(regression, loss_fn=loss, callbacks=[loss.settled])
    assert caught.value.checkpoint is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_partial_estimate(number: int, regression: Problem, tmp_path: Path) -> None:
    loss = Sending(number, 3)
    options: dict[str, Any] = {
        "loss_fn": loss, "callbacks": [loss.settled], "on_interrupt": "return",
    }  # fmt: skip
    with pytest.warns(FastvolWarning, match="first 48 of 100 directions") as caught:
        partial = call(regression, checkpoint=tmp_path, **options)
    # It points at the caller's own line.
    assert caught[0].filename == __file__
    expected = call(regression, n=48)
    assert partial.n == partial.config["n"] == 48
    np.testing.assert_array_equal(partial.log_radii, expected.log_radii)
    assert partial.log_volume == expected.log_volume
    assert any("first 48 of 100" in remark for remark in partial.warnings)
    partial.save(tmp_path.parent / "partial.safetensors")
    # The folder still continues.
    resumed = call(regression, loss_fn=Sending(number, 99), checkpoint=tmp_path)
    np.testing.assert_array_equal(resumed.log_radii, call(regression).log_radii)


def test_nothing_settled_is_no_estimate(regression: Problem) -> None:
    with pytest.raises(fastvol.Interrupted, match="from which no estimate can be made"):
        call(regression, loss_fn=Sending(signal.SIGINT, 0), on_interrupt="return")


def test_of_several_thresholds_those_that_were_begun(regression: Problem) -> None:
    first = call(regression, increase=0.5)
    seen = []

    def stop(progress: fastvol.Progress) -> None:
        seen.append(progress.threshold)
        if len(set(seen)) == 2 and progress.n_done == 2 * BLOCK:
            raise KeyboardInterrupt

    with (
        pytest.warns(FastvolWarning, match="first 32 of 100"),
        pytest.warns(FastvolWarning, match="2 of 3 thresholds"),
    ):
        results: Any = call(
            regression, increase=[0.5, 1.0, 2.0], callbacks=[stop], on_interrupt="return"
        )
    assert [result.n for result in results] == [100, 32]
    np.testing.assert_array_equal(results[0].log_radii, first.log_radii)


def test_an_interrupt_within_the_audit(
    regression: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvol.methods import _rays

    whole = call(regression)
    real, calls = _rays.scan, 0

    def scan(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(_rays, "scan", scan)
    with pytest.warns(FastvolWarning, match="audited for earlier crossings no more"):
        result = call(regression, on_interrupt="return")
    np.testing.assert_array_equal(result.log_radii, whole.log_radii)
    calls = 0
    with pytest.raises(fastvol.Interrupted, match="after 100 of 100"):
        call(regression)


def chains(folder: Path | None, interrupted_after: int | None) -> fastvol.PathEstimate:
    """Two runs of chains, and a short one; an interrupt soon after one of the three."""
    body, calls, runs = bodies.ellipsoid(6, 100.0), 0, 0

    def loss(model: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if runs == interrupted_after and calls == 100:
            raise KeyboardInterrupt
        return bodies.loss(model)

    def count(progress: fastvol.Progress) -> None:
        nonlocal calls, runs
        del progress
        calls, runs = 0, runs + 1

    result = fastvol.estimate(
        body.model(), loss, n=300, threshold=1.0, method="annealed", plan={**PLAN, "chunk": 1},
        on_interrupt="return", checkpoint=folder, callbacks=[count], progress=False,
    )  # fmt: skip
    assert isinstance(result, fastvol.PathEstimate)
    return result


def test_without_a_run_of_chains_there_is_no_estimate(tmp_path: Path) -> None:
    with pytest.raises(fastvol.Interrupted, match=r"of 3 runs of chains, from which no estimate"):
        chains(tmp_path, 1)


def test_the_estimate_of_the_runs_of_chains_that_are_done(tmp_path: Path) -> None:
    whole = chains(None, None)
    with pytest.warns(FastvolWarning, match="from 1 of 2 runs"):
        partial = chains(tmp_path / "run", 2)
    assert partial.config["replicates"] == 1
    assert any("from 1 of 2 runs" in remark for remark in partial.warnings)
    np.testing.assert_array_equal(partial.log_radii, whole.log_radii[: partial.n])
    assert partial.n < whole.n
    error = math.hypot(partial.stderr, whole.stderr)
    assert abs(partial.log_volume - whole.log_volume) < 3.0 * error
    partial.save(tmp_path / "partial.safetensors")
    # The folder still continues.
    np.testing.assert_array_equal(chains(tmp_path / "run", None).log_radii, whole.log_radii)


def test_a_handler_of_the_callers_own_is_left_alone(regression: Problem) -> None:
    seen = []

    def own(*_: Any) -> None:
        seen.append("came")

    before = signal.signal(signal.SIGTERM, own)
    try:
        loss = Sending(signal.SIGTERM, 2)
        result = call(regression, loss_fn=loss, callbacks=[loss.settled])
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.n == 100
    assert seen == ["came"]


def test_beside_the_main_thread_no_handler_is_touched(regression: Problem) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(call(regression, n=20)))
    thread.start()
    thread.join()
    assert results[0].n == 20
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Scarce:
    """A loss that fails to allocate from the third block on, until so few rays are asked for."""

    def __init__(self, failures: int, error: BaseException) -> None:
        self.failures, self.error = failures, error
        self.armed = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if self.armed and self.failures:
            self.failures -= 1
            raise self.error
        return F.mse_loss(output, target)

    def settled(self, progress: fastvol.Progress) -> None:
        self.armed = progress.n_done >= 2 * BLOCK


ERRORS = [
    MemoryError("no room"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("failures", [1, 3])
def test_with_less_memory_there_are_fewer_lanes_and_the_same_numbers(
    error: BaseException, failures: int, regression: Problem
) -> None:
    whole = call(regression)
    loss = Scarce(failures, error)
    result = call(regression, loss_fn=loss, callbacks=[loss.settled])
    rtol = whole.config["pilot"]["rtol"]
    np.testing.assert_allclose(result.log_radii, whole.log_radii, rtol=0, atol=rtol)
    np.testing.assert_array_equal(result.log_radii[:32], whole.log_radii[:32])
    assert result.log_volume == pytest.approx(whole.log_volume, abs=1e-3)
    wanted = f"memory ran out with {8 // 2 ** (failures - 1)} rays in flight"
    assert any(wanted in remark for remark in result.warnings)


def test_one_lane_at_a_time_the_numbers_do_not_depend_on_the_lanes(regression: Problem) -> None:
    plan = {**PLAN, "chunk": 1}
    loss = Scarce(2, ERRORS[0])
    result = call(regression, loss_fn=loss, callbacks=[loss.settled], plan=plan)
    whole = call(regression, plan=plan)
    np.testing.assert_array_equal(result.log_radii, whole.log_radii)
    assert result.n_loss == whole.n_loss


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_when_one_ray_does_not_fit_the_error_is_clear_and_the_work_is_kept(
    error: BaseException, regression: Problem, tmp_path: Path
) -> None:
    loss = Scarce(10**9, error)
    with pytest.raises(FastvolError, match=rf"single ray .*what is done lies in {tmp_path}"):
        call(regression, loss_fn=loss, callbacks=[loss.settled], checkpoint=tmp_path)
    loss.failures = 0
    resumed = call(regression, loss_fn=loss, checkpoint=tmp_path)
    np.testing.assert_array_equal(resumed.log_radii, call(regression).log_radii)


def test_memory_that_runs_out_in_the_pilot(regression: Problem) -> None:
    loss, calls = F.mse_loss, 0

    def scarce(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        # After the two calls at θ*.
        if 3 <= calls <= 4:
            raise MemoryError
        return loss(output, target)

    result = call(regression, loss_fn=scarce)
    assert result.plan["lanes"] == 2
    whole = call(regression)
    np.testing.assert_allclose(result.log_radii, whole.log_radii, rtol=0, atol=1e-3)


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out(ValueError("out of memory"))
    wrapped = FastvolError("loss_fn raised")
    wrapped.__cause__ = MemoryError()
    assert ran_out(wrapped)
    assert not ran_out(None)
