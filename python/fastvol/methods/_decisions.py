"""What a run settles before its first piece: the method, the law of directions, their pilot.

It is kept with the run: pieces that are made later follow from the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .. import preconditioners
from .._problem import Problem
from .._proposal import Proposal
from .._work import section
from ..checkpoints.files import Piece
from ..checkpoints.laws import restore_law, store_law
from ..engines import Plan
from ._search import Pilot

CHAINS = ("annealed", "splitting")


@dataclass(frozen=True)
class Decision:
    """How a threshold is worked on.

    Args:
        method: ``"radial"``, ``"preconditioned"``, ``"annealed"`` or ``"splitting"``.
        law: of the directions. pilot: its pilot.
        n_loss, n_grad: what it took to decide.
        notes: sentences for the result's warnings.
        seconds: that the engine took.
        start: the law that ``law`` was learned from. start_pilot: its pilot.
        total: the budget of chains, in losses.
        trouble: why the loss has no gradient to go by.
        screen: what was measured for a plan's ``screening``, if anything was.
    """

    method: str
    law: Proposal | None
    pilot: Pilot
    n_loss: int
    n_grad: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    start: Proposal | None = None
    start_pilot: Pilot | None = None
    total: float = math.inf
    trouble: str = ""
    screen: Mapping[str, Any] = field(default_factory=dict)

    def plan_of(self, problem: Problem) -> Plan:
        """The problem's plan, with the screen that was measured where it names none itself."""
        if problem.plan.screening != "unmeasured":
            return problem.plan
        return replace(problem.plan, **{"screening": "off", **self.screen})

    def to_piece(self) -> Piece:
        """For a file."""
        arrays: dict[str, Any] = {}
        same = self.start is self.law
        info = {
            "method": self.method,
            "law": store_law(self.law, "law", arrays),
            "pilot": asdict(self.pilot),
            "n_loss": self.n_loss,
            "n_grad": self.n_grad,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "start_is_law": same,
            "start": None if same else store_law(self.start, "start", arrays),
            "start_pilot": None if self.start_pilot is None else asdict(self.start_pilot),
            "total": self.total,
            "trouble": self.trouble,
            "screen": dict(self.screen),
        }
        return Piece(arrays, info)

    @classmethod
    def from_piece(cls, piece: Piece, problem: Problem) -> Decision:
        """What :meth:`to_piece` wrote."""

        def given() -> Any:
            model = problem.objective.module.model
            return preconditioners.as_preconditioner(
                problem.preconditioner, problem.layout, problem.ray_scale.flat, model
            )

        info, arrays = dict(piece.info), piece.arrays
        law = restore_law(info["law"], "law", arrays, given)
        start = law if info.pop("start_is_law") else None
        if info["start"] is not None:
            start = restore_law(info["start"], "start", arrays, given)
        told = info["start_pilot"]
        return cls(
            **{
                **info,
                "law": law,
                "start": start,
                "pilot": Pilot(**info["pilot"]),
                "start_pilot": None if told is None else Pilot(**told),
                "notes": tuple(info["notes"]),
            }
        )


def decided(
    problem: Problem,
    threshold: float,
    kinds: Sequence[str],
    choose: Callable[[], Decision],
) -> Decision:
    """The decision of a threshold: the one that is kept, or else a new one.

    Args:
        problem, threshold: of the run.
        kinds: ``"rays"``, ``"chains"``, or both: what may have been decided.
        choose: makes a new one.
    """
    places = {"rays": rays_place(threshold), "chains": f"{chains_place(problem, threshold)}/start"}

    def make() -> tuple[str, Piece]:
        decision = choose()
        kind = "chains" if decision.method in CHAINS else "rays"
        made.append(decision)
        return places[kind], decision.to_piece()

    made: list[Decision] = []
    piece = problem.work.agreed([places[kind] for kind in kinds], make)
    # One of another process may differ in the last digit.
    return made[0] if made and problem.work.leads else Decision.from_piece(piece, problem)


def rays_place(threshold: float) -> str:
    """Where the decision for independent rays is kept."""
    return f"{section(threshold)}/rays"


def chains_place(problem: Problem, threshold: float) -> str:
    """Where runs of chains are kept: with another n they are other runs."""
    return f"{section(threshold)}/chains-{problem.n}"
