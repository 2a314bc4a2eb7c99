"""Which checkpoints a local folder has. Imports nothing heavy."""

from pathlib import Path

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
