"""Preemption: the first signal is recorded, a second ends the process, handlers are restored."""

import signal
import subprocess
import sys

import pytest

from gptjax.errors import Preempted
from gptjax.runtime.preemption import Interrupted, PreemptionHandler, preemptible

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@SIGNALS
def test_first_signal_is_only_recorded(number: signal.Signals) -> None:
    with PreemptionHandler() as handler:
        assert handler.signal is None
        signal.raise_signal(number)
        assert handler.signal is number
        assert handler.signal.name == number.name  # the name in the user's message


@SIGNALS
def test_previous_signal_handlers_are_restored(number: signal.Signals) -> None:
    caught: list[int] = []
    before = signal.signal(number, lambda n, _: caught.append(n))
    handler = PreemptionHandler()

    def leave_by_an_error() -> None:
        with handler:
            signal.raise_signal(number)
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            leave_by_an_error()
        assert (handler.signal, caught) == (number, [])
        signal.raise_signal(number)
        assert caught == [number]
    finally:
        signal.signal(number, before)


def test_new_handler_has_no_signal() -> None:
    with PreemptionHandler():
        signal.raise_signal(signal.SIGTERM)
    with PreemptionHandler() as second:
        assert second.signal is None


# With a fake clock, so that no test waits.
TWICE = """
import signal, sys, types
from gptjax.runtime import preemption
now = 100.0
preemption.time = types.SimpleNamespace(monotonic=lambda: now)
with preemption.PreemptionHandler() as handler:
    try:
        signal.raise_signal(int(sys.argv[1]))
        print("recorded", handler.signal.name, flush=True)
        now += float(sys.argv[3])
        signal.raise_signal(int(sys.argv[2]))
        print("continued after", handler.signal.name, flush=True)
    finally:
        print("cleaned up", flush=True)
"""


def twice(first: signal.Signals, second: signal.Signals, seconds: float):
    words = [str(int(first)), str(int(second)), str(seconds)]
    return subprocess.run([sys.executable, "-c", TWICE, *words], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_second_signal_ends_the_process_at_once(first, second) -> None:
    done = twice(first, second, 1.5)
    assert done.stdout == f"recorded {first.name}\n"
    assert done.returncode == 128 + second
    assert done.stderr == ""


def test_signal_repeated_within_a_second_counts_once() -> None:
    done = twice(signal.SIGTERM, signal.SIGINT, 0.5)
    assert done.stdout == "recorded SIGTERM\ncontinued after SIGTERM\ncleaned up\n"
    assert (done.returncode, done.stderr) == (0, "")


@SIGNALS
def test_interruptible_phase_raises_interrupted_at_a_signal(number: signal.Signals) -> None:
    reached = []

    def phase(handler: PreemptionHandler) -> None:
        with handler.at_once():
            reached.append("begun")
            signal.raise_signal(number)
            reached.append("went on")

    with PreemptionHandler() as handler:
        with pytest.raises(Interrupted):
            phase(handler)
        assert handler.signal is number
        with pytest.raises(Interrupted):  # a later phase does not begin
            phase(handler)
    assert reached == ["begun"]


def test_a_library_that_turns_the_exception_into_its_own_is_interrupted_too() -> None:
    def library() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise AttributeError("'list' object has no attribute '_type_spec'") from None

    with PreemptionHandler() as handler:
        with pytest.raises(AttributeError), handler.at_once():
            raise AttributeError("without a signal")
        with pytest.raises(Interrupted), handler.at_once():
            library()


def test_signal_after_an_interruptible_phase_is_only_recorded() -> None:
    with PreemptionHandler() as handler:
        with handler.at_once():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert handler.signal is signal.SIGTERM


@SIGNALS
def test_a_signal_ends_work_with_what_was_going_on(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with (
        pytest.raises(Preempted, match=f"told to stop by {number.name} while it rained"),
        preemptible("it rained"),
    ):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before
    with preemptible("it rained"):
        pass
