"""Checkpoints: Orbax writes and reads the arrays; this module verifies them.

    RUN/checkpoints/<step>/state    the arrays, by path, whatever the mesh
    RUN/checkpoints/<step>/meta     JSON: the run's metadata, and a fingerprint of each array
    RUN/checkpoints.json            the last step that was saved

A checkpoint exists when Orbax has renamed its folder into place. Saving is asynchronous; a thread
waits for each save and syncs it to disk, so its failure is known without blocking the loop and
without waiting for the next one. Restoring checks the metadata against their checksum and every
array against its fingerprint: a checkpoint that fails is set aside (`<step>.corrupt-<n>`) and the
one before it is restored. One that is not kept is renamed (`<step>.removed`) and then removed.

In a job of several processes each writes and reads its own shards of the arrays, in one folder.
Process 0 alone renames and removes; all together agree on which checkpoint is valid. A run without
checkpoints begins anew only where checkpoints.json knows of none.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.config import CheckpointConfig
from gptjax.data import store
from gptjax.errors import CheckpointError, MismatchError, OutputError
from gptjax.param_tree import Leaves, leaves_by_path, nested
from gptjax.runtime import distributed
from gptjax.version import __version__

FORMAT = 1
_UNFINISHED = ".orbax-checkpoint-tmp"
_COMMITTED = "_CHECKPOINT_METADATA"
_REMOVED = ".removed"
_CHECKSUM = "sha256"
_FAILED_SAVES_LIMIT = 3
_CLEAR_S = 5.0  # while threads of a failed save may still write
_PATIENCE_S = 24 * 3600
_BARRIERS = (
    "orbax.checkpoint._src.multihost.multihost",
    "orbax.checkpoint.experimental.v1._src.synchronization.multihost",
)
_SURGE_BYTES = 1 << 27  # memory of a save beyond the arrays, unless a single one is larger


# --- fingerprints ------------------------------------------------------------------------------


@jax.jit  # leaf by leaf: compiling all of a large tree at once takes many times as long
def _fingerprint(x: jax.Array) -> jax.Array:
    """Two 32-bit sums over all elements' bits, each weighted by an odd function of its index.

    Integer sums do not depend on order, and so not on the sharding; an odd weight makes any single
    flipped bit change the sum.
    """
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    width = bits.dtype.itemsize * 8
    bits = lax.bitcast_convert_type(bits, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    strides = [math.prod(x.shape[d + 1 :]) % 2**32 for d in range(x.ndim)]
    iota = functools.partial(
        lax.broadcasted_iota, jnp.uint32, x.shape, out_sharding=jax.typeof(x).sharding
    )
    index = sum((iota(d) * jnp.uint32(s) for d, s in enumerate(strides)), jnp.uint32(0))
    first = jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
    second = jnp.sum(bits * ((index * jnp.uint32(2654435761)) | 1), dtype=jnp.uint32)
    return jnp.stack([first, second])


def fingerprints(leaves: Leaves) -> dict[str, list[int]]:
    """Fingerprint of each leaf, the same on every mesh."""
    sums = {path: _fingerprint(leaf) for path, leaf in leaves.items()}
    return {path: value.tolist() for path, value in jax.device_get(sums).items()}


# --- saving and restoring ----------------------------------------------------------------------


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


class Checkpointer:
    """The checkpoints of one run. `describe(step)` returns the run's part of the metadata.

    `order`: the order of the layers in the blocks' stacked arrays, where a pipeline has another
    than the model's. It is saved, and restored arrays are put into the order given here.
    `milestones` are steps whose checkpoints are kept permanently.
    """

    def __init__(
        self,
        folder: Path,
        cfg: CheckpointConfig | None = None,
        describe: Callable[[int], Mapping[str, Any]] = lambda step: {},
        say: Callable[[str], None] = lambda line: None,
        order: Sequence[int] | None = None,
        milestones: Collection[int] = (),
    ) -> None:
        """With `cfg`, for saving: removes the remains of an interrupted save."""
        self.folder, self._cfg, self._describe, self._say = folder.absolute(), cfg, describe, say
        self._order = None if order is None else list(order)
        self._milestones = milestones
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self.last_step: int | None = None  # the step that was handed to `save` last
        self._failures: list[str] = []
        self._failed_in_a_row = 0
        if cfg is not None and distributed.first() and self.folder.is_dir():
            self._clear()

    def _clear(self) -> None:
        """Removes what a process left that was killed while it saved, or removed a checkpoint."""
        left = {_UNFINISHED: "discarded unfinished checkpoint", _REMOVED: "removed the rest of"}
        for mark, what in left.items():
            for path in self.folder.glob(f"*{mark}*"):
                self._say(f"{what} {path.name.split('.')[0]}")
                shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(path.name)
            for path in self.folder.iterdir()
            if path.name.isdecimal() and (path / _COMMITTED).exists()
        )

    def save(self, step: int, state: Any) -> None:
        """Begins to save; returns when the arrays have been copied off the devices.

        Waits for the previous save first. Raises OutputError after three failures in a row.
        """
        self._settle()
        self.last_step = step
        leaves = leaves_by_path(state)
        meta = {
            "format": FORMAT,
            "step": step,
            **self._describe(step),
            "versions": _versions(),
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            **({} if self._order is None else {"layers": self._order}),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "tree": {path: [list(x.shape), str(x.dtype)] for path, x in leaves.items()},
            "fingerprints": fingerprints(leaves),
        }
        meta[_CHECKSUM] = sha256_of(meta)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            surge = max(_SURGE_BYTES, *map(_own_bytes, leaves.values()))
            with _context(write_bytes=surge):
                response = _orbax().save_checkpointables_async(
                    self.folder / str(step),
                    {"state": nested(leaves), "meta": meta},
                    overwrite=True,
                )
        except (OSError, ValueError) as error:
            self._failed(step, error)
            return
        self._saving = step, self._thread.submit(self._finish, step, response)

    def _finish(self, step: int, response: Any) -> None:
        """In the thread: waits for the commit, then removes old checkpoints."""
        assert self._cfg is not None
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
        forever = self._cfg.keep_every
        for old in self.steps()[: -self._cfg.keep]:
            if old not in self._milestones and not (forever and old % forever == 0):
                gone = self.folder / f"{old}{_REMOVED}"
                (self.folder / str(old)).rename(gone)  # no longer a checkpoint
                shutil.rmtree(gone, ignore_errors=True)

    def _give_back(self, step: int) -> None:
        """Removes what a failed save has written, also while its threads go on for a moment."""
        deadline = time.monotonic() + _CLEAR_S
        while left := list(self.folder.glob(f"{step}{_UNFINISHED}*")):
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)

    @property
    def _saved_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    def failures(self) -> list[str]:
        """Messages about saves that have failed since the last call. Does not wait."""
        if self._saving is not None and self._saving[1].done():
            self._settle()
        told, self._failures = self._failures, []
        return told

    def _settle(self) -> None:
        """Waits for the save in progress, if any."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        error = future.exception()
        if error is None:
            self._failed_in_a_row = 0
        else:
            self._failed(step, error)

    def _failed(self, step: int, error: BaseException) -> None:
        self._failed_in_a_row += 1
        reason = str(error).split("\n")[0][:300]
        self._failures.append(f"checkpoint {step} was not written: {reason}")
        if self._failed_in_a_row >= _FAILED_SAVES_LIMIT:
            raise OutputError(
                f"{self._failed_in_a_row} checkpoints in a row were not written to {self.folder}, "
                f"the last of them {step}: {reason}"
            )

    def finish(self) -> None:
        """Waits until the last save is safe. Raises OutputError if it failed."""
        self._settle()
        distributed.barrier()  # process 0 may still be removing old checkpoints
        if self._failed_in_a_row:
            raise OutputError("; ".join(self._failures) or f"{self.folder}: the last save failed")

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the save in progress: leaving the interpreter before its end would lose it."""
        if self._saving is not None:
            concurrent.futures.wait([self._saving[1]])

    def meta(self, step: int) -> dict[str, Any]:
        """A checkpoint's metadata. Raises whatever reading raises."""
        with _context():
            meta = _orbax().load_checkpointables(self.folder / str(step), {"meta": None})["meta"]
        checksum = meta.pop(_CHECKSUM, None)  # absent in a checkpoint of before there were any
        if checksum not in (None, sha256_of(meta)):
            raise ValueError("its metadata differ from their checksum")
        return meta

    def restore_newest(self, abstract: Any, *, partial: bool = False) -> Any | None:
        """The newest valid checkpoint, laid out as `abstract`; None if there are no checkpoints.

        With `partial`, `abstract` holds some of the checkpoint's subtrees, and only they are read.
        Raises MismatchError where the arrays have other shapes, CheckpointError where there are
        checkpoints and none is valid: a run never starts again from step 0 by itself.
        """
        steps, damaged = json.loads(distributed.from_first(json.dumps(self.steps()))), []
        for step in reversed(steps):
            restored, reason = self._attempt(step, abstract, partial)
            if reason is not None:  # once more: it may have been the disk or the network
                restored, reason = self._attempt(step, abstract, partial)
            if reason is not None:
                self._say(f"checkpoint {step} failed verification ({reason})")
                damaged.append(step)
                continue
            # Only now: if none had been readable, the disk would be at fault.
            if self._cfg is not None and distributed.first():
                for bad in damaged:
                    self._set_aside(bad)
            if self._cfg is not None:
                self._tell_versions(step)
            return restored
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {', '.join(map(str, steps))} can be read; "
                "nothing was changed. To begin anew, remove the folder"
            )
        if self.folder.is_dir() and any(self.folder.glob("*.corrupt-*")):
            raise CheckpointError(
                f"{self.folder}: only checkpoints that were set aside as damaged are left; to "
                "begin anew, remove the folder"
            )
        if self._saved_file.exists():
            raise CheckpointError(
                f"{self.folder}: has no checkpoint, though {self._saved_file} says that one was "
                "saved; nothing was changed. Put the checkpoints back; to begin anew, remove the "
                f"whole folder {self.folder.parent}"
            )
        return None

    def _tell_versions(self, step: int) -> None:
        """Tells of each version that differs from the one that the checkpoint was written with."""
        saved = self.meta(step).get("versions", {})
        changed = [
            f"{name} {saved[name]}, now {own}"
            for name, own in _versions().items()
            if saved.get(name, own) != own
        ]
        if changed:
            self._say(f"checkpoint {step} was written with {', '.join(changed)}")

    def restore(self, step: int, abstract: Any, *, partial: bool = False) -> Any:
        """The checkpoint of a step, as `restore_newest` restores the newest.

        Raises CheckpointError where it is not found or not valid.
        """
        if step not in (steps := self.steps()):
            have = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{self.folder}: checkpoint {step} not found; available: {have}")
        restored, reason = self._attempt(step, abstract, partial)
        if reason is not None:
            raise CheckpointError(f"{self.folder / str(step)}: failed verification ({reason})")
        return restored

    def _attempt(self, step: int, abstract: Any, partial: bool) -> tuple[Any, str | None]:
        """The checkpoint of a step, or the reason why it is not valid in some process."""
        restored, reason = None, None
        try:
            restored = self._restore(step, abstract, partial)
        except (MismatchError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # not the checkpoint's fault
        except Exception as error:  # Orbax raises many kinds for many kinds of damage
            reason = str(error).split("\n")[0][:300] or repr(error)
        return restored, distributed.first_of(reason)

    def _restore(self, step: int, abstract: Any, partial: bool) -> Any:
        wanted = leaves_by_path(abstract)
        meta = self.meta(step)
        if meta["format"] != FORMAT:
            raise MismatchError(
                f"{self.folder / str(step)}: has format {meta['format']}; this gptjax reads format "
                f"{FORMAT}"
            )
        roots = {path.split("/")[0] for path in wanted}
        saved = {p: x for p, x in meta["tree"].items() if not partial or p.split("/")[0] in roots}
        _check_tree(self.folder / str(step), saved, wanted)
        with _context(partial=partial):
            tree = _orbax().load(
                self.folder / str(step), nested(wanted), checkpointable_name="state"
            )
        leaves = leaves_by_path(tree)
        for path, value in fingerprints(leaves).items():
            if value != meta["fingerprints"][path]:
                raise ValueError(f"{path}: its fingerprint is not the one saved")
        if (saved_order := meta.get("layers")) != self._order:
            count = len(saved_order or self._order or ())
            have, want = (np.arange(count) if o is None else o for o in (saved_order, self._order))
            places = np.argsort(have)[want]
            for path in leaves:
                if "/blocks/" in path:
                    leaves[path] = _moved(leaves[path], tuple(places.tolist()))
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[path] for path in wanted])

    def _set_aside(self, step: int) -> None:
        names = (self.folder / f"{step}.corrupt-{n}" for n in range(1, 1000))
        free = next(name for name in names if not name.exists())
        (self.folder / str(step)).rename(free)
        self._say(f"checkpoint {step} is set aside as {free.name}")


def _versions() -> dict[str, str]:
    return {
        "gptjax": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
    }


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _moved(stacked: jax.Array, places: tuple[int, ...]) -> jax.Array:
    """Layers of a stacked array in another order, laid out as before."""
    return stacked.at[np.array(places)].get(out_sharding=jax.typeof(stacked).sharding)


def _sync_tree(folder: Path) -> None:
    """Syncs all files below a folder to disk, and the folders."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in (*names, "."):
            store.sync(os.path.join(path, name))


def _own_bytes(leaf: jax.Array) -> int:
    """Bytes of an array that this process writes."""
    return sum(s.data.nbytes for s in leaf.addressable_shards if s.replica_id == 0)


def _check_tree(checkpoint: Path, saved: Mapping[str, Any], wanted: Leaves) -> None:
    """Raises MismatchError with a line for each path that differs."""
    have = {path: (tuple(shape), dtype) for path, (shape, dtype) in saved.items()}
    want = {path: (tuple(x.shape), str(x.dtype)) for path, x in wanted.items()}
    show = lambda entry: "absent" if entry is None else f"{entry[1]}{list(entry[0])}"
    differences = [
        f"{path}: {show(have.get(path))} in the checkpoint, {show(want.get(path))} in the model"
        for path in sorted(have.keys() | want.keys())
        if have.get(path) != want.get(path)
    ]
    if differences:
        raise MismatchError(f"{checkpoint} is of another model", differences)


def sha256_of(values: Any) -> str:
    """SHA-256 of JSON values, key order aside."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
