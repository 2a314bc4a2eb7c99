"""Log files of a run in a bucket: written on this machine, and uploaded as they grow.

A bucket's objects are written whole, and what draws metrics or records a profile wants a folder.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptjax import bucket
from gptjax.errors import OutputError

_PERIOD_S = 30.0
_PATIENCE_S = 60.0


class Mirror:
    """A folder of this machine whose files are copied to a folder in a bucket."""

    def __init__(self, folder: Path, place: str, say: Callable[[str], None]) -> None:
        self.folder, self._place, self._say = folder, place, say
        self._kv: Any = bucket.open_kvstore(place)
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of change of each file
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._complained = False

    @classmethod
    @contextmanager
    def kept(
        cls, place: str, names: Sequence[str], say: Callable[[str], None], disk: Path | None = None
    ) -> Iterator["Mirror"]:
        """A mirror with the files `names` of the bucket, which is uploaded every half a minute
        while entered, and at the end.

        With `disk`, in a folder that outlives a kill: a file there that is longer than the bucket's
        is what had not been uploaded.
        """
        with contextlib.ExitStack() as stack:
            folder = disk or stack.enter_context(tempfile.TemporaryDirectory(prefix="gptjax-"))
            mirror = cls(Path(folder), place, say)
            mirror.folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                mirror._fetch(name)
            thread = threading.Thread(target=mirror._go, name="mirror", daemon=True)
            thread.start()
            try:
                yield mirror
            finally:
                mirror._ended.set()
                thread.join()
                mirror.upload()

    def _fetch(self, name: str) -> None:
        what = f"{self._place}/{name}: cannot be read"
        read = lambda: self._kv.read(name).result()
        found = bucket.patiently(read, what, self._say, _PATIENCE_S)
        file = self.folder / name
        here = file.stat().st_size if file.exists() else -1
        if found.state == "value" and len(found.value) > here:
            file.write_bytes(found.value)

    def _go(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self.upload()

    def upload(self) -> None:
        """Copies every file that has changed. A failure is told once, and mended the next time."""
        with self._lock:
            try:
                for path, _, names in os.walk(self.folder):
                    for name in names:
                        self._send(Path(path, name))
                self._complained = False
            except (OutputError, OSError) as error:
                if not self._complained:
                    self._say(f"{error}; training goes on")
                self._complained = True

    def _send(self, file: Path) -> None:
        name = file.relative_to(self.folder).as_posix()
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            status = file.stat()
            state = status.st_size, status.st_mtime_ns
            if state == self._sent.get(name) or not status.st_size:
                return
            contents = file.read_bytes()
            what = f"{self._place}/{name}: was not uploaded"
            write = lambda: self._kv.write(name, contents).result()
            bucket.patiently(write, what, lambda line: None, _PATIENCE_S)
            self._sent[name] = state
