"""Streaming log-mean-exp: mean, error and concentration of weights that arrive as logarithms.

Source: the pairwise update of mean and sum of squared deviations of Chan, Golub and LeVeque (1979),
applied to exp(log_weight - largest log_weight so far), which never leaves float64's range.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


class LogMeanExp:
    """Log of the mean of exp(log_weights), over any number of updates and merges.

    Weights are independent units; -inf is a weight of zero. The state is four numbers: ``count``;
    ``log_max``, the largest log weight; ``mean`` and ``m2``, the mean and the sum of squared
    deviations of exp(log_weights - log_max).
    """

    def __init__(self) -> None:
        self._count = 0
        self._log_max = -math.inf
        self._mean = 0.0
        self._m2 = 0.0

    def update(self, log_weights: npt.ArrayLike) -> None:
        """Add weights.

        Args:
            log_weights: [n] float64, natural logs; -inf is allowed.

        Raises:
            ValueError: an entry is nan or +inf.
        """
        values = np.asarray(log_weights, dtype=np.float64).ravel()
        if np.any(np.isnan(values)) or np.any(values == np.inf):
            raise ValueError("log_weights: nan and +inf are not log weights")
        if values.size == 0:
            return
        other = LogMeanExp()
        other._count = values.size
        other._log_max = float(values.max())
        if other._log_max > -math.inf:
            scaled = np.exp(values - other._log_max)
            other._mean = float(scaled.mean())
            other._m2 = float(np.square(scaled - other._mean).sum())
        self.merge(other)

    def merge(self, other: LogMeanExp) -> None:
        """Add the weights that ``other`` has seen; ``other`` is left as it is."""
        if other._count == 0:
            return
        log_max = max(self._log_max, other._log_max)
        n_a, mean_a, m2_a = self._rescaled(log_max)
        n_b, mean_b, m2_b = other._rescaled(log_max)
        total = n_a + n_b
        gap = mean_b - mean_a
        self._count = total
        self._log_max = log_max
        self._mean = mean_a + gap * (n_b / total)
        self._m2 = m2_a + m2_b + gap * gap * (n_a * (n_b / total))

    def _rescaled(self, log_max: float) -> tuple[int, float, float]:
        # A state without a positive weight has log_max -inf, for which the difference may be nan.
        scale = math.exp(self._log_max - log_max) if self._log_max > -math.inf else 0.0
        return self._count, self._mean * scale, self._m2 * scale * scale

    @property
    def count(self) -> int:
        """Number of weights seen."""
        return self._count

    @property
    def log_mean(self) -> float:
        """Log of the mean weight; -inf where every weight is zero, nan where there is none."""
        if self._count == 0:
            return math.nan
        return self._log_max + math.log(self._mean) if self._mean > 0 else -math.inf

    @property
    def stderr(self) -> float:
        """Standard error of ``log_mean`` by the delta method, in nats.

        inf for fewer than two weights, or where all are zero.
        """
        if self._count < 2 or self._mean == 0:
            return math.inf
        return math.sqrt(self._m2 / (self._count - 1) / self._count) / self._mean

    @property
    def ess(self) -> float:
        """Effective sample size, (sum w)^2 / sum w^2; 0 where every weight is zero."""
        if self._mean == 0:
            return 0.0
        return self._count / (1.0 + self._m2 / (self._count * self._mean * self._mean))

    @property
    def max_share(self) -> float:
        """Largest weight over the sum of all; nan where the sum is zero."""
        if self._mean == 0:
            return math.nan
        return 1.0 / (self._count * self._mean)

    def state(self) -> tuple[int, float, float, float]:
        """(count, log_max, mean, m2): all there is to save."""
        return self._count, self._log_max, self._mean, self._m2

    @classmethod
    def from_state(cls, state: tuple[int, float, float, float]) -> LogMeanExp:
        """An accumulator that continues from ``state()``."""
        new = cls()
        new._count, new._log_max, new._mean, new._m2 = (
            int(state[0]),
            float(state[1]),
            float(state[2]),
            float(state[3]),
        )
        return new
