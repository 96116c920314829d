"""The benchmark of the GPU path runs from end to end at tiny sizes, and says what it left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_runs

pytest.importorskip("triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tiny sizes are for the interpreter")
def test_every_row_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = gpu.main(["--smoke", "--out", str(tmp_path)])
    assert [row for row in rows if "failed" in row] == []
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
