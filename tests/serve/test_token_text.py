"""The texts of single tokens in a response."""

import pytest

from gptjax.sample import Token
from gptjax.serve.protocol import logprobs_of
from gptjax.serve.token_text import TokenText, TokenTextStream


@pytest.fixture
def texts(make_sampler, on_mesh) -> TokenTextStream:
    with on_mesh():
        return TokenTextStream(make_sampler(), [256, *b"caf"])


def test_token_text_is_the_text_that_it_adds(texts: TokenTextStream) -> None:
    one = texts.add(Token(ord("e"), -0.5, ((ord("e"), -0.5), (ord(" "), -1.5))))
    assert one == TokenText("e", 0, 1, -0.5, {"e": -0.5, " ": -1.5})
    assert texts.add(Token(ord("s"), -0.1)) == TokenText("s", 1, 2, -0.1, {})


def test_parts_of_a_character_and_eos_have_their_vocabulary_entries(texts) -> None:
    first, second = "é".encode()
    assert texts.add(Token(first, -1.0))[:3] == ("<0xC3>", 0, 0)
    assert texts.add(Token(second, -1.0, ((second, -1.0), (256, -2.0)))) == TokenText(
        "<0xA9>", 0, 1, -1.0, {"<0xA9>": -1.0, "<eos>": -2.0}
    )
    assert texts.add(Token(256, -3.0))[:3] == ("<eos>", 1, 1)


def test_token_that_completes_a_character_and_continues_is_not_cut(texts, monkeypatch) -> None:
    first, second = "é".encode()
    pieces = {1: bytes([first]), 2: bytes([second]) + b" so"}
    decode = lambda ids: b"".join(pieces.get(i, b"a") for i in ids).decode("utf-8", "replace")
    monkeypatch.setattr(texts._sampler.tokenizer, "decode", decode)
    assert texts.add(Token(1, -1.0))[:3] == ("<0x01>", 0, 0)
    assert texts.add(Token(2, -1.0))[:3] == ("<0x02>", 0, 4)


def test_likelier_of_two_alternatives_with_the_same_text_is_kept(texts, monkeypatch) -> None:
    monkeypatch.setattr(texts._sampler.tokenizer, "decode", lambda ids: "x" * len(ids))
    assert texts.add(Token(7, -1.0, ((7, -1.0), (8, -2.0)))).top == {"x": -1.0}


def test_logprobs_are_valid_json() -> None:
    minus = float("-inf")
    told = logprobs_of(
        [TokenText("a", 0, 1, float("nan"), {"b": minus}), TokenText("c", 1, 2, 0, {})]
    )
    assert told["token_logprobs"] == [None, 0]
    assert told["top_logprobs"] == [{"b": -9999.0}, None]
    assert told["text_offset"] == [0, 1]
