"""How tokens are written in a response."""

import pytest

from gptjax.sample import Token
from gptjax.serve.protocol import logprobs_of
from gptjax.serve.token_text import Spelled, Spelling


@pytest.fixture
def spelling(make_sampler, on_mesh) -> Spelling:
    with on_mesh():
        return Spelling(make_sampler(), [256, *b"caf"])


def test_a_token_is_written_as_the_text_that_it_adds(spelling: Spelling) -> None:
    one = spelling.add(Token(ord("e"), -0.5, ((ord("e"), -0.5), (ord(" "), -1.5))))
    assert one == Spelled("e", 0, 1, -0.5, {"e": -0.5, " ": -1.5})
    assert spelling.add(Token(ord("s"), -0.1)) == Spelled("s", 1, 2, -0.1, {})


def test_parts_of_a_character_and_the_end_are_written_as_the_vocabulary_does(spelling) -> None:
    first, second = "é".encode()
    assert spelling.add(Token(first, -1.0))[:3] == ("<0xC3>", 0, 0)
    assert spelling.add(Token(second, -1.0, ((second, -1.0), (256, -2.0)))) == Spelled(
        "<0xA9>", 0, 1, -1.0, {"<0xA9>": -1.0, "<eos>": -2.0}
    )
    assert spelling.add(Token(256, -3.0))[:3] == ("<eos>", 1, 1)


def test_a_token_that_ends_a_character_and_goes_on_is_not_cut(spelling, monkeypatch) -> None:
    first, second = "é".encode()
    pieces = {1: bytes([first]), 2: bytes([second]) + b" so"}
    decode = lambda ids: b"".join(pieces.get(i, b"a") for i in ids).decode("utf-8", "replace")
    monkeypatch.setattr(spelling._sampler.tokenizer, "decode", decode)
    assert spelling.add(Token(1, -1.0))[:3] == ("<0x01>", 0, 0)
    assert spelling.add(Token(2, -1.0))[:3] == ("<0x02>", 0, 4)


def test_of_two_alternatives_written_alike_the_likelier_is_told(spelling, monkeypatch) -> None:
    monkeypatch.setattr(spelling._sampler.tokenizer, "decode", lambda ids: "x" * len(ids))
    assert spelling.add(Token(7, -1.0, ((7, -1.0), (8, -2.0)))).top == {"x": -1.0}


def test_a_logprob_is_always_json() -> None:
    minus = float("-inf")
    told = logprobs_of([Spelled("a", 0, 1, float("nan"), {"b": minus}), Spelled("c", 1, 2, 0, {})])
    assert told["token_logprobs"] == [None, 0]
    assert told["top_logprobs"] == [{"b": -9999.0}, None]
    assert told["text_offset"] == [0, 1]
