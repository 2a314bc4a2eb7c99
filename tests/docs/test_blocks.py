"""Every command in README and docs parses, every Python block compiles, and many of them run."""

import ast
import importlib
import os
import re
import shlex
from pathlib import Path

import pages
import pytest
from pages import PAGES, REPO, Block

import gptjax
from gptjax import config
from gptjax.cli import main
from gptjax.config import Config, registry

pytestmark = pytest.mark.usefixtures("quick_compile")

FIELDS = {name.replace("*", "NAME") for name in config.resume_classes()}
SECTIONS = {name[:dot] for name in FIELDS for dot in range(len(name)) if name[dot] == "."}
EXAMPLES = {"configs/mine.py", "configs/my_model.py"}  # files that a page tells the reader to write
PYTHON = pages.blocks("python")


def commands(block: Block) -> list[str]:
    """The commands of a shell block; the text of here-documents is left out."""
    source = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block.text, flags=re.MULTILINE | re.DOTALL)
    joined = source.replace("\\\n", " ")
    return [part.strip() for line in joined.splitlines() for part in line.split("&&")]


def gptjax_arguments(command: str) -> list[str] | None:
    """The arguments of gptjax in a command, or None where it is another program's."""
    words = shlex.split(command, comments=True)
    for place, word in enumerate(words):
        if word in ("gptjax", ".venv/bin/gptjax"):
            return words[place + 1 :]
    return None


def check_arguments(argv: list[str]) -> None:
    """Parses the arguments of gptjax as the command line does, without running the command."""
    args, rest = main.parser().parse_known_args(argv)
    if not args.command.overrides:
        assert rest == []
    elif re.match(r"(configs/\w+\.py|[a-z]\w+)(:[a-z]|$)", args.config or ""):
        config.resolve(args.config, rest).check()
    else:  # a run, or a placeholder
        config.override(Config(), rest, "gptjax")


SHELL = [
    pytest.param(argv, id=f"{block}-{number}")
    for block in pages.blocks("sh")
    for number, command in enumerate(commands(block))
    if (argv := gptjax_arguments(command)) is not None
]


@pytest.mark.parametrize("argv", SHELL)
def test_shell_command_parses(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    check_arguments(argv)


def test_readme_keeps_the_quickstart_and_test_commands() -> None:
    marked = {block.comment: block for block in pages.blocks("sh") if block.page == "README.md"}
    assert commands(marked["quickstart"])[-1] == ".venv/bin/gptjax train configs/quickstart.py"
    assert commands(marked["test"])[-1] == ".venv/bin/python -m pytest"


def inline_commands(page: str) -> list[list[str]]:
    """Complete gptjax commands in code spans, with numbers for their placeholders."""
    found = []
    for span in pages.spans(page):
        words = shlex.split(span) if span.startswith("gptjax ") else []
        named = {word.partition(":")[0] for word in words}
        unfinished = named & {"…", "...", "COMMAND", "--help", *EXAMPLES}
        if len(words) > 2 and not unfinished:
            found.append(["1" if word in ("N", "B") else word for word in words[1:]])
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page not in pages.HISTORY])
def test_inline_commands_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    for argv in inline_commands(page):
        check_arguments(argv)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in pages.HISTORY])
def test_paths_and_fields_exist(page: str) -> None:
    shell = [block.text for block in pages.blocks("sh") if block.page == page]
    for path in re.findall(
        r"(?<![\w/.])(?:gptjax|tests|configs|launch|docs)/[\w./-]*\w",
        " ".join([*pages.spans(page), *shell]),
    ):
        made = path in EXAMPLES or path.startswith(("docs/_build", "docs/reference"))
        assert made or (REPO / path).exists(), f"{page}: {path}"
    for span in pages.spans(page):
        name = span.removeprefix("--").partition("=")[0].split()[0].replace("-", "_")
        section, _, last = name.rpartition(".")
        if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", name) and section.split(".")[0] in SECTIONS:
            known = name in FIELDS or name in SECTIONS or last in ("json", "jsonl", "py", "md")
            assert known, f"{page}: {span} is no field"


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_block_compiles_and_its_imports_exist(block: Block) -> None:
    tree = ast.parse(block.text)
    compile(tree, str(block), "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gptjax"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "gptjax"
        ):
            assert node.attr in gptjax.__all__


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> Path:
    """A folder with configs/ and a run of a tiny model that was trained for two steps."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(REPO / "configs")
    (folder / "text.txt").write_text("def f():\n    return 0\n" * 100)
    (folder / "valid.txt").write_text("def g():\n    return 1\n" * 100)
    command = (
        "train configs/debug.py --run runs/quickstart --data.sources text.txt --data.valid-sources "
        "valid.txt --data.store data/store --train.tokens 2048 --optim.warmup-tokens 0 "
        "--model.layers 1 --model.embed 16 --eval.batch 8 --eval.sample-tokens 4 --eval.prompts"
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main.main(command.split()) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block))
        for block in PYTHON
        if not block.comment.startswith("needs")
    ],
)
@pytest.mark.slow
def test_python_block_runs(block: Block, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_run)
    for value in vars(registry).values():  # what a block registers is gone after the test
        if isinstance(value, registry.Registry):
            monkeypatch.setattr(value, "_items", dict(value._items))
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(block.text, str(block), "exec"), names)
    if "main" in names:  # the block is a preset
        names["main"]().check()
