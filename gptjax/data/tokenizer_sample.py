"""The text that a tokenizer is trained on: an even sample of all training documents."""

import heapq
from collections.abc import Iterator

from gptjax import tokenizer as tokenizers
from gptjax.data.files import Document

SLICE = tokenizers.SLICE
_ONE = 1 << 64
_GOLDEN = 11400714819323198485  # the golden ratio's fractional part, times _ONE


def sample(documents: Iterator[Document], size: int) -> Iterator[str]:
    """Slices of the documents, at most `size` bytes of them, in the order of reading.

    They are spread evenly over all of the text, however its files are packed: slice n is taken
    where the fractional part of n times the golden ratio is low enough, and parts of that sequence
    of any length fill the unit interval evenly. All documents are read, once.
    """
    kept: list[tuple[int, int, str, int]] = []  # a heap, the highest part first
    taken, limit, number = 0, -_ONE, 0
    for document in documents:
        for start in range(0, len(document.text), SLICE):
            rank = -(number * _GOLDEN % _ONE)
            number += 1
            if rank <= limit:
                continue
            text = document.text[start : start + SLICE]
            size_bytes = len(text.encode("utf-8", "replace"))
            heapq.heappush(kept, (rank, number, text, size_bytes))
            taken += size_bytes
            while taken > size and len(kept) > 1:
                limit, _, _, dropped = heapq.heappop(kept)
                taken -= dropped
    yield from (text for _, _, text, _ in sorted(kept, key=lambda one: one[1]))
