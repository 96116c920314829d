"""What ``prior_mass`` found: the mass of all solutions, and how it falls with the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ._layout import ParameterLayout
from ._prior_ladder import Level

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

_MOST_ERROR = 0.5
_APART = 3.0
# Chains that carry a level, by effective number.
_LEAST_CHAINS = 20.0
# How many rungs up a common ancestor counts, unless most pairs have one.
_LAG = 4
_MOST_RELATED = 0.5
_LEAST_HITS = 30
_LEAST_ACCEPTANCE = 0.02
_LEAST_MULTIPLE = 1e-3
# With no hit among N draws, the mass is below 3/N with 95 % confidence.
_NO_HIT = 3.0


class PriorPoint(NamedTuple):
    """The mass at one threshold.

    Attributes:
        threshold: τ, in the units of the loss.
        log_mass: log P(L ≤ τ), nats; where ``bound`` is true an upper bound of it.
        stderr: nats; infinite where it cannot be told.
        reliable: whether value and error can be trusted.
        bound: whether no state at or below τ was found.
        warnings: plain sentences.
    """

    threshold: float
    log_mass: float
    stderr: float
    reliable: bool
    bound: bool
    warnings: tuple[str, ...]


class PriorProfile(NamedTuple):
    """Log mass as a function of the threshold, from the law's typical loss down.

    Attributes:
        thresholds: float64 ``[k]``, descending. log_mass, stderr: float64 ``[k]``, nats.
        reliable: bool ``[k]``.
    """

    thresholds: Float
    log_mass: Float
    stderr: Float
    reliable: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, repr=False)
class PriorMass:
    r"""Log mass :math:`\log P(L(\theta) \le \tau)` under a normal law of the parameters, nats.

    Attributes:
        thresholds: as they were asked for.
        n: the budget; n_loss: loss evaluations that were spent. seconds: wall clock.
        seed: of all noise.
        dim: parameters that move.
        std: the law's standard deviation, JSON-ready; tensors by their digest.
        replicates: independent runs. plan: how it was carried out.
        rungs: losses of the ladder, descending, float64 ``[levels]``; empty where plain draws
            served.
        solutions: parameters at or below the smallest threshold, flat, ``[k, dim]`` in the working
            dtype on the model's device; k may be 0. Drawn from the law given L ≤ τ; some share
            their recent ancestors.
    """

    thresholds: tuple[float, ...]
    n: int
    n_loss: int
    seconds: float
    seed: int
    dim: int
    std: Any
    replicates: int
    plan: dict[str, Any]
    rungs: Float
    solutions: Tensor
    _runs: tuple[tuple[Level, ...], ...]
    _layout: ParameterLayout
    _plateau: bool
    _remarks: tuple[str, ...]

    @property
    def threshold(self) -> float:
        """The smallest of the thresholds."""
        return min(self.thresholds)

    @property
    def log_mass(self) -> float:
        """At :attr:`threshold`, nats; an upper bound where :attr:`bound` is true."""
        return self.at(self.threshold).log_mass

    @property
    def stderr(self) -> float:
        """Standard error of :attr:`log_mass`, nats."""
        return self.at(self.threshold).stderr

    @property
    def bound(self) -> bool:
        """Whether no solution was found, so that ``log_mass`` is an upper bound only."""
        return self.at(self.threshold).bound

    @property
    def reliable(self) -> bool:
        """Whether :attr:`log_mass` and its error can be trusted.

        The ladder leads to the threshold, the error is below half a nat, the replicates agree, and
        no level hangs on a few chains or on a collapsed move.
        """
        return self.at(self.threshold).reliable

    @property
    def warnings(self) -> tuple[str, ...]:
        """Plain sentences."""
        return self._remarks + self.at(self.threshold).warnings

    def at(self, threshold: float) -> PriorPoint:
        """The mass at a threshold, from the same run.

        Args:
            threshold: finite. Below the last rung the states that are lower still are counted.
        """
        threshold = float(threshold)
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be finite, got {threshold}")
        depth = int((self.rungs >= threshold).sum())
        masses = [_mass(run, depth, threshold) for run in self._runs]
        logs = np.array([mass.log_mass for mass in masses])
        if not np.isfinite(logs).any():
            return self._bound(threshold)
        weights = np.exp(logs - logs.max())
        log_mass = float(logs.max() + math.log(weights.mean()))
        shares = weights / weights.sum()
        variances = np.array([mass.variance for mass in masses])
        found = np.isfinite(logs)
        stderr = math.sqrt(float(np.square(shares[found]) @ variances[found]))
        hits = sum(mass.hits for mass in masses)
        if depth == 0:
            # Plain draws: the binomial law.
            draws = sum(run[0].losses.size for run in self._runs)
            stderr = math.sqrt((draws - hits) / (draws * hits))
        elif len(logs) > 1:
            spread = float(shares.std(ddof=1)) * math.sqrt(len(logs))
            stderr = max(stderr, spread)
        reasons = self._reasons(threshold, depth, masses, stderr, hits)
        return PriorPoint(threshold, log_mass, stderr, not reasons, False, tuple(reasons))

    def profile(self, thresholds: Sequence[float] | Float | None = None) -> PriorProfile:
        """Log mass as a function of the loss threshold.

        Args:
            thresholds: where; by default quantiles of the law's own losses, the ladder, and the
                thresholds that were asked for, as far as states were found.
        """
        if thresholds is None:
            plain = np.concatenate([run[0].losses.reshape(-1) for run in self._runs])
            plain = plain[np.isfinite(plain)]
            typical = np.quantile(plain, [0.9, 0.7, 0.5]) if len(plain) else np.zeros(0)
            grid = np.unique([*typical, *self.rungs, *self.thresholds])[::-1]
            points = [p for p in map(self.at, grid) if not p.bound]
        else:
            points = [self.at(t) for t in sorted(map(float, thresholds), reverse=True)]
        return PriorProfile(
            np.array([p.threshold for p in points]),
            np.array([p.log_mass for p in points]),
            np.array([p.stderr for p in points]),
            np.array([p.reliable for p in points], dtype=np.bool_),
        )

    def ci(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of :attr:`log_mass`, nats; it holds where ``reliable`` is true.

        Normal, from ``stderr``; of a bound the lower end is minus infinity.

        Args:
            level: between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie between 0 and 1, got {level}")
        point = self.at(self.threshold)
        if point.bound:
            return -math.inf, point.log_mass
        width = NormalDist().inv_cdf(0.5 + 0.5 * level) * point.stderr
        return point.log_mass - width, min(point.log_mass + width, 0.0)

    def solution(self, index: int) -> dict[str, Tensor]:
        """One solution by parameter name, for ``torch.func.functional_call``.

        ``model.load_state_dict(result.solution(i), strict=False)`` loads it.

        Args:
            index: a row of :attr:`solutions`.
        """
        if not -len(self.solutions) <= index < len(self.solutions):
            raise IndexError(f"index is {index}; there are {len(self.solutions)} solutions")
        return self._layout.unflatten(self.solutions[index].clone())

    def summary(self) -> str:
        """Several lines: the mass, how far to trust it, what it cost."""
        lines = [self._headline()]
        for threshold in self.thresholds:
            if threshold != self.threshold:
                p = self.at(threshold)
                relation = "<=" if p.bound else "="
                trust = "" if p.reliable else ", not reliable"
                lines.append(
                    f"at threshold {threshold:.4g}: {relation} {p.log_mass:.6g} ± {p.stderr:.2g} "
                    f"nats{trust}"
                )
        if len(self.rungs):
            lines.append(
                f"subset simulation: {len(self.rungs)} rungs from loss {self.rungs[0]:.4g} to "
                f"{self.rungs[-1]:.4g}, {self.replicates} independent runs"
            )
        else:
            lines.append(f"plain draws from the law, in {self.replicates} runs")
        lines.extend(f"note: {warning}" for warning in self.warnings)
        if not self.reliable:
            lines.append("next: raise n, or take a larger threshold (result.profile() shows both)")
        lines.append(
            f"d = {self.dim}, {len(self.solutions)} solutions kept, {self.n_loss} loss evaluations "
            f"in {self.seconds:.3g} s"
        )
        return "\n".join(lines)

    def __repr__(self) -> str:
        point = self.at(self.threshold)
        relation = "<=" if point.bound else "="
        trust = "reliable" if point.reliable else "NOT reliable"
        return (
            f"PriorMass(log mass {relation} {point.log_mass:.6g} ± {point.stderr:.3g} nats at "
            f"threshold {point.threshold:.6g}, d={self.dim}, n={self.n}, {trust})"
        )

    def _headline(self) -> str:
        point = self.at(self.threshold)
        where = f"of the parameters with a loss of at most {point.threshold:.4g}"
        if point.bound:
            return f"log mass {where} is below {point.log_mass:.6g} nats: none were found"
        if not point.reliable:
            return f"log mass {where} is about {point.log_mass:.6g} nats, NOT reliable"
        low, high = self.ci()
        return (
            f"log mass {where} = {point.log_mass:.6g} ± {point.stderr:.2g} nats (95 % interval "
            f"{low:.6g} to {high:.6g})"
        )

    def _bound(self, threshold: float) -> PriorPoint:
        """The smallest mass that was seen, which the mass at a lower threshold cannot exceed."""
        depth = max(len(run) for run in self._runs) - 1
        if depth == 0:
            draws = sum(run[0].losses.size for run in self._runs)
            log_mass = min(math.log(_NO_HIT / draws), 0.0)
            seen = f"none of {draws} draws from the law"
        else:
            rung = float(self.rungs[depth - 1])
            point = self.at(rung)
            log_mass = min(point.log_mass + 2.0 * point.stderr, 0.0)
            seen = f"no state below the rung {rung:.4g}"
        why = (
            "the loss has a plateau there that the chains do not leave"
            if self._plateau
            else f"n = {self.n} does not pay for more"
        )
        sentence = (
            f"{seen} reached the threshold {threshold:.4g} ({why}): the log mass is an upper bound"
        )
        return PriorPoint(threshold, log_mass, math.inf, False, True, (sentence,))

    def _reasons(
        self, threshold: float, depth: int, masses: list[_Mass], stderr: float, hits: int
    ) -> list[str]:
        reasons = []
        if hits < _LEAST_HITS:
            reasons.append(f"only {hits} states lie at or below the threshold {threshold:.4g}")
        if not stderr <= _MOST_ERROR:
            reasons.append(f"the error, {stderr:.2g} nats, is above {_MOST_ERROR:g}; raise n")
        if depth == 0:
            return reasons
        if not all(mass.hits for mass in masses):
            reasons.append("one of the independent runs died out above the threshold; raise n")
            masses = [mass for mass in masses if mass.hits]
        if any(
            abs(a.log_mass - b.log_mass) > _APART * math.sqrt(a.variance + b.variance)
            for i, a in enumerate(masses)
            for b in masses[:i]
        ):
            reasons.append(
                f"independent runs differ by more than {_APART:g} of their errors; raise n"
            )
        fewest = min(mass.chains for mass in masses)
        if fewest < _LEAST_CHAINS:
            reasons.append(f"one level is carried by {fewest:.3g} chains only; raise n")
        moves = [level for run in self._runs for level in run[1 : depth + 1]]
        if min(level.acceptance for level in moves) < _LEAST_ACCEPTANCE:
            reasons.append("on one level hardly any step was accepted; raise n")
        if min(level.multiple for level in moves) < _LEAST_MULTIPLE:
            reasons.append("the steps shrank to nothing: the chains stay where they start")
        return reasons


class _Mass(NamedTuple):
    """What one run says of a threshold: variance of the log mass, effective chains, states."""

    log_mass: float
    variance: float
    chains: float
    hits: int


def _mass(run: tuple[Level, ...], depth: int, threshold: float) -> _Mass:
    if len(run) <= depth:
        return _Mass(-math.inf, math.inf, 0.0, 0)
    level = run[depth]
    hits = int((level.losses <= threshold).sum())
    if not hits:
        return _Mass(-math.inf, math.inf, 0.0, 0)
    limits = [*(below.rung for below in run[1 : depth + 1]), threshold]
    kept = [(above.losses <= low).mean(axis=1) for above, low in zip(run, limits, strict=False)]
    log_mass = level.log_weight + math.log(hits / level.losses.size)
    shares = [weights / weights.sum() for weights in kept]
    effective = min(1.0 / float(share @ share) for share in shares)
    variance = family_variance(shares, [above.parents for above in run[: depth + 1]])
    return _Mass(log_mass, variance, effective, hits)


def family_variance(shares: list[Float], parents: list[Int]) -> float:
    r"""Relative variance of a run's mass, from its family tree.

    With Q_k the chance that two states, drawn at most :data:`_LAG` levels further down, descend
    from one chain of level k, that level contributes

    .. math:: (Q_k - Q_{k+1}) / (1 - Q_k) \cdot (1 - 1/M) - 1/M,

    where M chains that were all alike would contribute nothing (Lee & Whiteley 2018).

    Args:
        shares: by level, the share of each chain ``[M]`` in what is kept; they sum to 1.
        parents: by level, the chain ``[M]`` of the level above that each chain comes from.
    """
    total = 0.0
    for level in range(len(shares)):
        count = len(shares[level])
        best = 0.0
        for end in range(level, min(level + _LAG, len(shares) - 1) + 1):
            groups: Float = shares[end]
            below = 0.0
            for step in range(end, level, -1):
                if step == level + 1:
                    below = float(groups @ groups)
                groups = np.bincount(parents[step], groups, minlength=count).astype(np.float64)
            related = float(groups @ groups)
            if end > level and related > _MOST_RELATED:
                break
            best = (related - below) / max(1.0 - related, 1e-12) * (1.0 - 1.0 / count) - 1.0 / count
        total += best
    return max(total, 0.0)
