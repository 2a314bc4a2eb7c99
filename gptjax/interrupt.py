"""Being told to stop: SIGTERM from a scheduler, Ctrl-C from a person.

The first signal asks the loop to save and end; a second one ends the process at once.
"""

import os
import signal
from types import FrameType


class Interrupt:
    """While it is entered, notes SIGTERM and SIGINT instead of dying of them."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Interrupt":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
