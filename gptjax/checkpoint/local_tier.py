"""Checkpoints on each machine's own disk, between those in the bucket, which cost more.

    FOLDER/<id of the run>/<process>-of-<count>/<step>/meta.json    what it is, and what is in it
    FOLDER/<id of the run>/<process>-of-<count>/<step>/state/...    the arrays of shards.py

Each process writes every part of the arrays that is on its devices, so that with the same mesh it
needs no other machine. A machine that comes back empty gets its parts from those that hold copies
of them, where the mesh replicates. Nothing here has to survive the machine.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import bucket
from gptjax.checkpoint import shards
from gptjax.checkpoint.shards import Index, Layout
from gptjax.param_tree import Leaves
from gptjax.runtime import distributed

_PARTIAL = ".partial"


class LocalTier:
    """The checkpoints of this process on its machine's disk.

    `run_id` tells runs apart that were begun under one name, one after the other.
    """

    def __init__(self, folder: str, run_id: str, keep: int) -> None:
        """Removes what a kill has left."""
        process = f"{distributed.index()}-of-{distributed.count()}"
        self.folder = Path(folder).expanduser().absolute() / run_id / process
        self._keep = keep
        for path in self.folder.glob(f"*{_PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, leaves: Leaves, meta: dict[str, Any]) -> Callable[[], None]:
        """As `checkpointer.Store.save`, of this process alone; older ones are removed then."""
        layouts = {path: Layout.of(leaf) for path, leaf in leaves.items()}
        own = shards.own_shards(leaves, replicas=True)
        return lambda: self._finish(step, layouts, own, meta)

    def _finish(
        self, step: int, layouts: dict[str, Layout], own: list[shards.Shard], meta: dict[str, Any]
    ) -> None:
        partial = self.folder / f"{step}{_PARTIAL}"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            shards.write(self._arrays(partial), layouts, own)
            described = {
                "meta": meta,
                "layouts": {path: asdict(one) for path, one in layouts.items()},
                "layout": _layout_of(parts_of(own)),
            }
            (partial / "meta.json").write_text(json.dumps(described))
            self.remove(step)
            partial.rename(self.folder / str(step))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self._all()[: -self._keep]:
            self.remove(old)

    @staticmethod
    def _arrays(checkpoint: Path) -> dict[str, Any]:
        return bucket.kvstore(f"{checkpoint}/state")

    def remove(self, step: int) -> None:
        """Removes a checkpoint."""
        gone = self.folder / f"{step}{_PARTIAL}.old"
        if (self.folder / str(step)).exists():
            os.replace(self.folder / str(step), gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _all(self) -> list[int]:
        names = (path.name for path in self.folder.glob("*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def steps(self, wanted: Leaves) -> list[int]:
        """Steps of the checkpoints that have exactly the parts that this process needs."""
        layout = _layout_of({path: needed(leaf) for path, leaf in wanted.items()})
        return [step for step in self._all() if self._described(step).get("layout") == layout]

    def _described(self, step: int) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / str(step) / "meta.json").read_bytes()))
        except (OSError, ValueError):
            return {}

    def meta(self, step: int) -> dict[str, Any]:
        """As `checkpointer.Store.meta`."""
        return dict(self._described(step)["meta"])

    def load(self, step: int, wanted: Leaves) -> Leaves:
        """As `checkpointer.Store.load`."""
        described = self._described(step)
        layouts = {
            path: Layout(tuple(one["shape"]), one["dtype"], tuple(one["chunk"]))
            for path, one in described["layouts"].items()
        }
        return shards.read(self._arrays(self.folder / str(step)), layouts, wanted)


def needed(leaf: Any) -> set[Index]:
    """The parts of an array that are on this process's devices."""
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    return {shards.index_of(place, leaf.shape) for place in places.values()}


def parts_of(own: list[shards.Shard]) -> dict[str, set[Index]]:
    """The parts of each array among shards."""
    found: dict[str, set[Index]] = {}
    for shard in own:
        found.setdefault(shard.path, set()).add(shard.index)
    return found


def _layout_of(parts: dict[str, set[Index]]) -> str:
    """What identifies the parts that a process has of each array."""
    text = json.dumps({path: sorted(parts[path]) for path in sorted(parts)})
    return hashlib.sha256(text.encode()).hexdigest()


# --- what the machines have together --------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A step of which the processes `holders` have all parts together, each those that it needs."""

    step: int
    holders: tuple[int, ...]
    tier: LocalTier

    @property
    def _own(self) -> bool:
        return distributed.index() in self.holders

    def meta(self) -> dict[str, Any]:
        """As `checkpointer.Store.meta`: all processes call this."""
        own = json.dumps(self.tier.meta(self.step)) if self._own else ""
        return dict(json.loads(distributed.from_process(self.holders[0], own)))

    def load(self, wanted: Leaves) -> Leaves:
        """This process's parts of the arrays; zeros where it has none."""
        return self.tier.load(self.step, wanted) if self._own else _zeros(wanted)

    def completed(self, leaves: Leaves) -> Leaves:
        """The arrays with the parts that other processes have: all processes call this."""
        if len(self.holders) == distributed.count():
            return leaves
        return copied(leaves, lambda device: device.process_index in self.holders)


def agreed(tier: LocalTier, wanted: Leaves) -> list[Held]:
    """The steps that can be restored from the machines' disks, newest first: in all processes the
    same, all of which call this."""
    lists = distributed.gather(json.dumps(tier.steps(wanted)))
    holders: dict[int, list[int]] = {}
    for process, text in enumerate(lists):
        for step in json.loads(text):
            holders.setdefault(step, []).append(process)
    held = [Held(step, tuple(holders[step]), tier) for step in sorted(holders, reverse=True)]
    return [one for one in held if _whole(wanted, one.holders)]


def _whole(wanted: Leaves, holders: Collection[int]) -> bool:
    """Whether the devices of these processes have every part of the arrays."""
    return all(_parts(leaf, holders) == _parts(leaf, None) for leaf in wanted.values())


def _parts(leaf: Any, processes: Collection[int] | None) -> set[Index]:
    places = leaf.sharding.devices_indices_map(leaf.shape).items()
    chosen = (i for d, i in places if processes is None or d.process_index in processes)
    return {shards.index_of(place, leaf.shape) for place in chosen}


def _zeros(wanted: Leaves) -> Leaves:
    def part(leaf: Any, place: tuple[slice, ...]) -> np.ndarray:
        sizes = [last - first for first, last in shards.index_of(place, leaf.shape)]
        return np.zeros(sizes, leaf.dtype)

    return {
        path: jax.make_array_from_callback(leaf.shape, leaf.sharding, functools.partial(part, leaf))
        for path, leaf in wanted.items()
    }


def copied(leaves: Leaves, holds: Callable[[jax.Device], bool]) -> Leaves:
    """Each part on every device that is to have it, from one device that holds it.

    All processes call this together; what is on the other devices does not matter.
    """
    return {path: _copied(leaf, holds) for path, leaf in leaves.items()}


def _copied(leaf: jax.Array, holds: Callable[[jax.Device], bool]) -> jax.Array:
    sharding: Any = leaf.sharding
    mesh, spec = sharding.mesh, sharding.spec
    split = {axis for entry in spec for axis in _axes(entry)}
    replicated = tuple(axis for axis in mesh.axis_names if axis not in split)
    first: set[Index] = set()
    chosen = np.zeros(mesh.devices.shape, bool)
    places = sharding.devices_indices_map(leaf.shape)
    for number, device in enumerate(mesh.devices.flat):
        index = shards.index_of(places[device], leaf.shape)
        if holds(device) and index not in first:
            first.add(index)
            chosen.flat[number] = True
    flags = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    chosen_here = jax.make_array_from_callback(chosen.shape, flags, lambda place: chosen[place])

    def body(flag: jax.Array, x: jax.Array) -> jax.Array:
        # As whole numbers: a sum with zeros changes no bit of them.
        bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        unsigned = jnp.dtype(f"uint{bits.dtype.itemsize * 8}")
        bits = jnp.where(flag.reshape(()), lax.bitcast_convert_type(bits, unsigned), 0)
        found = lax.psum(bits, replicated) if replicated else bits
        if x.dtype == jnp.bool_:
            return found.astype(jnp.bool_)
        return lax.bitcast_convert_type(found, x.dtype)

    specs = (flags.spec, spec)
    copy = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    found = jax.jit(copy)(chosen_here, leaf)
    parts = [shard.data for shard in found.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


def _axes(entry: Any) -> Iterator[str]:
    yield from () if entry is None else (entry,) if isinstance(entry, str) else entry
