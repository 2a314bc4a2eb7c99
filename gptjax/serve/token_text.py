"""How single tokens are written in a response: each as the text that it adds where it stands."""

from collections.abc import Sequence
from typing import NamedTuple

from gptjax.sample import Continuation, Sampler, Token

_CONTEXT = 8  # tokens before one, so that a first word keeps its space
_UNFINISHED = "\ufffd"


class Spelled(NamedTuple):
    """A token of a continuation: what it adds to the text, from which character of it to which, its
    log-probability, and those of the likeliest tokens in its place, by what they would add.

    Tokens without text of their own, such as the end or part of a character, are written as the
    vocabulary writes them.
    """

    token: str
    start: int
    end: int
    logprob: float
    top: dict[str, float]


class Spelling:
    """Writes the tokens of one continuation as they come."""

    def __init__(self, sampler: Sampler, prompt: Sequence[int]) -> None:
        self._sampler = sampler
        self._before = list(prompt[-_CONTEXT:])
        tokenizer = sampler.tokenizer
        self._text = None if tokenizer is None else Continuation(tokenizer, prompt, ())

    def add(self, token: Token) -> Spelled:
        """The next token. It has a log-probability."""
        start = end = 0
        own = self._spell(token.id)
        top: dict[str, float] = {}
        for i, logprob in token.top:
            top.setdefault(self._spell(i), logprob)  # the likelier of two written alike
        if self._text is not None:
            start = len(self._text.text)
            self._text.add([] if token.id in self._sampler.stop_ids else [token.id])
            end = len(self._text.text)
        self._before = [*self._before, token.id][-_CONTEXT:]
        assert token.logprob is not None
        return Spelled(own, start, end, token.logprob, top)

    def _spell(self, token: int) -> str:
        tokenizer = self._sampler.tokenizer
        if tokenizer is None or token in self._sampler.stop_ids:
            return self._sampler.piece(token)
        known = tokenizer.decode(self._before)
        whole = tokenizer.decode([*self._before, token])
        text = whole[len(known) :] if whole.startswith(known) else ""
        return self._sampler.piece(token) if not text or _UNFINISHED in text else text
