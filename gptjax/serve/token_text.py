"""The text of single tokens in a response: what each adds to the continuation in its place."""

from collections.abc import Sequence
from typing import NamedTuple

from gptjax.sample import Continuation, Sampler, Token
from gptjax.sample.detokenizer import context

_INCOMPLETE = "\ufffd"


class TokenText(NamedTuple):
    """A token of a continuation: its text, the characters `start` to `end` of the continuation that
    it adds, its log-probability, and those of the likeliest tokens in its place by their texts.

    A token that adds no text by itself, such as EOS or part of a character, has the vocabulary's
    entry as its text.
    """

    token: str
    start: int
    end: int
    logprob: float
    top: dict[str, float]


class TokenTextStream:
    """The texts of the tokens of one continuation, token by token."""

    def __init__(self, sampler: Sampler, prompt: Sequence[int]) -> None:
        self._sampler = sampler
        tokenizer = sampler.tokenizer
        self._before = list(prompt)
        self._text = None if tokenizer is None else Continuation(tokenizer, prompt, ())

    def add(self, token: Token) -> TokenText:
        """The text of the next token, which must have a log-probability."""
        start = end = 0
        own = self._text_of(token.id)
        top: dict[str, float] = {}
        for i, logprob in token.top:
            top.setdefault(self._text_of(i), logprob)  # of two with the same text, the likelier
        if self._text is not None:
            start = len(self._text.text)
            self._text.add([] if token.id in self._sampler.stop_ids else [token.id])
            end = len(self._text.text)
        self._before.append(token.id)
        assert token.logprob is not None
        return TokenText(own, start, end, token.logprob, top)

    def _text_of(self, token: int) -> str:
        tokenizer = self._sampler.tokenizer
        if tokenizer is None or token in self._sampler.stop_ids:
            return self._sampler.piece(token)
        before = context(tokenizer, self._before)
        known = tokenizer.decode(before)
        whole = tokenizer.decode([*before, token])
        text = whole[len(known) :] if whole.startswith(known) else ""
        return self._sampler.piece(token) if not text or _INCOMPLETE in text else text
