from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from . import cpu_figure
from .data import Sources
from .problems import Problem
from .record import RESULTS, record
from .works import WORKS


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
    group.addoption(
        "--cifar",
        type=Path,
        metavar="DIR",
        help="folder with CIFAR-10's train.parquet; generated images of the same shape without it",
    )
    group.addoption(
        "--threads",
        type=int,
        help="PyTorch's threads; its own choice without it, 1 in the short form",
    )
    group.addoption(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the JSON files"
    )


@dataclass
class Report:
    """Where a benchmark leaves its table and its record.

    Args:
        short: whether this is a short run, of which nothing is kept.
        folder: of the records.
        lines: shown after the run.
        kept: what was to be recorded, by name.
    """

    short: bool
    folder: Path
    lines: list[str] = field(default_factory=list)
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)

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
        self.kept[name] = payload
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


@pytest.fixture(scope="session", autouse=True)
def speed_figure(report: Report) -> Iterator[None]:
    """Draws the speeds when all of them are recorded; a short run draws what it has, for nobody."""
    yield
    if not report.kept.keys() & set(cpu_figure.RECORDS):
        return
    try:
        if report.short:
            cpu_figure.draw(report.kept, io.BytesIO())
        else:
            report.lines.append(f"  drawn in {cpu_figure.redraw(report.folder).name}")
    except ImportError as error:
        report.lines.append(f"  no figure: {error}")


@pytest.fixture(scope="session")
def short(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--short"))


@pytest.fixture(scope="session", autouse=True)
def threads(pytestconfig: pytest.Config) -> Iterator[int]:
    before, wanted = torch.get_num_threads(), pytestconfig.getoption("--threads")
    if pytestconfig.getoption("--short"):
        # Nothing is judged by it, and threads that wait for each other on busy cores take long.
        wanted = wanted or 1
    torch.set_num_threads(wanted or before)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@dataclass
class Problems:
    """Trained networks, each made once a session.

    Args:
        sources: of the data.
        short: whether they are of the short form.
    """

    sources: Sources
    short: bool
    _made: dict[str, Problem] = field(default_factory=dict)

    def work(self, name: str) -> Problem:
        """Of a row of the table of speeds."""
        return self.get(name, lambda: WORKS[name].problem(self.sources, self.short))

    def get(self, name: str, build: Callable[[], Problem]) -> Problem:
        """The problem of that name, built where it is not there yet."""
        if name not in self._made:
            self._made[name] = build()
        return self._made[name]


@pytest.fixture(scope="session")
def sources(pytestconfig: pytest.Config) -> Sources:
    return Sources(pytestconfig.getoption("--data"), pytestconfig.getoption("--cifar"))


@pytest.fixture(scope="session")
def trained(sources: Sources, threads: int, short: bool) -> Problems:
    return Problems(sources, short)
