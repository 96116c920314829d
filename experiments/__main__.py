"""``python -m experiments``: lists the experiments, or runs one."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from . import NAMES
from .base import figures, results
from .base.cache import Cache
from .base.errors import ExperimentError
from .base.laboratory import Laboratory

_HERE = Path(__file__).parent
SIZES = ("smoke", "small", "paper")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    options = _parser().parse_args(argv)
    if options.name is None:
        _list()
        return 0
    try:
        run(options)
    except ExperimentError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nexperiments: stopped. What was finished is kept: the same command goes on",
            file=sys.stderr,
        )
        return 130
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs one experiment, or only draws its figure again; what the JSON file holds."""
    if options.name not in NAMES:
        raise ExperimentError(
            f"there is no experiment {options.name!r}; there are {', '.join(NAMES)}"
        )
    script = import_module(f"experiments.{options.name}.run")
    path = options.json or _HERE / options.name / "results" / f"{options.size}.json"
    figures.check()
    if options.redraw:
        found = results.read(path)
    else:
        results.prepare(path)
        found = _carry_out(script, options, path)
    with figures.style():
        drawn = figures.save(script.draw(found), path.with_suffix(""), results.checksum(path))
    print(script.title(found))
    print(f"{path}, {', '.join(str(figure) for figure in drawn)}")
    return found


def _carry_out(script: Any, options: argparse.Namespace, path: Path) -> dict[str, Any]:
    began = time.perf_counter()
    settings = script.SETTINGS[options.size]
    data = options.data or ("builtin" if options.size == "smoke" else "hub")
    laboratory = Laboratory(Cache(options.cache), data, options.device, quiet=options.quiet)
    found = script.run(laboratory, settings)
    payload = {
        "experiment": options.name,
        "size": options.size,
        "config": asdict(settings),
        "device": str(laboratory.device),
        "data": laboratory.sources(),
        "seconds": round(time.perf_counter() - began, 1),
        **found,
    }
    return results.write(path, payload, laboratory.outcomes)


def _list() -> None:
    for name in NAMES:
        script = import_module(f"experiments.{name}.run")
        print(f"{name:20} {(script.__doc__ or '').splitlines()[0]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Repeats an experiment; without a name it lists them.",
    )
    parser.add_argument("name", nargs="?", help="which experiment")
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="smoke",
        help="smoke: seconds, on built-in data; small: two cores; paper: as published, for a GPU",
    )
    parser.add_argument(
        "--data",
        help="hub: data sets by name (the default beyond smoke); builtin (the default at smoke); "
        "or a folder with mnist/ and cifar10/, each with train.parquet and test.parquet; for "
        "language a text file",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--json",
        type=Path,
        help="where results go, the figures beside them; experiments/NAME/results/SIZE.json",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=_HERE / ".cache",
        help="where finished units of work are kept (shared by all experiments)",
    )
    parser.add_argument("--redraw", action="store_true", help="only draw the figure again")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())
