"""launch/Dockerfile, read and not built: that takes a daemon. Its installing step can be tried."""

import importlib.metadata
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from gptjax.cli import main

REPO = Path(__file__).resolve().parents[2]
TEXT = (REPO / "launch" / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its words, with continued lines joined."""
    lines = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines()]


def words_of(name: str) -> list[str]:
    return [words for instruction, words in instructions() if instruction == name]


def test_every_instruction_is_one_that_docker_knows() -> None:
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    names = [name for name, _ in instructions()]
    assert set(names) <= known
    assert names[0] == "FROM"


def test_what_it_copies_is_there_and_is_all_that_installing_reads() -> None:
    copied = [word for words in words_of("COPY") for word in words.split()[:-1]]
    for path in copied:
        assert (REPO / path).exists(), path
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "gptjax"} <= set(copied)
    assert "constraints.txt" in copied


def test_it_runs_gptjax_itself_as_nobody_in_particular() -> None:
    assert words_of("USER") == ["gptjax"]
    names = [name for name, _ in instructions()]
    assert "RUN" not in names[names.index("USER") :]
    # Without a shell, which would not hand on SIGTERM.
    assert json.loads(words_of("ENTRYPOINT")[0]) == ["gptjax"]


def test_it_installs_extras_that_exist_within_the_constraints() -> None:
    (install,) = [words for words in words_of("RUN") if "pip install" in words]
    branches = dict(re.findall(r"(\w+)\) extra=(\S*) ;;", install))
    assert sorted(branches) == ["cpu", "cuda", "tpu"]
    assert words_of("ARG") == ["ACCELERATOR=cpu"]
    known = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    for extra in filter(None, branches.values()):
        assert re.fullmatch(r"'jax\[(\w+)\]'", extra)[1] in known
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    (ours,) = re.findall(r"'\.\[([\w,]+)\]'", install)
    assert set(ours.split(",")) <= set(project["optional-dependencies"])
    assert "-c /tmp/constraints.txt" in install
    (image,) = words_of("FROM")
    python = re.fullmatch(r"python:(\d\.\d+)-slim", image)[1]
    assert python == (REPO / ".python-version").read_text().strip()


def test_constraints_leave_libtpu_to_jax_only_where_they_disagree() -> None:
    (pinned,) = re.findall(r"^libtpu==([\d.]+)", (REPO / "constraints.txt").read_text(), re.M)
    asked = [r for r in importlib.metadata.requires("jax") if r.startswith("libtpu")]
    (version,) = re.findall(r"libtpu==([\d.]+)\.\*", asked[0])
    # When this fails the `grep -v` in launch/Dockerfile and launch/tpu_vm.sh can go.
    assert pinned != version
    assert "grep -v '^libtpu=='" in TEXT


LINES = re.findall(r"^#\s+docker run .*? gptjax:\w+ (.*)$", TEXT, re.M)


def test_its_head_shows_commands() -> None:
    assert len(LINES) == 2
    built = re.findall(r"--build-arg ACCELERATOR=(\w+) ", TEXT)
    assert built == ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize("line", LINES)
def test_a_command_that_it_shows_can_be_parsed(line: str, monkeypatch) -> None:
    monkeypatch.chdir(REPO)
    words = shlex.split(line.replace("CONFIG", "configs/quickstart.py"))
    args, rest = main._parser().parse_known_args(words)
    assert main._resolve(args, rest)
