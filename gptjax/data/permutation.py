"""The data order: a pure function from (seed, step) to the windows of a batch, in numpy.

Training windows are numbered 0..n-1. Epoch e visits them in the order of a permutation keyed by
(seed, e), and the batch of step s is the slice [s*batch, (s+1)*batch) of the endless sequence of
epochs. So a batch depends on the seed, the step and the global batch size alone, and not on
processes, devices or restarts. A process computes only its own rows, at the same cost for any step.
"""

import math
from dataclasses import dataclass

import numpy as np

_ROUNDS = 8


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): each input bit reaches each output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `index` (int64, any shape) under the permutation of 0..size-1 keyed by seed, epoch.

    A Feistel network over pairs (left, right) below ceil(sqrt(size)), adding modulo that number
    (Black & Rogaway 2002); the few images outside 0..size-1 are permuted again until inside.
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    with np.errstate(over="ignore"):
        words = np.array([seed, epoch], np.uint64) + np.uint64(1)
        key = _mix(_mix(words[:1] * np.uint64(0x9E3779B97F4A7C15)) ^ words[1:])
        keys = _mix(
            key + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        )
        image = index.astype(np.uint64)
        outside = np.ones(image.shape, bool)
        while outside.any():
            left, right = np.divmod(image[outside], side)
            for key in keys:
                left, right = right, (left + _mix(right ^ key) % side) % side
            image[outside] = left * side + right
            outside = image >= np.uint64(size)
    return image.astype(np.int64)


def endless(places: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The windows at places of the endless sequence of epochs over 0..size-1, int64 like places."""
    epochs, within = np.divmod(places, size)
    if places.size and epochs.min() == epochs.max():
        return permute(within, size, seed, int(epochs.flat[0]))
    ids = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        ids[here] = permute(within[here], size, seed, epoch)
    return ids


@dataclass(frozen=True)
class Order:
    """The order of `windows` training windows in batches of `batch` sequences, by `seed`."""

    windows: int
    batch: int
    seed: int

    def ids(self, step: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Window ids of the given rows (default: all) of a step's batch, int64 [B]."""
        rows = np.arange(self.batch) if rows is None else rows
        return endless(step * self.batch + rows, self.windows, self.seed)

    def epoch(self, step: int) -> float:
        """Epochs completed when a step begins, as a fraction."""
        return step * self.batch / self.windows
