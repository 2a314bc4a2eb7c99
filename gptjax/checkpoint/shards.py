"""Arrays of a checkpoint in a key-value store, local or in a bucket: sharded zarr 3 arrays.

    FOLDER/<path of the array>/zarr.json    its shape and type
    FOLDER/<path of the array>/c/0/1 ...    its chunks, each with a CRC-32C

Any zarr 3 library reads them. Each process writes the chunks of its own shards, and reads those
that its devices need, whatever the mesh that wrote them. Nothing is renamed and nothing is written
twice, so a bucket will do. (Orbax writes to a folder that all processes see, whose names it can
change: not to s3://, and to gs:// only through TensorFlow's own files.)
"""

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gptjax.param_tree import Leaves

_CHUNK_BYTES = 1 << 26  # at most, where the sizes divide: what is sent at once, and again
_WRITTEN_AT_ONCE = 32
_CACHE_BYTES = 1 << 30

Index = tuple[tuple[int, int], ...]  # the first and the last element but one of each dimension


@dataclass(frozen=True)
class Shard:
    """A part of an array in host memory."""

    path: str
    index: Index
    values: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Shape, type and chunk shape of a stored array."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]

    @classmethod
    def of(cls, leaf: jax.Array) -> "Layout":
        """That of an array on devices: each shard is a whole number of chunks."""
        chunk = list(leaf.sharding.shard_shape(leaf.shape))
        for axis in range(leaf.ndim):
            while math.prod(chunk) * leaf.dtype.itemsize > _CHUNK_BYTES and chunk[axis] > 1:
                chunk[axis] //= _smallest_factor(chunk[axis])
        return cls(leaf.shape, str(leaf.dtype), tuple(chunk))

    def zarr(self) -> dict[str, Any]:
        """The contents of zarr.json."""
        separator = {"separator": "/"}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": separator},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
            "fill_value": False if self.dtype == "bool" else 0,
        }


def _smallest_factor(n: int) -> int:
    return next((d for d in range(2, math.isqrt(n) + 1) if n % d == 0), n)


def own_shards(leaves: Leaves, *, replicas: bool) -> list[Shard]:
    """Copies in host memory of this process's parts of the arrays.

    With `replicas`, of each part that is on its devices; without, of those parts that it has to
    save, so that all processes together have each part once.
    """
    chosen: dict[tuple[str, Index], jax.Array] = {}
    for path, leaf in leaves.items():
        for shard in leaf.addressable_shards:
            if replicas or shard.replica_id == 0:
                chosen.setdefault((path, index_of(shard.index, leaf.shape)), shard.data)
    for data in chosen.values():
        data.copy_to_host_async()
    # Copies, as on a CPU the array's own memory would be given, which the next step overwrites.
    return [Shard(path, index, np.array(data)) for (path, index), data in chosen.items()]


def index_of(slices: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    """A part of an array as its bounds in each dimension."""
    return tuple(s.indices(n)[:2] for s, n in zip(slices, shape, strict=True))


def _open(folder: Mapping[str, Any], path: str, layout: Layout, context: Any = None) -> Any:
    """The array in a key-value store, without a look at what is there."""
    import tensorstore

    metadata = {k: v for k, v in layout.zarr().items() if k not in ("zarr_format", "node_type")}
    kvstore = {**folder, "path": f"{folder['path']}{path}/"}
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    options: Any = {"open": True, "assume_metadata": True, "read": True, "write": True}
    return tensorstore.open(spec, context=context, **options).result()


def write(
    folder: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    shards: list[Shard],
    bytes_per_second: float = 0,
) -> None:
    """Writes shards to the arrays in a key-value store, chunk by chunk.

    `bytes_per_second` limits the rate; 0: no limit. Raises what TensorStore raises.
    """
    pending: list[Any] = []
    began, sent = time.monotonic(), 0
    for shard in shards:
        array = _open(folder, shard.path, layouts[shard.path])
        for place, values in _chunks(shard, layouts[shard.path].chunk):
            pending.append(array[place].write(values))
            sent += values.nbytes
            while len(pending) > _WRITTEN_AT_ONCE:
                pending.pop(0).result()
            if bytes_per_second:
                time.sleep(max(0.0, sent / bytes_per_second - (time.monotonic() - began)))
    for one in pending:
        one.result()


def _chunks(shard: Shard, chunk: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The chunks of a shard, each with its place in the whole array."""
    ranges = [
        range(first, last, size) for (first, last), size in zip(shard.index, chunk, strict=True)
    ]
    for corner in itertools.product(*ranges):
        place = tuple(slice(at, at + size) for at, size in zip(corner, chunk, strict=True))
        within = tuple(
            slice(at - first, at - first + size)
            for at, size, (first, _) in zip(corner, chunk, shard.index, strict=True)
        )
        yield place, shard.values[within]


def write_metadata(kv: Any, folder: str, layouts: Mapping[str, Layout]) -> None:
    """Writes the zarr.json of each array, which this module does not read."""
    pending = [
        kv.write(f"{folder}{path}/zarr.json", json.dumps(layout.zarr()).encode())
        for path, layout in layouts.items()
    ]
    for one in pending:
        one.result()


def read(folder: Mapping[str, Any], layouts: Mapping[str, Layout], wanted: Leaves) -> Leaves:
    """Arrays laid out as `wanted`. Raises what TensorStore raises; a missing chunk reads as 0."""
    import tensorstore

    # Devices that need parts of one chunk share it.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    reads: dict[str, dict[Index, Any]] = {}
    for path, leaf in wanted.items():
        array = _open(folder, path, layouts[path], context)
        places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        indices = {index_of(place, leaf.shape) for place in places.values()}
        reads[path] = {i: array[tuple(slice(*bounds) for bounds in i)].read() for i in indices}
    leaves = {}
    for path, leaf in wanted.items():
        parts = {index: future.result() for index, future in reads.pop(path).items()}
        take = lambda place, parts=parts, leaf=leaf: parts[index_of(place, leaf.shape)]
        leaves[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, take)
    return leaves
