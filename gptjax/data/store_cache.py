"""Copies of a remote store's files on this machine's disk, made while the store is read.

    CACHE/SHA256        a file of tokens, by its hash
    CACHE/SHA256.PID    one that is being written
    CACHE/lock          held (flock) by the process that writes or removes files

All stores and processes of a machine share the folder. A mapped file is locked by whoever maps it,
so that no process removes it to make room; of the others the least recently used go first.
"""

import fcntl
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax import bucket
from gptjax.errors import DataError, OutputError

_COPY = re.compile(r"[0-9a-f]{64}(\.\d+)?")  # nothing else in the folder is counted, or removed
_SPARE = 0.02  # of the disk, which copies leave free
_PATIENCE_S = 600.0  # of one file while the bucket fails


class File(NamedTuple):
    """A file of a split: what the manifest says of it."""

    sha256: str
    tokens: int
    size: int


class StoreCache:
    """The copies of a split's files: `files` has their tokens, None where there is no copy yet.

    Never raises: what goes wrong is told once, and leaves the files without a copy as they are.
    """

    def __init__(
        self, folder: str, gigabytes: float, place: str, files: Sequence[File], dtype: str
    ) -> None:
        """The cache of the split at a place; without a folder or a size it stays empty."""
        self._folder, self._limit = Path(folder), int(gigabytes * 1e9) if folder else 0
        self._place, self._known, self._dtype = place, files, dtype
        self.files: list[np.ndarray | None] = [None] * len(files)
        self._begun, self._dropped = not self._limit, set[int]()

    def open(self, trusted: bool) -> None:
        """Maps the copies of earlier runs: with `trusted`, those of the right size, as the caller
        checks what it reads; otherwise none before `begin` has looked at their hashes."""
        if self._limit:
            with self._told():
                self._folder = self._folder.expanduser()
                if trusted:
                    self.files[:] = [self._mapped(file) for file in self._known]

    def begin(self) -> None:
        """Begins to copy the other files, one by one, in a thread; once."""
        if not self._begun:
            self._begun = True
            if any(file is None for file in self.files):
                threading.Thread(target=self._copy_all, name="store cache", daemon=True).start()

    def drop(self, numbers: Iterable[int]) -> None:
        """Ends the use of copies that are damaged; each is replaced, but not twice."""
        for number in numbers:
            self.files[number] = None
            self._tell(f"the copy of {self._place}/c/{number} is damaged, and not used")
            if number not in self._dropped:
                self._dropped.add(number)
                self._begun = False
        self.begin()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._begun = True
            self._tell(
                f"{bucket.reason_of(error)}; what is not there of {self._place} is read from the "
                "bucket instead"
            )

    def _tell(self, what: str) -> None:
        print(f"gptjax: data.cache={self._folder}: {what}", file=sys.stderr)

    def _mapped(self, file: File) -> np.ndarray | None:
        """A copy's tokens; None where there is none, or a shorter or longer file."""
        with suppress(FileNotFoundError), (self._folder / file.sha256).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)  # until the mapping ends: it has the descriptor too
            found = os.fstat(stream.fileno())
            if found.st_size == file.size and found.st_nlink:  # not removed meanwhile
                with suppress(OSError):  # another user's
                    os.utime(stream.fileno())
                return np.asarray(np.memmap(stream, self._dtype, "r", shape=(file.tokens,)))
        return None

    def _copy_all(self) -> None:
        """Copies what is missing, up to the first file that there is no room for."""
        with self._told():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            store = bucket.open_kvstore(f"{self._place}/c")
            for number, file in enumerate(self._known):
                if self.files[number] is None:
                    with (self._folder / "lock").open("a") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX)
                        self._copy(store, number, file)
                        self.files[number] = self._mapped(file)

    def _copy(self, store: Any, number: int, file: File) -> None:
        """Writes a copy, unless another process has meanwhile."""
        path = self._folder / file.sha256
        with suppress(FileNotFoundError):
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256:
                    return
            path.unlink()
        self._make_room(file.size)
        what = f"{self._place}/c/{number}"
        read = lambda: _read(store, str(number))
        contents = bucket.patiently(read, what, lambda line: None, _PATIENCE_S)
        if hashlib.sha256(contents).hexdigest() != file.sha256:
            raise DataError(f"{what}: its SHA-256 differs from the manifest's")
        partial = self._folder / f"{file.sha256}.{os.getpid()}"
        try:
            partial.write_bytes(contents)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Removes files of other splits until there is room. Raises OutputError if that is not
        enough."""
        own = {file.sha256 for file in self._known}
        paths = [path for path in self._folder.iterdir() if _COPY.fullmatch(path.name)]
        found = {path: path.stat() for path in paths}
        free = self._limit - sum(stat.st_size for stat in found.values())
        others = sorted(
            (path for path in paths if path.name not in own), key=lambda path: found[path].st_mtime
        )
        if free + sum(found[path].st_size for path in others) >= size:
            for path in others:
                if free >= size:
                    break
                with suppress(BlockingIOError), path.open("rb") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where it is mapped
                    path.unlink()
                    free += found[path].st_size
        if free < size:
            raise OutputError(f"data.cache_gb={self._limit / 1e9:g} has no room for more")
        disk = shutil.disk_usage(self._folder)
        if disk.free - size < _SPARE * disk.total:
            raise OutputError("its disk is full")


def _read(store: Any, name: str) -> bytes:
    """The contents of a file in a bucket."""
    reading = store.read(name)
    # A daemon thread must not be within a C++ library when the interpreter ends: that aborts.
    while not reading.done():
        time.sleep(0.01)
    return reading.result().value
