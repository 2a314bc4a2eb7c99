"""launch/Dockerfile and the files that it refers to; the image is not built, for want of Docker."""

import importlib.metadata
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from gptjax.cli import arguments, main

REPO = Path(__file__).resolve().parents[2]
LISTS = REPO / "launch" / "requirements"
TEXT = (REPO / "launch" / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def instruction_arguments(instruction: str) -> list[str]:
    """The arguments of each use of an instruction, with continued lines joined."""
    return re.findall(rf"^{instruction} (.*)$", TEXT.replace("\\\n", " "), re.M)


def test_copied_files_exist_and_include_all_that_the_build_reads() -> None:
    copied = {word for words in instruction_arguments("COPY") for word in words.split()[:-1]}
    assert [path for path in copied if not (REPO / path).exists()] == []
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "gptjax"} <= copied


def test_documented_builds_are_supported_and_install_existing_lists() -> None:
    (install,) = [words for words in instruction_arguments("RUN") if "pip install" in words]
    built = set(re.findall(r"--build-arg ACCELERATOR=(\w+) ", TEXT))
    branches = re.findall(r"(\w+(?: \| \w+)*)\) extra=", install)
    assert built == {name.strip() for names in branches for name in names.split("|")}
    assert all((LISTS / f"{name}.txt").exists() for name in built)
    assert "--require-hashes" in install


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda12", "tpu"])
def test_listed_packages_have_hashes_and_the_constraints_versions(name) -> None:
    text = (LISTS / f"{name}.txt").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.M))
    lines = (REPO / "constraints.txt").read_text()
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)", lines, re.M))
    libtpu = {"libtpu"}  # of which jax requires another version than the planner
    shared = pins.keys() & constraints.keys() - libtpu
    assert {k: pins[k] for k in shared} == {k: constraints[k] for k in shared}
    assert name != "cpu" or pins.keys() <= constraints.keys()
    listed = re.split(r"^(?=\S)", text, flags=re.M)[1:]
    assert len(listed) == len(pins) > 0
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", one) for one in listed)


def test_accelerators_lists_hold_what_jax_requires_for_them() -> None:
    required = importlib.metadata.requires("jax")
    for extra, name in (("cuda13", "cuda"), ("cuda12", "cuda12"), ("tpu", "tpu")):
        of_extra = [r for r in required if re.search(rf"extra == .{extra}\b", r)]
        packages = {re.match(r"[\w-]+", one)[0] for one in of_extra}
        text = "".join((LISTS / f"{list_}.txt").read_text() for list_ in ("cpu", name))
        assert {p for p in packages if not re.search(rf"^{p}==", text, re.M)} == set()


def test_image_has_the_python_version_of_development() -> None:
    (image,) = instruction_arguments("FROM")
    version = re.fullmatch(r"python:(\d\.\d+)-slim", image)[1]
    assert version == (REPO / ".python-version").read_text().strip()


def test_documented_commands_parse(monkeypatch) -> None:
    monkeypatch.chdir(REPO)
    commands = re.findall(r"^#\s+docker run .*? gptjax:\w+ (.*)$", TEXT, re.M)
    assert commands
    for command in commands:
        words = shlex.split(command.replace("CONFIG", "configs/quickstart.py"))
        args, rest = main.parser().parse_known_args(words)
        assert arguments.resolve(args, rest)
