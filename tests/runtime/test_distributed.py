"""Joining a job: what is told while processes are missing."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

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


JOIN = """
import sys
from gptjax.cli import main
sys.exit(main.main(["train", "debug", "--run", sys.argv[1], "--log.compile-cache", ""]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("others", ["absent", "at a barrier"])
def test_ctrl_c_is_heard_while_a_process_waits_for_the_others(tmp_path, others) -> None:
    """As they join, and as process 0 waits for one that does nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    idle = (
        f"import jax, time; jax.distributed.initialize('{address}', 2, 1); "
        "print('joined', flush=True); time.sleep(100)"
    )
    commands = [[sys.executable, "-c", JOIN, str(tmp_path / "run")]]
    if others != "absent":
        commands.append([sys.executable, "-c", idle])
    jobs = [
        subprocess.Popen(
            command,
            env=env | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell without job control has its background jobs ignore it, and pytest with them.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for i, command in enumerate(commands)
    ]
    try:
        if others == "absent":
            assert "waiting for the other processes" in jobs[0].stderr.readline()
        else:
            assert jobs[1].stdout.readline() == "joined\n"
            time.sleep(3)  # process 0 claims the run folder, and waits for the other
        jobs[0].send_signal(signal.SIGINT)
        began = time.monotonic()
        _, err = jobs[0].communicate(timeout=20)
        assert time.monotonic() - began < 2
        assert jobs[0].returncode == 130
        assert err.splitlines()[-1] == "gptjax: interrupted"
        assert "Traceback" not in err
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
