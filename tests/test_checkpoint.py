"""Checkpoints: the same call continues, bit for bit; what is not the same call is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import warnings
from collections.abc import Callable
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
from fastvol._work import Work
from fastvol.checkpoints import DamagedError, Folder, Piece
from fastvol.checkpoints.files import Writer, read_piece, write_bytes
from fastvol.checkpoints.inspection import Contents
from fastvol.cli import main

BLOCK = 16
PLAN: dict[str, Any] = {
    "engine": "general",
    "chunk": 4,
    "lanes": 4,
    "keep_rows": True,
    "dtype": "float64",
    "threads": 1,
    "noise_threads": 1,
    "backend": "cpp",
    "block": BLOCK,
}

Problem = tuple[nn.Module, tuple[Tensor, Tensor]]


class StopError(Exception):
    """Ends a run as a crash would, but within the process."""


def call(problem: Problem, folder: Path | None = None, **options: Any) -> VolumeEstimate:
    model, data = problem
    settings = {
        "n": 100, "increase": 1.0, "method": "radial", "plan": PLAN, "progress": False, **options,
    }  # fmt: skip
    loss_fn = settings.pop("loss_fn", F.mse_loss)
    result: VolumeEstimate = fastvol.estimate(
        model, loss_fn, data=data, checkpoint=folder, **settings
    )
    return result


def stop_after(blocks: int) -> Callable[[fastvol.Progress], None]:
    def stop(progress: fastvol.Progress) -> None:
        if progress.n_done >= blocks * BLOCK:
            raise StopError

    return stop


def assert_same(a: VolumeEstimate, b: VolumeEstimate) -> None:
    np.testing.assert_array_equal(a.log_radii, b.log_radii)
    np.testing.assert_array_equal(a.status, b.status)
    for name in ("log_volume", "stderr", "n", "n_loss", "n_grad", "warnings", "config", "plan"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.reentrant_fraction == b.reentrant_fraction


def blocks_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("threshold-*/blocks/*.safetensors"))


CASES: dict[str, dict[str, Any]] = {
    "radial": {},
    "every ray scanned": {"first_crossing": True},
    "pairs": {"antithetic": True},
    "curvature": {"method": "preconditioned", "preconditioner": "hessian"},
    "matrix": {"method": "preconditioned", "preconditioner": torch.diag(torch.linspace(1, 2, 17))},
    "off centre": {
        "measure": fastvol.Gaussian(0.5, center="origin"),
        "method": "preconditioned",
        "preconditioner": "diagonal",
    },
    "auto": {"method": "auto"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(
    case: str, regression: Problem, tmp_path: Path
) -> None:
    options = CASES[case]
    whole = call(regression, **options)
    folder = tmp_path / "run"
    with pytest.raises(StopError):
        call(regression, folder, callbacks=[stop_after(3)], **options)
    kept = blocks_of(folder)
    assert len(kept) == 3
    before = [path.stat().st_mtime_ns for path in kept]
    seen: list[int] = []
    again = call(regression, folder, callbacks=[lambda p: seen.append(p.n_done)], **options)
    assert_same(again, whole)
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert seen == [16, 32, 48, 64, 80, 96, 100]
    # All is there now: nothing is evaluated but θ* and what tells one loss from another.
    calls = 0

    def counted(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.mse_loss(output, target)

    counted.__qualname__ = "mse_loss"
    assert_same(call(regression, folder, loss_fn=counted, **options), whole)
    assert calls == 4


def test_n_is_the_total(regression: Problem, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = call(regression, folder, n=40)
    more = call(regression, folder, n=100)
    assert_same(more, call(regression, n=100))
    fewer = call(regression, folder, n=40)
    assert fewer.n == 40
    np.testing.assert_array_equal(fewer.log_radii[:32], first.log_radii[:32])
    np.testing.assert_allclose(fewer.log_radii, first.log_radii, rtol=0, atol=1e-9)
    assert len(blocks_of(folder)) == 7


def test_each_threshold_is_kept_by_itself(regression: Problem, tmp_path: Path) -> None:
    options: dict[str, Any] = {"threshold": [0.5, 1.0], "increase": 0.1}
    options = {"increase": [0.5, 1.0]}
    both: Any = call(regression, tmp_path / "run", **options)
    again: Any = call(regression, tmp_path / "run", increase=[1.0, 0.5])
    for one, other in zip(both, reversed(again), strict=True):
        assert_same(one, other)
    assert len(list((tmp_path / "run").glob("threshold-*"))) == 2


def test_the_stored_plan_is_taken(regression: Problem, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = call(regression, folder, n=48)
    assert call(regression, folder, plan=None).plan == first.plan
    assert_same(call(regression, folder, plan=None), call(regression))


@pytest.mark.parametrize(
    "change", [{"lanes": 3}, {"plan": {**PLAN, "chunk": 1, "lanes": 2}}, {"backend": "torch"}]
)
def test_another_plan_agrees_within_the_tolerance(
    change: dict[str, Any], regression: Problem, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    call(regression, folder, n=48)
    mixed = call(regression, folder, **{"plan": None, **change})
    whole = call(regression)
    rtol = whole.config["pilot"]["rtol"]
    np.testing.assert_allclose(mixed.log_radii, whole.log_radii, rtol=0, atol=rtol)


def test_other_blocks_are_refused(regression: Problem, tmp_path: Path) -> None:
    call(regression, tmp_path / "run", n=20)
    with pytest.raises(FastvolError, match="blocks of 32 directions, the folder's have 16"):
        call(regression, tmp_path / "run", plan={**PLAN, "block": 32})


def altered(problem: Problem, change: str) -> tuple[Problem, dict[str, Any]]:
    model, (x, y) = problem
    options: dict[str, Any] = {
        "seed": {"seed": 5},
        "metric": {"metric": "filter"},
        "measure": {"measure": fastvol.Lebesgue(9.0)},
        "loss fn": {"loss_fn": F.l1_loss},
        "noise": {"antithetic": True},
        "rtol": {"rtol": 1e-5},
        "first crossing": {"first_crossing": True},
        "method": {"method": "preconditioned"},
    }.get(change, {})
    if change == "parameters sha256":
        with torch.no_grad():
            next(model.parameters()).mul_(1 + 1e-7)
    if change == "buffers sha256":
        model.register_buffer("extra", torch.ones(1))
    if change == "parameters":
        options = {"parameters": ["0.*"]}
    if change == "data sha256":
        x = x.clone()
        x[3, 1] = 9.0
        y = model(x).detach()
    if change == "the loss":
        # Another loss of the same name.
        def mse_loss(output: Tensor, target: Tensor) -> Tensor:
            return 2.0 * F.mse_loss(output, target)

        options = {"loss_fn": mse_loss}
    return (model, (x, y)), options


@pytest.mark.parametrize(
    "change",
    [
        "seed", "metric", "measure", "loss fn", "rtol", "first crossing", "method", "the loss",
        "parameters sha256", "buffers sha256", "parameters", "data sha256",
    ],
)  # fmt: skip
def test_another_run_is_refused_by_what_differs(
    change: str, regression: Problem, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    call(regression, folder, n=20)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*.safetensors"))
    other, options = altered(regression, change)
    with pytest.raises(FastvolError, match=f"(: |; ){change}.* is .*, the folder's is"):
        call(other, folder, n=20, **options)
    after = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*.safetensors"))
    assert after == before


def test_another_format_is_refused(regression: Problem, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    call(regression, folder, n=20)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "seed": 1}))
    with pytest.raises(FastvolError, match="checksum"):
        call(regression, folder, n=20)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(FastvolError, match="format version 99; this version reads 2"):
        call(regression, folder, n=20)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(FastvolError, match="not a manifest"):
        call(regression, folder, n=20)


def test_folders_that_are_none(regression: Problem, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="checkpoint"):
        call(regression, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        call(regression, tmp_path / "no" / "such")
    with pytest.raises(ValueError, match="checkpoint"):
        call(regression, "")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="checkpoint"):
        call(regression, 3)  # type: ignore[arg-type]
    with pytest.raises(FastvolError, match=r"checkpoint: .* holds file but no manifest"):
        call(regression, tmp_path)
    assert (tmp_path / "file").read_text() == "x"


def test_one_run_at_a_time(regression: Problem, tmp_path: Path) -> None:
    def second(progress: fastvol.Progress) -> None:
        call(regression, tmp_path)

    with pytest.raises(FastvolError, match="another run is writing"):
        call(regression, tmp_path, callbacks=[second])
    assert_same(call(regression, tmp_path), call(regression))


def test_a_forked_process_does_not_hold_the_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    ours, its = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        its.send(b"alive")
        its.recv(1)
        os._exit(0)
    its.close()
    ours.recv(16)
    folder.close()
    Folder(tmp_path).close()
    ours.close()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("harm", ["truncated", "emptied", "flipped", "flipped in the header"])
@pytest.mark.parametrize("which", ["blocks", "audit-100", "rays"])
def test_damage_is_named_and_mended(
    harm: str, which: str, regression: Problem, tmp_path: Path
) -> None:
    whole = call(regression, tmp_path)
    place = next(tmp_path.glob("threshold-*"))
    candidates = [place / "rays.safetensors"] if which == "rays" else [
        *(place / which).rglob("*.safetensors")
    ]  # fmt: skip
    victim = sorted(candidates)[-1]
    data = bytearray(victim.read_bytes())
    if harm == "truncated":
        data = data[:-5]
    elif harm == "emptied":
        data = bytearray()
    else:
        position = len(data) - 12 if harm == "flipped" else data.index(b"n_loss") + 2
        data[position] ^= 4
    victim.write_bytes(data)
    contents = Contents.of(tmp_path)
    assert contents.damaged == (str(victim.relative_to(tmp_path)),)
    assert "damaged" in contents.summary()
    with pytest.warns(FastvolWarning, match=f"{victim.name} is damaged"):
        mended = call(regression, tmp_path)
    assert_same(mended, whole)
    assert not Contents.of(tmp_path).damaged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(regression, tmp_path)


def test_every_flipped_bit_is_found() -> None:
    piece = Piece({"x": np.arange(3.0), "y": np.array([True, False])}, {"n_loss": 3})
    data = piece.to_bytes()
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << (position % 8)
        try:
            read = Piece.from_bytes(bytes(flipped))
        except DamagedError:
            continue
        # Nothing but white space, or the name of the metadata's own entry, may differ.
        assert read.info == piece.info
        for name, array in piece.arrays.items():
            np.testing.assert_array_equal(read.arrays[name], array)
    for length in range(len(data)):
        with pytest.raises(DamagedError):
            Piece.from_bytes(data[:length])


def test_what_was_being_written_is_ignored_and_removed(regression: Problem, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        call(regression, tmp_path, callbacks=[stop_after(2)])
    place = blocks_of(tmp_path)[0].parent
    half = place / f".{BLOCK:08d}.safetensors.0123.part"
    half.write_bytes(b"half a block")
    (tmp_path / ".manifest.json.12.part").write_bytes(b"{")
    assert Contents.of(tmp_path).unfinished == 2
    assert_same(call(regression, tmp_path), call(regression))
    assert not [*tmp_path.rglob("*.part")]


def test_a_folder_whose_run_never_began_is_as_good_as_new(
    regression: Problem, tmp_path: Path
) -> None:
    (tmp_path / ".manifest.json.12.part").write_bytes(b"{")
    assert_same(call(regression, tmp_path), call(regression))


def test_a_full_disk_is_told(
    regression: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = call(regression)
    real = os.fsync
    count = 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        call(regression, tmp_path)
    monkeypatch.setattr(os, "fsync", real)
    assert not [*tmp_path.rglob("*.part")]
    assert_same(call(regression, tmp_path), whole)


def test_the_writer_writes_in_order_and_keeps_nothing_back(tmp_path: Path) -> None:
    writer = Writer()
    path = tmp_path / "below" / "x.safetensors"
    for value in range(40):
        writer.put(path, Piece({"x": np.array([value])}))
    writer.close()
    assert read_piece(path).arrays["x"].tolist() == [39]
    with pytest.raises(OSError, match="No such file"):
        write_bytes(tmp_path / "no" / "such", b"")


CHAINS: dict[str, dict[str, Any]] = {
    "annealed": {"preconditioner": None, "replicates": 2},
    "learned": {"preconditioner": "auto", "replicates": 3},
    "splitting": {"method": "splitting", "measure": fastvol.Lebesgue(3.0)},
}


def chains(folder: Path | None = None, **options: Any) -> fastvol.PathEstimate:
    body = bodies.ellipsoid(10, 1e3)
    settings = {
        "n": 600, "threshold": 1.0, "method": "annealed", "progress": False, "seed": 3,
        "plan": {**PLAN, "chunk": 16, "lanes": 16}, "checkpoint": folder, **options,
    }  # fmt: skip
    result = fastvol.estimate(body.model(), bodies.loss, **settings)
    assert isinstance(result, fastvol.PathEstimate)
    return result


@pytest.mark.parametrize("case", CHAINS)
def test_chains_go_on_from_their_last_level(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CHAINS[case]
    whole = chains(**options)
    monkeypatch.setattr("fastvol._work._SNAPSHOT_PAUSE", 0.0)
    real, limit = Work.snapshot, [0]
    levels: list[str] = []

    def snapshot(self: Work, place: str, make: Callable[[], Piece]) -> None:
        real(self, place, make)
        levels.append(place)
        if len(levels) == limit[0]:
            raise StopError

    monkeypatch.setattr(Work, "snapshot", snapshot)
    # Stopped twice, somewhere in the first and in a later run.
    made = []
    for limit[0] in (2, 5):
        levels.clear()
        try:
            result = chains(tmp_path, **options)
        except StopError:
            assert any(kept.levels for kept in Contents.of(tmp_path).thresholds[0].chains)
            made.append(len(levels))
    assert made
    levels.clear()
    limit[0] = 0
    result = chains(tmp_path, **options)
    np.testing.assert_array_equal(result.log_radii, whole.log_radii)
    for name in ("log_volume", "stderr", "n_loss", "n_grad", "config", "warnings"):
        assert getattr(result, name) == getattr(whole, name), name
    assert not [*tmp_path.rglob("level-*")]
    assert chains(tmp_path, **options).log_volume == whole.log_volume


def test_chains_of_another_n_are_other_runs(tmp_path: Path) -> None:
    short = chains(tmp_path, n=300)
    assert chains(tmp_path, n=600).log_volume == chains(n=600).log_volume
    assert chains(tmp_path, n=300).log_volume == short.log_volume
    kept = Contents.of(tmp_path).thresholds[0].chains
    assert [(each.n, each.finished) for each in kept] == [(300, 3), (600, 3)]


class Operator:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def matvec(self, rows: Tensor) -> Tensor:
        return self.factor * rows

    rmatvec = matvec

    def logabsdet(self) -> float:
        return 17 * float(np.log(self.factor))


def test_an_operator_of_the_callers_own(regression: Problem, tmp_path: Path) -> None:
    options = {"method": "preconditioned", "preconditioner": Operator(2.0)}
    whole = call(regression, **options)
    with pytest.raises(StopError):
        call(regression, tmp_path, callbacks=[stop_after(2)], **options)
    assert_same(call(regression, tmp_path, **options), whole)
    with pytest.raises(FastvolError, match="not the operator"):
        call(regression, tmp_path, **{**options, "preconditioner": Operator(3.0)})


def test_info(regression: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with pytest.raises(StopError):
        call(regression, folder, callbacks=[stop_after(3)])
    blocks_of(folder)[1].unlink()
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "17 parameters" in out
    assert "32 directions in 2 blocks, without gaps up to 16" in out
    assert main(["info", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["thresholds"][0]["directions"] == 32
    assert told["manifest"]["identity"]["seed"] == 0
    call(regression, folder)
    assert main(["info", str(folder)]) == 0
    assert "100 directions in 7 blocks, " in capsys.readouterr().out
    assert main(["info", str(tmp_path)]) == 1
    assert "not a checkpoint" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main(["info", str(folder)]) == 1
