"""Packing: several conversations in one row, where none attends to another.

By best fit, as data/packing.py packs documents: the rows depend on nothing but the examples and the
length.

Shapes: R rows, T tokens.
"""

from dataclasses import dataclass

import numpy as np

from gptjax.data.packing import best_fit
from gptjax.finetune.conversations import Conversations
from gptjax.finetune.examples import raise_problems


@dataclass(frozen=True)
class PackedRows:
    """Packed conversations, int32 [R, T] each: tokens, next tokens as targets, segments (the number
    of the conversation within its row, 0 for padding), positions within the conversation, and
    whether a target counts in the loss. `cut` counts the conversations that were too long, whose
    prompt was truncated at its beginning.
    """

    tokens_RT: np.ndarray
    targets_RT: np.ndarray
    segments_RT: np.ndarray
    positions_RT: np.ndarray
    counts_RT: np.ndarray
    cut: int

    def __len__(self) -> int:
        return len(self.tokens_RT)

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of these numbers as a batch, by the names that the objective expects."""
        return {
            "tokens_BT": self.tokens_RT[ids],
            "targets_BT": self.targets_RT[ids],
            "segments_BT": self.segments_RT[ids],
            "positions_BT": self.positions_RT[ids],
            "counts_BT": self.counts_RT[ids],
        }


def pack(given: Conversations, length: int, fill: int) -> PackedRows:
    """Rows of `length` tokens, padded with the token `fill`.

    Raises DataError for an answer that is longer than a row.
    """
    ids, loss_masks, cut, problems = [], [], 0, []
    for one in given.all:
        answer = len(one.ids) - len(one.prompt)
        if answer > length:
            problems.append(
                f"{one.location}: the answer has {answer} tokens, more than train.seq_len={length}"
            )
        over = max(0, len(one.ids) - 1 - length)
        cut += over > 0
        ids.append(one.ids[over:])
        loss_masks.append(one.loss_mask[over:])
    raise_problems(problems)
    costs_D = np.array([len(one) - 1 for one in ids])
    row_D = best_fit(costs_D, length)
    by_row = np.lexsort((-costs_D, row_D))  # and the longest first
    rows = np.split(by_row, np.cumsum(np.bincount(row_D))[:-1])
    shape = len(rows), length
    tokens, targets = np.full(shape, fill, np.int32), np.full(shape, fill, np.int32)
    segments, positions, counts = (np.zeros(shape, np.int32) for _ in range(3))
    for row, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members, 1):
            n = len(ids[i]) - 1
            span = slice(start, start + n)
            tokens[row, span], targets[row, span] = ids[i][:-1], ids[i][1:]
            segments[row, span], positions[row, span] = segment, np.arange(n)
            counts[row, span] = loss_masks[i][1:]
            start += n
    return PackedRows(tokens, targets, segments, positions, counts, cut)
