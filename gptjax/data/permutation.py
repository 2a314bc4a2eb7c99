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


def _keys(seed: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """Keys of the rounds for each seed and epoch, uint64 [R, G]."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key_G = _mix(_mix((seed + np.uint64(1)) * step) ^ (epoch + np.uint64(1)))
        return _mix(key_G + np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * step)


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `index` (int64, any shape) under the permutation of 0..size-1 keyed by seed, epoch.

    A Feistel network over pairs (left, right) below ceil(sqrt(size)), adding modulo that number
    (Black & Rogaway 2002); the few images outside 0..size-1 are permuted again until inside.
    """
    sizes, seeds, epochs = (np.array([value], np.uint64) for value in (size, seed, epoch))
    return permute_groups(index, None, sizes, seeds, epochs)


def permute_groups(
    index: np.ndarray,
    groups: np.ndarray | None,
    sizes_G: np.ndarray,
    seeds_G: np.ndarray,
    epochs_G: np.ndarray,
) -> np.ndarray:
    """As `permute`, each index by the size, seed and epoch (uint64) of its group.

    `groups` are int64, shaped as the index; None: there is one group.
    """
    sides_G = np.array([math.isqrt(size - 1) + 1 for size in sizes_G.tolist()], np.uint64)
    keys_RG = _keys(seeds_G, epochs_G)
    image, outside = index.astype(np.uint64), np.ones(index.shape, bool)
    of = lambda values_G: values_G[0] if groups is None else values_G[groups[outside]]
    with np.errstate(over="ignore"):
        while outside.any():
            side = of(sides_G)
            left, right = np.divmod(image[outside], side)
            for key_G in keys_RG:
                left, right = right, (left + _mix(right ^ of(key_G)) % side) % side
            image[outside] = left * side + right
            outside = image >= (sizes_G[0] if groups is None else sizes_G[groups])
    return image.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The order of `windows` training windows in batches of `batch` sequences, by `seed`."""

    windows: int
    batch: int
    seed: int

    def ids(self, step: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Window ids of the given rows (default: all) of a step's batch, int64 [B]."""
        rows = np.arange(self.batch) if rows is None else rows
        epochs, places = np.divmod(step * self.batch + rows, self.windows)
        ids = np.empty_like(rows)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = permute(places[here], self.windows, self.seed, epoch)
        return ids

    def epoch(self, step: int) -> float:
        """Epochs completed when a step begins, as a fraction."""
        return step * self.batch / self.windows
