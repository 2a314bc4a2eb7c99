"""launch/tpu_vm.sh with a fake gcloud, which logs its arguments and runs the command locally."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "launch" / "tpu_vm.sh"

# Each host has its own home; like the real gcloud, this ends with the first failure's exit code.
GCLOUD = """\
#!/usr/bin/env bash
{ printf '%s\\036' "$@"; printf '\\037'; } >> "$WORDS"
[ "$4" = ssh ] || exit 0
for word in "$@"; do case $word in
    --worker=all) hosts="0 1" ;;
    --worker=*) hosts=${word#*=} ;;
    --command=*) command=${word#*=} ;;
esac; done
declare -A running
for host in $hosts; do
    HOME=$HOMES/$host bash -c "$command" &
    running[$host]=$!
done
code=0
for host in $hosts; do wait "${running[$host]}" || { last=$?; [ $code != 0 ] || code=$last; }; done
exit $code
"""

# A fake gptjax: ends its nth attempt as the nth line of `endings` in its home says; `wait` waits
# for SIGTERM.
FAKE_GPTJAX = """\
#!/usr/bin/env bash
trap 'echo saved; exit 75' TERM
printf '%s|' "$@" >> ~/began; echo >> ~/began
how=$(sed -n "$(wc -l < ~/began)p" ~/endings)
while [ "$how" = wait ]; do sleep 0.05; done
exit "$how"
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Returns a function that makes two hosts whose attempts end as given; it returns the
    environment of the script."""

    def make(first: str, second: str) -> dict[str, str]:
        for host, endings in enumerate((first, second)):
            programs = tmp_path / str(host) / "gptjax" / ".venv" / "bin"
            programs.mkdir(parents=True)
            (tmp_path / str(host) / "endings").write_text("\n".join(endings.split()) + "\n")
            (programs / "gptjax").write_text(FAKE_GPTJAX)
            (programs / "gptjax").chmod(0o755)
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
        (tmp_path / "bin" / "gcloud").chmod(0o755)
        return os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "WORDS": str(tmp_path / "words"),
            "HOMES": str(tmp_path),
            "RESTART_SECONDS": "0",
        }

    return make


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def attempts(folder: Path, host: int) -> list[str]:
    file = folder / str(host) / "began"
    return file.read_text().splitlines() if file.exists() else []


def calls(folder: Path) -> list[list[str]]:
    """The arguments of each call of gcloud."""
    written = (folder / "words").read_text().split("\037")[:-1]
    return [call.split("\036")[:-1] for call in written]


def test_hosts_are_restarted_until_all_succeed(hosts, tmp_path) -> None:
    environment = hosts("75 69 134 0", "75 137 134 0")
    overrides = ["--run", "/shared/a run", "--data.sources", "/text/*.jsonl", "it's $HOME"]
    done = run(environment, "train", "slice", "configs/debug.py", *overrides)
    assert done.returncode == 0, done.stderr
    for host in (0, 1):
        assert (
            attempts(tmp_path, host)
            == ["|".join(["train", "configs/debug.py", *overrides, ""])] * 4
        )
    assert re.findall(r"ended with (\d+); restarting", done.stderr) == ["75", "69", "134"]
    called = calls(tmp_path)
    assert len(called) == 4
    assert called[0][:6] == ["compute", "tpus", "tpu-vm", "ssh", "slice", "--worker=all"]


@pytest.mark.parametrize(("first", "second", "code"), [("69", "65", 65), ("2", "2", 2)])
def test_permanent_error_ends_training_whatever_the_other_host_returns(
    hosts, tmp_path, first, second, code
) -> None:
    done = run(hosts(first, second), "train", "slice", "configs/debug.py")
    assert done.returncode == code
    assert len(attempts(tmp_path, 0)) == len(attempts(tmp_path, 1)) == 1
    assert f"a host ended with {code}, which a restart does not fix" in done.stderr


def test_restarts_are_limited(hosts, tmp_path) -> None:
    environment = hosts("75 75 75", "75 75 75") | {"MAX_RESTARTS": "2"}
    assert run(environment, "train", "slice", "configs/debug.py").returncode == 75
    assert len(attempts(tmp_path, 0)) == 3


@pytest.mark.parametrize("how", ["stop", "ctrl-c"])
def test_manual_stop_saves_and_does_not_restart(hosts, tmp_path, how) -> None:
    environment = hosts("wait 0", "75 0")  # the second host's SIGTERM is gptjax's own affair
    command = [str(SCRIPT), "train", "slice", "configs/debug.py"]
    # Tests that run in the background are deaf to Ctrl-C, and a shell that is cannot heed it.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed,
    ) as training:
        deadline = time.monotonic() + 30
        while not attempts(tmp_path, 0):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)  # the stand-in's trap comes before that line, its pid file too
        if how == "stop":
            assert run(environment, "stop", "slice").returncode == 0
        else:
            os.killpg(training.pid, signal.SIGINT)
        _, stderr = training.communicate(timeout=30)
    assert training.returncode == 75, stderr
    assert len(attempts(tmp_path, 0)) == 1
    assert "stopped manually" in stderr


def test_process_that_outlived_its_connection_is_stopped_first(hosts, tmp_path) -> None:
    environment = hosts("wait 0", "75 0")
    (tmp_path / "held").write_text(
        "cd ~/gptjax; exec 9>>.lock; flock 9; echo $BASHPID > .pid; exec .venv/bin/gptjax old"
    )
    held = ["bash", str(tmp_path / "held")]
    home = environment | {"HOME": str(tmp_path / "0")}
    with subprocess.Popen(held, env=home, stdout=subprocess.PIPE, text=True) as old:
        deadline = time.monotonic() + 30
        while not attempts(tmp_path, 0):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        done = run(environment, "train", "slice", "configs/debug.py")
        assert old.communicate(timeout=30)[0] == "saved\n"
    assert old.returncode == 75
    assert done.returncode == 0, done.stderr
    assert attempts(tmp_path, 0) == ["old|", "train|configs/debug.py|"]
    assert len(attempts(tmp_path, 1)) == 2


def test_slice_is_created_installed_and_deleted(hosts, tmp_path) -> None:
    environment = hosts("0", "0")
    tools = "#!/usr/bin/env bash\nprintf '%s|' \"$@\" >> ~/installed; echo >> ~/installed\n"
    (tmp_path / "bin" / "python3").write_text(tools)
    (tmp_path / "bin" / "python3").chmod(0o755)
    for host in (0, 1):  # where scp would have put it
        archive = tmp_path / str(host) / "gptjax.tar.gz"
        subprocess.run(["git", "archive", "-o", archive, "HEAD"], cwd=REPO, check=True)
    version = "v2-alpha-tpuv5-lite"
    assert run(environment, "create", "slice", "v5litepod-16", version, "--spot").returncode == 0
    installed = run(environment, "install", "slice")
    assert installed.returncode == 0, installed.stderr
    assert (
        run(environment, "all", "slice", "mkdir -p ~/shared && echo made").stdout.count("made") == 2
    )
    assert run(environment, "delete", "slice").returncode == 0
    called = calls(tmp_path)
    options = ["--accelerator-type=v5litepod-16", f"--version={version}", "--spot"]
    assert called[0] == ["compute", "tpus", "tpu-vm", "create", "slice", *options]
    assert [call[3] for call in called] == ["create", "scp", "ssh", "ssh", "delete"]
    packages, own = (tmp_path / "1" / "installed").read_text().splitlines()[-2:]
    assert packages.endswith("--require-hashes|-r|.requirements.txt|")
    listed = (tmp_path / "1" / "gptjax" / ".requirements.txt").read_text()
    assert "\njax==" in listed
    assert "\nlibtpu==" in listed
    assert own.endswith("--no-deps|--no-build-isolation|-e|.|")


@pytest.mark.parametrize("words", [[], ["train"], ["train", "slice"], ["fly", "slice"]])
def test_usage_errors_are_reported_before_gcloud_is_called(hosts, tmp_path, words) -> None:
    done = run(hosts("", ""), *words)
    assert done.returncode == 2
    assert "tpu_vm.sh: " in done.stderr
    assert not (tmp_path / "words").exists()


SHELL = [SCRIPT, REPO / "launch" / "slurm.sbatch"]


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_script_has_valid_bash_syntax(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck: apt-get install it")
@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shellcheck_reports_nothing(file: Path) -> None:
    done = subprocess.run(["shellcheck", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
