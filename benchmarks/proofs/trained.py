"""Trained networks, whose volume nobody knows: two ways must agree, or one of them must warn."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvol

from .refusals import digits
from .runs import apart, quietly

EASY_MOST = 0.3
TWICE_MOST = 1.0
RIDGE = 1e-2
# Excess of the regularised loss; the last one reaches across the basin, where curvature turns.
EASY = (1e-6, 1e-5, 1e-4)
HARD = 0.01
# The widest law of which 1e5 plain rays still tell; and twice that.
DIGITS_STD = 0.1


def run(short: bool) -> dict[str, Any]:
    """Both networks. Raises AssertionError where two answers disagree that should not."""
    return {"tanh": tanh(short), "digits": digits_mass(short)}


def tanh(short: bool) -> dict[str, Any]:
    """Mean squared error and ridge of a 2-8-8-1 net at its minimum, two laws of directions."""
    model, loss = tanh_net()
    rows = []
    for increase in (*(EASY[:1] if short else EASY), HARD):
        results = {
            str(name): quietly(
                model,
                loss,
                increase=increase,
                method="annealed",
                preconditioner=name,
                n=_size(increase, short),
                seed=seed,
            )
            for seed, name in enumerate(("hessian", "boundary"))
        }
        rows.append(_pair(f"tanh, increase {increase:g}", results))
        rows[-1] |= {"increase": increase, "easy": increase != HARD}
    for row in rows:
        if row["easy"]:
            row["met"] = row["both_reliable"] and row["difference"] <= EASY_MOST
        else:
            # It must be known to be hard.
            row["met"] = not row["both_reliable"]
        assert row["met"], row
    return {"rows": rows, "limit": EASY_MOST}


def _size(increase: float, short: bool) -> float:
    if short:
        return 1e4 if increase != HARD else 2e3
    return 1e5 if increase != HARD else 3e4


def tanh_net() -> tuple[nn.Module, Any]:
    """The net at the minimum of its loss, float64, and that loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        ).double()
        x = 2.0 * torch.rand(64, 2, dtype=torch.float64) - 1.0
    y = torch.sin(3.0 * x[:, :1]) * x[:, 1:]

    def loss(m: nn.Module) -> Tensor:
        ridge = sum(p.square().sum() for p in m.parameters())
        return (m(x) - y).square().mean() + 0.5 * RIDGE * ridge

    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=20_000,
        tolerance_grad=1e-10,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    optimizer.step(closure)
    return model, loss


def digits_mass(short: bool) -> dict[str, Any]:
    """Gaussian mass around the minimum: by plain rays where they tell, twice as wide by two P."""
    model, data = digits()
    call: dict[str, Any] = {"data": data, "increase": 0.1}
    n = 2e3 if short else 1e5
    near = fastvol.Gaussian(DIGITS_STD)
    results = {
        "radial": quietly(model, F.cross_entropy, n=n, measure=near, method="radial", **call),
        "annealed": quietly(
            model,
            F.cross_entropy,
            n=1e3 if short else 3e4,
            measure=near,
            method="annealed",
            preconditioner=None,
            seed=1,
            **call,
        ),
    }
    row = _pair(f"digits, std {DIGITS_STD:g}", results)
    assert row["apart"] <= 3.0, row
    rows = [row | {"met": row["runs"][0]["reliable"] and row["apart"] <= 3.0}]
    if not short:
        far = fastvol.Gaussian(2.0 * DIGITS_STD)
        results = {
            str(name): quietly(
                model,
                F.cross_entropy,
                n=1e5,
                measure=far,
                method="annealed",
                preconditioner=name,
                seed=seed,
                **call,
            )
            for seed, name in enumerate((None, "lowrank"))
        }
        row = _pair(f"digits, std {2 * DIGITS_STD:g}", results)
        rows.append(row | {"met": row["difference"] <= TWICE_MOST})
    return {"rows": rows, "limit": TWICE_MOST}


def _pair(name: str, results: dict[str, fastvol.VolumeEstimate]) -> dict[str, Any]:
    first, second = results.values()
    row = {
        "case": name,
        "d": first.dim,
        "runs": [
            {
                "name": key,
                "log_volume": result.log_volume,
                "stderr": result.stderr,
                "reliable": result.reliable,
                "warnings": list(result.warnings),
                "n_loss": result.n_loss,
                "n_grad": result.n_grad,
                "seconds": result.seconds,
            }
            for key, result in results.items()
        ],
        "difference": abs(first.log_volume - second.log_volume),
        "apart": apart(first, second) if math.isfinite(first.stderr + second.stderr) else math.nan,
        "both_reliable": first.reliable and second.reliable,
    }
    told = ", ".join(
        f"{key} {result.log_volume:.3f} ± {result.stderr:.2g}{'' if result.reliable else '?'} "
        f"({result.seconds:.0f} s)"
        for key, result in results.items()
    )
    print(f"  {name}, d = {first.dim}: {told}", flush=True)
    return row
