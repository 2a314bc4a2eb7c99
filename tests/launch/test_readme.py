"""launch/README.md agrees with the launchers, and the documented commands parse."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from gptjax import errors
from gptjax.cli import arguments, main

REPO = Path(__file__).resolve().parents[2]
LAUNCH = REPO / "launch"
PAGE = (LAUNCH / "README.md").read_text()


def rows() -> dict[int, str]:
    """The launchers' action by exit code."""
    found = {}
    for codes, action in re.findall(
        r"^\| ([\d, ]+)(?:, and others)? \|[^|]+\| (.+) \|$", PAGE, re.M
    ):
        found |= {int(code): action for code in codes.split(",")}
    return found


RESTART_CODES = {code for code, action in rows().items() if action == "restart"}


def test_every_exit_code_is_documented() -> None:
    known = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    assert known <= set(rows())


def test_every_launcher_is_documented_and_restarts_on_the_same_codes() -> None:
    named = set(re.findall(r"^\|[^|]+\| `([\w.]+)` \|", PAGE, re.M))
    there = {file.name for file in LAUNCH.iterdir() if file.is_file()} - {"README.md"}
    assert named >= there
    for name in ("slurm.sbatch", "tpu_vm.sh"):
        (codes,) = re.findall(r"^\s+(0(?: \| \d+)+)\) ;;", (LAUNCH / name).read_text(), re.M)
        assert set(map(int, codes.split("|"))) - {0, 255} == RESTART_CODES, name
    spec = importlib.util.spec_from_file_location("ray_job", LAUNCH / "ray_job.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.RESTART_CODES == RESTART_CODES
    yaml = pytest.importorskip("yaml")
    jobset = next(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert set(job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]) == RESTART_CODES


def documented(name: str) -> list[str]:
    """Each CONFIG with its overrides in a file's comments, with continued lines joined."""
    head = re.sub(r" \\\\?\n#?\s+", " ", (LAUNCH / name).read_text())
    overrides = r"(?: --[\w.-]+ (?:'[^']*'|[^\s'`]+))*"
    return re.findall(rf"configs/\w+\.py:[a-z]\w+{overrides}", head)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (name, line)
        for name in ("slurm.sbatch", "tpu_vm.sh", "ray_job.py", "gke_jobset.yaml", "README.md")
        for line in documented(name)
    ],
)
def test_documented_training_command_parses(name: str, line: str, monkeypatch) -> None:
    monkeypatch.chdir(REPO)
    args, rest = main.parser().parse_known_args(["train", *shlex.split(line)])
    assert arguments.resolve(args, rest)


def test_launchers_contain_commands() -> None:
    for name in ("slurm.sbatch", "tpu_vm.sh", "ray_job.py"):
        assert any(re.search(r" --run (/shared|gs:/)/", line) for line in documented(name)), name
