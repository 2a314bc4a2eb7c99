"""The presets that come with gptjax: Python files of functions that return a whole Config.

They lie in configs/ at the top of the repository, and in gptjax/configs/ of an installed package.
"""

import ast
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def preset_folder() -> Path:
    """The folder of the presets that come with gptjax."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def find_preset(name: str) -> Path | None:
    """The file of a preset by its plain name, such as gpt2; None where there is none."""
    file = preset_folder() / f"{name}.py"
    return file if name.isidentifier() and name != "__init__" and file.is_file() else None


def list_presets() -> list[tuple[str, str]]:
    """Each preset as (FILE:FUNCTION, the first line of its docstring); `:main` is left out."""
    listed = []
    for file in sorted(preset_folder().glob("[!_]*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                name = file.stem if node.name == "main" else f"{file.stem}:{node.name}"
                text = (ast.get_docstring(node) or "").partition("\n")[0]
                listed.append((name, text))
    return listed
