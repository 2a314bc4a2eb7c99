"""The parts of the documentation that follow from the code agree with it."""

import ast
import functools
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pages
import pytest
from pages import DOCS, REPO

import gptjax
from gptjax import config, errors
from gptjax.cli import main
from gptjax.config import Config


def script(name: str) -> ModuleType:
    """A script of docs/, imported under another name than a package could have."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_levels_is_up_to_date() -> None:
    levels = script("levels")
    assert levels.PICTURE.read_text() == levels.picture(), "run: python docs/levels.py"


def test_the_configuration_reference_has_every_field_with_its_meaning(tmp_path: Path) -> None:
    reference = script("reference")
    reference.write(tmp_path)
    page = (tmp_path / "config.md").read_text()
    for name in config.flatten(Config()):
        (row,) = re.findall(rf"^\| `{re.escape(name)}` \|.*$", page, re.MULTILINE)
        meaning = row.rstrip(" |").rpartition(" | ")[2]
        assert len(meaning) > 5, f"{name}: has no docstring"


def test_the_command_reference_has_every_command_and_option(tmp_path: Path) -> None:
    reference = script("reference")
    reference.write(tmp_path)
    page = (tmp_path / "cli.md").read_text()
    found = list(reference.commands(main.parser()))
    assert len(found) > 12
    for parser in found:
        section = page[page.index(f"## {parser.prog}\n") :].partition("\n## ")[0]
        for option in re.findall(r"^  (?:-\w, )?(--[\w-]+)", parser.format_help(), re.MULTILINE):
            assert option == "--help" or f"`{option}" in section, f"{parser.prog} {option}"


def test_the_readme_is_at_most_12_kilobytes() -> None:
    assert len((REPO / "README.md").read_bytes()) <= 12_000


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {gptjax.__version__}\n" in (REPO / "CITATION.cff").read_text()


# --- questions by error message ------------------------------------------------------------------


@functools.cache
def messages() -> list[str]:
    """Every text in the package, with … for what is filled in."""
    found = []
    for file in sorted((REPO / "gptjax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        part.value if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize(
    "message", re.findall(r"^### `(.*)`$", pages.text("docs/faq.md"), re.MULTILINE)
)
def test_a_message_of_the_questions_is_one_of_gptjax(message: str) -> None:
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    assert any(pattern.fullmatch(text) for text in messages()), message


def test_every_exit_code_is_explained() -> None:
    known = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    page = pages.text("docs/faq.md")
    told = {int(code) for code in re.findall(r"^\| (\d+)", page, re.MULTILINE)}
    assert known <= told
