"""Checkpoints in a folder that all processes see, written and read by Orbax.

    RUN/checkpoints/<step>/state    the arrays, by path, whatever the mesh
    RUN/checkpoints/<step>/meta     JSON: the run's metadata, and a fingerprint of each array
    RUN/checkpoints.json            the last step that was saved

A checkpoint exists when Orbax has renamed its folder into place. One that is not kept is renamed
(`<step>.removed`) and then removed; one that is damaged is set aside (`<step>.corrupt-<n>`).
"""

import contextlib
import functools
import importlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.checkpoint import listing
from gptjax.checkpoint.listing import COMMITTED
from gptjax.data import store
from gptjax.param_tree import Leaves, leaves_by_path, nested
from gptjax.runtime import distributed

UNFINISHED = ".orbax-checkpoint-tmp"
REMOVED = ".removed"
CORRUPT = ".corrupt-"
_CLEAR_S = 5.0  # while threads of a failed save may still write
_PATIENCE_S = 24 * 3600
_BARRIERS = (
    "orbax.checkpoint._src.multihost.multihost",
    "orbax.checkpoint.experimental.v1._src.synchronization.multihost",
)
_SURGE_BYTES = 1 << 27  # memory of a save beyond the arrays, unless a single one is larger


def _orbax() -> Any:
    """Orbax's module, imported when first needed, its logs silenced: failures are told here."""
    from orbax.checkpoint import v1

    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _quiet_closed_loops()
    # Slow processes are the watchdog's concern: Orbax's limit of 300 s at a barrier would make a
    # valid checkpoint look damaged.
    for module in _BARRIERS:
        vars(importlib.import_module(module))["_DEFAULT_BARRIER_TIMEOUT"] = _PATIENCE_S
    return v1


@functools.cache  # once
def _quiet_closed_loops() -> None:
    """Drops the complaint of writes that end after the event loop of their failed save."""
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    sys.unraisablehook = hook


def _context(*, partial: bool = False, write_bytes: int | None = None) -> Any:
    ocp = _orbax()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.pytree.loading.partial_load = partial
    context.memory.write_concurrent_bytes = write_bytes
    # Created in the background, a folder that cannot be made hangs the process at its end.
    context.asynchronous.timeout_secs = _PATIENCE_S
    context.asynchronous.create_directories_asynchronously = False
    return context


class OrbaxStore:
    """The checkpoints in a folder; see `checkpointer.Store`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def place(self, step: int) -> str:
        return str(self.folder / str(step))

    def clear(self, say: Callable[[str], None]) -> None:
        if not self.folder.is_dir():
            return
        left = {UNFINISHED: "discarded unfinished checkpoint", REMOVED: "removed the rest of"}
        for mark, what in left.items():
            for path in self.folder.glob(f"*{mark}*"):
                say(f"{what} {path.name.split('.')[0]}")
                shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        return listing.steps_in(self.folder)

    def save(self, step: int, leaves: Leaves, meta: dict[str, Any]) -> Callable[[], None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Orbax refuses an array of as many bytes as the limit.
        surge = max(_SURGE_BYTES, *(_own_bytes(leaf) + 1 for leaf in leaves.values()))
        with _context(write_bytes=surge):
            response = _orbax().save_checkpointables_async(
                self.folder / str(step),
                {"state": nested(leaves), "meta": meta},
                overwrite=True,
            )
        return lambda: self._finish(step, response)

    def _finish(self, step: int, response: Any) -> None:
        """Waits for the commit, and for the disk."""
        try:
            response.result()
        except BaseException:
            if distributed.first():
                self._give_back(step)
            raise
        if not distributed.first():
            return
        _sync_tree(self.folder / str(step))
        store.sync(self.folder)
        with contextlib.suppress(OSError):  # so that a loss of the folder is known
            store.replace_file(self._saved_file, json.dumps({"saved": step}) + "\n")

    def _give_back(self, step: int) -> None:
        """Removes what a failed save has written, also while its threads go on for a moment."""
        deadline = time.monotonic() + _CLEAR_S
        while left := list(self.folder.glob(f"{step}{UNFINISHED}*")):
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)

    @property
    def _saved_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    def remove(self, step: int) -> None:
        gone = self.folder / f"{step}{REMOVED}"
        (self.folder / str(step)).rename(gone)  # no longer a checkpoint
        shutil.rmtree(gone, ignore_errors=True)

    def meta(self, step: int) -> dict[str, Any]:
        with _context():
            loaded = _orbax().load_checkpointables(self.folder / str(step), {"meta": None})
        meta: dict[str, Any] = loaded["meta"]
        return meta

    def load(self, step: int, wanted: Leaves, *, partial: bool) -> Leaves:
        with _context(partial=partial):
            tree = _orbax().load(
                self.folder / str(step), nested(wanted), checkpointable_name="state"
            )
        return leaves_by_path(tree)

    def set_aside(self, step: int) -> str:
        names = (self.folder / f"{step}{CORRUPT}{n}" for n in range(1, 1000))
        free = next(name for name in names if not name.exists())
        (self.folder / str(step)).rename(free)
        return free.name

    def lost(self) -> str:
        if self.folder.is_dir() and any(self.folder.glob(f"*{CORRUPT}*")):
            return "only checkpoints that were set aside as damaged are left"
        if self._saved_file.exists():
            return (
                f"has no checkpoint, though {self._saved_file} says that one was saved; nothing "
                "was changed. Put the checkpoints back"
            )
        return ""

    def left(self) -> Iterator[str]:
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            if UNFINISHED in path.name or path.name.endswith(REMOVED):
                yield f"{path.name}: {size:,} bytes left by a kill; the next start removes it"
            elif CORRUPT in path.name:
                yield f"{path.name}: {size:,} bytes set aside as damaged; remove it if you like"
            elif path.name.isdecimal() and not (path / COMMITTED).exists():
                yield f"{path.name}: {size:,} bytes without the mark of a checkpoint"

    def ended(self) -> str:
        return ""


def _sync_tree(folder: Path) -> None:
    """Syncs all files below a folder to disk, and the folders."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in (*names, "."):
            store.sync(os.path.join(path, name))


def _own_bytes(leaf: Any) -> int:
    """Bytes of an array that this process writes."""
    return sum(s.data.nbytes for s in leaf.addressable_shards if s.replica_id == 0)
