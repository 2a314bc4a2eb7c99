"""Goodput: what the wall time of a run, with all its restarts, was spent on.

RUN/sessions.jsonl has a line for every few seconds of each session, that is of each process that
trained the run (process 0, in a job of several): when it began, now, the step that it began after
and the step that it has done, and its seconds by stage. Lines are only ever added, so steps that
were done and lost are seen too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SESSIONS = "sessions.jsonl"
STAGES = {
    "step": "productive",
    "compile": "compiling",
    "restore": "starting and restoring",
    "prepare": "preparing text",
    "data": "waiting for data",
    "save": "saving",
    "eval": "evaluating",
}
"""What the stages of the watchdog are called."""
LOST, DOWN = "work that was lost", "down"


@dataclass(frozen=True)
class Session:
    """A process that trained a run from step `first` to `step`; times in seconds since 1970."""

    began: float
    now: float
    first: int
    step: int
    seconds: Mapping[str, float]


def read(file: Any) -> list[Session]:
    """The sessions in a run's sessions.jsonl, in their order; damaged lines are left out."""
    found: dict[float, Session] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            session = Session(**json.loads(line))
            found[session.began] = session
        except (ValueError, TypeError):
            continue
    return list(found.values())


def summarize(sessions: Sequence[Session]) -> dict[str, float]:
    """Seconds by what they were spent on; their sum is the wall time from the first to the last.

    Steps that a later session did again are lost work, at the mean time of a step of theirs. What
    lies between two sessions is down time, in which processes start too.
    """
    spent = dict.fromkeys([*STAGES.values(), LOST, DOWN], 0.0)
    for number, session in enumerate(sessions):
        later = [one.first for one in sessions[number + 1 :]]
        kept = max(session.first, min([session.step, *later]))
        done = session.step - session.first
        lost = (session.step - kept) / done if done else 0.0
        for stage, seconds in session.seconds.items():
            if stage == "step":
                spent[LOST] += seconds * lost
                seconds *= 1 - lost
            spent[STAGES[stage]] += seconds
        if number:
            spent[DOWN] += max(0.0, session.began - sessions[number - 1].now)
    return spent


def share(spent: Mapping[str, float]) -> float:
    """The share of the wall time that was productive."""
    return spent[STAGES["step"]] / max(1e-9, sum(spent.values()))


def lines(spent: Mapping[str, float]) -> Iterator[str]:
    """The goodput as a table, a line for each thing that time was spent on."""
    wall = max(1e-9, sum(spent.values()))
    for name, seconds in spent.items():
        if seconds > 0:
            yield f"{name:24} {seconds:12,.1f} s {seconds / wall:7.1%}"
