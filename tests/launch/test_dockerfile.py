"""launch/Dockerfile and the files that it refers to; the image is not built, for want of Docker."""

import importlib.metadata
import re
import shlex
import tomllib
from pathlib import Path

from gptjax.cli import arguments, main

REPO = Path(__file__).resolve().parents[2]
TEXT = (REPO / "launch" / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def instruction_arguments(instruction: str) -> list[str]:
    """The arguments of each use of an instruction, with continued lines joined."""
    return re.findall(rf"^{instruction} (.*)$", TEXT.replace("\\\n", " "), re.M)


def test_copied_files_exist_and_include_all_that_the_build_reads() -> None:
    copied = {word for words in instruction_arguments("COPY") for word in words.split()[:-1]}
    assert [path for path in copied if not (REPO / path).exists()] == []
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "gptjax"} <= copied


def test_installed_extras_exist_and_documented_builds_are_supported() -> None:
    (install,) = [words for words in instruction_arguments("RUN") if "pip install" in words]
    branches = dict(re.findall(r"(\w+)\) extra=(\S*) ;;", install))
    known = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    for extra in filter(None, branches.values()):
        assert re.fullmatch(r"'jax\[(\w+)\]'", extra)[1] in known
    (own,) = re.findall(r"'\.\[([\w,]+)\]'", install)
    assert set(own.split(",")) <= set(PROJECT["optional-dependencies"])
    assert set(re.findall(r"--build-arg ACCELERATOR=(\w+) ", TEXT)) == set(branches)


def test_image_has_the_python_version_of_development() -> None:
    (image,) = instruction_arguments("FROM")
    version = re.fullmatch(r"python:(\d\.\d+)-slim", image)[1]
    assert version == (REPO / ".python-version").read_text().strip()


def test_libtpu_constraint_still_conflicts_with_jax() -> None:
    """When this fails, the `grep -v` in launch/Dockerfile and launch/tpu_vm.sh can be removed."""
    (pinned,) = re.findall(r"^libtpu==([\d.]+)", (REPO / "constraints.txt").read_text(), re.M)
    required = [r for r in importlib.metadata.requires("jax") if r.startswith("libtpu")]
    (version,) = re.findall(r"libtpu==([\d.]+)\.\*", required[0])
    assert pinned != version


def test_documented_commands_parse(monkeypatch) -> None:
    monkeypatch.chdir(REPO)
    commands = re.findall(r"^#\s+docker run .*? gptjax:\w+ (.*)$", TEXT, re.M)
    assert commands
    for command in commands:
        words = shlex.split(command.replace("CONFIG", "configs/quickstart.py"))
        args, rest = main.parser().parse_known_args(words)
        assert arguments.resolve(args, rest)
