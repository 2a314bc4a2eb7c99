"""Signals: the first is noted, a later one ends the process, and outside they do what they did."""

import signal
import subprocess
import sys

import pytest

from gptjax.runtime.preemption import Interrupted, PreemptionHandler

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@SIGNALS
def test_the_first_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with PreemptionHandler() as interrupt:
        assert interrupt.signal is None
        signal.raise_signal(number)
        assert interrupt.signal is number
        assert interrupt.signal.name == number.name  # what the user is told


@SIGNALS
def test_afterwards_a_signal_does_what_it_did_before(number: signal.Signals) -> None:
    caught: list[int] = []
    before = signal.signal(number, lambda n, _: caught.append(n))
    interrupt = PreemptionHandler()

    def leave_by_an_error() -> None:
        with interrupt:
            signal.raise_signal(number)
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            leave_by_an_error()
        assert (interrupt.signal, caught) == (number, [])
        signal.raise_signal(number)
        assert caught == [number]
    finally:
        signal.signal(number, before)


def test_an_interrupt_says_at_first_that_there_was_none_each_time_anew() -> None:
    with PreemptionHandler():
        signal.raise_signal(signal.SIGTERM)
    with PreemptionHandler() as second:
        assert second.signal is None


# A clock that is set, so that no test waits.
TWICE = """
import signal, sys, types
from gptjax import interrupt
now = 100.0
interrupt.time = types.SimpleNamespace(monotonic=lambda: now)
with interrupt.Interrupt() as noted:
    try:
        signal.raise_signal(int(sys.argv[1]))
        print("noted", noted.signal.name, flush=True)
        now += float(sys.argv[3])
        signal.raise_signal(int(sys.argv[2]))
        print("went on after", noted.signal.name, flush=True)
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
def test_a_later_signal_ends_the_process_at_once(first, second) -> None:
    done = twice(first, second, 1.5)
    assert done.stdout == f"noted {first.name}\n"
    assert done.returncode == 128 + second
    assert done.stderr == ""


def test_a_signal_that_a_launcher_sends_twice_counts_once() -> None:
    done = twice(signal.SIGTERM, signal.SIGINT, 0.5)
    assert done.stdout == "noted SIGTERM\nwent on after SIGTERM\ncleaned up\n"
    assert (done.returncode, done.stderr) == (0, "")


@SIGNALS
def test_a_phase_that_may_be_left_anywhere_is_left_at_a_signal(number: signal.Signals) -> None:
    reached = []

    def phase(interrupt: PreemptionHandler) -> None:
        with interrupt.at_once():
            reached.append("begun")
            signal.raise_signal(number)
            reached.append("went on")

    with PreemptionHandler() as interrupt:
        with pytest.raises(Interrupted):
            phase(interrupt)
        assert interrupt.signal is number
        with pytest.raises(Interrupted):  # and one that comes after it is not begun
            phase(interrupt)
    assert reached == ["begun"]


def test_after_such_a_phase_a_signal_is_noted_again() -> None:
    with PreemptionHandler() as interrupt:
        with interrupt.at_once():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal is signal.SIGTERM
