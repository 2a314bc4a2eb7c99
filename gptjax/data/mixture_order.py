"""The order of a mixture: a pure function from (seed, step) to the part and the window of each row.

In every batch each part has its share of the rows, rounded down or up, and the roundings of
successive batches balance, so that its share of any stretch of steps is within one row a batch of
its weight. Within a part the windows come in the order of `permutation.Order`: each once before
any comes again. A part with a limit leaves the mixture before the first batch in which it would
exceed it; from there the weights of the others are scaled up, or the order ends.

A run may have stretches of steps with different batches, weights and lengths of windows. Windows of
one length go on where an earlier stretch of that length ended.

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
class Stretch:
    """The steps from `first` on, to the next stretch, in which nothing but a limit changes.

    batch: rows. windows, weights: of each part. seq_len tells windows of one length from others.
    """

    batch: int
    windows: tuple[int, ...]
    weights: tuple[float, ...]
    first: int = 0
    seq_len: int = 1


@dataclass(frozen=True)
class _Segment:
    """The steps from `first` on, in which the same parts are in the mixture.

    used_K: rows of this length that each part had before. others_K: its epochs in other lengths.
    totals_PK: [P + 1, K], rows of each part in the first 0, 1, ... P batches of a period, or of the
    stretch where that is shorter.
    """

    stretch: Stretch
    first: int
    used_K: np.ndarray
    others_K: np.ndarray
    totals_PK: np.ndarray

    def used(self, steps_N: np.ndarray) -> np.ndarray:
        """Rows of each part in all batches before each of the steps, int64 [N, K]."""
        periods_N, rest_N = np.divmod(steps_N - self.first, PERIOD)
        return self.used_K + periods_N[:, None] * self.totals_PK[-1] + self.totals_PK[rest_N]

    def steps_until(self, part: int, rows: int) -> float:
        """The number of its batches in which a part has at most so many rows."""
        totals_P = self.totals_PK[:, part]
        if len(totals_P) <= PERIOD or not totals_P[-1]:
            return math.inf if totals_P[-1] <= rows else int((totals_P <= rows).sum()) - 1
        periods, rest = divmod(rows, int(totals_P[-1]))
        return periods * PERIOD + int((totals_P[:-1] <= rest).sum()) - 1


def batch_counts(weights_K: np.ndarray, batch: int, steps: int = PERIOD) -> np.ndarray:
    """Rows of each part in the first batches of a period, int64 [steps, K]; each has `batch` rows.

    A part has its share of the batch rounded down, or one row more. Which parts have one more,
    those say that lag the most behind their weights.
    """
    shares_K = weights_K / weights_K.sum() * batch
    least_K = np.floor(shares_K + 1e-9).astype(np.int64)
    counts_PK = np.tile(least_K, (steps, 1))
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
    """The order of the windows of one part or several, by `seed`; its last stretch has no end.

    `epochs`: the limit of each part, 0 for none. `stops`: the order ends where a part with a limit
    leaves it; otherwise the others go on.
    """

    names: tuple[str, ...]
    stretches: tuple[Stretch, ...]
    seed: int
    epochs: tuple[float, ...]
    stops: bool = False

    @functools.cached_property
    def _plan(self) -> tuple[list[_Segment], int | None, dict[str, int]]:
        """The segments, the number of steps (None: endless), and the step at which parts leave."""
        parts = range(len(self.names))
        rows = {stretch.seq_len: np.zeros(len(parts), np.int64) for stretch in self.stretches}
        windows = {stretch.seq_len: np.array(stretch.windows) for stretch in self.stretches}
        segments: list[_Segment] = []
        leaves: dict[str, int] = {}
        for stretch, following in itertools.pairwise([*self.stretches, None]):
            assert stretch is not None
            first, stop = stretch.first, math.inf if following is None else following.first
            while first < stop:
                active = [name not in leaves for name in self.names]
                weights_K = np.array(stretch.weights) * active
                if not weights_K.any():
                    return segments, first, leaves
                used_K = rows[stretch.seq_len]
                others = [rows[n] / windows[n] for n in rows if n != stretch.seq_len]
                others_K = sum(others, np.zeros(len(parts)))
                segment = _segment(stretch, first, stop, weights_K, used_K, others_K)
                segments.append(segment)
                leaving = [first + self._lasting(segment, weights_K, part) for part in parts]
                if min(stop, *leaving) == math.inf:
                    return segments, None, leaves
                first = int(min(stop, *leaving))
                (rows[stretch.seq_len],) = segment.used(np.array([first]))
                gone = {self.names[k]: first for k in parts if leaving[k] == first < stop}
                leaves |= gone
                if gone and self.stops:
                    return segments, first, leaves
        raise AssertionError("the last stretch has no end")

    def _lasting(self, segment: _Segment, weights_K: np.ndarray, part: int) -> float:
        """The number of a segment's batches before a part exceeds its limit."""
        epochs, others = self.epochs[part], segment.others_K[part]
        if not weights_K[part] or not epochs:
            return math.inf
        windows = segment.stretch.windows[part]
        limit = math.floor((epochs - others) * windows) if others else rows_of(epochs, windows)
        return segment.steps_until(part, max(0, limit - int(segment.used_K[part])))

    @property
    def steps(self) -> int | None:
        """The number of steps that there are windows for; None: endless."""
        return self._plan[1]

    @property
    def leaves(self) -> dict[str, int]:
        """The number of steps after which each part leaves the mixture, of those that do."""
        return self._plan[2]

    def _segments(self, step: int) -> list[_Segment]:
        """The segments of the stretch of a step."""
        stretch = next(s for s in reversed(self._plan[0]) if s.first <= step).stretch
        return [segment for segment in self._plan[0] if segment.stretch is stretch]

    def used(self, step: int) -> np.ndarray:
        """Rows of its length that each part has had when a step begins, int64 [K]."""
        return self._used(np.array([step]))[0]

    def _used(self, steps_N: np.ndarray) -> np.ndarray:
        """As `used`, of ascending steps of one stretch or its end, int64 [N, K]."""
        found = []
        for segment, following in itertools.pairwise([*self._segments(int(steps_N[0])), None]):
            assert segment is not None
            here_N = steps_N >= segment.first
            if following is not None:
                here_N &= steps_N < following.first
            if here_N.any():
                found.append(segment.used(steps_N[here_N]))
        return np.concatenate(found)

    def epochs_at(self, step: int) -> dict[str, float]:
        """Epochs of each part completed when a step begins, as fractions, by name."""
        segment = self._segments(step)[0]
        epochs_K = self.used(step) / segment.stretch.windows + segment.others_K
        return dict(zip(self.names, epochs_K.tolist(), strict=True))

    def places(self, step: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Part and window of the given rows (default: all) of a step's batch, int64 [B] each."""
        parts_NB, windows_NB = self.places_of(range(step, step + 1), rows)
        return parts_NB[0], windows_NB[0]

    def places_of(
        self, steps: range, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Part and window of the rows of successive steps of one stretch, int64 [N, B] each.

        The rows of a batch go through the parts in their order.
        """
        stretch = self._segments(steps.start)[0].stretch
        rows = np.arange(stretch.batch) if rows is None else rows
        used_NK = self._used(np.arange(steps.start, steps.stop + 1))
        counts_NK = np.diff(used_NK, axis=0)
        ends_NK = np.cumsum(counts_NK, axis=1)
        parts_NB = (rows[:, None] >= ends_NK[:, None, :-1]).sum(2)
        shift_NK = used_NK[:-1] - (ends_NK - counts_NK)
        places_NB = rows + np.take_along_axis(shift_NK, parts_NB, axis=1)
        windows_K, seeds_K = np.array(stretch.windows, np.int64), self._seeds_K
        epochs_NB, within_NB = np.divmod(places_NB, windows_K[parts_NB])
        # Groups of one permutation each: a part in one of the epochs that these steps are in.
        first_K = used_NK[0] // windows_K
        later_NB = epochs_NB - first_K[parts_NB]
        count, parts = int(later_NB.max(initial=0)) + 1, len(self.names)
        epochs_G = (first_K + np.arange(count)[:, None]).ravel()
        sizes_G, seeds_G = (np.tile(values, count) for values in (windows_K, seeds_K))
        groups_NB = None if count == parts == 1 else parts_NB + parts * later_NB
        unsigned = (values.astype(np.uint64) for values in (sizes_G, seeds_G, epochs_G))
        return parts_NB, permute_groups(within_NB, groups_NB, *unsigned)

    @functools.cached_property
    def _seeds_K(self) -> np.ndarray:
        """The seed of each part, so that parts are shuffled apart."""
        seeds = [self.seed | zlib.crc32(name.encode()) << 32 for name in self.names]
        return np.array(seeds, np.uint64)


def _segment(
    stretch: Stretch,
    first: int,
    stop: float,
    weights_K: np.ndarray,
    used_K: np.ndarray,
    others_K: np.ndarray,
) -> _Segment:
    """The segment of a stretch from `first` on, in which the parts have these weights."""
    steps = int(min(PERIOD, stop - first))
    totals_PK = np.zeros((steps + 1, len(weights_K)), np.int64)
    np.cumsum(batch_counts(weights_K, stretch.batch, steps), axis=0, out=totals_PK[1:])
    return _Segment(stretch, first, used_K, others_K, totals_PK)


def rows_of(epochs: float, windows: int) -> int:
    """The rows that so many epochs of a part have, at least one; 0 epochs: no limit."""
    return max(1, math.floor(epochs * windows)) if epochs else 0
