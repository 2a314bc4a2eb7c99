"""Streamed tokens of a continuation: those of its text, whatever bursts the server works in."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.sample import Continuation
from gptjax.sample.engine import Event, Token
from gptjax.serve.worker import _Sample
from gptjax.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
TEXT = "x é สย aย🙂"


def streamed(text: str, stop: str, bursts: list[int]) -> tuple[str, list[str]]:
    """The text and the tokens that come out of a sample that draws `text`."""
    sampler = SimpleNamespace(
        tokenizer=BYTES,
        stop_ids=(BYTES.eos_id,),
        piece=BYTES.piece,
        continuation=lambda request: Continuation(BYTES, request.prompt, (stop,) if stop else ()),
    )
    request = SimpleNamespace(
        prompt=[BYTES.eos_id],
        stop_ids=(BYTES.eos_id,),
        settings=SimpleNamespace(logprobs=1),
        cancel=lambda sample: None,
    )
    sample = _Sample(None, request, 0, sampler)
    tokens = [Token(i, -1.0) for i in BYTES.encode(text)]
    out, pieces = "", []
    while tokens:
        size = bursts.pop() if bursts else len(tokens)
        part, tokens = tokens[:size], tokens[size:]
        chunk = sample.take(Event(request, 0, part, None if tokens else "length"))
        out += chunk.text
        pieces += [one.token for one in chunk.tokens]
        if chunk.finish:
            break
    return out, pieces


@pytest.mark.parametrize("stop", ["", "é", "ย", "aย", "🙂", "ส", "absent"])
@settings(max_examples=60, deadline=None)
@given(bursts=st.lists(st.integers(1, 4), max_size=30))
def test_tokens_are_those_of_the_text_in_every_burst(stop, bursts) -> None:
    text, tokens = streamed(TEXT, stop, bursts)
    assert text == (TEXT.partition(stop)[0] if stop else TEXT)
    # A byte that is part of a character has the vocabulary's entry as its text.
    assert len(tokens) == len(text.encode())
    assert (text, tokens) == streamed(TEXT, stop, [])
