"""The watchdog's verdict: dead and hung processes. tests/processes has real processes."""

from dataclasses import replace

import pytest

from gptjax.config import WatchConfig
from gptjax.runtime.watchdog import Heartbeat, find_fault, own_part

LIMITS = WatchConfig(lost=60, data=100, step=200, save=300)


def beat(number: int, stage: str, step: int, seconds: float = 1.0) -> Heartbeat:
    return Heartbeat(1, stage, step, seconds, f"process {number}", "")


def verdict(*beats: Heartbeat, silence: dict[int, float] | None = None, limits=LIMITS):
    last = dict(enumerate(beats))
    return find_fault(last, dict.fromkeys(last, 0.0) | (silence or {}), limits)


def test_no_fault_while_all_stages_are_within_their_deadlines() -> None:
    assert verdict(beat(0, "step", 7, 199), beat(1, "data", 7, 99)) is None


def test_process_without_heartbeat_is_dead_even_if_another_is_past_its_deadline() -> None:
    fault = verdict(beat(0, "step", 7, 500), beat(1, "save", 7), silence={1: 61})
    assert fault is not None
    assert fault[0] == 1
    assert "process 1 is dead: no heartbeat for 61 s (limit watch.lost=60)" in fault[1]
    assert "stage save of step 7" in fault[1]


def test_of_several_hung_processes_the_furthest_behind_is_at_fault() -> None:
    """The others wait for it in a collective of the step."""
    fault = verdict(beat(0, "step", 8, 300), beat(1, "data", 8, 300), beat(2, "step", 9, 400))
    assert fault is not None
    assert fault[0] == 1
    assert "process 1 hung: in stage data of step 8 for 300 s (limit watch.data=100;" in fault[1]


def test_process_waiting_for_a_slower_stage_within_its_deadline_is_not_at_fault() -> None:
    """One compiles within its deadline; the others are past the deadline of their stage."""
    limits = replace(LIMITS, compile=1000)
    assert verdict(beat(0, "step", 1, 500), beat(1, "compile", 0, 900), limits=limits) is None
    fault = verdict(beat(0, "step", 1, 600), beat(1, "compile", 0, 1001), limits=limits)
    assert fault is not None
    assert fault[0] == 1


def test_time_since_the_last_heartbeat_counts_towards_the_deadline() -> None:
    assert verdict(beat(0, "data", 3, 95), silence={0: 4}) is None
    assert verdict(beat(0, "data", 3, 95), silence={0: 6}) is not None


@pytest.mark.parametrize("stage", ["data", "prepare"])
def test_deadline_of_zero_is_never_exceeded(stage) -> None:
    limits = replace(LIMITS, data=0, lost=0)
    assert verdict(beat(0, stage, 1, 1e6), silence={0: 1e6}, limits=limits) is None


@pytest.mark.parametrize(
    ("silence", "stopped", "told"),
    [
        ({0: 0, 1: 31, 2: 3}, (0, 0), ""),  # the others are heard
        ({0: 0, 1: 12}, (90, 5), ""),  # nobody is silent for too long
        ({0: 0, 1: 31, 2: 3}, (90, 40), "process 0 was itself stopped for 90 s until 40 s ago"),
        ({0: 0, 1: 31}, (90, 200), "the other process is silent, so it may be process 0"),
        ({0: 0, 1: 31, 2: 33}, (0, 0), "all other processes are silent, so it may be process 0"),
        ({0: 0, 1: 31, 2: 90}, (0, 0), ""),  # one after the other
    ],
)
def test_a_process_says_that_it_was_itself_away(silence, stopped, told) -> None:
    part = own_part(silence, 0, stopped, WatchConfig(lost=30))
    assert part.startswith(f"; {told}") if told else part == ""
