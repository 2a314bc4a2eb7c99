"""launch/README.md says what the files do, and what their heads show can be run."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from gptjax import errors
from gptjax.cli import main

REPO = Path(__file__).resolve().parents[2]
LAUNCH = REPO / "launch"
PAGE = (LAUNCH / "README.md").read_text()


def rows() -> dict[int, str]:
    """What is done on each exit code."""
    found = {}
    for codes, action in re.findall(
        r"^\| ([\d, ]+)(?:, and others)? \|[^|]+\| (.+) \|$", PAGE, re.M
    ):
        found |= {int(code): action for code in codes.split(",")}
    return found


AGAIN = {code for code, action in rows().items() if action.startswith("again")}


def test_every_code_that_gptjax_ends_with_is_told() -> None:
    known = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    assert known <= set(rows())


def test_every_file_is_told_and_restarts_on_the_same_codes() -> None:
    named = set(re.findall(r"^\|[^|]+\| `([\w.]+)` \|", PAGE, re.M))
    there = {file.name for file in LAUNCH.iterdir() if file.is_file()} - {"README.md"}
    assert named >= there
    for name in ("slurm.sbatch", "tpu_vm.sh"):
        (codes,) = re.findall(r"^\s+(0(?: \| \d+)+)\) ;;", (LAUNCH / name).read_text(), re.M)
        assert set(map(int, codes.split("|"))) - {0, 255} == AGAIN, name
    spec = importlib.util.spec_from_file_location("ray_job", LAUNCH / "ray_job.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.AGAIN == AGAIN
    yaml = pytest.importorskip("yaml")
    jobset = next(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert set(job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]) == AGAIN


def shown(name: str) -> list[str]:
    """Each CONFIG with its overrides in the head of a file, whose lines may go on."""
    head = re.sub(r" \\\\?\n#?\s+", " ", (LAUNCH / name).read_text())
    overrides = r"(?: --[\w.-]+ (?:'[^']*'|[^\s'`]+))*"
    return re.findall(rf"configs/\w+\.py:[a-z]\w+{overrides}", head)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (name, line)
        for name in ("slurm.sbatch", "tpu_vm.sh", "ray_job.py", "gke_jobset.yaml", "README.md")
        for line in shown(name)
    ],
)
def test_what_a_head_shows_can_be_trained(name: str, line: str, monkeypatch) -> None:
    monkeypatch.chdir(REPO)
    args, rest = main._parser().parse_known_args(["train", *shlex.split(line)])
    assert main._resolve(args, rest)


def test_heads_show_commands() -> None:
    for name in ("slurm.sbatch", "tpu_vm.sh", "ray_job.py"):
        assert any(" --run /shared/" in line for line in shown(name)), name
