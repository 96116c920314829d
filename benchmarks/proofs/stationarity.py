"""Every move keeps its target: chains started in it stay in it.

On a body whose loss has no one power along its rays. There a force that is taken at the state's
own radius is not the same on the way back, and its bias shows; on homogeneous bodies it does not.
On a sum of second and eighth powers it shows at once, so that body is the control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import fastvol
from fastvol._problem import Problem
from fastvol._proposal import Proposal
from fastvol.methods._search import make_pilot, pilot_source
from fastvol.preconditioners import Matrix
from fastvol.sampling.field import Level, Population, RayField
from fastvol.sampling.moves import CrankNicolson, GreatCircleSlice, Hamiltonian, Move

from . import bodies, compounds
from .compounds import _log_radii

Float = npt.NDArray[np.float64]
T = TypeVar("T")

STEPS = 20
Z_MOST = 3.0
Z_DETECTED = 5.0
# Its radii are so nearly of one power that the mistake's bias drowns in the noise: reported.
POLYNOMIAL = "polynomial, d = 6"
STATISTICS = ("log_r", "r_squared", "u1_fourth")
_CHUNK = 20_000
# Rays kept to start chains from.
_KEPT = 2_000_000


def run(short: bool) -> dict[str, Any]:
    """Each move on its targets, and a wrong one. Raises AssertionError where one is biased."""
    chains, count = (2048, 200_000) if short else (4096, 10_000_000)
    rows = []
    for body in (bodies.mixed_powers([2.0, 8.0] * 3), compounds.polynomial(6)):
        rows += within(
            body.model(),
            lambda problem, body=body: _rows(problem, body, chains, count, short),
            threshold=1.0,
            rtol=1e-8,
        )
    for row in rows:
        if not row["wrong"]:
            assert row["worst_z"] < Z_MOST, row
        elif row["body"] != POLYNOMIAL:
            assert row["worst_z"] > Z_DETECTED, row
    return {"chains": chains, "rays": count, "steps": STEPS, "moves": rows}


def _rows(
    problem: Problem, body: bodies.Body, chains: int, count: int, short: bool
) -> list[dict[str, Any]]:
    rows = []
    for target in targets(body, short):
        truth = _reference(body, target, count)
        for name in _moves(target):
            row = {"body": body.name, **_row(problem, name, target, truth, chains)}
            print(
                f"  {body.name}, {target.name}, {name}: z "
                f"{', '.join(f'{z:.2f}' for z in row['z'])}",
                flush=True,
            )
            rows.append(row)
    return rows


def _moves(target: Target) -> list[str]:
    names = [*MOVES]
    if math.isinf(target.level.log_scale):
        # It draws its radii from a ball.
        names.remove("crank-nicolson")
    if target.name != "no cap":
        # The mistake is made where it is simplest.
        names.remove("own radius")
    return names


@dataclass(frozen=True)
class Target:
    """A level, and the map P of the directions on which it lives."""

    name: str
    level: Level
    matrix: Tensor | None = None

    def field(self, problem: Problem, kind: type[RayField], lanes: int) -> RayField:
        """The rays, by way of the pilot that a run would make."""
        law = None if self.matrix is None else Proposal(Matrix(self.matrix), name="given")
        threshold = problem.thresholds[0]
        pilot, _ = make_pilot(problem, pilot_source(problem, problem.engine(), law), threshold)
        return kind(problem, threshold, pilot, law, lanes)


def targets(body: bodies.Body, short: bool) -> list[Target]:
    """β = 1 without a cap, and with one that cuts half of the rays; with a P of no meaning."""
    normal = np.random.default_rng(2).standard_normal((body.dim + 4000, body.dim))
    capped = Level(1.0, float(np.median(_log_radii(body.value, torch.from_numpy(normal)))))
    matrix = torch.eye(body.dim, dtype=torch.float64)
    matrix += torch.from_numpy(normal[: body.dim] / body.dim)
    free = Level(1.0, math.inf)
    everything = [
        Target("no cap", free),
        Target("cap at the median radius", capped),
        Target("no cap, through P", free, matrix),
        Target("cap, through P", capped, matrix),
    ]
    return everything[:2] if short else everything


def within(model: torch.nn.Module, work: Callable[[Problem], T], **call: Any) -> T:
    """What ``work`` makes of the problem that a call of ``estimate`` would solve."""

    def method(problem: Problem) -> list[T]:
        return [work(problem)]

    with mock.patch("fastvol.methods.get", return_value=method):
        found: Any = fastvol.estimate(model, bodies.loss, n=1000, **call)
    return found


class OwnRadius(RayField):
    """A field whose force is taken at each state's own radius: the mistake to be found."""

    own: Float

    def force(
        self,
        units: Tensor,
        log_multiple: float,
        level: Level,
        *,
        smoothed: bool = False,
        refinements: int = 0,
    ) -> tuple[Tensor, Float]:
        """∇log W / d where it is homogeneous, at ``own``."""
        gradient = self.gradient(units, self.own)
        force = -level.beta * gradient / (gradient * units).sum(dim=1, keepdim=True)
        return force - (force * units).sum(dim=1, keepdim=True) * units, self.own


class OwnRadiusMove(Hamiltonian):
    """Its trajectories keep the radius at which they began."""

    def step(self, field: RayField, state: Population, level: Level) -> Population:
        """One trajectory for every chain."""
        assert isinstance(field, OwnRadius)
        field.own = state.log_multiples.copy()
        return super().step(field, state, level)


def _hamiltonian(force: str) -> Callable[..., Move]:
    def make(generator: torch.Generator, rng: np.random.Generator) -> Move:
        return Hamiltonian(generator, rng, adapt=False, force=force)

    return make


MOVES: Mapping[str, Callable[[torch.Generator, np.random.Generator], Move]] = {
    "hamiltonian": _hamiltonian("plain"),
    "hamiltonian, smoothed force": _hamiltonian("smoothed"),
    "hamiltonian, refined force": _hamiltonian("refined"),
    "slice": lambda generator, rng: GreatCircleSlice(generator, rng, repeats=1),
    "crank-nicolson": lambda generator, rng: CrankNicolson(generator, rng, repeats=1, size=0.6),
    "own radius": lambda generator, rng: OwnRadiusMove(generator, rng, adapt=False),
}


def _row(
    problem: Problem, name: str, target: Target, truth: Reference, chains: int
) -> dict[str, Any]:
    """How far the chains' means over the second half of their steps are from the target's."""
    rng = np.random.default_rng([7, *name.encode()])
    rays = target.field(problem, OwnRadius if name == "own radius" else RayField, chains)
    start = truth.resample(chains, rng)
    state = rays.measure(torch.from_numpy(start))
    move = MOVES[name](torch.Generator().manual_seed(8), rng)
    move.start_level(state, target.level)
    later = []
    for step in range(STEPS):
        state = move.step(rays, state, target.level)
        if step >= STEPS // 2:
            later.append(_statistics(state.log_radii, state.units.numpy()))
    # One number a chain: its steps are not independent, the chains are.
    means = np.mean(later, axis=0)
    error = means.std(axis=1, ddof=1) / math.sqrt(chains)
    z = (means.mean(axis=1) - truth.means) / np.hypot(error, truth.errors)
    return {
        "move": name,
        "target": target.name,
        "wrong": name == "own radius",
        "statistics": STATISTICS,
        "z": z.tolist(),
        "stderr": error.tolist(),
        "worst_z": float(np.abs(z).max()),
        "report": move.report(),
        "n_loss": rays.n_loss,
        "n_grad": rays.n_grad,
    }


@dataclass(frozen=True)
class Reference:
    """Means under a target from isotropic rays, found without the sampler.

    Args:
        means, errors: of :data:`STATISTICS`.
        units, weights: some of the rays, to start chains from.
    """

    means: Float
    errors: Float
    units: Float
    weights: Float

    def resample(self, count: int, rng: np.random.Generator) -> Float:
        """Directions drawn from the target, ``[count, d]``."""
        chosen = rng.choice(len(self.weights), size=count, p=self.weights / self.weights.sum())
        return self.units[chosen]


def _reference(body: bodies.Body, target: Target, count: int) -> Reference:
    """By weighting ``count`` isotropic rays by W."""
    sums, squares, total = np.zeros(3), np.zeros((3, 3)), 0.0
    cross, weight_squares = np.zeros(3), 0.0
    kept: list[tuple[Float, Float]] = []
    for chunk in range(math.ceil(count / _CHUNK)):
        z = np.random.default_rng([11, chunk]).standard_normal((_CHUNK, body.dim))
        units = z / np.linalg.norm(z, axis=1, keepdims=True)
        v = units if target.matrix is None else units @ target.matrix.numpy().T
        log_radii = _log_radii(body.value, torch.from_numpy(v))
        log_norm = np.log(np.linalg.norm(v, axis=1))
        capped = np.minimum(log_radii, target.level.log_scale)
        weight = np.exp(body.dim * (capped - log_norm))
        values = _statistics(log_radii, units)
        total += weight.sum()
        weight_squares += np.square(weight).sum()
        sums += values @ weight
        cross += values @ np.square(weight)
        squares += (values * np.square(weight)) @ values.T
        if chunk * _CHUNK < _KEPT:
            kept.append((units, weight))
    means = sums / total
    # Var of Σ w (x − mean), the ratio's leading term.
    spread = np.diag(squares) - 2.0 * means * cross + np.square(means) * weight_squares
    units, weights = (np.concatenate(part) for part in zip(*kept, strict=True))
    return Reference(means, np.sqrt(spread) / total, units, weights)


def _statistics(log_radii: Float, units: Float) -> Float:
    return np.stack([log_radii, np.exp(2.0 * log_radii), units[:, 0] ** 4])
