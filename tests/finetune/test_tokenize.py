"""Labelled examples as arrays of tokens."""

import numpy as np
import pytest

from gptjax.errors import DataError
from gptjax.finetune import tokenize
from gptjax.finetune.examples import Example, Examples
from gptjax.finetune.tokenize import SpecialTokens
from gptjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
START, DELIMITER, EXTRACT = SpecialTokens.of(TOKENIZER)
FILL = TOKENIZER.eos_id


def rows(*all: Example, length: int = 12, labels=("x", "y")) -> tokenize.TokenizedExamples:
    given = Examples("file.jsonl", "", all)
    texts = tokenize.encode(given, TOKENIZER)
    return tokenize.to_arrays(given, texts, SpecialTokens.of(TOKENIZER), length, labels, FILL)


def test_special_token_ids_follow_the_tokenizers_vocabulary() -> None:
    assert (START, DELIMITER, EXTRACT) == (258, 259, 260)


def test_special_tokens_surround_one_and_two_texts() -> None:
    got = rows(Example((("ab",),), "y", 1), Example((("ab", "c"),), "x", 2), length=8)
    assert got.tokens_ECT[:, 0].tolist() == [
        [START, 97, 98, EXTRACT, *[FILL] * 4],
        [START, 97, 98, DELIMITER, 99, EXTRACT, FILL, FILL],
    ]
    assert got.lengths_EC.tolist() == [[4], [6]]
    assert got.labels_E.tolist() == [1, 0]
    assert got.cut == 0


def test_fewer_choices_are_padded_with_length_zero() -> None:
    two, three = ((("a", c) for c in cs) for cs in ("bc", "bcd"))
    got = rows(Example(tuple(two), 1, 1), Example(tuple(three), 2, 2), labels=())
    assert got.lengths_EC.tolist() == [[5, 5, 0], [5, 5, 5]]
    assert got.labels_E.tolist() == [1, 2]
    assert (got.tokens_ECT[0, 2] == FILL).all()


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ((9,), 4, [4]),
        ((3, 3), 6, [3, 3]),
        ((9, 2), 6, [4, 2]),
        ((2, 9), 6, [2, 4]),
        ((9, 9), 7, [3, 4]),
    ],
)
def test_longer_text_is_truncated_first(lengths, room, kept) -> None:
    parts = [list(range(n)) for n in lengths]
    got = tokenize.truncate(parts, room, last_whole=False)
    assert list(map(len, got)) == kept
    assert all(part == list(range(len(part))) for part in got)


def test_truncated_example_is_counted_once_and_keeps_its_extract_token() -> None:
    got = rows(Example((("a" * 20, "b" * 20),), "x", 1), Example((("a",),), "x", 2))
    assert got.cut == 1
    assert got.lengths_EC[0] == [12]
    assert got.tokens_ECT[0, 0, -1] == EXTRACT


def test_choice_is_never_truncated_and_too_long_is_an_error() -> None:
    got = rows(Example((("a" * 20, "bcd"), ("a", "b")), 0, 1), labels=())
    assert got.tokens_ECT[0, 0].tolist() == [START, *[97] * 6, DELIMITER, 98, 99, 100, EXTRACT]
    with pytest.raises(DataError, match=r"file.jsonl:7: choice 1 has 9 tokens"):
        rows(Example((("a", "b"), ("a", "b" * 9)), 0, 7), labels=())


def test_longest_counts_special_tokens() -> None:
    given = Examples("", "", (Example((("abc",),), "x", 1), Example((("a", "bc"),), "x", 2)))
    assert tokenize.longest(tokenize.encode(given, TOKENIZER)) == 6


def test_take_selects_examples_by_number() -> None:
    got = rows(*(Example((("a" * n,),), "x", n) for n in (1, 2, 3)))
    assert got.take(np.array([2, 0]))["lengths_BC"].tolist() == [[5], [3]]
