from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from . import problems
from .problems import Problem
from .record import RESULTS, record


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvol benchmarks")
    group.addoption(
        "--short",
        action="store_true",
        help="few directions: everything runs, nothing is recorded, no ratio is required",
    )
    group.addoption(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with MNIST's train.parquet; generated images of the same shape without it",
    )
    group.addoption("--threads", type=int, help="PyTorch's threads; its own choice without it")
    group.addoption(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the JSON files"
    )


@dataclass
class Report:
    """Where a benchmark leaves its table and its record.

    Args:
        short: whether this is a short run, of which nothing is kept.
        folder: of the records.
    """

    short: bool
    folder: Path
    lines: list[str] = field(default_factory=list)

    def table(self, title: str, rows: list[tuple[str, ...]]) -> None:
        """Shown after the run, first row as the heading."""
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        self.lines += ["", title]
        for row in rows:
            first = row[0].ljust(widths[0])
            rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            self.lines.append("  ".join(["  " + first, *rest]))

    def keep(self, name: str, payload: dict[str, Any]) -> None:
        """Records ``payload``, unless the run is short."""
        if not self.short:
            path = record(name, payload, folder=self.folder)
            self.lines.append(f"  kept in {path.name}")


_REPORT = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    short, folder = config.getoption("--short"), config.getoption("--results")
    config.stash[_REPORT] = Report(short, folder)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    for line in config.stash[_REPORT].lines:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[_REPORT]


@pytest.fixture(scope="session")
def short(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--short"))


@pytest.fixture(scope="session", autouse=True)
def threads(pytestconfig: pytest.Config) -> Iterator[int]:
    before, wanted = torch.get_num_threads(), pytestconfig.getoption("--threads")
    torch.set_num_threads(wanted or before)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mlp(pytestconfig: pytest.Config, threads: int) -> Problem:
    return problems.mnist_mlp(pytestconfig.getoption("--data"))


@pytest.fixture(scope="session")
def cnn(pytestconfig: pytest.Config, threads: int, short: bool) -> Problem:
    return problems.mnist_cnn(pytestconfig.getoption("--data"), 10 if short else 60)


@pytest.fixture(scope="session")
def tiny(pytestconfig: pytest.Config, threads: int) -> Problem:
    return problems.tiny_mlp(pytestconfig.getoption("--data"))
