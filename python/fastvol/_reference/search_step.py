"""The ray search as a struct of arrays on any device: one step for all lanes, without branches.

The state machine of :mod:`fastvol._reference.search`, written so that every lane does the same
operations and a mask decides what it keeps: no shape depends on a value, and nothing is read by the
host. That is what a round on a GPU needs. A lane that waits for no loss is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .search import Status


class Phase(IntEnum):
    """What a lane is doing."""

    IDLE = 0
    BRACKET = 1
    REFINE = 2
    SCAN = 3
    SETTLED = 4


class Number(IntEnum):
    """Rows of :attr:`SearchState.numbers`."""

    X = 0
    RADIUS = 1
    TOTAL = 2
    INSIDE_X = 3
    INSIDE_LOSS = 4
    OUTSIDE_X = 5
    OUTSIDE_LOSS = 6
    THIRD_X = 7
    THIRD_LOSS = 8
    LAST_STEP = 9
    GUARD_WIDTH = 10
    KNOWN_X = 11


class Mark(IntEnum):
    """Rows of :attr:`SearchState.marks`."""

    PHASE = 0
    STATUS = 1
    EVALUATIONS = 2
    REENTRANT = 3
    BEYOND = 4
    INSIDE_KNOWN = 5
    OUTSIDE_KNOWN = 6
    OUTSIDE_SMOOTH = 7
    THIRD_KNOWN = 8
    THIRD_SMOOTH = 9
    GUARD_STEPS = 10
    SCAN_INDEX = 11


class Rule(IntEnum):
    """Entries of :attr:`SearchState.rules`."""

    LOSS0 = 0
    THRESHOLD = 1
    XTOL = 2
    LOG_CAP = 3
    SLOPE = 4
    SCAN_SPAN = 5
    SCAN_POINTS = 6
    MAX_EVALUATIONS = 7
    LIMIT = 8


_LOG2 = math.log(2.0)


@dataclass(frozen=True)
class SearchState:
    """The searches of K lanes. Everything is written in place, so that addresses stay.

    Args:
        numbers: float64 ``[len(Number), K]``: x and its radius exp x, the weighted sum of the
            losses at that radius, the points that each search remembers.
        marks: int32 ``[len(Mark), K]``: phase, status, counts, and 0 or 1 for what is true.
        rules: float64 ``[len(Rule)]``: what all lanes share.
        items: int64 ``[K]``: what each lane searches for; -1 for an idle one.
        settled: int32 ``[1]``: how many searches have ended since all lanes were idle.
    """

    numbers: Tensor
    marks: Tensor
    rules: Tensor
    items: Tensor
    settled: Tensor

    @classmethod
    def empty(cls, lanes: int, device: torch.device | str) -> SearchState:
        """``lanes`` idle lanes."""
        return cls(
            torch.zeros((len(Number), lanes), dtype=torch.float64, device=device),
            torch.zeros((len(Mark), lanes), dtype=torch.int32, device=device),
            torch.zeros(len(Rule), dtype=torch.float64, device=device),
            torch.full((lanes,), -1, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    @property
    def lanes(self) -> int:
        """K."""
        return self.marks.shape[1]

    @property
    def radii(self) -> Tensor:
        """Where each lane wants its loss, float64 ``[K]``."""
        return self.numbers[Number.RADIUS]

    def keep_rules(self, rules: Mapping[Rule, float]) -> None:
        """Writes what all lanes share."""
        values = [float(rules[rule]) for rule in Rule]
        self.rules.copy_(torch.tensor(values, dtype=torch.float64, device="cpu"))

    def begin(self, lanes: Tensor, start: Tensor, *, scan: bool) -> None:
        """Starts searches from the log radii ``start``, or scans of the rays inside them.

        Args:
            lanes: int64 ``[k]`` on the state's device. start: float64 ``[k]`` there.
        """
        self.numbers.index_fill_(1, lanes, 0.0)
        self.marks.index_fill_(1, lanes, 0)
        if scan:
            self.numbers[Number.KNOWN_X].index_copy_(0, lanes, start)
            x = start - self.rules[Rule.SCAN_SPAN]
        else:
            x = torch.minimum(start, self.rules[Rule.LOG_CAP])
        phase = int(Phase.SCAN if scan else Phase.BRACKET)
        self.marks[Mark.PHASE].index_fill_(0, lanes, phase)
        self.numbers[Number.X].index_copy_(0, lanes, x)
        self.numbers[Number.RADIUS].index_copy_(0, lanes, x.exp())

    def clear(self) -> None:
        """All lanes idle."""
        self.numbers.zero_()
        self.marks.zero_()
        self.items.fill_(-1)
        self.settled.zero_()


def search_step(state: SearchState) -> None:
    """Moves every lane that waits for a loss; the losses have been summed in ``Number.TOTAL``.

    A lane marked ``Mark.BEYOND`` has only a lower bound of its loss, known to lie outside. Adds the
    lanes that it settles to ``state.settled``.
    """
    numbers, marks = state.numbers, state.marks
    loss0, threshold, xtol, log_cap, base_slope, span, points, most, _ = state.rules.unbind()
    phase, x, loss = marks[Mark.PHASE], numbers[Number.X], numbers[Number.TOTAL]
    scanning, bracketing = phase == Phase.SCAN, phase == Phase.BRACKET
    refining = phase == Phase.REFINE
    active = scanning | bracketing | refining
    marks[Mark.EVALUATIONS] += active
    evaluations = marks[Mark.EVALUATIONS]

    smooth = loss.isfinite() & (marks[Mark.BEYOND] == 0)
    inside = smooth & (loss <= threshold)
    low_x, low_loss = numbers[Number.INSIDE_X], numbers[Number.INSIDE_LOSS]
    high_x, high_loss = numbers[Number.OUTSIDE_X], numbers[Number.OUTSIDE_LOSS]
    low_known, high_known = marks[Mark.INSIDE_KNOWN] != 0, marks[Mark.OUTSIDE_KNOWN] != 0
    high_smooth = marks[Mark.OUTSIDE_SMOOTH] != 0

    # The displaced end of a bracket is the third point of the interpolation.
    displaced = active & ~scanning
    third_x = torch.where(displaced, torch.where(inside, low_x, high_x), numbers[Number.THIRD_X])
    third_loss = torch.where(
        displaced, torch.where(inside, low_loss, high_loss), numbers[Number.THIRD_LOSS]
    )
    third_known = torch.where(
        displaced, torch.where(inside, low_known, high_known), marks[Mark.THIRD_KNOWN] != 0
    )
    # What lies inside is smooth.
    third_smooth = torch.where(
        displaced, torch.where(inside, low_known, high_smooth), marks[Mark.THIRD_SMOOTH] != 0
    )
    new_low, new_high = active & inside, active & ~inside
    low_x, low_loss = torch.where(new_low, x, low_x), torch.where(new_low, loss, low_loss)
    low_known = low_known | new_low
    high_x, high_loss = torch.where(new_high, x, high_x), torch.where(new_high, loss, high_loss)
    high_known = high_known | new_high
    high_smooth = torch.where(new_high, smooth, high_smooth)

    # Scan.
    scan_index = marks[Mark.SCAN_INDEX] + (scanning & inside)
    scanned = scanning & inside & (scan_index >= points)
    known_x = numbers[Number.KNOWN_X]
    next_scan = known_x - span + scan_index / points * span
    found = scanning & ~inside

    # Bracket.
    moved = found | bracketing
    entering = moved & low_known & high_known
    stepping = moved & ~entering
    capped = stepping & inside & (x >= log_cap)
    f, usable = _log_excess(loss, smooth, loss0, threshold)
    f_before, usable_before = _log_excess(third_loss, third_known & third_smooth, loss0, threshold)
    secant = (f - f_before) / (x - third_x)
    follow = usable & usable_before & secant.isfinite() & (secant > 0)
    slope = torch.where(
        follow, secant.clamp(base_slope / 4.0, base_slope * 4.0), base_slope.expand_as(secant)
    )
    # A little too far is better than a little too near: it ends the bracketing.
    delta = (2.0 * xtol).clamp(min=0.01)
    step = torch.where(usable, 1.25 * f.abs() / slope + delta, torch.full_like(f, _LOG2))
    step = torch.maximum(step, 2.0 * numbers[Number.LAST_STEP]).clamp(max=_LOG2)
    next_bracket = torch.where(inside, torch.minimum(x + step, log_cap), x - step)

    # Refine.
    working = refining | entering
    third_known, third_smooth = third_known & ~entering, third_smooth & ~entering
    width = high_x - low_x
    middle = low_x + 0.5 * width
    guard_width = torch.where(entering, width, numbers[Number.GUARD_WIDTH])
    guard_steps = (marks[Mark.GUARD_STEPS] + refining).masked_fill(entering, 0)
    on_log = (low_loss > loss0) & (high_loss > loss0) & (threshold > loss0)
    f_low = _scaled(low_loss, on_log, loss0, threshold)
    f_high = _scaled(high_loss, on_log, loss0, threshold)
    crossing = low_x + width * (f_low / (f_low - f_high))
    root = torch.where(high_smooth & crossing.isfinite(), crossing, middle)
    root = torch.minimum(torch.maximum(root, low_x), high_x)
    interpolated = _inverse_quadratic(
        inside,
        (low_x, low_loss),
        (high_x, high_loss),
        (third_x, third_loss),
        on_log & (third_loss > loss0),
        middle,
        loss0,
        threshold,
    )
    trial = torch.where(third_known, interpolated, root)
    trusted = high_smooth & (third_smooth | ~third_known) & trial.isfinite()
    trial = torch.where(trusted, trial, middle)
    checked = guard_steps >= 3
    trial = torch.where(checked & (width > 0.5 * guard_width), middle, trial)
    guard_width = torch.where(checked, width, guard_width)
    guard_steps = guard_steps.masked_fill(checked, 0)
    margin = torch.minimum(0.5 * width, 0.9 * xtol)
    trial = torch.minimum(torch.maximum(trial, low_x + margin), high_x - margin)
    closed = working & ((width <= xtol) | (trial <= low_x) | (trial >= high_x))

    # What each lane makes of it.
    settled = scanned | capped | closed
    next_x = torch.where(scanning & inside, torch.where(scanned, known_x, next_scan), x)
    next_x = torch.where(stepping, torch.where(capped, log_cap, next_bracket), next_x)
    next_x = torch.where(working, torch.where(closed, root, trial), next_x)
    status = torch.full_like(phase, int(Status.CONVERGED))
    status = status.masked_fill(capped, int(Status.UNBOUNDED))
    status = status.masked_fill(closed & ~high_loss.isfinite(), int(Status.NONFINITE))
    spent = active & ~settled & (evaluations >= most)
    next_x = torch.where(spent, torch.where(low_known, low_x, high_x), next_x)
    status = status.masked_fill(spent, int(Status.FAILED))
    settled = settled | spent
    next_phase = torch.full_like(phase, int(Phase.SCAN))
    next_phase = next_phase.masked_fill(stepping, int(Phase.BRACKET))
    next_phase = next_phase.masked_fill(working, int(Phase.REFINE))
    next_phase = next_phase.masked_fill(settled, int(Phase.SETTLED))

    _put(numbers[Number.X], active, next_x)
    _put(numbers[Number.RADIUS], active & ~settled, next_x.exp())
    _put(numbers[Number.INSIDE_X], active, low_x)
    _put(numbers[Number.INSIDE_LOSS], active, low_loss)
    _put(numbers[Number.OUTSIDE_X], active, high_x)
    _put(numbers[Number.OUTSIDE_LOSS], active, high_loss)
    _put(numbers[Number.THIRD_X], active, third_x)
    _put(numbers[Number.THIRD_LOSS], active, third_loss)
    _put(numbers[Number.LAST_STEP], stepping & ~capped, step)
    _put(numbers[Number.GUARD_WIDTH], working, guard_width)
    _put(marks[Mark.STATUS], settled, status)
    _put(marks[Mark.REENTRANT], found, torch.ones_like(status))
    _put(marks[Mark.INSIDE_KNOWN], active, low_known)
    _put(marks[Mark.OUTSIDE_KNOWN], active, high_known)
    _put(marks[Mark.OUTSIDE_SMOOTH], active, high_smooth)
    _put(marks[Mark.THIRD_KNOWN], active, third_known)
    _put(marks[Mark.THIRD_SMOOTH], active, third_smooth)
    _put(marks[Mark.GUARD_STEPS], working, guard_steps)
    _put(marks[Mark.SCAN_INDEX], scanning, scan_index)
    _put(marks[Mark.PHASE], active, next_phase)
    state.settled.add_(settled.sum())


def _put(row: Tensor, where: Tensor, value: Tensor) -> None:
    row.copy_(torch.where(where, value.to(row.dtype), row))


def _log_excess(
    loss: Tensor, smooth: Tensor, loss0: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """f on the log scale, and where it is defined; finite elsewhere."""
    usable = smooth & (loss > loss0) & (threshold > loss0)
    excess = (loss - loss0).masked_fill(~usable, 1.0)
    return excess.log() - _log_gap(loss0, threshold), usable


def _scaled(loss: Tensor, on_log: Tensor, loss0: Tensor, threshold: Tensor) -> Tensor:
    excess = (loss - loss0).masked_fill(~on_log, 1.0)
    return torch.where(on_log, excess.log() - _log_gap(loss0, threshold), loss - threshold)


def _log_gap(loss0: Tensor, threshold: Tensor) -> Tensor:
    return (threshold - loss0).masked_fill(threshold <= loss0, 1.0).log()


def _inverse_quadratic(
    newest_inside: Tensor,
    low: tuple[Tensor, Tensor],
    high: tuple[Tensor, Tensor],
    third: tuple[Tensor, Tensor],
    on_log: Tensor,
    middle: Tensor,
    loss0: Tensor,
    threshold: Tensor,
) -> Tensor:
    f_low = _scaled(low[1], on_log, loss0, threshold)
    f_high = _scaled(high[1], on_log, loss0, threshold)
    a = torch.where(newest_inside, low[0], high[0])
    b = torch.where(newest_inside, high[0], low[0])
    fa = torch.where(newest_inside, f_low, f_high)
    fb = torch.where(newest_inside, f_high, f_low)
    c, fc = third[0], _scaled(third[1], on_log, loss0, threshold)
    xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
    safe = (phi.square() < xi) & ((1 - phi).square() < 1 - xi)
    t = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
    return torch.where(safe, a + t * (b - a), middle)
