"""What people do by hand today to measure a basin, each in the form in which it is fastest here.

A *peer* gets the network, the data, the threshold and the filter metric that fastvol gets. Radii
are in the metric's coordinates: coefficient times ‖z‖ before the filter normalisation.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch import Tensor
from torch.func import functional_call

from .problems import Problem


class Direction(NamedTuple):
    """s ⊙ z by parameter name, and ‖z‖."""

    parts: dict[str, Tensor]
    norm: float


class Found(NamedTuple):
    """A radius, and the loss evaluations it took."""

    radius: float
    evaluations: int


LossAt = Callable[[Direction, float], float]


class Normals:
    """Directions from ``torch.randn``, one call a parameter, filter-normalised."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self._scale = problem.scale()
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Direction:
        """The next direction."""
        squared, parts = 0.0, {}
        for name, scale in self._scale.items():
            z = torch.randn(scale.shape, generator=self._generator)
            squared += float(torch.dot(z.view(-1), z.view(-1)))
            parts[name] = z.mul_(scale)
        return Direction(parts, math.sqrt(squared))

    def uniform(self) -> float:
        """The next number between 0 and 1 from the same generator."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def functional(problem: Problem) -> LossAt:
    """θ* + c·s⊙z as new tensors, handed to the model by ``torch.func.functional_call``."""
    model, inputs, targets = problem.model, problem.inputs, problem.targets
    start = {name: p.detach() for name, p in model.named_parameters()}

    def loss_at(direction: Direction, coefficient: float) -> float:
        with torch.no_grad():
            moved = {
                name: torch.add(p, direction.parts[name], alpha=coefficient)
                for name, p in start.items()
            }
            return F.cross_entropy(functional_call(model, moved, (inputs,)), targets).item()

    return loss_at


def inplace(problem: Problem) -> LossAt:
    """θ* + c·s⊙z written over the parameters of a copy of the model: no allocation."""
    model, inputs, targets = copy.deepcopy(problem.model), problem.inputs, problem.targets
    start = {name: p.detach() for name, p in problem.model.named_parameters()}
    moved = {name: p.detach() for name, p in model.named_parameters()}

    def loss_at(direction: Direction, coefficient: float) -> float:
        with torch.no_grad():
            for name, p in start.items():
                torch.add(p, direction.parts[name], alpha=coefficient, out=moved[name])
            return F.cross_entropy(model(inputs), targets).item()

    return loss_at


@dataclass(frozen=True)
class Way:
    """How a peer evaluates the loss.

    Args:
        name: how it moves the parameters.
        loss_at: does it.
        threads: PyTorch's threads, with which it was the quickest.
        seconds: of an evaluation.
    """

    name: str
    loss_at: LossAt
    threads: int
    seconds: float


def ways(problem: Problem, most_threads: int) -> tuple[Way, Way]:
    """``functional_call``, and the quicker of it and moving in place.

    Each with one thread or with all, whichever is the quicker, by the best of a few evaluations.
    """
    direction = Normals(problem, seed=0)()
    losses = {"functional_call": functional(problem), "in place": inplace(problem)}
    seconds: dict[tuple[str, int], float] = {}
    for threads in sorted({1, most_threads}):
        with torch_threads(threads):
            for _ in range(4):
                for name, loss_at in losses.items():
                    began = time.perf_counter()
                    loss_at(direction, 0.01)
                    spent = time.perf_counter() - began
                    seconds[name, threads] = min(spent, seconds.get((name, threads), math.inf))
    measured = [
        Way(name, losses[name], threads, spent) for (name, threads), spent in seconds.items()
    ]
    of_functional = [way for way in measured if way.name == "functional_call"]
    return min(of_functional, key=_seconds), min(measured, key=_seconds)


def _seconds(way: Way) -> float:
    return way.seconds


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch's thread count inside, and as it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


COEFFICIENTS = [(k / 99) ** 2 for k in range(100)]


def sweep(loss_at: LossAt, direction: Direction, threshold: float) -> Found:
    """The published sweep: ``linspace(0, 1, 100)**2``, all evaluated.

    The radius is the first coefficient whose loss lies strictly above the threshold, times ‖z‖;
    NaN where none does. Copies the procedure of "Sharp Minima Can Generalize" (arXiv 2511.04808).
    """
    losses = [loss_at(direction, coefficient) for coefficient in COEFFICIENTS]
    for coefficient, loss in zip(COEFFICIENTS, losses, strict=True):
        if loss > threshold:
            return Found(coefficient * direction.norm, len(losses))
    return Found(math.nan, len(losses))


def sweep_cell(radius: float, norm: float) -> tuple[float, float]:
    """The radii between which the sweep places a crossing that it reports at ``radius``."""
    coefficient = radius / norm
    before = [c for c in COEFFICIENTS if c < coefficient * (1 - 1e-9)]
    return (before[-1] if before else 0.0) * norm, radius


def bisect(
    loss_at: LossAt, direction: Direction, threshold: float, start: float, rtol: float
) -> Found:
    """The loop one would write: double or halve from ``start`` to a bracket, then bisect it.

    Ends where the bracket's ends differ by a factor of at most exp(``rtol``), which is fastvol's
    own criterion, and returns their geometric mean.
    """
    evaluations = 0

    def inside(radius: float) -> bool:
        nonlocal evaluations
        evaluations += 1
        return loss_at(direction, radius / direction.norm) <= threshold

    low = high = start
    if inside(start):
        while inside(high := 2 * high):
            low = high
    else:
        while not inside(low := low / 2):
            high = low
    while math.log(high / low) > rtol:
        middle = math.sqrt(low * high)
        if inside(middle):
            low = middle
        else:
            high = middle
    return Found(math.sqrt(low * high), evaluations)


@dataclass
class Ball:
    """Points drawn in one ball of hit-or-miss, and how many lay in the basin."""

    radius: float
    points: int = 0
    hits: int = 0


@dataclass
class HitOrMiss:
    """Hit-or-miss Monte Carlo: uniform points in a ball around θ*, counted where loss ≤ τ.

    The right radius is not known beforehand: the balls are doubled from radius 1, a few points
    each, until one is not hit; the remaining time goes to that one and the last one with hits.

    Args:
        problem: what is measured.
        loss_at: evaluates it.
        seed: of the points.
    """

    problem: Problem
    loss_at: LossAt
    seed: int
    balls: list[Ball] = field(default_factory=lambda: [Ball(1.0)])
    seconds: float = 0.0

    _SCOUTS = 16

    def __post_init__(self) -> None:
        self._normals = Normals(self.problem, self.seed)

    def run(self, seconds: float) -> None:
        """Draws points for so long; may be called again."""
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            last = self.balls[-1]
            if last.points >= self._SCOUTS and last.hits:
                self.balls.append(Ball(2 * last.radius))
            elif last.points < self._SCOUTS or len(self.balls) == 1:
                self._draw(last)
            else:
                self._draw(min(self.balls[-2:], key=lambda ball: ball.points))
        self.seconds += elapsed

    def _draw(self, ball: Ball) -> None:
        direction = self._normals()
        radius = ball.radius * self._normals.uniform() ** (1 / self.problem.dim)
        ball.points += 1
        ball.hits += self.loss_at(direction, radius / direction.norm) <= self.problem.threshold

    @property
    def points(self) -> int:
        """Drawn in all balls: the loss evaluations."""
        return sum(ball.points for ball in self.balls)

    def log_lower_bound(self, level: float = 0.95) -> float:
        """Lower bound of the log volume in metric coordinates, nats.

        The best over the balls of log vol(B_R) + log of the exact binomial (Clopper–Pearson) bound;
        that the best of several is picked is not held against it.
        """
        bounds = [
            log_ball_volume(self.problem.dim, ball.radius)
            + math.log(beta.ppf(1 - level, ball.hits, ball.points - ball.hits + 1))
            for ball in self.balls
            if ball.hits
        ]
        return max(bounds, default=-math.inf)


def log_ball_volume(dim: int, radius: float) -> float:
    """Log volume of a ball, nats."""
    return 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1) + dim * math.log(radius)
