"""The command ``fastvol``.

Exit status: 0, or 1 with one line on stderr where an input cannot give an answer, 2 for a wrong
call, 130 after Ctrl-C.
"""

# Everything heavy is imported where it is used, so that --help and a mistyped call answer at once.
from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import FastvolError

if TYPE_CHECKING:
    from .demo import Demo, Twin
    from .result import VolumeEstimate


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status.

    Raises:
        SystemExit: from ``argparse``: 0 after ``--help`` and ``--version``, 2 for a wrong call.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_usage(sys.stderr)
        return 2
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except KeyboardInterrupt as error:
        print(f"fastvol: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except (FastvolError, ValueError, OSError) as error:
        print(f"fastvol: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvol", description="How large is the minimum that training found?"
    )
    parser.add_argument("--version", action="version", version=f"fastvol {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="measure a trained network and its poisoned twin",
        description=(
            "Trains a small network on handwritten digits, and a twin that also sees images with "
            "wrong labels, to the same loss; then measures both basins on the clean images. "
            "Nothing is downloaded."
        ),
    )
    demo.add_argument(
        "--n", type=_count, default=4000, help="directions for each network (default: %(default)s)"
    )
    demo.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="of the data, the initial parameters and the directions (default: %(default)s)",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("fastvol-demo.png"),
        metavar="FILE",
        help="where the figure goes (default: %(default)s)",
    )
    demo.add_argument("--no-plot", action="store_true", help="draw no figure")
    demo.add_argument("--json", metavar="FILE", help="write the numbers here; - is stdout")
    demo.add_argument("--quiet", action="store_true", help="print the finding only")
    demo.set_defaults(run=_demo)

    show = commands.add_parser(
        "show",
        help="print a saved result",
        description="Prints what VolumeEstimate.save() wrote, in words.",
    )
    show.add_argument("file", type=Path, metavar="FILE")
    show.add_argument("--json", action="store_true", help="as JSON, without the single radii")
    show.set_defaults(run=_show)

    info = commands.add_parser(
        "info",
        help="say what a checkpoint folder holds",
        description=(
            "Says what run a folder of estimate(checkpoint=...) belongs to and how much of it is "
            "done, and names damaged files. To continue, make the same call again."
        ),
    )
    info.add_argument("folder", type=Path, metavar="DIR")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from . import demo

    # Half a minute of work should not end in a file that cannot be written.
    if not arguments.no_plot:
        _check_folder(arguments.output, "--output")
        demo.check_figure(arguments.output)
    to_stdout = arguments.json == "-"
    if arguments.json is not None and not to_stdout:
        _check_folder(Path(arguments.json), "--json")

    outcome = demo.run(
        arguments.n,
        arguments.seed,
        progress=not arguments.quiet,
        say=(lambda _: None) if arguments.quiet else _note,
    )
    # Where JSON has stdout for itself, words go to stderr.
    words = sys.stderr if to_stdout else sys.stdout
    if not arguments.quiet:
        print(demo.table(outcome), end="\n\n", file=words)
    print(textwrap.fill(demo.finding(outcome), 88), file=words)
    if not arguments.no_plot:
        demo.draw(outcome, arguments.output)
        if not arguments.quiet:
            print(f"\nfigure: {arguments.output}", file=words)
    if arguments.json is not None:
        text = _to_json(_demo_record(outcome))
        if to_stdout:
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n", encoding="utf-8")


def _show(arguments: argparse.Namespace) -> None:
    from .result import VolumeEstimate

    result = VolumeEstimate.load(arguments.file)
    print(_to_json(_estimate_record(result)) if arguments.json else result.summary())


def _info(arguments: argparse.Namespace) -> None:
    from .checkpoints.inspection import Contents

    contents = Contents.of(arguments.folder)
    print(_to_json(contents.describe()) if arguments.json else contents.summary())


def _estimate_record(result: VolumeEstimate) -> dict[str, Any]:
    """Everything a result says in numbers but for the single radii."""
    names = (
        "log_volume",
        "log_volume_metric",
        "log_mean_power",
        "stderr",
        "reliable",
        "reliable_radius",
        "warnings",
        "pareto_k",
        "ess",
        "dim",
        "n",
        "n_unbounded",
        "n_nonfinite",
        "n_failed",
        "reentrant_fraction",
        "n_loss",
        "n_grad",
        "seconds",
        "seeds",
        "config",
        "plan",
        "provenance",
    )
    record = {name: getattr(result, name) for name in names}
    record["ci"] = result.ci()
    record["lower_bound"] = result.lower_bound()
    return record


def _demo_record(outcome: Demo) -> dict[str, Any]:
    from . import demo

    comparison = outcome.comparison
    return {
        "fastvol": __version__,
        "seed": outcome.seed,
        "threshold": outcome.threshold,
        "finding": demo.finding(outcome),
        "comparison": {
            "log_ratio": comparison.log_ratio,
            "stderr": comparison.stderr,
            "probability_clean_is_larger": comparison.probability,
            "ci": comparison.ci(),
            "radius": comparison.radius,
            "reliable": comparison.reliable,
            "paired": comparison.paired,
        },
        "clean": _twin_record(outcome.clean, outcome.radius),
        "poisoned": _twin_record(outcome.poisoned, outcome.radius),
    }


def _twin_record(twin: Twin, radius: float | None) -> dict[str, Any]:
    record = {
        "training_images": twin.training_images,
        "wrong_labels": twin.wrong_labels,
        "training_steps": twin.steps,
        "training_loss": twin.training_loss,
        "clean_loss": twin.clean_loss,
        "test_accuracy": twin.test_accuracy,
        "mean_log_radius": twin.mean_log_radius,
        "estimate": _estimate_record(twin.estimate),
    }
    if radius is not None:
        log_fraction, stderr = twin.filled(radius)
        record |= {"log_fraction": log_fraction, "log_fraction_stderr": stderr}
    return record


def _to_json(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), indent=2, allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _check_folder(path: Path, option: str) -> None:
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder")


def _count(text: str) -> int:
    """A whole number of at least 1; 1e4 is one."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 1 and number == int(number)):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(number)


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return seed


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
