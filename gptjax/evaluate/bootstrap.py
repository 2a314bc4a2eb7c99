"""Bootstrap confidence intervals of statistics over examples, by the percentile method.

Efron (1979): examples are resampled with replacement, as many as there are, and the statistic is
computed on each resample. The interval covers the choice of examples and no other randomness.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
"""The confidence level."""


@dataclass(frozen=True)
class Statistic:
    """A ratio of sums over examples: transform(sum(numerators) / sum(denominators)).

    `numerators` and `denominators` are arrays over examples (or documents, or batches). `transform`
    is monotonic, so it can be applied after resampling.
    """

    name: str
    numerators: np.ndarray
    denominators: np.ndarray
    transform: Callable[[float], float] = float

    @classmethod
    def mean(
        cls,
        name: str,
        values: Sequence[float] | np.ndarray,
        transform: Callable[[float], float] = float,
    ) -> Self:
        """The mean over examples."""
        return cls(name, np.asarray(values, np.float64), np.ones(len(values)), transform)

    @property
    def value(self) -> float:
        """The statistic over all examples."""
        return self.transform(float(self.numerators.sum() / self.denominators.sum()))

    def confidence_interval(
        self, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
    ) -> tuple[float, float] | None:
        """The interval that holds the middle `level` of the resampled values; `seed` determines it.

        None for a single example, which says nothing about the variation between examples.
        """
        n = len(self.numerators)
        if n < 2:
            return None
        rng = np.random.default_rng(seed)
        ratios = np.empty(resamples)
        for i in range(resamples):
            drawn = rng.integers(n, size=n)
            ratios[i] = self.numerators[drawn].sum() / self.denominators[drawn].sum()
        tail = (1 - level) / 2
        low, high = sorted(self.transform(float(q)) for q in np.quantile(ratios, [tail, 1 - tail]))
        return low, high
