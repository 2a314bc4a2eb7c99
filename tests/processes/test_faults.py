"""What happens to a job when one of its processes dies, hangs, fails or is not like the others."""

import signal
import time

import pytest

pytestmark = pytest.mark.slow

LIMIT = 4  # seconds; watch.lost and, where a test says so, watch.data
WATCH = ("--watch.lost", str(LIMIT))


def running(start, name: str):
    """A job of two that has done three steps."""
    job = start(name, 2, *WATCH, FAULT="slow:0:0")
    job.reaches(3)
    return job


def test_the_others_end_when_one_is_killed_and_name_it(start) -> None:
    job = running(start, "killed")
    job.processes[1].kill()
    began = time.monotonic()
    assert job.wait() == [69, -signal.SIGKILL]
    print(f"killed: the other ended after {time.monotonic() - began:.1f} s")
    assert "process 1" in job.told(0)
    assert "has not been heard of for" in job.told(0)
    assert time.monotonic() - began < 4 * LIMIT
    again = start("killed", 2)
    assert again.wait() == [0, 0]  # goes on from what was saved


def test_the_others_end_when_the_first_is_killed(start) -> None:
    job = running(start, "killed_first")
    job.processes[0].kill()
    assert job.wait() == [-signal.SIGKILL, -signal.SIGABRT]  # JAX's doing, with our sentence
    assert "process 0, which runs it, has died" in job.told(1)


@pytest.mark.parametrize("stopped", [0, 1])
def test_the_others_end_when_one_is_stopped_and_name_it(start, stopped) -> None:
    job = running(start, f"stopped{stopped}")
    job.processes[stopped].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert job.processes[1 - stopped].wait(120) == 69
    print(f"stopped: the other ended after {time.monotonic() - began:.1f} s")
    told = job.told(1 - stopped)
    assert f"process {stopped}" in told
    if stopped:
        assert "in stage" in told
        assert "train.py" in told  # its stack, when it was last heard of


def test_a_process_that_hangs_is_named_with_its_stage_and_its_stack(start) -> None:
    job = start("hangs", 2, *WATCH, "--watch.data", str(LIMIT), FAULT="sleep:6:1")
    assert job.wait() == [69, 69]
    for index in (0, 1):
        assert "process 1" in job.told(index)
        assert "is late: in stage data of step 6" in job.told(index)
        assert "stuck_in_a_read" in job.told(index) or "next(source)" in job.told(index)
        assert job.told(index).count("is late") == 1
        assert "were not told" not in job.told(index)


def test_a_process_alone_that_hangs_ends_too(start) -> None:
    job = start("hangs_alone", 1, *WATCH, "--watch.data", str(LIMIT), FAULT="sleep:6:0")
    assert job.wait() == [69]
    assert "is late: in stage data of step 6" in job.told(0)


def test_an_error_in_one_ends_all_with_its_reason(start) -> None:
    job = start("raises", 2, *WATCH, FAULT="raise:5:1")
    assert job.wait() == [69, 1]
    assert "planted" in job.told(1)
    assert "process 1" in job.told(0)
    assert "planted" in job.told(0)


def test_folders_that_are_not_one_are_refused(start, workspace) -> None:
    folders = [workspace, workspace / "elsewhere"]
    folders[1].mkdir()
    codes = start("apart", 2, *WATCH, folders=folders)
    assert 73 in codes.wait()
    assert "does not have the folder of process 0 there" in codes.told(1)
    assert "does not have the folder of process 0 there" in codes.told(0)  # by word of process 1


def test_other_values_in_one_are_refused(start) -> None:
    job = start("unlike", 2, *WATCH, each=lambda index: ("--optim.lr", f"{index + 1}e-3"))
    assert 78 in job.wait()
    assert "optim.lr: 0.002 here, 0.001 in process 0" in job.told(1)
    assert not (job.folder / "checkpoints").exists()
