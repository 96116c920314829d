"""The benchmark of the GPU path runs from end to end at tiny sizes, and says what it left out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_runs

pytest.importorskip("triton")


@pytest.mark.usefixtures("by_definition")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tiny sizes are for the interpreter")
def test_every_row_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = gpu.main(["--smoke", "--out", str(tmp_path)])
    assert [row for row in rows if "failed" in row] == []
    assert json.loads(json.dumps(rows)) is not None
    works = [row["work"] for row in rows]
    assert len(works) == len(set(works))
    (apart,) = (row for row in rows if row["work"] == "radii of CPU and GPU")
    assert apart["met"]
    (run,) = (row for row in rows if row["work"].startswith("estimate(n=1e6)"))
    assert run["provenance"]["loop"] == "cpu, operation by operation"
    assert run["met"] is False
    (waits,) = (row for row in rows if row["work"] == "gap")
    assert waits["skipped"] == "needs a GPU"
    # Figures of no meaning are not kept.
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.count("\n| ") == len(rows)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: gpu.Bench) -> None:
        raise ZeroDivisionError("broken")

    def skipped(bench: gpu.Bench) -> None:
        raise gpu.SkippedError("not here")

    monkeypatch.setattr(gpu, "ROWS", (broken, skipped, gpu.step))
    rows = gpu.main(["--smoke"])
    assert rows[0] == {"work": "broken", "failed": "ZeroDivisionError: broken"}
    assert rows[1] == {"work": "skipped", "skipped": "not here"}
    assert rows[2]["work"].startswith("threshold_step")


# What stands for the benchmark: its rows are the names' own, but for three.
_WORKER = """
import json, os, sys, time
file, names = sys.argv[1], sys.argv[2:]
def tell(**row):
    with open(file, "a") as told:
        told.write(json.dumps(row) + "\\n")
tell(begun="limits")
tell(work="copy", seconds=len(names))
for name in names:
    tell(begun=name)
    if name == "crashes":
        tell(work="crashes, first half")
        os.abort()
    if name == "hangs":
        time.sleep(60)
    if name == "loses the card":
        tell(work=name, failed="illegal memory access")
        os._exit(3)
    tell(work=name)
"""


def test_rows_survive_what_ends_a_process() -> None:
    kept: list[int] = []

    def command(names: list[str], file: Path, seconds: float) -> list[str]:
        assert 0 < seconds <= 100
        return [sys.executable, "-S", "-c", _WORKER, str(file), *names]

    names = ["a", "crashes", "b", "loses the card", "c", "hangs", "d"]
    rows = gpu.supervised(names, command, 100, lambda rows: kept.append(len(rows)), patience=3)
    assert [row["work"] for row in rows] == [
        *("copy", "a", "crashes, first half", "crashes", "b", "loses the card", "c", "hangs", "d")
    ]
    assert rows[0]["seconds"] == len(names)
    assert rows[3]["failed"] == "its process ended with -6"
    assert rows[5]["failed"] == "illegal memory access"
    assert rows[7]["failed"] == "its process ended with -9"
    assert kept == list(range(1, 10))


def test_a_process_that_cannot_begin_is_not_tried_for_ever() -> None:
    def command(names: list[str], file: Path, seconds: float) -> list[str]:
        return [sys.executable, "-S", "-c", "raise SystemExit(1)"]

    rows = gpu.supervised(["a", "b"], command, 10, lambda rows: None)
    assert [row["work"] for row in rows] == ["a", "b"]


def test_a_card_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken(bench: gpu.Bench) -> Iterator[gpu.Row]:
        yield from ()

    monkeypatch.setattr(gpu, "ROWS", (broken,))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not gpu.run(gpu.Bench(torch.device("cuda"), True, float("inf")), [])


def test_no_row_begins_late() -> None:
    rows = gpu.main(["--smoke", "--seconds", "-1", "--only", "step"])
    assert rows == [
        {"work": "limits", "skipped": "no time left"},
        {"work": "step", "skipped": "no time left"},
    ]


def test_idle_share() -> None:
    # Of 25 … 75 the spans cover 30 … 40, 50 … 60 and 70 … 75.
    spans = [(0.0, 10.0), (30.0, 40.0), (50.0, 55.0), (52.0, 60.0), (70.0, 100.0)]
    assert gpu_runs.idle_share(spans) == pytest.approx(0.5)
    assert gpu_runs.idle_share([(0.0, 4.0)]) == 0.0
