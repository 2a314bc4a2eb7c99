"""Incremental detokenization, and stop texts."""

from collections.abc import Sequence

from gptjax.tokenizer import Tokenizer

_CONTEXT = 8  # tokens before a text that are decoded too, at least, so that a word keeps its space
_INCOMPLETE = "\ufffd"  # in place of a character some of whose bytes are missing


def context(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The last tokens of a sequence, from where they can be decoded as within all of it.

    That is at the beginning of a character, and with a token that has text: a tokenizer may drop
    the space before the first one.
    """
    start = max(0, len(ids) - _CONTEXT)
    while start:
        text = tokenizer.decode(ids[start:])
        if text and not text.startswith(_INCOMPLETE):
            break
        start = max(0, start - _CONTEXT)
    return list(ids[start:])


def added_text(known: str, whole: str) -> str:
    """What `whole` has beyond `known`, whose last character may be completed in it."""
    same = 0
    while same < min(len(known), len(whole)) and known[same] == whole[same]:
        same += 1
    return whole[same:]


class Continuation:
    """An incremental detokenizer: the text of a continuation, token by token.

    `text` holds only what can no longer change: neither part of a character's bytes nor a possible
    beginning of a stop text. `stopped` is true after a stop text; `text` ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = context(tokenizer, prompt)
        self._start, self._read = 0, len(self._ids)
        self._pending = ""
        self.text = ""
        self.stopped = False

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """Adds tokens; returns the text that is now final: with `last`, all that remains."""
        if self.stopped:
            return ""
        self._ids += ids
        whole = self._tokenizer.decode(self._ids[self._start :])
        if last or not whole.endswith(_INCOMPLETE):
            known = self._tokenizer.decode(self._ids[self._start : self._read])
            self._pending += added_text(known, whole)
            if self._tokenizer.decode(self._ids[self._read :]):
                self._start = self._read
            self._read = len(self._ids)
        ends = [at for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            final = min(ends)
        else:
            final = len(self._pending) - (0 if last else self._possible_stop())
        new, self._pending = self._pending[:final], self._pending[final:]
        self.text += new
        return new

    def _possible_stop(self) -> int:
        """Length of the pending text's longest suffix that may begin a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-size:]) for stop in self._stop):
                return size
        return 0
