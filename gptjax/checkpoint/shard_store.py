"""Checkpoints in a bucket: the arrays of shards.py, and the run's head, which says which exist.

    RUN/checkpoints/<step>-<attempt>/meta.json    the run's metadata, and each array's fingerprint
    RUN/checkpoints/<step>-<attempt>/state/...    the arrays
    RUN/head.json                                 the checkpoints that exist; see head.py

A save writes objects that nobody else has ever written, and is committed by one conditional write
of the head. What is there without being named in the head is a save that was never finished.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, TypeVar

from gptjax import bucket
from gptjax.checkpoint import head, shards
from gptjax.checkpoint.shards import Layout
from gptjax.errors import OutputError
from gptjax.param_tree import Leaves
from gptjax.runtime import distributed

_RETRY_S = 600.0  # of a save or a read while the bucket fails
_WAIT_MS = 24 * 3600 * 1000  # for other processes, whose loss the watchdog tells
_FOLDER = re.compile(rb"(\d+-[0-9a-f]+)/")

Say = Callable[[str], None]
T = TypeVar("T")


class ShardStore:
    """The checkpoints of a run in a bucket; see `checkpointer.Store`."""

    def __init__(self, folder: str, say: Say, bytes_per_second: float = 0) -> None:
        """`folder` is RUN/checkpoints; `bytes_per_second` limits what each process sends."""
        self.folder, self._say = folder.rstrip("/"), say
        self._rate = bytes_per_second
        self._head = head.of(self.folder.rpartition("/")[0])
        self._spec = bucket.kvstore(self.folder)
        self._kv = bucket.open_kvstore(self.folder)

    def _record(self) -> head.Record:
        return self._head.read(self._say)

    def place(self, step: int) -> str:
        return f"{self.folder}/{self._record().checkpoints.get(step, step)}"

    def clear(self, say: Say) -> None:
        for name in self._unnamed():
            say(f"discarded unfinished checkpoint {name.partition('-')[0]}")
            self._delete(name)

    def _unnamed(self) -> list[str]:
        """Folders that the head does not name."""
        record = self._record()
        keys = self._patiently(lambda: self._kv.list().result(), f"{self.folder}: cannot be listed")
        found = {match[1].decode() for key in keys if (match := _FOLDER.match(key))}
        return sorted(found - set(record.checkpoints.values()) - set(record.set_aside))

    def left(self) -> Iterator[str]:
        for name in self._unnamed():
            yield f"{name}: left by a kill, or being saved; the next start removes it"
        for name in self._record().set_aside:
            yield f"{name}: set aside as damaged; remove it if you like"

    def steps(self) -> list[int]:
        return sorted(self._record().checkpoints)

    # --- saving ---

    def save(self, step: int, leaves: Leaves, meta: dict[str, Any]) -> Callable[[], None]:
        name = f"{step}-{distributed.from_first(secrets.token_hex(4))}"
        layouts = {path: Layout.of(leaf) for path, leaf in leaves.items()}
        own = shards.own_shards(leaves, replicas=False)
        return lambda: self._finish(step, name, layouts, own, meta)

    def _finish(
        self,
        step: int,
        name: str,
        layouts: dict[str, Layout],
        own: list[shards.Shard],
        meta: dict[str, Any],
    ) -> None:
        """Writes this process's shards; process 0 commits when all have written theirs."""
        what, problem = f"checkpoint {step}", ""
        try:
            write = lambda: shards.write(self._arrays(name), layouts, own, self._rate)
            self._patiently(write, what)
            if distributed.first():
                self._patiently(lambda: self._describe(name, layouts, meta), what)
        except OutputError as error:
            problem = str(error)
        if distributed.first():
            problem = _problem_of_others(name, problem)
            try:
                if not problem:
                    self._commit(step, name)
            except OutputError as error:
                problem = str(error)
        problem = _outcome(name, problem)
        if problem:
            if distributed.first():
                self._delete(name)
            raise OutputError(problem.removeprefix(f"{what}: "))

    def _arrays(self, name: str) -> dict[str, Any]:
        return {**self._spec, "path": f"{self._spec['path']}{name}/state/"}

    def _describe(self, name: str, layouts: dict[str, Layout], meta: dict[str, Any]) -> None:
        shards.write_metadata(self._kv, f"{name}/state/", layouts)
        described = {"meta": meta, "layouts": {p: asdict(one) for p, one in layouts.items()}}
        self._kv.write(f"{name}/meta.json", json.dumps(described).encode()).result()

    def _commit(self, step: int, name: str) -> None:
        def with_this(record: head.Record) -> head.Record:
            return replace(record, checkpoints={**record.checkpoints, step: name}, saved=step)

        self._head.before_commit()
        before = self._record().checkpoints.get(step)
        self._head.update(with_this, self._say)
        if before:
            self._delete(before)

    def remove(self, step: int) -> None:
        name = self._record().checkpoints[step]
        self._head.update(lambda record: _without(record, step), self._say)
        self._delete(name)

    def _delete(self, name: str) -> None:
        """Deletes what is no checkpoint; what cannot be deleted is left for the next start."""
        import tensorstore

        whole = tensorstore.KvStore.KeyRange(f"{name}/", f"{name}0")  # "0" is what follows "/"
        try:
            self._kv.delete_range(whole).result()
        except (ValueError, OSError) as error:
            self._say(f"{self.folder}/{name}: was not deleted: {bucket.reason_of(error)}")

    # --- reading ---

    def _described(self, step: int) -> tuple[str, dict[str, Any]]:
        """The folder of a checkpoint, and its meta.json."""
        name = self._record().checkpoints[step]
        what = f"{self.folder}/{name}/meta.json: cannot be read"
        found = self._patiently(lambda: self._kv.read(f"{name}/meta.json").result(), what)
        return name, json.loads(found.value)

    def meta(self, step: int) -> dict[str, Any]:
        return dict(self._described(step)[1]["meta"])

    def load(self, step: int, wanted: Leaves, *, partial: bool) -> Leaves:
        name, described = self._described(step)
        layouts = {
            path: Layout(tuple(one["shape"]), one["dtype"], tuple(one["chunk"]))
            for path, one in described["layouts"].items()
        }
        what = f"{self.folder}/{name}: cannot be read"
        return self._patiently(lambda: shards.read(self._arrays(name), layouts, wanted), what)

    def set_aside(self, step: int) -> str:
        name = self._record().checkpoints[step]

        def without(record: head.Record) -> head.Record:
            return replace(_without(record, step), set_aside=(*record.set_aside, name))

        self._head.update(without, self._say)
        return name

    def lost(self) -> str:
        record = self._record()
        if record.set_aside:
            return "only checkpoints that were set aside as damaged are left"
        if record.saved >= 0:
            return f"has no checkpoint, though step {record.saved} was saved; nothing was changed"
        return ""

    def ended(self) -> str:
        return self._head.lost

    def _patiently(self, call: Callable[[], T], what: str) -> T:
        return bucket.patiently(call, what, self._say, _RETRY_S)


def _without(record: head.Record, step: int) -> head.Record:
    kept = {other: name for other, name in record.checkpoints.items() if other != step}
    return replace(record, checkpoints=kept)


# --- agreeing, in the threads that save ----------------------------------------------------------


def _problem_of_others(name: str, problem: str) -> str:
    """In process 0: waits until every other process has written; its own problem, or theirs."""
    for process in range(1, distributed.count()):
        key = f"gptjax/save/{name}/{process}"
        theirs = str(distributed.client().blocking_key_value_get(key, _WAIT_MS)).strip()
        problem = problem or theirs
    return problem


def _outcome(name: str, problem: str) -> str:
    """The problem of the whole save, the same in every process; empty if it is committed."""
    if not distributed.several():
        return problem
    store = distributed.client()
    if distributed.first():
        store.key_value_set(f"gptjax/save/{name}/outcome", problem or " ")
        return problem
    store.key_value_set(f"gptjax/save/{name}/{distributed.index()}", problem or " ")
    return str(store.blocking_key_value_get(f"gptjax/save/{name}/outcome", _WAIT_MS)).strip()
