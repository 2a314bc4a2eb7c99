"""Files and functions of the package stay small enough to be read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import gptjax

PACKAGE = Path(gptjax.__file__).parent
FILE_LINES, FUNCTION_LINES, PARAMETERS = 500, 60, 8

EXCEPTIONS: dict[str, str] = {}
"""Files, and file:function, that exceed a limit, each with its reason."""


def too_large(name: str, source: str) -> Iterator[str]:
    """Names that exceed a limit: the file itself, and functions as file:function."""
    if len(source.splitlines()) > FILE_LINES:
        yield name
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            count = len([one for one in named if one.arg not in ("self", "cls")])
            if lines > FUNCTION_LINES or count > PARAMETERS:
                yield f"{name}:{node.name}"


def test_files_functions_and_parameter_lists_stay_below_the_limits() -> None:
    found = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in too_large(path.relative_to(PACKAGE).as_posix(), path.read_text())
    }
    assert found == set(EXCEPTIONS)


def test_the_check_finds_what_is_too_large() -> None:
    long = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    wide = f"def g(self, {', '.join(f'a{i}' for i in range(PARAMETERS + 1))}): ..."
    assert list(too_large("a.py", long)) == ["a.py:f"]
    assert list(too_large("b.py", wide)) == ["b.py:g"]
    assert list(too_large("c.py", "\n" * (FILE_LINES + 1))) == ["c.py"]
