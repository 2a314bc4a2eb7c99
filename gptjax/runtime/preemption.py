"""Being told to stop: SIGTERM from a scheduler, Ctrl-C from a person.

The first signal asks the loop to save and end; a later one ends the process at once. Launchers
often forward one signal twice, so what follows within a second counts as the same.

Of several processes all must end at the same step, whichever of them was told. There JAX's
coordination service takes SIGTERM and makes them agree (see `PreemptionHandler.poll`), Ctrl-C counts as
SIGTERM, and no phase is left halfway.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """Told to stop, in a phase that may be left at any point."""


class PreemptionHandler:
    """While it is entered, notes SIGTERM and SIGINT instead of dying of them.

    `agreed(step)`, of several processes, says whether they have agreed to end at a step.
    """

    def __init__(self, agreed: Callable[[int], bool] | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._agreed = agreed
        self._noted = 0.0
        self._raises = False

    def __enter__(self) -> "PreemptionHandler":
        if self._agreed is None:
            handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        else:
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        self._before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self, step: int) -> None:
        """To be called after each step: notes what several processes have agreed upon."""
        if self._agreed is not None and self._agreed(step):
            self.signal = signal.SIGTERM

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a signal raises Interrupted, also one that was noted before."""
        self._raises = True
        try:
            if self.signal is not None:
                raise Interrupted
            yield
        finally:
            self._raises = False

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._noted > 1:
                os._exit(128 + number)
            return
        self.signal, self._noted = signal.Signals(number), time.monotonic()
        if self._raises:
            raise Interrupted
