"""How far an average over examples can be trusted: percentile intervals of the bootstrap.

Efron (1979): examples are drawn with replacement, as many as there are, and what is measured is
measured again. It says how much the choice of examples matters, and nothing of other randomness.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Statistic:
    """What was measured: `show` of the sum of `parts` over the sum of `weights`, each an array over
    examples (or documents). `show` rises or falls throughout, so it may follow the resampling.
    """

    name: str
    parts: np.ndarray
    weights: np.ndarray
    show: Callable[[float], float] = float

    @classmethod
    def mean(
        cls, name: str, parts: np.ndarray, show: Callable[[float], float] = float
    ) -> "Statistic":
        """The mean over examples."""
        return cls(name, np.float64(parts), np.ones(len(parts)), show)

    @property
    def value(self) -> float:
        """Over all examples."""
        return self.show(float(self.parts.sum() / self.weights.sum()))

    def interval(
        self, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
    ) -> tuple[float, float] | None:
        """The middle `level` of the values of resamples, the same for the same seed; None of a
        single example, which says nothing of others.
        """
        n = len(self.parts)
        if n < 2:
            return None
        rng = np.random.default_rng(seed)
        ratios = np.empty(resamples)
        for i in range(resamples):
            drawn = rng.integers(n, size=n)
            ratios[i] = self.parts[drawn].sum() / self.weights[drawn].sum()
        tail = (1 - level) / 2
        low, high = sorted(self.show(float(q)) for q in np.quantile(ratios, [tail, 1 - tail]))
        return low, high
