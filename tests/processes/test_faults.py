"""A job of several processes when one of them dies, hangs, fails or differs from the others."""

import fcntl
import re
import signal
import time

import pytest

pytestmark = pytest.mark.slow

LIMIT = 8  # seconds; watch.lost and, in some tests, watch.data
WATCH = ("--watch.lost", str(LIMIT))


def running(start, name: str):
    """A job of two processes that has trained three steps."""
    job = start(name, 2, *WATCH, FAULT="slow:0:0")
    job.reaches(3)
    return job


def test_peers_end_and_name_a_killed_process(start) -> None:
    job = running(start, "killed")
    job.processes[1].kill()
    began = time.monotonic()
    assert job.wait() == [69, -signal.SIGKILL]
    print(f"killed: the peer ended after {time.monotonic() - began:.1f} s")
    assert "process 1" in job.stderr(0)
    assert "is dead: no heartbeat for" in job.stderr(0)
    assert time.monotonic() - began < 4 * LIMIT
    again = start("killed", 2)
    assert again.wait() == [0, 0]  # continues from the last checkpoint


def test_peers_end_when_the_coordinator_is_killed(start) -> None:
    job = running(start, "killed_first")
    job.processes[0].kill()
    assert job.wait() == [-signal.SIGKILL, -signal.SIGABRT]  # JAX aborts it, with our explanation
    assert "process 0, which runs it, is dead" in job.stderr(1)


def test_peers_end_and_name_a_stopped_process(start) -> None:
    job = running(start, "stopped")
    job.processes[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert job.processes[0].wait(120) == 69
    print(f"stopped: the peer ended after {time.monotonic() - began:.1f} s")
    stderr = job.stderr(0)
    assert "process 1" in stderr
    assert "in stage" in stderr
    assert 'File "' in stderr  # the stack in its last heartbeat, which may be of before the steps


def test_process_0_says_that_it_was_itself_stopped(start) -> None:
    job = running(start, "away")
    job.processes[0].send_signal(signal.SIGSTOP)
    job.processes[1].wait(120)  # which ends, for want of an answer
    time.sleep(2)
    job.processes[0].send_signal(signal.SIGCONT)
    assert job.processes[0].wait(120) == 69
    assert "process 0 was itself stopped for" in job.stderr(0)


def test_hung_process_is_named_with_its_stage_and_stack(start) -> None:
    job = start("hangs", 2, *WATCH, "--watch.data", str(LIMIT), FAULT="sleep:6:1")
    assert job.wait() == [69, 69]
    for index in (0, 1):
        assert "process 1" in job.stderr(index)
        assert "hung: in stage data of step 6" in job.stderr(index)
        assert "next(self._batches)" in job.stderr(index)  # the stack of its main thread
        assert job.stderr(index).count("hung: in stage") == 1
        assert "could not notify" not in job.stderr(index)


def test_hung_single_process_ends_itself(start) -> None:
    job = start("hangs_alone", 1, *WATCH, "--watch.data", str(LIMIT), FAULT="sleep:6:0")
    assert job.wait() == [69]
    assert "hung: in stage data of step 6" in job.stderr(0)


def test_a_process_that_restores_for_longer_is_waited_for(start) -> None:
    """For longer than the 30 s that Gloo gives the first collective."""
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2")
    job = start("late", 2, *mesh, devices=2, FAULT="restore:40:1")
    assert job.wait() == [0, 0], job.stderr(0) + job.stderr(1)


def test_error_in_one_process_ends_all_with_its_reason(start) -> None:
    job = start("raises", 2, *WATCH, FAULT="raise:5:1")
    assert job.wait() == [69, 1]
    assert "injected" in job.stderr(1)
    assert "process 1" in job.stderr(0)
    assert "injected" in job.stderr(0)


def test_a_signal_is_heard_while_process_0_waits_for_the_run_folder(start, workspace) -> None:
    (workspace / "held").mkdir()
    with (workspace / "held" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = start("held", 2)
        job.says(0, "in use by")
        began = time.monotonic()
        for process in job.processes:
            process.send_signal(signal.SIGTERM)
        codes = job.wait()
    assert time.monotonic() - began < 15  # process 0 lets the other one read why, for 8 s
    assert codes[0] == 75
    assert codes[1] in (75, 69)
    assert "told to stop by SIGTERM while it waited for the run folder" in job.stderr(0)
    assert "told to stop" in job.stderr(1)


def test_a_signal_is_heard_while_text_is_prepared(start, workspace) -> None:
    """To process 0 alone: the others end too, and the same command goes on."""
    store = ("--data.store", "interrupted")
    job = start("preparing", 2, *store, FAULT="prepare:0:0")
    job.says(0, "preparing")
    job.processes[0].send_signal(signal.SIGTERM)
    assert job.wait() == [75, 69]
    assert "told to stop by SIGTERM while the text was prepared" in job.stderr(0)
    assert "told to stop by SIGTERM while the text was prepared" in job.stderr(1)
    assert start("preparing", 2, *store).wait() == [0, 0]


def test_run_folder_that_is_not_shared_is_refused(start, workspace) -> None:
    folders = [workspace, workspace / "elsewhere"]
    folders[1].mkdir()
    codes = start("apart", 2, *WATCH, folders=folders)
    assert 73 in codes.wait()
    assert "does not have the folder of process 0 there" in codes.stderr(1)
    assert "does not have the folder of process 0 there" in codes.stderr(0)  # reported by process 1


def test_differing_configurations_are_refused(start) -> None:
    job = start("unlike", 2, *WATCH, each=lambda index: ("--optim.lr", f"{index + 1}e-3"))
    assert 78 in job.wait()
    assert "optim.lr: 0.002 here, 0.001 in process 0" in job.stderr(1)
    assert not (job.folder / "checkpoints").exists()


def test_a_slow_device_is_named_and_a_request_is_heard_by_all(start) -> None:
    """A profile is not asked for: taken in a forked process, it ended it once of four times."""
    job = start("asked", 2, FAULT="device:2:1")
    job.reaches(8)
    (job.folder / "request").write_text("save stacks")
    assert job.wait() == [0, 0], job.stderr(0) + job.stderr(1)
    told = job.stderr(0)
    slow = re.findall(r"step (\d+): device \d+ of process (\d) .* took ([\d.]+) times", told)
    assert slow == [("16", "1", "2.00"), ("24", "1", "2.00")]
    (step,) = re.findall(r"step (\d+): asked to save", told)
    assert (job.folder / "checkpoints" / step).is_dir()
    assert set(re.findall(r"process ([01])\b.*: stage \w+ of step \d+ for ", told)) == {"0", "1"}


def test_a_flipped_bit_names_its_process_and_ends_all(start) -> None:
    job = start("flipped", 2, "--watch.audit-every", "5", FAULT="flip:10:1")
    assert job.wait() == [76, 76], job.stderr(0) + job.stderr(1)
    for index in (0, 1):
        found = r"step 10 was computed twice, with two results, by device \d+ of process 1 on "
        assert re.search(found, job.stderr(index))
    assert {file.parent.name for file in job.folder.glob("audit-10/*/*.npy")} >= {"process-1"}
    assert not (job.folder / "checkpoints" / "16").exists()
