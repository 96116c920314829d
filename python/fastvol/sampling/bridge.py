r"""Log volumes from the states of many levels: the multistate Bennett acceptance ratio.

Level t holds N_t states from a density proportional to exp(λ_t(n)) against the law of the
directions, λ_0 = 0. Their normalisers Z_t = exp(f_t) solve (Shirts & Chodera 2008, J. Chem. Phys.
129, 124105; Kong et al. 2003, J. R. Statist. Soc. B 65)

.. math:: e^{f_t} = \sum_n \frac{e^{\lambda_t(n)}}{\sum_s N_s e^{\lambda_s(n) - f_s}},

and the same sum over any other weight is its mean over directions. Errors are those of the
estimating equations, summed over clusters of dependent states (a sandwich estimate).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

_MOST_STEPS = 100
_TOLERANCE = 1e-9
# States, in effect, that levels below and above a gap must share.
_LEAST_OVERLAP = 3.0


@dataclass(frozen=True)
class Mean:
    """A log mean over directions.

    Attributes:
        log_mean: nats.
        stderr: nats.
        ess: effective number of clusters among those that carry the weight.
        n_states: effective number of states.
        max_share: the largest share that one cluster has of the weight.
    """

    log_mean: float
    stderr: float
    ess: float
    n_states: float
    max_share: float


class Bridge:
    """The states of one run, and what they tell.

    Args:
        log_densities: λ, float64 ``[levels, n]``; row 0 is zeros.
        level: of each state, int64 ``[n]``; every level has states.
        cluster: int64 ``[n]``; states of one cluster depend on each other and share a level.
        start: a first guess of f, ``[levels]``.
    """

    def __init__(
        self, log_densities: Float, level: Int, cluster: Int, start: Float | None = None
    ) -> None:
        self._level = level
        levels = len(log_densities)
        self._counts = np.bincount(level, minlength=levels).astype(np.float64)
        _, self._cluster = np.unique(cluster, return_inverse=True)
        self.n_clusters = int(self._cluster.max()) + 1
        cluster_level = np.empty(self.n_clusters, dtype=np.int64)
        cluster_level[self._cluster] = level
        self._cluster_level = cluster_level
        self._clusters_of = np.bincount(cluster_level, minlength=levels).astype(np.float64)
        self.log_normalisers = self._solve(log_densities, start)
        self._log_mixture, self._shares = self._mix(log_densities, self.log_normalisers)
        # What one state adds to the estimating equations, solved for f, as a row of each state.
        score = self._shares.copy()
        score[level, np.arange(len(level))] -= 1.0
        self._influence = np.zeros_like(score)
        self._influence[1:] = self._divide(self._shares, score[1:])
        self.connected = self._is_connected()

    def _is_connected(self) -> bool:
        """Whether every level shares states with the next, so that their ratio is known at all."""
        common = self._shares @ self._shares.T
        return all(float(common[:t, t:].sum()) > _LEAST_OVERLAP for t in range(1, len(common)))

    def _mix(self, log_densities: Float, f: Float) -> tuple[Float, Float]:
        """Log of the mixture's density at each state, and each level's share of it."""
        terms = log_densities - (f - np.log(self._counts))[:, None]
        log_mixture: Float = np.logaddexp.reduce(terms, axis=0)
        return log_mixture, np.exp(terms - log_mixture)

    def _divide(self, shares: Float, right: Float) -> Float:
        """J⁻¹ times some columns, J the derivative of the equations in f_1, f_2 and so on."""
        j = np.diag(shares.sum(axis=1)) - shares @ shares.T
        # Levels that do not overlap leave J singular; their error is then found large.
        ridge = 1e-12 * float(np.trace(j)) / len(j)
        inner = j[1:, 1:] + ridge * np.eye(len(j) - 1)
        # Slow to import.
        from scipy.linalg import solve

        try:
            solved: Float = solve(inner, right, assume_a="pos")
        except np.linalg.LinAlgError:
            solved = np.linalg.pinv(inner) @ right
        return solved

    def _solve(self, log_densities: Float, start: Float | None) -> Float:
        levels = len(log_densities)
        f = np.zeros(levels) if start is None else np.array(start, dtype=np.float64)
        f -= f[0]
        if levels == 1:
            return f
        for _ in range(_MOST_STEPS):
            _, shares = self._mix(log_densities, f)
            gap = shares.sum(axis=1) - self._counts
            try:
                step = self._divide(shares, gap[1:])
            except (np.linalg.LinAlgError, ValueError):
                step = np.full(levels - 1, math.inf)
            longest = float(np.abs(step).max())
            if not longest < 2.0:
                # Far from the solution: the fixed point, which always goes the right way.
                log_mixture, _ = self._mix(log_densities, f)
                fixed = np.logaddexp.reduce(log_densities - log_mixture, axis=1)
                f = fixed - fixed[0]
                continue
            f[1:] += step
            if longest < _TOLERANCE:
                break
        return f

    def mean(self, log_weights: Float) -> Mean:
        """The log mean of some weights over the law of the directions.

        Args:
            log_weights: nats ``[n]``.
        """
        terms = log_weights - self._log_mixture
        top = float(terms.max())
        if top == -math.inf:
            return Mean(-math.inf, math.inf, 0.0, 0.0, math.nan)
        share = np.exp(terms - top)
        log_mean = top + math.log(float(share.sum()))
        share /= share.sum()
        if not self.connected:
            return Mean(log_mean, math.inf, *self._spread(share))
        slope = self._shares @ share
        influence = share + slope @ self._influence
        return Mean(log_mean, self._error(influence), *self._spread(share))

    def _error(self, influence: Float) -> float:
        sums = np.bincount(self._cluster, weights=influence, minlength=self.n_clusters)
        count = self._clusters_of[self._cluster_level]
        level_sum = np.bincount(self._cluster_level, weights=sums, minlength=len(self._clusters_of))
        deviation = sums - level_sum[self._cluster_level] / count
        usable = count > 1
        if not usable.all():
            return math.inf
        return math.sqrt(float((np.square(deviation) * count / (count - 1.0)).sum()))

    def _spread(self, share: Float) -> tuple[float, float, float]:
        clusters = np.bincount(self._cluster, weights=share, minlength=self.n_clusters)
        return (
            1.0 / float(np.square(clusters).sum()),
            1.0 / float(np.square(share).sum()),
            float(clusters.max()),
        )
