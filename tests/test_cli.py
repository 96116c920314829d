"""The command: what it prints where, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import fastvol
import fastvol.demo
from fastvol import FastvolError, VolumeEstimate
from fastvol.cli import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def outcome() -> fastvol.demo.Demo:
    return fastvol.demo.run(n=150)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch, outcome: fastvol.demo.Demo) -> None:
    """The demo without its work."""
    monkeypatch.setattr(fastvol.demo, "run", lambda *_, **__: outcome)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.Linear(3, 1, bias=False).double()
    result: VolumeEstimate = fastvol.estimate(
        model, lambda m: m.weight.square().sum(), n=200, increase=1.0, progress=False
    )
    path = tmp_path / "result.safetensors"
    result.save(path)
    return path


def _refuse(text: str) -> object:
    raise AssertionError(f"not JSON: {text}")


def _strict(text: str) -> dict:
    """Parses JSON, and refuses the NaN and Infinity that Python would let pass."""
    return json.loads(text, parse_constant=_refuse)


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"], ["show", "--help"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 0
    assert "usage: fastvol" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"fastvol {fastvol.__version__}\n"


def test_no_command_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "usage: fastvol" in err


@pytest.mark.parametrize(
    "argv",
    [
        ["guess"],
        ["show"],
        ["demo", "--n", "0"],
        ["demo", "--n", "1.5"],
        ["demo", "--n", "inf"],
        ["demo", "--n", "many"],
        ["demo", "--seed", "-1"],
        ["demo", "--seed", "x"],
        ["demo", "--colour"],
    ],
)
def test_a_wrong_call_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert "usage: fastvol" in capsys.readouterr().err


def test_show_prints_the_summary(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert out == VolumeEstimate.load(saved).summary() + "\n"
    assert not err


def test_show_as_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(saved), "--json"]) == 0
    record = _strict(capsys.readouterr().out)
    result = VolumeEstimate.load(saved)
    assert record["log_volume"] == result.log_volume
    assert record["ci"] == list(result.ci())
    assert record["config"]["measure"]["max_radius"] is None
    assert record["n"] == 200


@pytest.mark.parametrize("content", [None, b"", b"not a result", b"\x00" * 64])
def test_show_of_no_result_is_1_and_one_line(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    assert main(["show", str(path)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("fastvol: ")
    assert err.count("\n") == 1
    assert str(path) in err


def test_the_demo_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, numbers = tmp_path / "figure.png", tmp_path / "numbers.json"
    argv = ["demo", "--n", "3e2", "--seed", "1", "--output", str(figure), "--json", str(numbers)]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "test accuracy" in out
    assert str(figure) in out
    assert "training on 400 images" in err
    assert figure.read_bytes().startswith(b"\x89PNG")
    record = _strict(numbers.read_text(encoding="utf-8"))
    assert record["seed"] == record["clean"]["estimate"]["seeds"][0] == 1
    assert record["clean"]["estimate"]["n"] == record["poisoned"]["estimate"]["n"] == 300
    comparison = record["comparison"]
    difference = record["clean"]["log_fraction"] - record["poisoned"]["log_fraction"]
    assert comparison["log_ratio"] == pytest.approx(difference, abs=1e-9)
    assert 0 <= comparison["probability_clean_is_larger"] <= 1


@pytest.mark.usefixtures("at_once")
def test_json_has_stdout_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--json", "-", "--no-plot"]) == 0
    out, err = capsys.readouterr()
    assert _strict(out)["finding"].split() == err[err.index("\n\n") :].split()
    assert "test accuracy" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("at_once")
def test_quiet_prints_the_finding_only(
    outcome: fastvol.demo.Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--quiet", "--no-plot"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == fastvol.demo.finding(outcome).split()
    assert not err


@pytest.mark.usefixtures("at_once")
def test_the_default_figure_lies_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--quiet"]) == 0
    assert (tmp_path / "fastvol-demo.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("option", "value"),
    [("--output", "no/such/figure.png"), ("--output", "figure.txt"), ("--json", "no/such/n.json")],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    option: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastvol.demo, "run", lambda *_, **__: pytest.fail("it began to work"))
    assert main(["demo", option, value]) == 1
    err = capsys.readouterr().err
    assert option in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_a_missing_extra_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--n", "2", *(["--no-plot"] if module == "sklearn" else [])]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("fastvol: ")
    assert "pip install 'fastvol[demo]'" in err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "fastvol: interrupted\n"),
        (FastvolError("first\nsecond"), 1, "fastvol: first second\n"),
        (ValueError("n must be less"), 1, "fastvol: n must be less\n"),
    ],
)
def test_errors_are_one_line_and_a_status(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(fastvol.demo, "run", fail)
    assert main(["demo", "--no-plot"]) == status
    assert capsys.readouterr() == ("", line)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastvol.demo, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["demo", "--no-plot"])


def test_the_module_is_the_command_and_imports_nothing_it_does_not_need() -> None:
    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
        )

    done = python("-m", "fastvol", "--version")
    assert (done.returncode, done.stdout) == (0, f"fastvol {fastvol.__version__}\n")
    assert python("-m", "fastvol", "nonsense").returncode == 2
    code = "import sys, fastvol.cli; print(sorted({'sklearn', 'matplotlib'} & set(sys.modules)))"
    assert python("-c", code).stdout == "[]\n"
