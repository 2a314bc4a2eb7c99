"""launch/slurm.sbatch on its own Slurm: munged, slurmctld and slurmd, one node, on loopback.

`apt-get install slurm-wlm` installs all three. The machine's own Slurm is neither read nor changed.
"""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "launch" / "slurm.sbatch"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
slurm_runs = pytest.mark.skipif(
    bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install slurm-wlm"
)

# A requeued job waits until its credential has expired: five seconds are the minimum, two minutes
# the default.
CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
KillWait=5
SchedulerParameters=batch_sched_delay=1,sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""

# A fake gptjax: each attempt ends as its file says, or waits for a signal.
FAKE_GPTJAX = """\
#!/usr/bin/env bash
echo "attempt ${SLURM_RESTART_COUNT:-0} task $SLURM_PROCID of $SLURM_NTASKS: $*"
trap 'echo "saved by task $SLURM_PROCID"; exit 75' TERM
read -r how < "$ENDINGS/${SLURM_RESTART_COUNT:-0}.$SLURM_PROCID"
touch "$ENDINGS/began.${SLURM_RESTART_COUNT:-0}.$SLURM_PROCID"
while [ "$how" = wait ]; do sleep 0.1; done
sleep "${how#*,}"
exit "${how%,*}"
"""


ENDED = ("COMPLETED", "FAILED", "CANCELLED")


class Cluster:
    """Slurm commands for the cluster of a slurm.conf."""

    def __init__(self, slurm_conf: Path) -> None:
        self.environment = os.environ | {"SLURM_CONF": str(slurm_conf)}

    def call(self, *command: object) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, folder: Path, *arguments: object, **environment: str) -> "Job":
        exported = ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])
        where = ("--parsable", "--ntasks=2", f"--chdir={folder}", f"--export={exported}")
        return Job(self, folder, int(self.call("sbatch", *where, SCRIPT, *arguments)))


class Job:
    """A job of two tasks."""

    def __init__(self, cluster: Cluster, folder: Path, number: int) -> None:
        self.cluster, self.number = cluster, number
        self.log = folder / f"slurm-{number}.out"

    def shown(self, name: str) -> str:
        shown = self.cluster.call("scontrol", "show", "job", self.number)
        return re.search(rf"\b{name}=(\S+)", shown)[1]

    @property
    def state(self) -> str:
        return self.shown("JobState")

    @property
    def restarts(self) -> int:
        return int(self.shown("Restarts"))

    def until(self, what: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{self.state}: {self.text()}"
            time.sleep(0.1)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def terminate(self) -> None:
        """Sends SIGTERM to the tasks, as Slurm does before the time limit."""
        self.cluster.call("scancel", "--signal=TERM", self.number)

    def kill(self, task: int) -> None:
        """Sends SIGKILL to one task only."""
        listed = self.cluster.call("scontrol", "listpids", f"{self.number}.0").splitlines()
        (pid,) = (int(row.split()[0]) for row in listed if row.split()[3] == str(task))
        os.kill(pid, signal.SIGKILL)

    def restarts_for(self, restarts: int, seconds: float = 60) -> None:
        """Waits until the job has been requeued for the nth time."""

        def queued() -> bool:
            assert self.state not in ENDED, f"not requeued: {self.text()}"
            return self.restarts >= restarts

        self.until(queued, seconds)

    def end(self, seconds: float = 60) -> tuple[str, int]:
        """Waits until the job has ended without a requeue; returns state and exit code."""
        self.until(lambda: self.state in ENDED, seconds)
        return self.state, int(self.shown("ExitCode").split(":")[0])


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def running(folder: Path, *command: object) -> Iterator[None]:
    """Runs a daemon in the foreground of a process that ends with the context."""
    words = [str(word) for word in command]
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    with (folder / f"{words[0]}.log").open("w") as log:
        daemon = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    ports = (free_port(), free_port())
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, user=user, folder=folder, ports=ports))
    munge = [f"--{part}-file={folder}/munge.{part}" for part in ("key", "pid", "log", "seed")]
    cluster = Cluster(conf)
    with ExitStack() as daemons:
        for command in (
            ("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge),
            ("slurmctld", "-D"),
            ("slurmd", "-D"),
        ):
            daemons.enter_context(running(folder, *command))
            time.sleep(1)  # each needs the previous one, and does not wait for it
        deadline = time.monotonic() + 30
        while "idle" not in (seen := cluster.call("sinfo", "--noheader")):
            logs = "".join(log.read_text() for log in folder.glob("*.log"))
            assert time.monotonic() < deadline, f"{seen}\n{logs}"
            time.sleep(0.2)
        yield cluster
        jobs = cluster.call("squeue", "--noheader", "--format=%A").split()
        if jobs:
            cluster.call("scancel", *jobs)
            time.sleep(6)  # KillWait


@pytest.fixture
def fake_gptjax(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Returns a function that sets how each attempt's tasks end, and returns the environment."""

    def write(*attempts: tuple[str, str]) -> dict[str, str]:
        program = tmp_path / "gptjax"
        program.write_text(FAKE_GPTJAX)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        for attempt, tasks in enumerate(attempts):
            for task, how in enumerate(tasks):
                (tmp_path / f"{attempt}.{task}").write_text(how + "\n")
        return {"GPTJAX": str(program), "ENDINGS": str(tmp_path)}

    return write


def began(folder: Path, attempt: int) -> Callable[[], bool]:
    return lambda: all((folder / f"began.{attempt}.{task}").exists() for task in (0, 1))


@pytest.mark.slow
@slurm_runs
def test_job_is_requeued_after_preemption_and_after_a_dead_task(
    cluster, fake_gptjax, tmp_path
) -> None:
    # First SIGTERM; then task 1 is killed and task 0 detects it; then the coordinator's abort.
    environment = fake_gptjax(
        ("wait", "wait"), ("69,4", "wait"), ("134,0", "134,0"), ("0,0", "0,1")
    )
    job = cluster.submit(tmp_path, "configs/debug.py", "--run", "a folder", **environment)
    job.until(began(tmp_path, 0))
    job.terminate()
    job.restarts_for(1)
    job.until(began(tmp_path, 1))
    job.kill(task=1)
    job.restarts_for(2)
    job.restarts_for(3)
    assert job.end() == ("COMPLETED", 0)
    lines = job.text().splitlines()
    for attempt in range(4):
        for task in (0, 1):
            words = "train configs/debug.py --run a folder"
            assert lines.count(f"attempt {attempt} task {task} of 2: {words}") == 1
    assert {f"saved by task {task}" for task in (0, 1)} <= set(lines)
    requeued = [line for line in lines if line.endswith("; requeued")]
    assert [int(re.search(r"ended with (\d+);", line)[1]) for line in requeued] == [75, 137, 134]


@pytest.mark.slow
@slurm_runs
@pytest.mark.parametrize(
    ("tasks", "code"), [(("2,0", "2,0"), 2), (("69,2", "65,0"), 65), (("134,1", "78,0"), 78)]
)
def test_permanent_error_ends_the_job_whatever_the_other_tasks_return(
    cluster, fake_gptjax, tmp_path, tasks, code
) -> None:
    job = cluster.submit(tmp_path, "configs/debug.py", **fake_gptjax(tasks))
    assert job.end() == ("FAILED", code)
    assert job.restarts == 0
    assert f"a process ended with {code}, which a restart does not fix" in job.text()


@pytest.mark.slow
@slurm_runs
def test_restarts_are_limited(cluster, fake_gptjax, tmp_path) -> None:
    environment = fake_gptjax(("75,0", "75,0"), ("69,0", "69,0"))
    job = cluster.submit(tmp_path, "configs/debug.py", MAX_RESTARTS="1", **environment)
    job.restarts_for(1)
    assert job.end() == ("FAILED", 69)
    assert "after 1 restarts; giving up" in job.text()


STEPS = 50


class Training(Job):
    """A job of two tasks that train configs/debug.py."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        host = socket.gethostname().split(".")[0]  # where JAX will look for task 0 of a Slurm job
        if not socket.gethostbyname(host).startswith("127."):
            pytest.skip(f"{host} is not this machine's loopback: others could reach the job")
        (folder / "text.txt").write_text(Path(os.__file__).read_text())
        (folder / "valid.txt").write_text(Path(re.__file__).read_text())
        overrides = [
            *("--data.sources", "text.txt", "--data.valid-sources", "valid.txt"),
            *("--train.tokens", STEPS * 1024, "--checkpoint.every", 5, "--log.every", 1),
            *("--eval.every", 0, "--eval.sample-tokens", 4, "--log.tensorboard", False),
            *("--watch.lost", 10),  # seconds after which a killed task is noticed
        ]
        job = cluster.submit(
            folder,
            *(REPO / "configs" / "debug.py", "--run", "run", *overrides),
            GPTJAX=f"{sys.executable} -m gptjax",
            PYTHONPATH=str(REPO),
            JAX_PLATFORMS="cpu",
            JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # compiles faster
            XLA_FLAGS="",
        )
        super().__init__(cluster, folder, job.number)
        self._metrics = folder / "run" / "metrics.jsonl"

    def steps(self) -> list[int]:
        """Training steps in the metrics file, in file order."""
        lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return [entry["step"] for entry in entries if "grad_norm" in entry]

    def reaches(self, step: int) -> None:
        self.until(lambda: (self.steps() or [0])[-1] >= step, 400)


@pytest.mark.exhaustive
@pytest.mark.slow
@slurm_runs
def test_two_tasks_save_at_the_same_step_and_continue_from_it(cluster, tmp_path) -> None:
    job = Training(cluster, tmp_path)
    job.reaches(10)
    job.terminate()
    job.restarts_for(1, 200)
    saved = {int(step) for step in re.findall(r"saved step (\d+)", job.text())}
    assert len(saved) == 1
    assert 10 <= max(saved) < STEPS
    assert job.end(600) == ("COMPLETED", 0)
    assert f"resumed after step {max(saved)} of {STEPS}" in job.text()
    assert job.steps() == list(range(1, STEPS + 1))  # each step once


@pytest.mark.exhaustive
@pytest.mark.slow
@slurm_runs
def test_two_tasks_continue_after_one_is_killed(cluster, tmp_path) -> None:
    job = Training(cluster, tmp_path)
    job.reaches(10)
    job.kill(task=1)
    job.restarts_for(1, 400)
    assert job.end(600) == ("COMPLETED", 0)
    assert "resumed after step" in job.text()
    assert job.steps() == list(range(1, STEPS + 1))
