"""The reference pages, generated from the code: configuration fields and command-line options.

conf.py calls `write` at each build; docs/reference/ is not committed.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from gptjax import config
from gptjax.cli import main


def write(folder: Path) -> None:
    """Writes config.md and cli.md; a page that has not changed keeps its date."""
    folder.mkdir(exist_ok=True)
    for name, text in {"config.md": config_page(), "cli.md": cli_page()}.items():
        file = folder / name
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


# --- configuration -------------------------------------------------------------------------------

CONFIG_HEAD = """# Configuration reference

Every field of `gptjax.config.Config`, with its type, its default and its meaning. Set a field on
the command line by its dotted name (`--optim.lr 3e-4`), in a preset by its Python name, or in a
JSON file. `gptjax config CONFIG` prints all values of a configuration and where each came from.

The column *resume* says how a run that resumes treats a change of the field:

- **identity**: the field decides which run this is. A resume with another value is refused.
- **schedule**: the field may change, and training changes with it. The change is reported.
- **stage**: the field belongs to a stage of training. It may change while its stage is to come, and
  the change is reported; of a stage that is over it is refused.
- **free**: the field may change and leaves the mathematics as it is.
"""


def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, its base classes included."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        body = tree.body[0].body
        for field, following in zip(body, [*body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign):
                continue
            prose = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            found[field.target.id] = inspect.cleandoc(following.value.value) if prose else ""
    return found


def sections(cls: type = config.Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every dataclass of the configuration with its dotted name, outer ones first."""
    yield prefix, cls
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{prefix}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(hint):
            yield from sections(hint, name)
        elif typing.get_origin(hint) is Mapping:
            inner = typing.get_args(hint)[1]
            if dataclasses.is_dataclass(inner):
                yield from sections(inner, f"{name}.NAME")


def config_page() -> str:
    """The page of all fields, a table for each section."""
    parts = [CONFIG_HEAD]
    for prefix, cls in sections():
        hints, docs = typing.get_type_hints(cls), field_docs(cls)
        rows = []
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            if dataclasses.is_dataclass(hint):
                continue
            name = f"{prefix}.{field.name}".lstrip(".")
            cells = (
                f"`{name}`",
                f"`{_type(hint)}`",
                f"`{_default(field)}`",
                field.metadata["resume"],
                " ".join(docs[field.name].split()),
            )
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts += [
            f"## {prefix or 'The top level'}\n",
            _escaped(inspect.cleandoc(cls.__doc__ or "")) + "\n",
            "| field | type | default | resume | meaning |\n|---|---|---|---|---|",
            *map(_escaped, rows),
            "",
        ]
    return "\n".join(parts)


def _escaped(text: str) -> str:
    """Docstrings are plain text: angle brackets, stars and dollars are no markup."""
    outside_code = lambda part: re.sub(r"([<>*$_\[\]])", r"\\\1", part)
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else outside_code(part) for part in parts)


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"list of {_type(args[0])}"
    if origin is Mapping:
        return f"{'sections' if dataclasses.is_dataclass(args[1]) else 'numbers'} by name"
    if args:
        return " or ".join(_type(arg) for arg in args)
    return {type(None): "None", str: "text", int: "integer", float: "number", bool: "boolean"}.get(
        hint, str(hint)
    )


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is dict:
        return "none"
    value = field.default
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "()"
    return repr(value)


# --- command line --------------------------------------------------------------------------------

CLI_HEAD = """# Command-line reference

Every command and its options. A command that takes CONFIG also takes an override for each field of
the [configuration](config.md), such as `--optim.lr 3e-4`; `gptjax COMMAND CONFIG --help` lists
them. Each option's default stands in parentheses. The [exit codes](../faq.md#exit-codes) say how a
command ended.
"""


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands in their order, with the members of groups."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from commands(sub)
            return
    yield parser


def cli_page() -> str:
    """The page of all commands: a usage line, a sentence, and a table of the options."""
    parts = [CLI_HEAD]
    for parser in commands(main.parser()):
        parts += [
            f"## {parser.prog}\n",
            _escaped(parser.description or "") + "\n",
            f"```text\n{usage(parser)}\n```\n",
        ]
        shown = [a for a in parser._actions if a.help is not argparse.SUPPRESS and a.dest != "help"]
        if shown:
            parts.append("| argument | meaning |\n|---|---|")
            parts += [f"| `{_spelled(action)}` | {_help(action)} |" for action in shown]
            parts.append("")
    return "\n".join(parts)


def usage(parser: argparse.ArgumentParser) -> str:
    """The usage line of a command, at a width that does not depend on the terminal."""
    formatter = argparse.HelpFormatter(parser.prog, width=96)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    return re.sub(r"\x1b\[[\d;]*m", "", formatter.format_help()).strip()


def _spelled(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    if action.option_strings and action.nargs != 0:
        chosen = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
        names += f" {action.metavar or chosen or action.dest.upper()}"
    return names.replace("|", "\\|")


def _help(action: argparse.Action) -> str:
    return _escaped((action.help or "").replace("%%", "%")).replace("|", "\\|")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "reference"))
