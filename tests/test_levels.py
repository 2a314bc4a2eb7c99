"""The import graph is a picture: files import downwards only, and light commands stay light."""

import ast
import functools
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import gptjax

PACKAGE = Path(gptjax.__file__).parent

LEVELS = [
    {"errors", "version", "kernels/*"},
    {"bucket"},
    {"config/*", "param_tree"},
    {"runtime/*", "tokenizer/*"},
    {"parallel/*", "data/*"},
    {"model/*"},
    {"checkpoint/*", "sample/*"},
    {"training/*", "hf/*", "report/*"},
    {"evaluate/*", "plan/*"},
    {"finetune/*"},
    {"load_model"},
    {"serve/*", "pretrain/*"},
    {"cli/*"},
    {"__main__", ""},  # "" is the package itself: the public API
]


def level(module: str) -> int:
    """Level of a module, by its path below the package without suffix."""
    for names in (module, f"{module.partition('/')[0]}/*"):
        for number, level_names in enumerate(LEVELS):
            if names in level_names:
                return number
    raise KeyError(module)


def modules() -> dict[str, str]:
    """Source of every file, by path below the package without suffix; "" is the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        found["" if name == "__init__" else name] = path.read_text()
    return found


@functools.cache
def import_statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    """Every import of a source, at its top or later."""
    nodes = ast.walk(ast.parse(source))
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(source: str, known: set[str]) -> Iterator[str]:
    """The files of the package that a source imports."""
    for node in import_statements(source):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != "gptjax":
                continue
            # The longest prefix that is a file; what follows is a name within it.
            for end in range(len(parts), 0, -1):
                file = "/".join(parts[1:end])
                if file in known:
                    yield file
                    break
                if f"{file}/__init__" in known:
                    yield f"{file}/__init__"
                    break


def upward(files: dict[str, str]) -> list[str]:
    """Imports that do not point down, peers of one folder aside."""
    wrong = []
    for file, source in files.items():
        for other in imports(source, set(files)):
            folder = file.partition("/")[0]
            peers = "/" in file and folder == other.partition("/")[0]
            if level(other) > level(file) or (level(other) == level(file) and not peers):
                wrong.append(f"{file} -> {other}")
    return wrong


def test_every_file_has_a_level() -> None:
    assert sorted(name for name in modules() if not _has_level(name)) == []


def _has_level(name: str) -> bool:
    try:
        level(name)
    except KeyError:
        return False
    return True


def test_every_level_names_files_that_exist() -> None:
    found = modules()
    exact = {name for names in LEVELS for name in names if not name.endswith("*")}
    assert exact <= set(found)


def test_files_import_downwards_only() -> None:
    assert upward(modules()) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    files = modules()
    graph = {file: set(imports(source, set(files))) for file, source in files.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) == len(files)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("config/schema", "from gptjax.parallel import sharding"),
        ("config/loading", "import gptjax.training.trainer"),
        ("data/permutation", "from gptjax.training.loss import cross_entropy"),
        ("data/store", "from gptjax.model.decoder import init"),
        ("training/loss", "def f():\n    from gptjax.evaluate import TaskEvaluator"),
        ("training/optimizer", "from gptjax.pretrain.train import pretrain"),
        ("training/objective", "from gptjax.cli.main import main"),
    ],
)
def test_the_check_would_catch_an_import_that_points_up(file: str, line: str) -> None:
    files = modules()
    before = upward(files)
    files[file] += f"\n{line}\n"
    (found,) = set(upward(files)) - set(before)
    assert found.startswith(f"{file} -> ")


def test_tensorflow_is_imported_by_the_data_files_only() -> None:
    users = set()
    for file, source in modules().items():
        for node in import_statements(source):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""]
            if any(name.partition(".")[0].startswith("tensorflow") for name in names):
                users.add(file)
    assert users
    assert all(file.startswith("data/") for file in users)


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("gptjax", {"jax", "jaxlib", "flax", "numpy", "tensorflow"}),
        ("gptjax.cli.main", {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "tensorflow"}),
        ("gptjax.data.permutation", {"jax", "jaxlib", "tensorflow", "tensorstore"}),
        pytest.param(
            "gptjax.runtime.hardware",
            {"jax", "jaxlib", "numpy", "tensorflow"},
            marks=pytest.mark.slow,
        ),
        ("gptjax.cli.inspect", {"jax", "jaxlib", "flax", "numpy", "tensorflow", "tensorstore"}),
        ("gptjax.cli.report", {"jax", "jaxlib", "flax", "numpy", "tensorflow", "tensorstore"}),
        ("gptjax.plan.machines", {"jax", "jaxlib", "numpy", "tensorflow"}),
        ("gptjax.cli.plan", {"tensorflow", "tensorflow_datasets"}),
        pytest.param(
            "gptjax.sample",
            {"tensorflow", "tensorflow_datasets", "optax", "orbax"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "gptjax.checkpoint.run_dir",
            {"tensorflow", "tensorflow_datasets", "optax"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_importing_loads_nothing_heavy_that_it_can_do_without(
    imported: str, absent: set[str]
) -> None:
    code = f"import sys, {imported}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "gptjax" in loaded
    assert loaded & absent == set()


FAMILIES = ("gpt1", "gpt2", "gpt3", "openai", "llama", "falcon", "mistral", "mixtral", "qwen")


def family_names(source: str) -> list[str]:
    """Names of families in a source's code: identifiers and strings, but no docstrings."""
    tree = ast.parse(source)
    bodies = (
        node.body
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    )
    prose = {id(line.value) for body in bodies for line in body if isinstance(line, ast.Expr)}
    words = [
        getattr(node, field)
        for node in ast.walk(tree)
        if id(node) not in prose
        for field in ("id", "attr", "name", "arg", "value")
        if isinstance(getattr(node, field, None), str)
    ]
    plain = lambda word: word.lower().replace("-", "").replace("_", "")
    return [w for w in words if "configs/" not in w and any(f in plain(w) for f in FAMILIES)]


def test_no_code_knows_a_family_by_name_but_the_presets_and_their_declaration() -> None:
    files = modules()
    users = {file for file, source in files.items() if family_names(source)}
    assert users == {"hf/families", "hf/gpt", "hf/llama", "hf/config_keys", "hf/falcon", "hf/rope"}
    caught = 'def f(kind):\n    """Falcon."""\n    return kind == "gpt-2"'
    assert family_names(caught) == ["gpt-2"]


def test_an_installed_package_has_every_folder_with_code() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    folders = {file.parent.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"gptjax.configs"}
    assert set(project["tool"]["setuptools"]["packages"]) == expected
