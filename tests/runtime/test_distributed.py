"""Joining a job: what is told while processes are missing."""

import time

from gptjax.runtime import distributed


def test_waiting_is_told_soon_and_then_again(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "_FIRST_REPORT_S", 0.05)
    monkeypatch.setattr(distributed, "_NEXT_REPORT_S", 0.05)
    said: list[str] = []
    with distributed._report_waiting(" at host:1", said.append):
        deadline = time.monotonic() + 10
        while len(said) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    count = len(said)
    assert count >= 3
    assert said[0] == "waiting for the other processes to join at host:1 (at most 1800 s)"
    time.sleep(0.2)
    assert len(said) == count


def test_a_job_that_joins_at_once_says_nothing() -> None:
    said: list[str] = []
    with distributed._report_waiting("", said.append):
        pass
    assert said == []
