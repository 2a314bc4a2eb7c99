"""What lies in a run folder, for whoever only looks at it. Imports nothing heavy."""

import json
from pathlib import Path
from typing import Any

from gptjax.errors import DataError

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
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
