"""The head of a run in a bucket: its finished checkpoints, and the one job that may write to it.

A bucket has neither locks nor renames. One small object, RUN/head.json, does what both did: every
change to it is a conditional write on the version that was read last (If-Match of S3,
ifGenerationMatch of Google's), so a job that has lost the run cannot change it, however late it
wakes. A checkpoint exists once the head names it, whole or not at all.

The writer changes its entry every few seconds. A job that wants the run takes it where there is no
writer, where the writer was a process of this machine that is gone, or where the entry has not
changed for the writer's lease, by the clock of the one who waits: clocks are never compared.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gptjax import bucket
from gptjax.errors import DataError, OutputError

HEAD = "head.json"
FORMAT = 1
LEASE_S = 60.0
_BEATS = 6  # of a lease
_LOOK_S = 1.0
_PATIENCE_S = 600.0  # of one change while the bucket fails

Say = Callable[[str], None]


@dataclass(frozen=True)
class Writer:
    """The job that may write; `beat` counts its changes, `machine` is its host since it started."""

    name: str
    id: str
    machine: str
    pid: int
    lease: float
    beat: int = 0

    @classmethod
    def here(cls, lease: float) -> "Writer":
        """This process."""
        name = f"process {os.getpid()} on {socket.gethostname()}"
        return cls(name, secrets.token_hex(8), _machine(), os.getpid(), lease)

    def is_gone(self) -> bool:
        """Whether it was a process of this machine, and has ended."""
        if self.machine != _machine():
            return False
        with contextlib.suppress(PermissionError):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
        return False


@dataclass(frozen=True)
class Record:
    """The contents of head.json. `checkpoints` has the folder of each step's checkpoint.

    `saved` is the last step that was ever saved; -1: none. `id` tells runs of one name apart.
    """

    checkpoints: dict[int, str] = field(default_factory=dict)
    set_aside: tuple[str, ...] = ()
    saved: int = -1
    writer: Writer | None = None
    id: str = ""
    format: int = FORMAT

    @classmethod
    def parse(cls, text: bytes, place: str) -> "Record":
        """The record in a JSON text. Raises DataError."""
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']}, not {FORMAT}")
            values["checkpoints"] = {int(k): str(v) for k, v in values["checkpoints"].items()}
            values["set_aside"] = tuple(values["set_aside"])
            values["writer"] = values["writer"] and Writer(**values["writer"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{place}/{HEAD}: is damaged ({str(error)[:200]})") from None

    def text(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self), indent=1).encode()


class Head:
    """The head of one run: read by anybody, written by the job that has taken it."""

    def __init__(self, place: str) -> None:
        """`place` is the run's folder."""
        self.place = place = _whole(place)
        self._kv: Any = bucket.open_kvstore(place)
        self._lock = threading.Lock()
        self._record, self._generation = Record(), b""
        self._own: Writer | None = None
        self._ended = threading.Event()
        self.before_commit: Callable[[], None] = lambda: None  # of a checkpoint, in its thread
        self.lost = ""  # why this job may no longer write; empty while it may

    def read(self, say: Say = lambda line: None) -> Record:
        """The record as it is now. Raises OutputError, DataError."""
        return self._record if self._own else self._fetch(say)[0]

    def exists(self) -> bool:
        """Whether there is one."""
        return bool(self._read(lambda line: None).state == "value")

    def _read(self, say: Say) -> Any:
        what = f"{self.place}/{HEAD}: cannot be read"
        return bucket.patiently(lambda: self._kv.read(HEAD).result(), what, say, _PATIENCE_S)

    def _fetch(self, say: Say) -> tuple[Record, bytes]:
        found = self._read(say)
        record = Record.parse(found.value, self.place) if found.state == "value" else Record()
        return record, found.stamp.generation

    # --- taking and giving back ---

    @contextmanager
    def taken(self, say: Say, patience: float = 0, lease: float = LEASE_S) -> Iterator[None]:
        """Makes this job the writer while entered, and keeps it so.

        Waits until it is known whether another writer lives; for one that does, up to `patience`
        seconds. Raises OutputError after that.
        """
        self._take(say, patience, Writer.here(lease))
        thread = threading.Thread(target=self._renew, args=(lease / _BEATS,), daemon=True)
        thread.start()
        held[self.place] = self
        try:
            yield
        finally:
            del held[self.place]
            self._ended.set()
            thread.join()
            with contextlib.suppress(OutputError):
                self.update(lambda record: replace(record, writer=None), patience=_LOOK_S)
            self._own = None

    def _take(self, say: Say, patience: float, own: Writer) -> None:
        began = since = time.monotonic()
        seen: tuple[str, int] | None = None
        while True:
            looked = time.monotonic()
            record, generation = self._fetch(say)
            writer = record.writer
            silent = writer and seen == (writer.id, writer.beat) and looked - since > writer.lease
            if writer is None or writer.is_gone() or silent:
                taken = replace(record, writer=own, id=record.id or secrets.token_hex(8))
                if self._write(taken, generation, say):
                    self._own = own
                    if writer is not None:
                        say(f"{self.place}: taken over from {writer.name}, which has ended")
                    return
                continue  # somebody was faster
            in_use = f"run={self.place}: in use by {writer.name}"
            if seen is None:
                say(f"{in_use}; waiting for up to {writer.lease:.0f} s for a sign of it")
            elif seen != (writer.id, writer.beat) and time.monotonic() - began > patience:
                raise OutputError(in_use)
            if seen != (writer.id, writer.beat):
                seen, since = (writer.id, writer.beat), time.monotonic()
            time.sleep(min(_LOOK_S, writer.lease / _BEATS))

    def _renew(self, period: float) -> None:
        """In a thread: shows that this job lives, and learns whether it still has the run."""
        while not self._ended.wait(period):
            with contextlib.suppress(OutputError):  # the bucket failed, or the run is lost: `lost`
                self.update(lambda record: record, patience=period)
            if self.lost:
                return

    # --- writing ---

    def update(
        self,
        change: Callable[[Record], Record],
        say: Say = lambda line: None,
        patience: float | None = None,
    ) -> None:
        """Changes the record. Raises OutputError where this job has lost the run to another, or
        where the bucket fails for `patience` seconds, by default ten minutes.
        """
        with self._lock:
            if self.lost:
                raise OutputError(self.lost)
            assert self._own is not None
            beating = replace(self._own, beat=self._own.beat + 1)
            wanted = change(replace(self._record, writer=beating))
            self._own = beating
            if not self._write(wanted, self._generation, say, patience):
                now, _ = self._fetch(say)
                other = now.writer.name if now.writer else "another job, which has ended"
                self.lost = (
                    f"run={self.place}: was taken over by {other}, as this job did not answer for "
                    f"{beating.lease:.0f} s; it has ended without saving"
                )
                raise OutputError(self.lost)

    def _write(
        self, record: Record, generation: bytes, say: Say, patience: float | None = None
    ) -> bool:
        """Writes a record over that of a generation; whether nobody else has written since."""
        text = record.text()
        what = f"{self.place}/{HEAD}: cannot be written"

        def attempt() -> bool:
            new = self._kv.write(HEAD, text, if_equal=generation).result().generation
            if not new:
                # A write whose answer was lost is tried again, and refused for its own sake.
                found = self._kv.read(HEAD).result()
                new = found.stamp.generation if found.value == text else b""
            if new:
                self._record, self._generation = record, new
            return bool(new)

        return bucket.patiently(attempt, what, say, patience or _PATIENCE_S)


held: dict[str, Head] = {}  # the heads that this process has taken, by their runs


def of(place: str) -> Head:
    """The head of a run: the one that this process has taken, if it has."""
    return held.get(_whole(place)) or Head(place)


def _whole(place: str) -> str:
    """A run's folder by the one name that it has here."""
    return place.rstrip("/") if bucket.remote(place) else str(Path(place).absolute())


def _machine() -> str:
    """This machine since it was started, its containers apart."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()
