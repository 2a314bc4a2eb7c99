"""Exchanges side by side in rows, each seeing itself alone.

Best-fit decreasing: the longest first, each into the row with the least room that holds it; of
equals the first. So rows are a function of the examples and of their length alone.

Shapes: R rows, T tokens.
"""

import bisect
from dataclasses import dataclass

import numpy as np

from gptjax.finetune.conversations import Conversations
from gptjax.finetune.examples import refuse


@dataclass(frozen=True)
class PackedRows:
    """int32 [R, T] each: tokens, the next tokens, segments (0: none), positions within them, and
    whether a target counts. `cut` exchanges were too long and lost the beginning of their prompt.
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
        """The rows of a batch, by the names that the objective knows."""
        return {
            "tokens_BT": self.tokens_RT[ids],
            "targets_BT": self.targets_RT[ids],
            "segments_BT": self.segments_RT[ids],
            "positions_BT": self.positions_RT[ids],
            "counts_BT": self.counts_RT[ids],
        }


def places(lengths: list[int], room: int) -> list[list[int]]:
    """For each row the numbers of what lies in it, none longer than `room`."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room left and row, ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(free, (lengths[i], -1))
        if at == len(free):
            left, row = room, len(rows)
            rows.append([])
        else:
            left, row = free.pop(at)
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


def pack(given: Conversations, length: int, fill: int) -> PackedRows:
    """Rows of `length` tokens. Raises DataError for an answer that is longer than that."""
    ids, learnt, cut, problems = [], [], 0, []
    for one in given.all:
        answer = len(one.ids) - len(one.prompt)
        if answer > length:
            problems.append(
                f"{one.place}: the answer has {answer} tokens, more than train.seq_len={length}"
            )
        over = max(0, len(one.ids) - 1 - length)
        cut += over > 0
        ids.append(one.ids[over:])
        learnt.append(one.learnt[over:])
    refuse(problems)
    rows = places([len(one) - 1 for one in ids], length)
    shape = len(rows), length
    tokens, targets = np.full(shape, fill, np.int32), np.full(shape, fill, np.int32)
    segments, positions, counts = (np.zeros(shape, np.int32) for _ in range(3))
    for row, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members, 1):
            n = len(ids[i]) - 1
            here = slice(start, start + n)
            tokens[row, here], targets[row, here] = ids[i][:-1], ids[i][1:]
            segments[row, here], positions[row, here] = segment, np.arange(n)
            counts[row, here] = learnt[i][1:]
            start += n
    return PackedRows(tokens, targets, segments, positions, counts, cut)
