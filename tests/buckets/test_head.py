"""The head of a run in a bucket: one writer at any time, who is told by name."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from servers import Bucket, Faults

from gptjax.checkpoint import head
from gptjax.checkpoint.head import Head, Record, Writer
from gptjax.errors import DataError, OutputError

LEASE_S = 1.2
quiet = lambda line: None


def elsewhere(**changes: object) -> Writer:
    """A writer on another machine."""
    return replace(Writer.here(LEASE_S), name="process 7 on far", machine="far", **changes)


def added(step: int):
    return lambda record: replace(record, checkpoints={**record.checkpoints, step: f"{step}-a"})


def test_what_the_writer_changes_is_read_by_others(place: str) -> None:
    one = Head(place)
    assert not one.exists()
    assert one.read() == Record()
    with one.taken(quiet):
        one.update(added(3))
        assert Head(place).read().checkpoints == {3: "3-a"}
        assert Head(place).read().writer.pid == os.getpid()
        assert head.of(f"{place}/") is one
    after = Head(place).read()
    assert after == Record(checkpoints={3: "3-a"}, id=after.id)
    assert len(after.id) == 16
    assert head.of(place) is not one


def test_a_second_job_is_told_who_has_the_run(place: str) -> None:
    with Head(place).taken(quiet, lease=LEASE_S):
        began = time.monotonic()
        with (
            pytest.raises(OutputError, match=rf"run={place}: in use by process {os.getpid()} on"),
            Head(place).taken(quiet, lease=LEASE_S),
        ):
            pass
        assert time.monotonic() - began < LEASE_S


def test_of_many_that_begin_at_once_one_writes(place: str) -> None:
    outcomes: list[str] = []

    def go(number: int) -> None:
        try:
            with Head(place).taken(quiet, lease=LEASE_S):
                outcomes.append("took")
                done.wait(20)
        except OutputError as error:
            outcomes.append(str(error))

    done = threading.Event()
    threads = [threading.Thread(target=go, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(outcomes) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[-1] == "took"
    assert sum(one == "took" for one in outcomes) == 1
    assert all("in use by" in one for one in sorted(outcomes)[:-1])


def test_a_machine_that_vanished_is_waited_for_as_long_as_its_lease(place: str) -> None:
    lost = Head(place)
    lost._take(quiet, 0, elsewhere())  # and never renews it
    said: list[str] = []
    began = time.monotonic()
    with Head(place).taken(said.append, lease=LEASE_S):
        assert time.monotonic() - began >= LEASE_S
    assert "in use by process 7 on far; waiting for up to 1 s for a sign of it" in said[0]
    assert "taken over from process 7 on far, which has ended" in said[1]


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(place: str) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    Head(place)._take(quiet, 0, replace(Writer.here(60), pid=ended.pid))
    began = time.monotonic()
    with Head(place).taken(quiet):
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("wrong_by", [3600, -3600])
def test_a_clock_that_is_wrong_changes_nothing(place: str, wrong_by: float, monkeypatch) -> None:
    right = time.time
    with Head(place).taken(quiet, lease=LEASE_S):
        monkeypatch.setattr(time, "time", lambda: right() + wrong_by)
        with (
            pytest.raises(OutputError, match="in use by"),
            Head(place).taken(quiet, lease=LEASE_S),
        ):
            pass


def test_a_writer_that_was_only_slow_cannot_write_any_more(place: str, monkeypatch) -> None:
    slow = Head(place)
    slow._take(quiet, 0, elsewhere())
    slow.update(added(1))
    with Head(place).taken(quiet, lease=LEASE_S) as _:
        now = head.of(place)
        now.update(added(2))
        with pytest.raises(OutputError, match="was taken over by process"):
            slow.update(added(9))
        with pytest.raises(OutputError, match="was taken over by process"):
            slow.update(added(9))  # and not later either
        assert slow.lost
        assert Head(place).read().checkpoints == {1: "1-a", 2: "2-a"}


def test_a_run_that_is_taken_while_its_writer_renews_it_is_given_up(place: str) -> None:
    with Head(place).taken(quiet, lease=0.6):
        mine = head.of(place)
        text = replace(Head(place).read(), writer=elsewhere()).text()
        mine._kv.write(head.HEAD, text).result()  # by force
        deadline = time.monotonic() + 10
        while not mine.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "was taken over by process 7 on far" in mine.lost


def test_changes_whose_answers_are_lost_are_known_to_be_made(bucket: Bucket, place: str) -> None:
    with Head(place).taken(quiet, lease=60):
        mine = head.of(place)
        bucket.proxy.faults = Faults(seed=1, share=0.5, burst=1, kinds=("lost answer",))
        for step in range(8):
            mine.update(added(step))
        told = bucket.proxy.faults.told
        bucket.proxy.faults = Faults()
        assert told["lost answer"] > 2
        assert sorted(Head(place).read().checkpoints) == list(range(8))


def test_a_damaged_head_is_told(place: str) -> None:
    Head(place)._kv.write(head.HEAD, b'{"format": 2}').result()
    with pytest.raises(DataError, match=rf"{place}/head.json: is damaged \(its format is 2"):
        Head(place).read()
