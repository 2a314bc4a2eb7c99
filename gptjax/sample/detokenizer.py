"""Tokens to text as they come, and texts that end a continuation."""

from collections.abc import Sequence

from gptjax.tokenizer import Tokenizer

_CONTEXT = 8  # of a prompt's last tokens, so that a first word keeps its space
_UNFINISHED = "\ufffd"


class Continuation:
    """The text of a continuation, which grows by tokens.

    Text is given out only when it can no longer change: not the first bytes of a character, nor
    what may be the beginning of a stop text. `stopped` is true once one of those was met; the text
    ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(prompt[-_CONTEXT:])
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens make certain; with `last`, all that there is."""
        if self.stopped:
            return ""
        self._ids += ids
        whole = self._tokenizer.decode(self._ids[self._start :])
        if last or not whole.endswith(_UNFINISHED):
            known = self._tokenizer.decode(self._ids[self._start : self._read])
            known = known.rstrip(_UNFINISHED)
            self._held += whole[len(known) :]
            self._start, self._read = self._read, len(self._ids)
        ends = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            certain = min(ends)
        else:
            certain = len(self._held) - (0 if last else self._beginning())
        new, self._held = self._held[:certain], self._held[certain:]
        self.text += new
        return new

    def _beginning(self) -> int:
        """Characters at the end of the held text with which a stop text may begin."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
