"""A lock on a folder: the kernel holds it for a process, and lets go however the process ends."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptjax.errors import OutputError


@contextmanager
def held(file: Path, name: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the lock that a file stands for; the file says by whom.

    `name` is what errors call the folder. Where another process has it, `waiting` is told and the
    lock awaited; without `waiting`, raises OutputError. OSError if the file cannot be written.
    """
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            in_use = f"{name}: in use by {lock.read().strip()}"
            if waiting is None:
                raise OutputError(in_use) from None
            waiting(in_use)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield
        lock.truncate(0)
