"""Checkpoints of a run: what is saved, what is kept, and that what is restored is what was saved.

Where they lie and how is the store's concern: orbax_store.py for a folder, shard_store.py for a
bucket.

Saving is asynchronous; a thread waits for each save, so its failure is known without blocking the
loop and without waiting for the next one. Restoring checks the metadata against their checksum and
every array against its fingerprint: a checkpoint that fails is set aside and the one before it is
restored.

In a job of several processes each writes and reads its own shards of the arrays. Process 0 alone
commits, sets aside and removes; all together agree on which checkpoint is valid. A run without
checkpoints begins anew only where none was ever saved.
"""

import concurrent.futures
import functools
import json
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import flax
import jax
import numpy as np

from gptjax import bucket
from gptjax.checkpoint import head, local_tier
from gptjax.checkpoint.fingerprint import fingerprints, sha256_of
from gptjax.checkpoint.local_tier import LocalTier
from gptjax.checkpoint.orbax_store import OrbaxStore
from gptjax.checkpoint.shard_store import ShardStore
from gptjax.config import CheckpointConfig
from gptjax.errors import CheckpointError, MismatchError, OutputError
from gptjax.param_tree import Leaves, leaves_by_path
from gptjax.runtime import distributed
from gptjax.version import __version__

FORMAT = 1
_CHECKSUM = "sha256"
_FAILED_SAVES_LIMIT = 3

Say = Callable[[str], None]


class Store(Protocol):
    """A place of checkpoints. All but `save` and `load` are called by process 0 alone, or only
    look."""

    def place(self, step: int) -> str:
        """Where the checkpoint of a step is, for messages."""

    def clear(self, say: Say) -> None:
        """Removes what a process left that was killed while it saved, or removed a checkpoint."""

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""

    def save(self, step: int, leaves: Leaves, meta: dict[str, Any]) -> Callable[[], None]:
        """Begins to save; returns when the arrays may be overwritten. The result waits until the
        checkpoint is safe. Both raise where it cannot be written, and leave nothing then."""

    def remove(self, step: int) -> None:
        """Removes a checkpoint, which at once is none any more."""

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata that it was saved with. Raises whatever reading raises."""

    def load(self, step: int, wanted: Leaves, *, partial: bool) -> Leaves:
        """Its arrays, laid out as `wanted`, which has some of its subtrees where `partial`."""

    def set_aside(self, step: int) -> str:
        """Makes a damaged checkpoint none; returns its new name."""

    def lost(self) -> str:
        """Where there is no checkpoint: why a run must not begin anew; empty if it may."""

    def left(self) -> Iterator[str]:
        """What is neither a checkpoint nor of use, with what happens to it."""

    def ended(self) -> str:
        """Why this job may no longer write here; empty while it may."""


def store_of(folder: Any, say: Say, upload_mb_s: float = 0) -> Store:
    """The store of the checkpoints in a folder, local or in a bucket."""
    if bucket.remote(folder) or (Path(folder).parent / head.HEAD).exists():  # or a copy of one
        return ShardStore(str(folder), say, upload_mb_s * 1e6)
    return OrbaxStore(Path(folder))


def _local_tier(folder: Any, cfg: CheckpointConfig) -> LocalTier | None:
    """The tier on this machine's disk, where there is to be one: all processes call this."""
    if not cfg.local:
        return None
    run = str(folder).rpartition("/")[0]
    return LocalTier(cfg.local, distributed.from_first(head.of(run).read().id), cfg.local_keep)


class Checkpointer:
    """The checkpoints of one run. `describe(step)` returns the run's part of the metadata.

    `order`: the order of the layers in the blocks' stacked arrays, where a pipeline has another
    than the model's. It is saved, and restored arrays are put into the order given here.
    `milestones` are steps whose checkpoints are kept permanently.
    """

    def __init__(
        self,
        folder: Any,
        cfg: CheckpointConfig | None = None,
        describe: Callable[[int], Mapping[str, Any]] = lambda step: {},
        say: Say = lambda line: None,
        order: Sequence[int] | None = None,
        milestones: Collection[int] = (),
    ) -> None:
        """`folder` is a path, local or in a bucket. With `cfg`, for saving: removes the remains of
        an interrupted save."""
        self.folder = folder.absolute() if isinstance(folder, Path) else folder
        self._cfg, self._describe, self._say = cfg, describe, say
        self.store = store_of(folder, say, cfg.upload_mb_s if cfg else 0)
        self._local = _local_tier(folder, cfg) if cfg else None
        self._held: local_tier.Held | None = None  # what is being restored from it
        self._local_thread = concurrent.futures.ThreadPoolExecutor(1)
        self._saving_local: tuple[int, concurrent.futures.Future[None]] | None = None
        self._order = None if order is None else list(order)
        self._milestones = milestones
        self.more: Callable[[int], Mapping[str, Any]] = lambda step: {}  # metadata of the loop
        self.restored: dict[str, Any] = {}  # the metadata of what was restored last
        self.settle = 0  # steps behind a checkpoint after which it is known to be good
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self.last_step: int | None = None  # the step that was handed to `save` last
        self._failures: list[str] = []
        self._failed_in_a_row = 0
        if cfg is not None and distributed.first():
            self.store.clear(say)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return self.store.steps()

    @property
    def local_every(self) -> int:
        """Steps between checkpoints on the machines' own disks; 0: none."""
        return self._cfg.local_every if self._cfg and self._local is not None else 0

    def save(self, step: int, state: Any, *, local: bool = False) -> None:
        """Begins to save; returns when the arrays have been copied off the devices.

        With `local`, on this machine's disk alone. Waits for the previous save of the same kind
        first. Raises OutputError after three failures in a row, but not of `local` ones.
        """
        leaves = leaves_by_path(state)
        meta = self._meta(step, leaves)
        if self._local is not None:
            self._settle_local()
            wait = self._local.save(step, leaves, meta)
            self._saving_local = step, self._local_thread.submit(wait)
        if local:
            return
        self._settle()
        self.last_step = step
        try:
            wait = self.store.save(step, leaves, meta)
        except (OSError, ValueError) as error:
            self._failed(step, error)
            return
        self._saving = step, self._thread.submit(self._finish, step, wait)

    def _meta(self, step: int, leaves: Leaves) -> dict[str, Any]:
        """The metadata of a checkpoint, with their checksum."""
        meta = {
            "format": FORMAT,
            "step": step,
            **self._describe(step),
            **self.more(step),
            "versions": _versions(),
            "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
            **({} if self._order is None else {"layers": self._order}),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "tree": {path: [list(x.shape), str(x.dtype)] for path, x in leaves.items()},
            "fingerprints": fingerprints(leaves),
        }
        meta[_CHECKSUM] = sha256_of(meta)
        return meta

    def _finish(self, step: int, wait: Callable[[], None]) -> None:
        """In the thread: waits for the commit, then removes old checkpoints."""
        assert self._cfg is not None
        wait()
        if not distributed.first():
            return
        forever, steps = self._cfg.keep_every, self.steps()
        # Those after the newest one that is known to be good may turn out not to be.
        good = max((one for one in steps if one <= step - self.settle), default=0)
        for old in steps[: -self._cfg.keep]:
            kept = old in self._milestones or (forever and old % forever == 0)
            if old < good and not kept:
                self.store.remove(old)

    def forget(self, steps: Collection[int]) -> None:
        """Removes checkpoints; all processes call this together, while nothing is being saved."""
        if distributed.first():
            for step in steps:
                self.store.remove(step)
        self.last_step = None
        distributed.barrier()

    def failures(self) -> list[str]:
        """Messages about saves that have failed since the last call. Does not wait.

        Raises OutputError where this job may no longer save here at all.
        """
        if ended := self.store.ended():
            raise OutputError(ended)
        if self._saving is not None and self._saving[1].done():
            self._settle()
        if self._saving_local is not None and self._saving_local[1].done():
            self._settle_local()
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

    def _settle_local(self) -> None:
        """Waits for the save on this machine's disk, if any."""
        if self._saving_local is None:
            return
        (step, future), self._saving_local = self._saving_local, None
        if error := future.exception():
            assert self._local is not None
            reason = str(error).split("\n")[0][:300]
            where = f"{distributed.name()}, {self._local.folder}"
            self._failures.append(f"local checkpoint {step} was not written: {where}: {reason}")

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
        self._settle_local()
        distributed.barrier()  # process 0 may still be removing old checkpoints
        if self._failed_in_a_row:
            raise OutputError("; ".join(self._failures) or f"{self.folder}: the last save failed")

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the save in progress: leaving the interpreter before its end would lose it."""
        pending = [one[1] for one in (self._saving, self._saving_local) if one is not None]
        concurrent.futures.wait(pending)

    def meta(self, step: int) -> dict[str, Any]:
        """A checkpoint's metadata. Raises whatever reading raises."""
        meta = self.store.meta(step) if self._held is None else self._held.meta()
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
        if self._local is not None:
            restored = self._from_disks(self._local, abstract, steps[-1] if steps else -1)
            if restored is not None:
                return restored
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
        if lost := self.store.lost():
            whole = self.folder.parent
            raise CheckpointError(
                f"{self.folder}: {lost}; to begin anew, remove the whole folder {whole}"
            )
        return None

    def _from_disks(self, tier: LocalTier, abstract: Any, newest: int) -> Any | None:
        """The newest valid checkpoint that the machines' disks have together, as `restore_newest`;
        None where that of the store, `newest`, is newer, or nothing on the disks is whole."""
        for held in local_tier.agreed(tier, leaves_by_path(abstract)):
            if held.step < newest:
                return None
            self._held = held
            restored, reason = self._attempt(held.step, abstract, False)
            self._held = None
            if reason is None:
                self._say(f"step {held.step} was on the machines' own disks")
                return restored
            self._say(f"local checkpoint {held.step} failed verification ({reason})")
            tier.remove(held.step)
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
            raise CheckpointError(f"{self.store.place(step)}: failed verification ({reason})")
        return restored

    def _attempt(self, step: int, abstract: Any, partial: bool) -> tuple[Any, str | None]:
        """The checkpoint of a step, or the reason why it is not valid in some process."""
        restored, reason = None, None
        try:
            restored = self._restore(step, abstract, partial)
        except (MismatchError, MemoryError, OutputError, jax.errors.JaxRuntimeError):
            raise  # not the checkpoint's fault
        except Exception as error:  # Orbax raises many kinds for many kinds of damage
            reason = str(error).split("\n")[0][:300] or repr(error)
        return restored, distributed.first_of(reason)

    def _restore(self, step: int, abstract: Any, partial: bool) -> Any:
        wanted = leaves_by_path(abstract)
        meta = self.meta(step)
        if meta["format"] != FORMAT:
            raise MismatchError(
                f"{self.store.place(step)}: has format {meta['format']}; this gptjax reads format "
                f"{FORMAT}"
            )
        roots = {path.split("/")[0] for path in wanted}
        saved = {p: x for p, x in meta["tree"].items() if not partial or p.split("/")[0] in roots}
        _check_tree(self.store.place(step), saved, wanted)
        self.restored = meta
        leaves = self._loaded(step, wanted, partial)
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

    def _loaded(self, step: int, wanted: Leaves, partial: bool) -> Leaves:
        """The arrays of a checkpoint. Raises in every process where one cannot read its part, as
        the others must not wait for it."""
        reason, leaves = None, {}
        try:
            if self._held is not None:
                leaves = self._held.load(wanted)
            else:
                leaves = self.store.load(step, wanted, partial=partial)
        except (MemoryError, OutputError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of many kinds
            reason = str(error).split("\n")[0][:300] or repr(error)
        if reason := distributed.first_of(reason):
            raise ValueError(reason)
        return leaves if self._held is None else self._held.completed(leaves)

    def _set_aside(self, step: int) -> None:
        self._say(f"checkpoint {step} is set aside as {self.store.set_aside(step)}")


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


def _check_tree(checkpoint: str, saved: Mapping[str, Any], wanted: Leaves) -> None:
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
