"""Incremental detokenization: only final text is returned, and nothing of a stop text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.sample import Continuation
from gptjax.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def collect(text, stop, cut):
    """The texts returned when the bytes of `text` are added `cut` at a time."""
    ids = BYTES.encode(text)
    out = Continuation(BYTES, [256], stop)
    chunks = []
    for i in range(0, len(ids), cut):
        chunks.append(out.add(ids[i : i + cut], last=i + cut >= len(ids)))
    assert "".join(chunks) == out.text
    return out, chunks


@given(st.text(max_size=12), st.integers(1, 4))
def test_chunks_join_to_the_text_for_any_chunk_size(text, cut):
    out, chunks = collect(text, (), cut)
    assert out.text == text.encode("utf-8", "replace").decode()
    assert not any("\ufffd" in chunk for chunk in chunks) or "\ufffd" in text


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=2))
def test_text_ends_before_the_first_stop_text_whole_or_byte_by_byte(text, stop):
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    byte_by_byte, _ = collect(text, stop, 1)
    assert byte_by_byte.stopped == bool(ends)
    # Byte by byte the stop text that is complete first wins, which may begin later.
    complete = [text.find(one) + len(one) for one in stop if one in text]
    if ends:
        first = min(complete)
        starts = [text.find(one) for one in stop if text[:first].endswith(one)]
        assert byte_by_byte.text == text[: min(starts)]
    else:
        assert byte_by_byte.text == text
    whole, _ = collect(text, stop, 100)
    assert whole.text == (text[: min(ends)] if ends else text)


def test_possible_beginnings_of_a_stop_text_are_held_back():
    out = Continuation(BYTES, [256], ("END",))
    assert out.add(BYTES.encode("xE")) == "x"
    assert out.add(BYTES.encode("N")) == ""
    assert out.add(BYTES.encode("Ey")) == "ENEy"
    assert out.add(BYTES.encode("EN"), last=True) == "EN"
    assert not out.stopped


def test_nothing_is_added_after_a_stop_text():
    out = Continuation(BYTES, [256], ("b",))
    assert out.add(BYTES.encode("abc")) == "a"
    assert out.stopped
    assert out.add(BYTES.encode("d"), last=True) == ""
    assert out.text == "a"


class Words:
    """A tokenizer that marks word beginnings, and drops the mark of a text's first word."""

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize("prompt", [[1], [1, 2, 3]])
def test_space_before_the_first_word_is_kept(prompt):
    out = Continuation(Words(), prompt, ())
    assert out.add([7]) == " w7"
    assert out.add([8, 9]) == " w8 w9"


def test_character_split_between_prompt_and_continuation_is_completed():
    first, rest = "é".encode()
    out = Continuation(BYTES, [97, first], ())
    assert out.add([rest, 66]) == "éB"
