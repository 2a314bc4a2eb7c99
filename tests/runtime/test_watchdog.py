"""Who is at fault when a job comes to nothing; tests/processes has real processes."""

from dataclasses import replace

import pytest

from gptjax.config import WatchConfig
from gptjax.runtime.watchdog import Beat, judge

LIMITS = WatchConfig(lost=60, data=100, step=200, save=300)


def beat(number: int, stage: str, step: int, seconds: float = 1.0) -> Beat:
    return Beat(1, stage, step, seconds, f"process {number}", "")


def verdict(*beats: Beat, silent: dict[int, float] | None = None, limits: WatchConfig = LIMITS):
    heard = dict(enumerate(beats))
    return judge(heard, dict.fromkeys(heard, 0.0) | (silent or {}), limits)


def test_nobody_is_at_fault_while_all_are_within_their_limits() -> None:
    assert verdict(beat(0, "step", 7, 199), beat(1, "data", 7, 99)) is None


def test_the_silent_one_is_lost_whatever_the_others_wait_for() -> None:
    fault = verdict(beat(0, "step", 7, 500), beat(1, "save", 7), silent={1: 61})
    assert fault is not None
    assert fault[0] == 1
    assert "process 1 has not been heard of for 61 s (watch.lost=60)" in fault[1]
    assert "stage save of step 7" in fault[1]


def test_of_several_late_ones_the_one_furthest_behind_is_at_fault() -> None:
    """The others are in the step that needs it."""
    fault = verdict(beat(0, "step", 8, 300), beat(1, "data", 8, 300), beat(2, "step", 9, 400))
    assert fault is not None
    assert fault[0] == 1
    assert "process 1 is late: in stage data of step 8 for 300 s (watch.data=100;" in fault[1]


def test_who_waits_for_a_slower_stage_within_its_limit_is_not_to_blame() -> None:
    """One compiles, which may take long; the others are past the limit of what they are in."""
    limits = replace(LIMITS, compile=1000)
    assert verdict(beat(0, "step", 1, 500), beat(1, "compile", 0, 900), limits=limits) is None
    fault = verdict(beat(0, "step", 1, 600), beat(1, "compile", 0, 1001), limits=limits)
    assert fault is not None
    assert fault[0] == 1


def test_time_since_the_last_beat_counts() -> None:
    assert verdict(beat(0, "data", 3, 95), silent={0: 4}) is None
    assert verdict(beat(0, "data", 3, 95), silent={0: 6}) is not None


@pytest.mark.parametrize("stage", ["data", "prepare"])
def test_without_a_limit_nobody_is_late(stage) -> None:
    limits = replace(LIMITS, data=0, lost=0)
    assert verdict(beat(0, stage, 1, 1e6), silent={0: 1e6}, limits=limits) is None
