"""Labelled examples as arrays of tokens, with start, delimiter and extract tokens around the texts
(Radford et al. 2018, section 3.3).

one text     start text extract
two texts    start text delimiter text extract

The ids of these special tokens follow the tokenizer's own. A model whose vocabulary ends there
grows by three, into the embedding table's padding or into new rows. The embeddings start at random,
and the auxiliary language-modelling loss predicts these tokens like others. The task head reads the
hidden state at the extract token: the last one, which other libraries read too.

Shapes: E examples, C sequences of each, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gptjax.errors import DataError
from gptjax.finetune.examples import Examples, raise_problems
from gptjax.tokenizer import Tokenizer

Ids = list[int]


class SpecialTokens(NamedTuple):
    """The ids of the special tokens."""

    start: int
    delimiter: int
    extract: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        """The three ids after the tokenizer's vocabulary."""
        return cls(*range(tokenizer.vocab_size, tokenizer.vocab_size + 3))


@dataclass(frozen=True)
class TokenizedExamples:
    """Examples as int32 arrays: tokens_ECT; lengths_EC in tokens, 0 for a padded choice; labels_E,
    -1 for an unlabelled example. `cut` counts the examples whose texts were truncated.
    """

    tokens_ECT: np.ndarray
    lengths_EC: np.ndarray
    labels_E: np.ndarray
    cut: int

    def __len__(self) -> int:
        return len(self.labels_E)

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of these numbers as a batch, by the names that the objective expects."""
        return {
            "tokens_BCT": self.tokens_ECT[ids],
            "lengths_BC": self.lengths_EC[ids],
            "labels_B": self.labels_E[ids],
        }


def encode(examples: Examples, tokenizer: Tokenizer) -> list[list[list[Ids]]]:
    """Token ids of each text of each sequence of each example."""
    cache: dict[str, Ids] = {}  # a text repeats for each of its choices

    def ids(text: str) -> Ids:
        if text not in cache:
            cache[text] = tokenizer.encode(text)
        return cache[text]

    return [[[*map(ids, texts)] for texts in one.sequences] for one in examples.all]


def longest(texts: Sequence[Sequence[Sequence[Ids]]]) -> int:
    """Tokens of the longest sequence, special tokens included."""
    return max(1 + sum(len(ids) + 1 for ids in one) for example in texts for one in example)


def to_arrays(
    examples: Examples,
    texts: Sequence[Sequence[Sequence[Ids]]],
    special: SpecialTokens,
    length: int,
    labels: Sequence[str],
    fill: int,
) -> TokenizedExamples:
    """Pads the sequences to `length` tokens with the token `fill`; truncates as `truncate` does.

    Raises DataError for a choice that leaves no room for its text.
    """
    choices = max(map(len, texts))
    tokens_ECT = np.full((len(texts), choices, length), fill, np.int32)
    lengths_EC = np.zeros((len(texts), choices), np.int32)
    index = {label: i for i, label in enumerate(labels)}
    labels_E = np.array(
        [-1 if one.label is None else index.get(str(one.label), one.label) for one in examples.all],
        np.int32,
    )
    cut, problems = 0, []
    for e, (one, sequences) in enumerate(zip(examples.all, texts, strict=True)):
        was_cut = False
        for c, parts in enumerate(sequences):
            room = length - len(parts) - 1
            if not labels and len(parts[-1]) >= room:
                problems.append(
                    f"{examples.path}:{one.line}: choice {c} has {len(parts[-1])} tokens, which "
                    f"leaves no room for the text in train.seq_len={length}"
                )
                continue
            kept = truncate(parts, room, last_whole=not labels)
            was_cut |= kept != list(parts)
            ids = [special.start]
            for part in kept:
                ids += [*part, special.delimiter]
            ids[-1] = special.extract
            tokens_ECT[e, c, : len(ids)], lengths_EC[e, c] = ids, len(ids)
        cut += was_cut
    raise_problems(problems)
    return TokenizedExamples(tokens_ECT, lengths_EC, labels_E, cut)


def truncate(parts: Sequence[Ids], room: int, *, last_whole: bool) -> list[Ids]:
    """The texts truncated at their ends to `room` tokens together, the longer one first.

    With `last_whole`, as for a choice, only the text before it is truncated.
    """
    if len(parts) == 1:
        return [parts[0][:room]]
    first, second = parts
    over = len(first) + len(second) - room
    if over <= 0:
        return [first, second]
    if last_whole:
        return [first[: len(first) - over], second]
    half = room // 2
    if len(first) <= half:
        return [first, second[: room - len(first)]]
    if len(second) <= room - half:
        return [first[: room - len(second)], second]
    return [first[:half], second[: room - half]]


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises DataError for a tokenizer with more tokens than the model's vocabulary."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and model.vocab_size={vocab_size}"
        )
