"""Incremental detokenization, and stop texts."""

from collections.abc import Sequence

from gptjax.tokenizer import Tokenizer

_CONTEXT = 8  # last tokens of the prompt that are decoded too, so that a first word keeps its space
_INCOMPLETE = "\ufffd"  # in place of a character some of whose bytes are missing


class Continuation:
    """An incremental detokenizer: the text of a continuation, token by token.

    `text` holds only what can no longer change: neither part of a character's bytes nor a possible
    beginning of a stop text. `stopped` is true after a stop text; `text` ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(prompt[-_CONTEXT:])
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
            known = known.rstrip(_INCOMPLETE)
            self._pending += whole[len(known) :]
            self._start, self._read = self._read, len(self._ids)
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
