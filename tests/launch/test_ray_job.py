"""launch/ray_job.py: its decisions and, where Ray is installed, a local job of two actors."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "ray_job.py"

# A fake gptjax: ends its nth attempt as the nth word of its process's file says, or waits.
FAKE_GPTJAX = """\
#!/usr/bin/env bash
trap 'exit 75' TERM
place="$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"
echo "$place: $*" >> "$JAX_PROCESS_ID.log"
read -ra endings < "$JAX_PROCESS_ID.endings"
how=${endings[$(wc -l < "$JAX_PROCESS_ID.log") - 1]}
while [ "$how" = wait ]; do sleep 0.1; done
[ "$how" != kill ] || kill -KILL $$
exit "$how"
"""


@pytest.fixture(scope="module")
def ray_job():
    spec = importlib.util.spec_from_file_location("ray_job", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 75], 75),
        ([75, 75], 75),
        ([69, 65], 65),  # the cause, although its peer's code is larger
        ([134, 2, 137], 2),
        ([78, 65], 78),
        ([69, 134], 134),
        ([1, 143], 1),
    ],
)
def test_permanent_error_takes_precedence_over_retryable_exit_codes(ray_job, codes, code) -> None:
    assert ray_job.worst(codes) == code


def test_exit_code_of_a_signal_is_128_plus_its_number(ray_job) -> None:
    assert [ray_job.exit_code(code) for code in (0, 75, -9, -6)] == [0, 75, 137, 134]


def test_environment_has_the_process_id_and_the_coordinator(ray_job) -> None:
    assert ray_job.environment({"A": "b"}, "10.0.0.1:1234", 4, 3) == {
        "A": "b",
        "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
    }


def test_overrides_are_passed_unchanged(ray_job) -> None:
    args = ray_job.parse(["--processes", "2", "--", "configs/debug.py", "--run", "a b"])
    words = ray_job.command("python -m gptjax", args.words)
    assert words == ["python", "-m", "gptjax", "train", "configs/debug.py", "--run", "a b"]


def test_zero_processes_are_refused(ray_job, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        ray_job.parse(["--processes", "0", "--", "configs/debug.py"])
    assert exit.value.code == 2
    assert "--processes=0: must be at least 1" in capsys.readouterr().err


ray_runs = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="no ray: pip install ray"
)


def start(folder: Path, first: str, second: str) -> subprocess.Popen[str]:
    """Starts a job of two actors whose attempts end as given, on its own Ray."""
    program = folder / "fake_gptjax"
    program.write_text(FAKE_GPTJAX)
    program.chmod(0o755)
    for process, endings in enumerate((first, second)):
        (folder / f"{process}.endings").write_text(endings + "\n")
    options = ["--processes", "2", "--cpus", "0", "--gptjax", str(program), "--cwd", str(folder)]
    command = [sys.executable, str(SCRIPT), *options, "--", "configs/debug.py", "--run", "a b"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def attempts(folder: Path, process: int) -> list[str]:
    file = folder / f"{process}.log"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
@ray_runs
@pytest.mark.parametrize(
    ("first", "second", "code", "times"),
    [("75 69 134 0", "75 kill 134 0", 0, 4), ("69", "65", 65, 1)],
)
def test_actors_are_restarted_until_all_succeed(tmp_path, first, second, code, times) -> None:
    with start(tmp_path, first, second) as job:
        _, stderr = job.communicate(timeout=180)
    assert job.returncode == code, stderr
    for process in (0, 1):
        lines = attempts(tmp_path, process)
        assert len(lines) == times
        assert all(line.startswith(f"{process} of 2 at ") for line in lines)
        assert all(line.endswith(": train configs/debug.py --run a b") for line in lines)
    coordinators = [[line.split()[4] for line in attempts(tmp_path, process)] for process in (0, 1)]
    assert coordinators[0] == coordinators[1]


@pytest.mark.slow
@ray_runs
def test_sigterm_saves_all_processes_and_does_not_restart(tmp_path) -> None:
    with start(tmp_path, "wait 0", "wait 0") as job:
        deadline = time.monotonic() + 120
        while not (attempts(tmp_path, 0) and attempts(tmp_path, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        _, stderr = job.communicate(timeout=60)
    assert job.returncode == 75, stderr
    assert len(attempts(tmp_path, 0)) == len(attempts(tmp_path, 1)) == 1
