"""A run of independent rays, whatever the law of their directions."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .._memory import ran_out, with_fewer_lanes
from .._problem import Problem, Progress
from .._proposal import Proposal
from .._work import Work, section
from ..checkpoints.files import Piece
from ..engines import Engine
from ..errors import warn
from ..result import Rays, VolumeEstimate, assemble
from ._audit import audit
from ._decisions import Decision
from ._screen import Screen
from ._search import Pilot, RayLoss, scan, settle

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

# Scans of one pass are divided into about so many groups.
_GROUPS = 64
# Rays in a group, at the least.
_LEAST_GROUP = 16


class Searcher:
    """Settles blocks of rays and scans them, with fewer lanes where memory runs out.

    Args:
        problem, engine, threshold, pilot, law: of the run.
    """

    def __init__(
        self,
        problem: Problem,
        engine: Engine,
        threshold: float,
        pilot: Pilot,
        law: Proposal | None,
    ) -> None:
        self._problem = problem
        self._threshold = threshold
        self._pilot = pilot
        self._loss = RayLoss(problem, engine, 0, law)
        self._screen = self._new_screen()
        self._law = law
        self._seconds = 0.0
        self.remarks: list[str] = []

    @property
    def seconds(self) -> float:
        """That the engine took, and a screen's."""
        own = 0.0 if self._screen is None else self._screen.seconds
        return self._seconds + self._loss.seconds + own

    @property
    def _n_loss(self) -> int:
        return self._loss.n_loss + (0 if self._screen is None else self._screen.n_loss)

    def _new_screen(self) -> Screen | None:
        if self._problem.plan.screening in ("off", "unmeasured"):
            return None
        return Screen(self._problem, self._pilot, self._threshold, 0, self._loss.proposal)

    def block(self, number: int) -> Piece:
        """A block of directions."""
        problem = self._problem
        first = number * problem.plan.block
        ids = np.arange(first, min(first + problem.plan.block, problem.n))
        return self._within_memory(lambda: self._settled(ids))

    def _settled(self, ids: Int) -> Piece:
        problem, loss = self._problem, self._loss
        before = self._n_loss
        rays = Rays.empty(len(ids))
        start = None if self._screen is None else self._screen.starts(ids)
        rays.log_radii[:], rays.status[:] = settle(
            problem, loss, self._pilot, self._threshold, ids, start
        )
        rays.shift[:] = loss.shift
        rays.log_offset[:] = loss.offsets()
        arrays: dict[str, npt.NDArray[Any]] = {}
        if problem.first_crossing:
            rows = np.arange(len(ids))
            scan(problem, loss, self._pilot, self._threshold, rays, ids, rows)
            arrays["reentrant"] = rays.reentrant
        arrays |= {"log_radii": rays.log_radii, "status": rays.status}
        # Of other runs these are zero.
        if problem.is_centred_elsewhere:
            arrays["shift"] = rays.shift
        if self._law is not None:
            arrays["log_offset"] = rays.log_offset
        return Piece(arrays, {"first": int(ids[0]), "n_loss": self._n_loss - before})

    def scanned(self, rays: Rays, ids: Int) -> Piece:
        """A scan of the rays ``ids``; ``rays`` stays as it is."""

        def scanned() -> Piece:
            before = self._loss.n_loss
            rows = np.arange(len(ids))
            own = rays.take(ids)
            found = scan(self._problem, self._loss, self._pilot, self._threshold, own, ids, rows)
            arrays: dict[str, npt.NDArray[Any]] = {
                "log_radii": own.log_radii,
                "status": own.status,
                "reentrant": found,
            }
            return Piece(arrays, {"n_loss": self._loss.n_loss - before, "of": _seen(rays, ids)})

        return self._within_memory(scanned)

    def _within_memory(self, attempt: Callable[[], Piece]) -> Piece:
        while True:
            try:
                return attempt()
            except Exception as error:
                # Of a sharded module the others are within this attempt.
                if not ran_out(error) or not self._problem.work.group.alone:
                    raise
                self._shrink(error)

    def _shrink(self, error: Exception) -> None:
        problem = self._problem
        plan = with_fewer_lanes(problem.plan, error, problem.work.kept_in)
        self.remarks.append(
            f"memory ran out with {problem.plan.lanes} rays in flight; it went on with {plan.lanes}"
        )
        self._problem = replace(problem, plan=plan)
        self._seconds = self.seconds
        # The old ones go first: both may not fit.
        law = self._loss.proposal
        del self._loss, self._screen
        self._loss = RayLoss(self._problem, self._problem.engine(), 0, law)
        self._screen = self._new_screen()


class Scans:
    """Scans of rays for an earlier crossing, in groups that anyone may make.

    Args:
        work: where the groups are kept. place: under which name.
        searchers: make them.
        rays: that are corrected.
        least: rays in a group, at the least. most: at the most.
    """

    def __init__(
        self,
        work: Work,
        place: str,
        searchers: Sequence[Searcher],
        rays: Rays,
        least: int,
        most: int,
    ) -> None:
        self._work, self._place, self._searchers = work, place, searchers
        self._rays = rays
        self._least, self._most = least, most
        self._passes = 0
        self.n_loss = 0

    def __call__(self, ids: Int) -> None:
        """Scans the rays ``ids``, ascending, and corrects their radii."""
        size = min(max(self._least, len(ids) // _GROUPS), self._most)
        groups = np.array_split(ids, max(1, len(ids) // size))
        rays = self._rays

        def compute(searcher: Searcher) -> Callable[[int], Piece]:
            return lambda number: searcher.scanned(rays, groups[number])

        def fits(number: int, piece: Piece) -> bool:
            return bool(piece.info["of"] == _seen(rays, groups[number]))

        place = f"{self._place}/{self._passes:04d}"
        self._passes += 1
        computes = [compute(searcher) for searcher in self._searchers]
        for number, piece in self._work.pieces(place, len(groups), computes, fits):
            group, found = groups[number], piece.arrays["reentrant"]
            rays.log_radii[group] = piece.arrays["log_radii"]
            rays.status[group] = piece.arrays["status"]
            rays.audited[group] = True
            rays.reentrant[group] |= found
            self.n_loss += piece.info["n_loss"]


def _seen(rays: Rays, ids: Int) -> str:
    """A digest of some rays before they are scanned."""
    sha = hashlib.sha256(np.ascontiguousarray(ids).tobytes())
    sha.update(rays.log_radii[ids].tobytes())
    return sha.hexdigest()


def run_threshold(
    problem: Problem,
    engine: Engine,
    threshold: float,
    bar: Any,
    decision: Decision,
    began: float,
) -> VolumeEstimate:
    """The estimate from ``problem.n`` rays at one threshold.

    Args:
        problem, engine, threshold: of the run.
        bar: progress, in directions.
        decision: law of the directions and pilot.
        began: ``time.perf_counter()`` when this threshold's turn came.
    """
    law, pilot, work = decision.law, decision.pilot, problem.work
    plan = decision.plan_of(problem)
    elsewhere = [replace(other, plan=plan) for other in problem.elsewhere]
    problem = replace(problem, plan=plan)
    searchers = [
        Searcher(own, engine if own is problem else own.engine(), threshold, pilot, law)
        for own in (problem, *elsewhere)
    ]
    constant_of_law = 0.0 if law is None else law.log_constant
    rays = Rays.empty(problem.n)
    n_loss, interrupted = _search(problem, searchers, threshold, rays, bar, constant_of_law)
    notes = list(decision.notes)
    if interrupted is not None:
        rays = rays.take(np.arange(interrupted))
        notes.append(
            f"interrupted: these are the first {interrupted} of {problem.n} directions, audited "
            "for earlier crossings no more than it takes"
        )
        warn(notes[-1])
        config = {**problem.config, "n": interrupted}
        problem = replace(problem, n=interrupted, config=config)
    search_loss = n_loss
    if problem.first_crossing:
        rays.audited[:] = True
    elif interrupted is not None:
        n_loss += _audit(problem, Work(), searchers, rays, 0, threshold)
    else:
        before = rays.take(np.arange(rays.n)) if work.on_interrupt == "return" else None
        try:
            n_loss += _audit(problem, work, searchers, rays, search_loss, threshold)
        except KeyboardInterrupt:
            if before is None or not work.alone:
                raise
            work.interrupted = True
            rays = before
            notes.append("interrupted: audited for earlier crossings no more than it takes")
            warn(notes[-1])
            n_loss += _audit(problem, Work(), searchers, rays, 0, threshold)

    now = time.perf_counter()
    config = {
        **problem.config,
        "threshold": threshold,
        "method": decision.method,
        "pilot": pilot.describe(),
    }
    if law is not None:
        config["preconditioner"] = law.describe()
    for searcher in searchers:
        notes.extend(searcher.remarks)
    provenance = {
        **problem.provenance,
        "engine_seconds": decision.seconds + sum(searcher.seconds for searcher in searchers),
        "run_seconds": now - began,
        "remarks": notes,
    }
    return assemble(
        rays,
        measure=problem.measure,
        dim=problem.dim,
        log_abs_scale=problem.log_abs_scale,
        offset_squared=problem.offset_squared,
        log_constant=constant_of_law,
        log_constant_error=0.0 if law is None else law.log_constant_error,
        seeds=(problem.seed,),
        config=config,
        plan=problem.plan.describe(),
        provenance=provenance,
        n_loss=decision.n_loss + n_loss,
        n_grad=decision.n_grad,
        seconds=now - problem.began,
    )


def _search(
    problem: Problem,
    searchers: Sequence[Searcher],
    threshold: float,
    rays: Rays,
    bar: Any,
    constant_of_law: float,
) -> tuple[int, int | None]:
    """Fills in all radii: losses that it took, and where an interrupt cut the run, if it did."""
    work, n, block = problem.work, problem.n, problem.plan.block
    running = problem.backend.LogMeanExp()
    done = np.zeros(-(-n // block), dtype=np.bool_)
    n_loss = n_done = 0

    def fits(number: int, piece: Piece) -> bool:
        enough = len(piece.arrays["log_radii"]) >= min(block, n - number * block)
        return enough and piece.info["first"] == number * block

    work.note(0, n)
    pieces = work.pieces(
        f"{section(threshold)}/blocks", len(done), [s.block for s in searchers], fits
    )
    try:
        for number, piece in pieces:
            first = number * block
            stop = min(first + block, n)
            for name, array in piece.arrays.items():
                getattr(rays, name)[first:stop] = array[: stop - first]
            n_loss += piece.info["n_loss"]
            n_done += stop - first
            done[number] = True
            work.note(n_done, n)
            weights, constant = rays.log_weights(
                problem.measure, problem.dim, np.arange(first, stop)
            )
            running.update(weights)
            log_volume = (
                running.log_mean + constant + constant_of_law - 0.5 * problem.offset_squared
            )
            bar.set_postfix_str(f"{log_volume:.4g} ± {running.stderr:.2g} nats", refresh=False)
            bar.update(stop - first)
            for callback in problem.callbacks:
                callback(
                    Progress(
                        n_done=n_done,
                        n=n,
                        threshold=threshold,
                        log_radii=_settled(rays.log_radii, done, block),
                        log_volume_metric=log_volume,
                        stderr=running.stderr,
                        seconds=time.perf_counter() - problem.began,
                    )
                )
    except KeyboardInterrupt:
        whole = len(done) if done.all() else int(np.argmin(done))
        # A process that goes its own way would leave the others waiting.
        if work.on_interrupt != "return" or not whole or not work.alone:
            raise
        work.interrupted = True
        pieces.close()
        return n_loss, min(whole * block, n)
    return n_loss, None


def _settled(log_radii: Float, done: npt.NDArray[np.bool_], block: int) -> Float:
    """Those of the blocks that are done."""
    count = int(np.count_nonzero(done))
    if done[:count].all():
        # In order, as they nearly always come: copies, one for each block of a long run, would take
        # longer than the run.
        settled = log_radii[: count * block]
    else:
        settled = log_radii[np.repeat(done, block)[: len(log_radii)]]
    settled.flags.writeable = False
    return settled


def _audit(
    problem: Problem,
    work: Work,
    searchers: Sequence[Searcher],
    rays: Rays,
    search_loss: int,
    threshold: float,
) -> int:
    """Audits in place; the losses that it took."""
    place = f"{section(threshold)}/audit-{problem.n}"
    plan = problem.plan
    # Small ones can be shared among processes; all rays of a scan take as many losses, so that no
    # lane runs dry before the others.
    least = min(max(_LEAST_GROUP, plan.lanes), plan.block)
    scans = Scans(work, place, searchers, rays, least, plan.block)
    audit(problem, scans, rays, search_loss)
    return scans.n_loss
