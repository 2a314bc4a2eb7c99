"""The order of a mixture: a pure function from (seed, step) to the part and the window of each row.

In every batch each part has its share of the rows, rounded down or up, and the roundings of
successive batches balance, so that its share of any stretch of steps is within one row a batch of
its weight. Within a part the windows come in the order of `permutation.Order`: each once before
any comes again. A part with a limit leaves the mixture before the first batch in which it would
exceed it; from there the weights of the others are scaled up, or the order ends.

Shapes: N steps, B rows, K parts, P period of the roundings.
"""

import functools
import itertools
import math
import zlib
from dataclasses import dataclass

import numpy as np

from gptjax.data.permutation import permute_groups

PERIOD = 4096  # batches, after which the roundings repeat


@dataclass(frozen=True)
class PartWindows:
    """A part as the order sees it: its training windows, its weight, how many rows it may fill.

    `limit` is a number of rows; 0: no limit.
    """

    name: str
    windows: int
    weight: float = 1.0
    limit: int = 0


@dataclass(frozen=True)
class _Segment:
    """The steps from `first` on, in which the same parts are in the mixture.

    used_K: rows that each part had before. totals_PK: [P + 1, K], rows of each part in the first
    0, 1, ... P batches of a period.
    """

    first: int
    used_K: np.ndarray
    totals_PK: np.ndarray

    def used(self, steps_N: np.ndarray) -> np.ndarray:
        """Rows of each part in all batches before each of the steps, int64 [N, K]."""
        periods_N, rest_N = np.divmod(steps_N - self.first, PERIOD)
        return self.used_K + periods_N[:, None] * self.totals_PK[-1] + self.totals_PK[rest_N]

    def steps_until(self, part: int, rows: int) -> float:
        """The number of its batches in which a part has at most so many rows."""
        a_period = int(self.totals_PK[-1, part])
        if not a_period:
            return math.inf
        periods, rest = divmod(rows, a_period)
        within = int(np.searchsorted(self.totals_PK[:-1, part], rest, side="right")) - 1
        return periods * PERIOD + within


def batch_counts(weights_K: np.ndarray, batch: int) -> np.ndarray:
    """Rows of each part in the batches of a period, int64 [P, K]; each batch has `batch` rows.

    A part has its share of the batch rounded down, or one row more. Which parts have one more,
    those say that lag the most behind their weights.
    """
    shares_K = weights_K / weights_K.sum() * batch
    least_K = np.floor(shares_K + 1e-9).astype(np.int64)
    counts_PK = np.tile(least_K, (PERIOD, 1))
    more = batch - int(least_K.sum())
    if not more:
        return counts_PK
    # In whole units of 1 / PERIOD of a row, so that every machine rounds alike.
    gain_K = np.floor((shares_K - least_K) * PERIOD).clip(0).astype(np.int64)
    missing = more * PERIOD - int(gain_K.sum())
    gain_K[np.argsort(-shares_K, kind="stable")[:missing]] += 1
    lag_K = np.where(gain_K > 0, 0, -((batch * PERIOD) ** 2))  # without a fraction, never one more
    for counts_K in counts_PK:
        lag_K += gain_K
        behind = np.argsort(-lag_K, kind="stable")[:more]
        lag_K[behind] -= PERIOD
        counts_K[behind] += 1
    return counts_PK


@dataclass(frozen=True)
class MixtureOrder:
    """The order of the windows of one part or several in batches of `batch` rows, by `seed`.

    `stops`: the order ends where a part with a limit leaves it; otherwise the others go on.
    """

    parts: tuple[PartWindows, ...]
    batch: int
    seed: int
    stops: bool = False

    @functools.cached_property
    def _plan(self) -> tuple[list[_Segment], int | None, dict[str, int]]:
        """The segments, the number of steps (None: endless), and the step at which parts leave."""
        used_K = np.zeros(len(self.parts), np.int64)
        active = np.ones(len(self.parts), bool)
        first, segments = 0, []
        leaves: dict[str, int] = {}
        while active.any():
            weights_K = np.array([part.weight for part in self.parts]) * active
            totals_PK = np.zeros((PERIOD + 1, len(self.parts)), np.int64)
            np.cumsum(batch_counts(weights_K, self.batch), axis=0, out=totals_PK[1:])
            segment = _Segment(first, used_K, totals_PK)
            lasts = [
                segment.steps_until(k, part.limit - int(used_K[k]))
                if active[k] and part.limit
                else math.inf
                for k, part in enumerate(self.parts)
            ]
            segments.append(segment)
            steps = min(lasts)
            if steps == math.inf:
                return segments, None, leaves
            first += int(steps)
            (used_K,) = segment.used(np.array([first]))
            for k, last in enumerate(lasts):
                if last == steps:
                    active[k] = False
                    leaves[self.parts[k].name] = first
            if self.stops:
                break
        return segments, first, leaves

    @property
    def steps(self) -> int | None:
        """The number of steps that there are windows for; None: endless."""
        return self._plan[1]

    @property
    def leaves(self) -> dict[str, int]:
        """The number of steps after which each part leaves the mixture, of those that do."""
        return self._plan[2]

    def used(self, step: int) -> np.ndarray:
        """Rows that each part has had when a step begins, int64 [K]."""
        return self._used(np.array([step]))[0]

    def _used(self, steps_N: np.ndarray) -> np.ndarray:
        """As `used`, of ascending steps, int64 [N, K]."""
        found = []
        for segment, following in itertools.pairwise([*self._plan[0], None]):
            assert segment is not None
            here_N = steps_N >= segment.first
            if following is not None:
                here_N &= steps_N < following.first
            if here_N.any():
                found.append(segment.used(steps_N[here_N]))
        return np.concatenate(found)

    def epochs(self, step: int) -> dict[str, float]:
        """Epochs of each part completed when a step begins, as fractions, by name."""
        used_K = self.used(step).tolist()
        return {part.name: n / part.windows for part, n in zip(self.parts, used_K, strict=True)}

    def places(self, step: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Part and window of the given rows (default: all) of a step's batch, int64 [B] each."""
        parts_NB, windows_NB = self.places_of(range(step, step + 1), rows)
        return parts_NB[0], windows_NB[0]

    def places_of(
        self, steps: range, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Part and window of the rows of several successive steps, int64 [N, B] each.

        The rows of a batch go through the parts in their order.
        """
        rows = np.arange(self.batch) if rows is None else rows
        used_NK = self._used(np.arange(steps.start, steps.stop + 1))
        counts_NK = np.diff(used_NK, axis=0)
        ends_NK = np.cumsum(counts_NK, axis=1)
        parts_NB = (rows[:, None] >= ends_NK[:, None, :-1]).sum(2)
        shift_NK = used_NK[:-1] - (ends_NK - counts_NK)
        places_NB = rows + np.take_along_axis(shift_NK, parts_NB, axis=1)
        windows_K, seeds_K = self._windows_and_seeds
        epochs_NB, within_NB = np.divmod(places_NB, windows_K[parts_NB])
        # Groups of one permutation each: a part in one of the epochs that these steps are in.
        first_K = used_NK[0] // windows_K
        later_NB = epochs_NB - first_K[parts_NB]
        count, parts = int(later_NB.max(initial=0)) + 1, len(self.parts)
        epochs_G = (first_K + np.arange(count)[:, None]).ravel()
        sizes_G, seeds_G = (np.tile(values, count) for values in (windows_K, seeds_K))
        groups_NB = None if count == parts == 1 else parts_NB + parts * later_NB
        unsigned = (values.astype(np.uint64) for values in (sizes_G, seeds_G, epochs_G))
        return parts_NB, permute_groups(within_NB, groups_NB, *unsigned)

    @functools.cached_property
    def _windows_and_seeds(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of windows and the seed of each part; so parts are shuffled apart."""
        seeds = [self.seed | zlib.crc32(part.name.encode()) << 32 for part in self.parts]
        windows = [part.windows for part in self.parts]
        return np.array(windows, np.int64), np.array(seeds, np.uint64)


def rows_of(epochs: float, windows: int) -> int:
    """The rows that so many epochs of a part have, at least one; 0 epochs: no limit."""
    return max(1, math.floor(epochs * windows)) if epochs else 0
