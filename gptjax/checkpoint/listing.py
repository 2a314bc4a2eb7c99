"""What lies in a run folder, for whoever only looks at it. Imports nothing heavy."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptjax.errors import DataError

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
EVALUATED = "evaluated"
"""In a line of metrics.jsonl the time of the evaluations whose values follow it."""
START = "start.json"
SOURCE = "source.json"
CERTIFICATE = "certificate.json"
LEFT_OUT = "left_out.json"
COMMITTED = "_CHECKPOINT_METADATA"
"""The file that a finished checkpoint has."""


def steps_in(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdecimal() and (path / COMMITTED).exists()
    )


def read_json(file: Any) -> dict[str, Any] | None:
    """The JSON object in a file; None where the file does not exist. Raises DataError."""
    if not file.exists():
        return None
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}") from None


def read_rows(file: Any) -> Iterator[dict[str, Any]]:
    """The objects with a step in a file of JSON lines, and after each what was evaluated at its
    step; other lines are passed over."""
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        trained, evaluated = split(row)
        yield trained
        if evaluated:
            yield evaluated


def split(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of metrics.jsonl without what was evaluated at its step, and that alone, if any was."""
    names = list(row)
    if EVALUATED not in row:
        return dict(row), {}
    place = names.index(EVALUATED)
    evaluated = {"step": row["step"], "time": row[EVALUATED]}
    return (
        {name: row[name] for name in names[:place]},
        evaluated | {name: row[name] for name in names[place + 1 :]},
    )
