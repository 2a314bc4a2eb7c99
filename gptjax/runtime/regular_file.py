"""Reading files that a user names: never one that has no end, or that waits for a writer."""

import stat
from pathlib import Path

from gptjax.errors import DataError

_LARGEST = 4 << 30  # bytes of a file that is read whole


def read(path: Path, name: str) -> bytes:
    """The contents of a file, which messages call `name`. Raises DataError."""
    check(path, name)
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{name}: has more than {_LARGEST >> 30} GiB; give a part of it")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None


def check(path: Path, name: str) -> None:
    """Raises DataError for what is neither a file nor a folder, such as a pipe or /dev/zero."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{name}: is a pipe or a device; give a file")
