"""File locks on folders (flock): the kernel releases one however its process ends."""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptjax.errors import OutputError


@contextmanager
def held(
    file: Path,
    name: str,
    waiting: Callable[[str], None] | None = None,
    patience: float = float("inf"),
) -> Iterator[None]:
    """Holds the lock of a file while entered; the file contains the name of the process.

    `name` is the folder's name in errors. If another process holds the lock, calls `waiting` with a
    message and waits up to `patience` seconds. Raises OutputError after that, or at once without
    `waiting`; OSError if the file cannot be written.
    """
    with file.open("a+") as lock:
        ends = time.monotonic() + (0 if waiting is None else patience)
        reported = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                in_use = f"{name}: in use by {lock.read().strip()}"
            if waiting is None or time.monotonic() > ends:
                raise OutputError(in_use)
            if not reported:
                waiting(in_use)
                reported = True
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield
        lock.truncate(0)
