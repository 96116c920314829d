"""Modules sharded by FSDP2 over processes on the CPU, against the same modules whole."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import sharded_work
import torch

from fastvol._sharding import Span, _spans

_SECONDS = 120


def started(world: int, target: Any, *args: Any) -> list[Any]:
    """Processes that run ``target(rank, world, *args)``."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch.distributed has no gloo here")
    pytest.importorskip("transformers")
    # The server imports everything once; the processes are its forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharded_work", "transformers.models.llama.modeling_llama"])
    processes = [context.Process(target=target, args=(rank, world, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_is_killed_ends_all(killed: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    processes = started(2, sharded_work.run, str(tmp_path / "first"), str(folder), 10**6)
    deadline = time.monotonic() + _SECONDS
    while len(list(folder.glob("threshold-*/blocks/*"))) < 3:
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    processes[killed].kill()
    other = processes[1 - killed]
    other.join(60)
    ended = not other.is_alive()
    other.kill()
    assert ended
    assert other.exitcode not in (0, None)
    # The others' time was not lost.
    before = {path.name: path.read_bytes() for path in folder.glob("threshold-*/blocks/*")}
    n = 2 * len(before) + 2
    for process in (again := started(2, sharded_work.run, str(tmp_path / "again"), str(folder), n)):
        process.join(_SECONDS)
    assert [process.exitcode for process in again] == [0, 0]
    after = {path.name: path.read_bytes() for path in folder.glob("threshold-*/blocks/*")}
    assert set(before) < set(after)
    assert all(after[name] == data for name, data in before.items())


@pytest.mark.parametrize("world", sharded_work.CHECKS)
def test_as_the_whole(world: int, tmp_path: Path) -> None:
    processes = started(world, sharded_work.start, str(tmp_path))
    deadline = time.monotonic() + _SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    failures = [path.read_text() for path in sorted(tmp_path.glob("failed*"))]
    assert not failures, "\n".join(failures)
    assert not stuck
    assert [process.exitcode for process in processes] == [0] * world


@pytest.mark.parametrize(
    ("shape", "starts", "sizes", "spans"),
    [
        ([6, 4], [2, 0], [2, 4], [Span(0, 8, 8)]),
        ([6, 4], [0, 1], [6, 2], [Span(2 * i, 4 * i + 1, 2) for i in range(6)]),
        ([6, 4], [2, 1], [2, 3], [Span(0, 9, 3), Span(3, 13, 3)]),
        ([6, 4], [0, 0], [6, 4], [Span(0, 0, 24)]),
        ([6, 4], [6, 0], [0, 4], []),
        ([5], [2], [3], [Span(0, 2, 3)]),
        ([], [], [], [Span(0, 0, 1)]),
        ([2, 3, 4], [0, 1, 0], [2, 1, 4], [Span(0, 4, 4), Span(4, 16, 4)]),
    ],
)
def test_where_a_shard_lies(
    shape: list[int], starts: list[int], sizes: list[int], spans: list[Span]
) -> None:
    assert list(_spans(shape, starts, sizes)) == spans
    # What the spans say is what slicing does.
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    part = whole[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))].reshape(-1)
    for span in spans:
        at = torch.arange(span.coordinate, span.coordinate + span.length)
        assert torch.equal(part[span.start : span.start + span.length], at)
