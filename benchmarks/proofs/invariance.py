"""No choice of P changes the answer: results that are both reliable agree, whatever P was."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch

import fastvol

from . import bodies, compounds
from .runs import apart, each, missed, quietly, verdict

MOST_APART = 3.0


def run(short: bool) -> dict[str, Any]:
    """All pairs on each body. Raises AssertionError where two of them disagree."""
    rows = each(_case, len(_bodies(short)), short)
    problems = [
        f"{row['worst_apart']:.2f} joint errors apart: {row['body']}, {row['worst_pair']}"
        for row in rows
        if row["worst_apart"] > MOST_APART
    ]
    # Two that are off alike agree as well.
    problems += [
        f"missed in silence: {row['body']}, {row['silent_misses']}"
        for row in rows
        if row["silent_misses"]
    ]
    pairs = sum(row["pairs"] for row in rows)
    if pairs < 5 * len(rows):
        # A proof by comparison needs something to compare.
        problems.append(f"only {pairs} pairs to compare")
    return verdict({"most_apart": MOST_APART, "bodies": rows}, problems)


def _bodies(short: bool) -> list[bodies.Body]:
    everything = [
        bodies.rotated_ellipsoid(10, 100.0),
        compounds.polynomial(10),
        compounds.shear_image(bodies.rotated_ellipsoid(10, 100.0), 0.5),
        bodies.singular(20),
        bodies.lp_ball(20, 4.0, bodies.geometric(20, 1.0, 10.0), rotation_seed=0),
        bodies.mixed_powers([2.0, 4.0] * 15),
        bodies.rotated_ellipsoid(60, 1e4),
        compounds.linear_image(bodies.singular(40), bodies.random_rotation(40, 3)),
    ]
    return everything[:2] if short else everything


def _case(index: int, short: bool) -> dict[str, Any]:
    body = _bodies(short)[index]
    d = body.dim
    normal = torch.from_numpy(np.random.default_rng(6).standard_normal((d, d)))
    choices: dict[str, Any] = {
        "none": None,
        "hessian": "hessian",
        "diagonal": "diagonal",
        "boundary": "boundary",
        # Close enough to a rotation for rays to be of use.
        "random": bodies.random_rotation(d, 7) + 0.3 * normal / d**0.5,
    }
    results, runs = {}, []
    for method, n in (("preconditioned", 1e4), ("annealed", 4e3 if short else 4e4)):
        for name, preconditioner in choices.items():
            try:
                result = quietly(
                    body.model(),
                    bodies.loss,
                    threshold=1.0,
                    method=method,
                    preconditioner=preconditioner,
                    n=n,
                    # Rays that differ in nothing but P would share their noise.
                    seed=len(runs),
                )
            except fastvol.FastvolError as refusal:
                # A body without curvature at its minimum.
                runs.append({"method": method, "preconditioner": name, "refused": str(refusal)})
                continue
            results[method, name] = result
            runs.append(
                {
                    "method": method,
                    "preconditioner": name,
                    "error": result.log_volume - body.log_volume,
                    "stderr": result.stderr,
                    "reliable": result.reliable,
                    "n_loss": result.n_loss,
                    "n_grad": result.n_grad,
                }
            )
    trusted = [key for key, result in results.items() if result.reliable]
    gaps = {pair: apart(results[pair[0]], results[pair[1]]) for pair in combinations(trusted, 2)}
    worst = max(gaps, key=gaps.__getitem__, default=None)
    row = {
        "body": body.name,
        "d": d,
        "reliable": len(trusted),
        "pairs": len(gaps),
        "worst_apart": 0.0 if worst is None else gaps[worst],
        "worst_pair": worst,
        "silent_misses": [key for key in trusted if missed(results[key], body.log_volume)],
        "runs": runs,
    }
    print(
        f"  {body.name}, d = {d}: {len(trusted)} of {len(results)} reliable, at most "
        f"{row['worst_apart']:.2f} joint errors apart ({worst})",
        flush=True,
    )
    return row
