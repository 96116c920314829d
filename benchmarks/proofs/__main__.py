"""Runs the proofs and keeps what they found: ``python -m benchmarks.proofs [--short] [NAME …]``.

A proof that fails raises; what passed before it is on record, and what it found itself.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..record import RESULTS, record
from . import (
    coverage,
    gaussian_quadratic,
    interrupted,
    invariance,
    known_answers,
    path_coverage,
    prior,
    reach,
    refusals,
    stationarity,
    trained,
)
from .runs import ProofError

PROOFS = {
    "known_answers": known_answers.run,
    "refusals": refusals.run,
    "coverage": coverage.run,
    "reach": reach.run,
    "gaussian": gaussian_quadratic.run,
    "stationarity": stationarity.run,
    "invariance": invariance.run,
    "path_coverage": path_coverage.run,
    "trained": trained.run,
    "prior": prior.run,
    "interrupted": interrupted.run,
    "cost": interrupted.run_cost,
    "soak": interrupted.run_soak,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proofs", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROOFS)}; all")
    parser.add_argument("--short", action="store_true", help="minutes instead of an hour")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args()
    unknown = set(options.names) - set(PROOFS)
    if unknown:
        parser.error(f"unknown proof: {', '.join(sorted(unknown))}")
    for name, proof in PROOFS.items():
        if options.names and name not in options.names:
            continue
        began = time.perf_counter()
        failure = None
        try:
            found = proof(options.short)
        except ProofError as failed:
            failure, found = failed, failed.found
        seconds = time.perf_counter() - began
        payload = {"proof": name, "short": options.short, "seconds": seconds, **found}
        path = record(f"proof_{name}", payload, folder=options.results)
        print(f"{name}: {'FAILED' if failure else 'passed'} in {seconds:.0f} s, {path.name}")
        if failure is not None:
            raise failure


if __name__ == "__main__":
    main()
