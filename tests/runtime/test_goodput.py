"""The goodput of a run: seconds by what they were spent on, over restarts."""

from pathlib import Path

import pytest

from gptjax.runtime import goodput
from gptjax.runtime.goodput import Session


def session(began: float, first: int, last: int, **seconds: float) -> Session:
    return Session(began, began + sum(seconds.values()), first, last, seconds)


def test_seconds_sum_to_the_wall_time_and_lost_steps_are_told() -> None:
    sessions = [
        session(1000.0, 0, 10, step=100.0, compile=20.0, save=5.0),
        session(1200.0, 8, 8, restore=4.0),  # died before it did a step
        session(1210.0, 4, 14, step=80.0, data=10.0, restore=2.0),
    ]
    spent = goodput.summarize(sessions)
    assert sum(spent.values()) == pytest.approx(sessions[-1].now - sessions[0].began)
    assert spent[goodput.LOST] == pytest.approx(60.0)  # six of ten steps, done again from step 4
    assert spent["productive"] == pytest.approx(40.0 + 80.0)
    assert spent[goodput.DOWN] == pytest.approx(75.0 + 6.0)
    assert goodput.share(spent) == pytest.approx(120.0 / 302.0)
    (last,) = [line for line in goodput.lines(spent) if "lost" in line]
    assert last.split()[-1] == "19.9%"


def test_the_last_line_of_each_session_counts_and_damaged_ones_do_not(tmp_path: Path) -> None:
    file = tmp_path / goodput.SESSIONS
    assert goodput.read(file) == []
    lines = [
        '{"began": 1.0, "now": 2.0, "first": 0, "step": 1, "seconds": {"step": 1.0}}',
        '{"began": 1.0, "now": 5.0, "first": 0, "step": 4, "seconds": {"step": 4.0}}',
        '{"began": 9.0, "now"',
        "[]",
        '{"began": 9.0, "now": 9.5, "first": 4, "step": 4, "seconds": {"restore": 0.5}}',
    ]
    file.write_text("\n".join(lines))
    assert [one.step for one in goodput.read(file)] == [4, 4]
    assert sum(goodput.summarize(goodput.read(file)).values()) == pytest.approx(8.5)
