"""The README's example runs, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest
import torch

import fastvol

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            exec(block, names)
    basin = names["basin"]
    assert isinstance(basin, fastvol.VolumeEstimate)
    assert basin.dim == 4810
    assert not basin.reliable
    assert 0 < basin.reliable_radius < float("inf")
    printed = capsys.readouterr().out
    assert "lower bound" in printed
    assert "next:" in printed
    mass = names["mass"]
    assert isinstance(mass, fastvol.VolumeEstimate)
    assert mass.log_volume <= 0
    assert fastvol.load("basin.safetensors").summary() in printed


def test_the_commands_of_the_readme_exist() -> None:
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", text):
        if target not in {"it"}:
            assert f"\n{target}:" in makefile
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (README.parent / image).is_file()
