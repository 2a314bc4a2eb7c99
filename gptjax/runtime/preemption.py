"""Preemption: SIGTERM from a scheduler or Ctrl-C from a user saves and ends the run.

The first signal asks the training loop to save and end; a second one ends the process at once.
Launchers often forward one signal twice, so signals within a second of each other count as one.

Several processes must end at the same step, whichever of them was signalled. There JAX's
coordination service handles SIGTERM and makes them agree on a step (see `PreemptionHandler.poll`),
Ctrl-C counts as SIGTERM, and from restoring on no phase is interrupted.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from gptjax.errors import Preempted


@contextmanager
def preemptible(what: str) -> Iterator[None]:
    """Within it, SIGTERM and Ctrl-C end the work with Preempted: `what` was going on.

    In a job of several processes the signalled one ends alone, and tells the others.
    """
    with _kept_action(signal.SIGTERM), PreemptionHandler() as handler:
        try:
            with handler.at_once():
                yield
        except Interrupted:
            assert handler.signal is not None
            raise _preempted(handler.signal, what) from None
    if handler.signal is not None:  # and the exception was lost, in a finalizer say
        raise _preempted(handler.signal, what)


def _preempted(number: signal.Signals, what: str) -> Preempted:
    return Preempted(f"told to stop by {number.name} while {what}", alone=True)


@contextmanager
def _kept_action(number: signal.Signals) -> Iterator[None]:
    """Keeps the action of a signal that Python cannot set again: JAX's own, in C."""
    sigaction, kept = ctypes.CDLL(None).sigaction, ctypes.create_string_buffer(256)
    sigaction(number, None, kept)
    try:
        yield
    finally:
        sigaction(number, kept, None)


class Interrupted(BaseException):
    """Raised by a signal within `PreemptionHandler.at_once`.

    No Exception, as what handles those would take it for an error: of a damaged checkpoint, say.
    """

    def __init__(self, signal: signal.Signals) -> None:
        super().__init__(signal.name)
        self.signal = signal


class PreemptionHandler:
    """While entered, records SIGTERM and SIGINT in `signal` instead of ending the process.

    With several processes, `agreed(step)` says whether they have agreed to end at a step.
    """

    def __init__(self, agreed: Callable[[int], bool] | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._agreed = agreed
        self._received = 0.0
        self._raises = False

    def __enter__(self) -> "PreemptionHandler":
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]
        if self._agreed is None:
            handlers = {signal.SIGTERM: self._receive, signal.SIGINT: self._receive}
        else:
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        self._before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # else it is JAX's own: see `_kept_action`
                signal.signal(number, handler)

    def poll(self, step: int) -> None:
        """Records SIGTERM if several processes have agreed to end at this step; call after each."""
        if self._agreed is not None and self._agreed(step):
            self.signal = signal.SIGTERM

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block a signal raises Interrupted, as does one that was recorded before.

        So does any error after a signal: libraries in C++ may turn an exception that is raised in
        them into another one.
        """
        self._raises = True
        try:
            if self.signal is not None:
                raise Interrupted(self.signal)
            yield
        except Exception as error:
            if self.signal is None:
                raise
            raise Interrupted(self.signal) from error
        finally:
            self._raises = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._received > 1:
                os._exit(128 + number)
            return
        self.signal, self._received = signal.Signals(number), time.monotonic()
        if self._raises:
            raise Interrupted(self.signal)
