"""Comparison of the copies of each array on the devices that hold the same part of it.

Replicas are computed alike and never compared by training itself: an error of one device's memory
or arithmetic would stay in it, and the copy that happens to be saved decides.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from gptjax.parallel import arrays
from gptjax.param_tree import Leaves


def differing(leaves: Leaves) -> list[str]:
    """Paths of arrays whose copies are not all equal bit for bit, with the devices; of all
    processes, which must call this together.
    """
    sums = {path: _sums(leaf) for path, leaf in leaves.items() if leaf.sharding.num_devices > 1}
    found = []
    for path, value in arrays.to_host(sums).items():
        if groups := _unequal(leaves[path], np.asarray(value)):
            found.append(f"{path} differs between devices {' and '.join(map(str, groups))}")
    return found


PartSums = dict[str, tuple[np.ndarray, list[jax.Device]]]
"""By the paths of arrays, sums of the bits of each device's own part, and the devices."""


def part_sums(leaves: Leaves) -> PartSums:
    """The sums of arrays, in all processes, which must call this together."""
    sums = arrays.to_host({path: _sums(leaf) for path, leaf in leaves.items()})
    placed: dict[str, Any] = {path: leaf.sharding for path, leaf in leaves.items()}
    return {
        path: (np.asarray(value), list(placed[path].mesh.devices.flat))
        for path, value in sums.items()
    }


def unlike(one: PartSums, two: PartSums) -> dict[str, list[jax.Device]]:
    """The devices that hold other bits of an array in `two` than in `one`, by its path."""
    found: dict[str, list[jax.Device]] = {}
    for path, (sums, devices) in one.items():
        rows = np.flatnonzero((sums != two[path][0]).any(axis=1))
        if len(rows):
            found[path] = [devices[row] for row in rows.tolist()]
    return found


def _unequal(leaf: jax.Array, sums_N2: np.ndarray) -> list[int]:
    """The ids of two devices that hold the same part of an array with unlike sums, if any do."""
    holders: dict[str, int] = {}
    sharding: Any = leaf.sharding
    devices = list(sharding.mesh.devices.flat)
    parts = sharding.devices_indices_map(leaf.shape)
    for place, device in enumerate(devices):
        first = holders.setdefault(str(parts[device]), place)
        if not np.array_equal(sums_N2[first], sums_N2[place]):
            return [devices[first].id, device.id]
    return []


def _sums(leaf: jax.Array) -> jax.Array:
    """Two weighted sums of the bits of each device's own part, uint32 [devices, 2]."""
    sharding: Any = leaf.sharding
    return _compiled(sharding.mesh, sharding.spec)(leaf)


@functools.lru_cache(maxsize=256)
def _compiled(mesh: Any, spec: PartitionSpec) -> Any:
    own = jax.shard_map(
        _own_sums,
        mesh=mesh,
        in_specs=spec,
        out_specs=PartitionSpec(tuple(mesh.axis_names)),
        check_vma=False,  # replicas need not agree here
    )
    return jax.jit(own)


def _own_sums(x: jax.Array) -> jax.Array:
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = lax.bitcast_convert_type(bits, jnp.dtype(f"uint{bits.dtype.itemsize * 8}"))
    bits = bits.astype(jnp.uint32).reshape(-1)
    index = lax.iota(jnp.uint32, bits.size)
    first = jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
    second = jnp.sum(bits * ((index * jnp.uint32(2654435761)) | 1), dtype=jnp.uint32)
    return jnp.stack([first, second])[None]
