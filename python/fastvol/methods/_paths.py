"""Runs of chains along a path: budget, laws of directions, replicates, and the shorter run."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .._path_estimate import PathEstimate, assemble_paths, final_log_scale
from .._problem import Problem, Progress
from .._proposal import Proposal
from ..checkpoints.files import Piece
from ..engines import Engine
from ..errors import warn
from ..result import Rays, VolumeEstimate
from ..sampling.field import Level, RayField, log_weight
from ..sampling.learning import learn
from ..sampling.moves import Move
from ..sampling.snapshots import level_from_piece, level_to_piece, run_from_piece, run_to_piece
from ..sampling.tempering import Ancestors, Path, Run, generator_on, temper
from ._decisions import Decision, chains_place, decided
from ._screen import with_screen
from ._search import Pilot, RayLoss, make_pilot, pilot_source

Float = npt.NDArray[np.float64]

# Losses that a gradient counts as.
GRADIENT_COST = 3
_CHAINS = 32
_MANY_CHAINS = 64
_SHORT_LENGTH = 4
_LEAST_LENGTH = 12
# Length of the shorter run that tells about mixing, over that of the main ones.
_SHORT_SHARE = 0.25
_MOST_LENGTH = 64
# The states of one level are kept with their directions up to this size.
_STATES_BYTES = 2 << 30
_LEARNING_SHARE = 0.3
# A ray of unknown length, its gradient included.
_RAY_PRICE = 8
# Families of counters: 0 is a run's own rays, 1 the pilot's, 2 the plan's.
_FIRST_STREAM = 1000
_LEARNING_STREAM = 500
_AUDITED = 64
_RUNAWAY = 2.0
# Log weights of a smaller deviation, nats, take no path.
_EVEN = 0.01

MakeMove = Callable[[torch.Generator, np.random.Generator], Move]


@dataclass
class Budget:
    """Losses that may be spent, a gradient counting as three.

    Args:
        total: n directions at the pilot's price.
        n_loss, n_grad: spent so far.
    """

    total: float
    n_loss: int = 0
    n_grad: int = 0

    @property
    def spent(self) -> float:
        """In losses."""
        return self.n_loss + GRADIENT_COST * self.n_grad

    @property
    def left(self) -> float:
        """In losses."""
        return self.total - self.spent

    def add(self, n_loss: int, n_grad: int) -> None:
        """Notes what something cost."""
        self.n_loss += n_loss
        self.n_grad += n_grad


@dataclass
class Laboratory:
    """What the steps of one run share: the problem, its pilots, its budget.

    Args:
        problem, engine, threshold: of the run.
        budget: what may be spent.
        pilots: of the laws seen so far, by identity.
        remarks: what the result should say.
    """

    problem: Problem
    engine: Engine
    threshold: float
    budget: Budget
    pilots: dict[int, tuple[Pilot, Rays]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    _kept: list[Proposal | None] = field(default_factory=list)

    def pilot(self, law: Proposal | None) -> tuple[Pilot, Rays]:
        """The pilot of a law of directions; made once."""
        key = id(law)
        if key not in self.pilots:
            source = pilot_source(self.problem, self.engine, law)
            self.pilots[key] = make_pilot(self.problem, source, self.threshold)
            self.budget.add(source.n_loss, 0)
            # Known by identity, so it must not go away.
            self._kept.append(law)
        return self.pilots[key]

    def know(self, law: Proposal | None, pilot: Pilot) -> None:
        """Takes a pilot that has been made before."""
        self.pilots[id(law)] = pilot, Rays.empty(0)
        self._kept.append(law)

    def bound(self, law: Proposal | None) -> float:
        """What the pilot of a law expects of the log mean at the least, nats."""
        constant = 0.0 if law is None else law.log_constant
        return self.pilot(law)[0].log_weight_mean + constant

    @cached_property
    def no_gradients(self) -> str:
        """Why the loss cannot be differentiated; empty where it can."""
        source = pilot_source(self.problem, self.engine)
        trouble = has_gradients(self.problem, self.engine, source)
        self.budget.add(0, 0 if trouble else 1)
        return trouble

    def open(self, law: Proposal | None, chains: int, parts: int | None = None) -> RayField:
        """The rays of a law, divided for all processes of the plan, or into so many parts."""
        parts = self.problem.plan.processes if parts is None else parts
        return RayField(self.problem, self.threshold, self.pilot(law)[0], law, chains, parts)

    def improve(self, law: Proposal | None, chains: int, stream: int) -> Proposal | None:
        """A law learned from the boundary, if that pays and can be paid for."""
        if self.no_gradients or (law is not None and law.offset is not None):
            return law
        before = self.budget.spent
        limit = _LEARNING_SHARE * self.budget.total
        return learn(
            lambda candidate: self.open(candidate, chains),
            lambda candidate: (self.bound(candidate), self.pilot(candidate)[0].log_weight_sd),
            law,
            affordable=lambda count: self.budget.spent - before + _RAY_PRICE * count < limit,
            charge=lambda rays: self.budget.add(rays.n_loss, rays.n_grad),
            stream=_LEARNING_STREAM + stream,
        )


def laboratory(
    problem: Problem, engine: Engine, threshold: float, *, frugal: bool = False
) -> Laboratory:
    """The problem with its budget and its isotropic pilot.

    Args:
        problem, engine, threshold: of the run.
        frugal: without that pilot, and with no limit to the budget.
    """
    source = pilot_source(problem, engine)
    pilot = None if frugal else make_pilot(problem, source, threshold)
    total = math.inf if frugal else problem.n * source.price
    lab = Laboratory(problem, engine, threshold, Budget(total, n_loss=source.n_loss))
    if pilot is not None:
        lab.pilots[id(None)] = pilot
    return lab


def decision_for_rays(
    lab: Laboratory, method: str, law: Proposal | None, notes: tuple[str, ...]
) -> Decision:
    """The decision for independent rays, at what the laboratory has spent."""
    pilot = lab.pilot(law)[0]
    budget, said = lab.budget, (*lab.remarks, *notes)
    decision = Decision(method, law, pilot, budget.n_loss, budget.n_grad, said)
    return with_screen(lab.problem, lab.engine, lab.threshold, decision)


def decision_for_chains(
    lab: Laboratory,
    method: str,
    law: Proposal | None,
    notes: tuple[str, ...],
    start: Proposal | None = None,
) -> Decision:
    """The decision for chains, at what the laboratory has spent.

    Args:
        lab: problem and budget. method: its name.
        law: of the first main run. start: that it was learned from.
        notes: further warnings.
    """
    pilot, trouble = lab.pilot(law)[0], lab.no_gradients
    return Decision(
        method,
        law,
        pilot,
        start=start,
        start_pilot=lab.pilot(start)[0],
        n_loss=lab.budget.n_loss,
        n_grad=lab.budget.n_grad,
        notes=(*lab.remarks, *notes),
        total=lab.budget.total,
        trouble=trouble,
    )


def over_thresholds(
    problem: Problem,
    choose: Callable[[Laboratory], Decision],
    sample: Callable[[Problem, Engine, float, Decision, Any], VolumeEstimate],
) -> list[VolumeEstimate]:
    """One estimate per threshold, all by one method of chains.

    Args:
        problem: the call.
        choose: what the method settles first.
        sample: its runs; given an engine, the threshold, that decision and a bar over the runs.
    """

    def one(threshold: float) -> VolumeEstimate:
        engine = problem.engine()
        decision = decided(
            problem,
            threshold,
            ("chains",),
            lambda: choose(laboratory(problem, engine, threshold)),
        )
        return sample(problem, engine, threshold, decision, bar)

    with problem.bar(unit="run", total=1 + problem.replicates) as bar:
        return problem.over_thresholds(one)


def laboratory_of(
    problem: Problem, engine: Engine, threshold: float, decision: Decision
) -> Laboratory:
    """The laboratory as it stood when a decision for chains was made."""
    budget = Budget(decision.total, decision.n_loss, decision.n_grad)
    lab = Laboratory(problem, engine, threshold, budget)
    lab.know(decision.law, decision.pilot)
    if decision.start_pilot is not None:
        lab.know(decision.start, decision.start_pilot)
    lab.__dict__["no_gradients"] = decision.trouble
    return lab


def chains_for(problem: Problem, states: float) -> tuple[int, int]:
    """M and K for about so many states a level."""
    bytes_a_state = problem.dim * torch.finfo(problem.layout.dtype).bits // 8
    most = max(4 * _SHORT_LENGTH, _STATES_BYTES // bytes_a_state)
    states = min(states, most)
    chains = _MANY_CHAINS if states >= _MANY_CHAINS * 32 else _CHAINS
    chains = max(4, min(chains, int(most) // _SHORT_LENGTH))
    return chains, int(min(max(states // chains, 2), _MOST_LENGTH))


def run_paths(
    lab: Laboratory,
    law: Proposal | None,
    path: Path,
    make_move: MakeMove,
    *,
    method: str,
    other_law: Callable[[Proposal | None, int], Proposal | None],
    remarks: list[str],
    bar: Any,
) -> PathEstimate:
    """A short run, then main runs of the length that the budget allows.

    Args:
        lab: problem and budget.
        law: of the directions, for the short run and the first main one.
        path: the path of targets.
        make_move: a new move.
        method: its name.
        other_law: the law of main run number i ≥ 1, given the first one's.
        remarks: further warnings.
        bar: progress.
    """
    problem, budget = lab.problem, lab.budget
    for name in ("antithetic", "first_crossing"):
        if getattr(problem, name):
            raise ValueError(
                f"{name}=True is for independent rays (method='radial' or 'preconditioned'); the "
                f"chains of method={method!r} cannot have it"
            )
    if problem.elsewhere:
        remarks = [*remarks, "chains run on one device of a process"]
    began = time.perf_counter()
    work, place = problem.work, chains_place(problem, lab.threshold)
    total_runs = 1 + problem.replicates
    work.note(0, total_runs, "runs of chains")

    def one(
        law: Proposal | None,
        chains: int,
        length: int,
        stream: int,
        most: float,
        parts: int | None = None,
    ) -> Run:
        """A run; it goes on from the last level of which something is kept."""
        rays = lab.open(law, chains, parts)
        rng = np.random.default_rng([problem.seed & 0xFFFFFFFF, problem.seed >> 32, 17, stream])
        generator = generator_on(problem.layout.device, rng)
        move = make_move(generator, rng)
        own = f"{place}/level-{stream:02d}"
        kept = work.recalled(own)
        start = None if kept is None else level_from_piece(kept, rays, move, generator, rng)

        def may_go_on(so_far: Run) -> bool:
            bar.set_postfix_str(f"level {len(so_far.levels)}, {_told(so_far.levels[-1])}")
            return so_far.n_loss + GRADIENT_COST * so_far.n_grad < most

        def keep(ancestors: Ancestors) -> None:
            work.snapshot(own, lambda: level_to_piece(ancestors, move, generator, rng))

        run = temper(
            rays,
            path,
            move,
            chains=chains,
            length=length,
            rng=rng,
            stream=_FIRST_STREAM + stream,
            may_go_on=may_go_on,
            keep=keep,
            start=start,
        )
        budget.add(run.n_loss, run.n_grad)
        return run

    def piece(index: int, make: Callable[[], tuple[Run, Proposal | None]]) -> Piece:
        before = budget.n_loss, budget.n_grad
        run, law = make()
        reentrant = _reentrance(lab, law, run) if index == 0 else (0.0, 0.0)
        spent = budget.n_loss - before[0], budget.n_grad - before[1]
        # Whoever receives it pays.
        budget.n_loss, budget.n_grad = before
        return run_to_piece(
            run,
            law=None if law is None else law.describe(),
            log_constant_error=0.0 if law is None else law.log_constant_error,
            reentrant=reentrant,
            spent=spent,
        )

    def received(made: Piece) -> Run:
        run = run_from_piece(made)
        budget.add(*made.info["spent"])
        bar.update(1)
        _tell(lab, run)
        return run

    def short_run(number: int, chains: int, length: int, most: float) -> Run:
        def compute(_: int) -> Piece:
            return piece(-1, lambda: (one(law, chains, length, number, most), law))

        ((_, made),) = work.pieces(f"{place}/short-{number}", 1, [compute])
        work.forget(f"{place}/level-{number:02d}")
        return received(made)

    chains, _ = chains_for(problem, _CHAINS * _SHORT_LENGTH)
    short = short_run(0, chains, _SHORT_LENGTH, max(budget.left, 0.5 * budget.total))
    # The first state of a chain on a level is its ancestor's, and costs nothing.
    price = (short.n_loss + GRADIENT_COST * short.n_grad) / (short.chains * (short.length - 1))
    replicates = problem.replicates
    states = max(budget.left, 0.0) / (replicates + _SHORT_SHARE) / price
    if lab.pilot(law)[0].log_weight_sd < _EVEN:
        states = min(states, _CHAINS * _LEAST_LENGTH)
    chains, length = chains_for(problem, states)
    if length < _LEAST_LENGTH:
        remarks = [
            *remarks,
            f"n = {problem.n} pays for chains of {length} states a level only; about "
            f"{problem.n * _LEAST_LENGTH / max(length, 1):.2g} would pay for {_LEAST_LENGTH}",
        ]
        length = max(length, _LEAST_LENGTH // 2)
    if round(_SHORT_SHARE * length) > _SHORT_LENGTH:
        # A run so much shorter would say little about this one.
        short = short_run(1, chains, round(_SHORT_SHARE * length), max(budget.left, 0.0))
    # The same for each run, whoever makes the others, and when.
    share = max(budget.left, 0.0) / replicates
    most = _RUNAWAY * max(share, price * chains * length)
    # So many processes work on each of them.
    parts = -(-problem.plan.processes // replicates)
    work.note(1, total_runs, "runs of chains")

    def main_run(index: int) -> Piece:
        def make() -> tuple[Run, Proposal | None]:
            own = other_law(law, index) if index else law
            return one(own, chains, length, 2 + index, most, parts), own

        return piece(index, make)

    done: dict[int, tuple[Piece, Run]] = {}
    try:
        for index, made in work.pieces(f"{place}/main", replicates, [main_run]):
            done[index] = made, received(made)
            work.note(1 + len(done), total_runs, "runs of chains")
            work.forget(f"{place}/level-{2 + index:02d}")
    except KeyboardInterrupt:
        # The first one comes first where this process is alone.
        if work.on_interrupt != "return" or not done or not work.alone:
            raise
        work.interrupted = True
        told = f"interrupted: from {len(done)} of {replicates} runs"
        warn(told)
        remarks = [*remarks, told]
    pieces, runs = map(list, zip(*(done[index] for index in sorted(done)), strict=True))
    now = time.perf_counter()
    pilot = lab.pilot(law)[0]
    config = {
        **problem.config,
        "threshold": lab.threshold,
        "method": method,
        "pilot": pilot.describe(),
        "preconditioner": [made.info["law"] for made in pieces],
        "replicates": len(runs),
    }
    provenance = {
        **problem.provenance,
        "run_seconds": now - began,
        "remarks": [*lab.remarks, *remarks],
    }
    if work.tasks is not None:
        provenance["parts"] = {"given": work.tasks.given, "taken": work.tasks.taken}
    share_found, share_error = pieces[0].info["reentrant"]
    return assemble_paths(
        runs,
        short,
        measure=problem.measure,
        dim=problem.dim,
        log_abs_scale=problem.log_abs_scale,
        offset_squared=problem.offset_squared,
        seeds=(problem.seed,),
        config=config,
        plan=problem.plan.describe(),
        provenance=provenance,
        n_loss=budget.n_loss,
        n_grad=budget.n_grad,
        seconds=now - problem.began,
        reentrant=(share_found, share_error),
        log_constant_error=max(made.info["log_constant_error"] for made in pieces),
    )


def _told(level: Level) -> str:
    if level.beta < 1.0 or not math.isfinite(level.log_scale):
        return f"beta {level.beta:.2g}"
    return f"scale {math.exp(level.log_scale):.3g}"


def _tell(lab: Laboratory, run: Run) -> None:
    """Calls the callbacks after a run, with its own estimate."""
    problem = lab.problem
    for callback in problem.callbacks:
        callback(
            Progress(
                n_done=len(run.log_radii),
                n=len(run.log_radii),
                threshold=lab.threshold,
                log_radii=run.log_radii.copy(),
                log_volume_metric=run.log_mean + problem.log_constant,
                stderr=math.nan,
                seconds=time.perf_counter() - problem.began,
            )
        )


def _reentrance(lab: Laboratory, law: Proposal | None, run: Run) -> tuple[float, float]:
    """Share of the weight on rays that leave the basin and re-enter it, by a random few."""
    final = run.final
    if final is None or not run.finished:
        return 0.0, 0.0
    problem = lab.problem
    rng = np.random.default_rng([problem.seed & 0xFFFFFFFF, 23])
    rows = np.sort(rng.choice(len(final), size=min(_AUDITED, len(final)), replace=False))
    rays = lab.open(law, run.chains)
    population = final.take(rows)
    first, found = rays.first_crossings(population)
    lab.budget.add(rays.n_loss, 0)
    if not found.any():
        return 0.0, 0.0
    scale = final_log_scale(problem.measure)
    weights, corrected = (
        log_weight(problem.measure, problem.dim, x, population.shift, population.log_offset, scale)
        for x in (population.log_radii, first)
    )
    lost = -np.expm1(np.minimum(corrected - weights, 0.0))
    return float(lost.mean()), float(lost.std(ddof=1)) / math.sqrt(len(rows))


def has_gradients(problem: Problem, engine: Engine, source: RayLoss) -> str:
    """Why the loss has no gradient to go by; empty where it has one."""
    lane = np.array([0])
    source.assign(np.array([0]))
    source.load(lane, lane)
    try:
        with warnings.catch_warnings():
            # PyTorch's advice to a loss that leaves it; that is what is being asked here.
            warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad")
            _, gradient = engine.loss_and_grad(np.array([problem.typical_radius]), lane)
    except (TypeError, AttributeError):
        return "it returns a number, not a tensor that remembers how it was made"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not bool(torch.isfinite(gradient).all()):
        return "it is not finite"
    if not bool((gradient != 0).any()):
        return "it is zero"
    return ""
