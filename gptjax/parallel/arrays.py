"""Arrays between hosts and the mesh: a process's share of a batch, and whole arrays gathered.

Here a row is one entry of a batch's first dimension.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.parallel.sharding import spec


def host_rows(rows: int) -> np.ndarray:
    """This process's rows of a global batch of `rows` on the ambient mesh, ascending, int64."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch"))
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices if index]))


def to_host(tree: Any) -> Any:
    """Whole arrays as NumPy's, in every process, however they are sharded."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.device_get(_replicated(tree))


@jax.jit
def _replicated(tree: Any) -> Any:
    return jax.sharding.reshard(tree, PartitionSpec())


def global_batch(local: Any, rows: int) -> Any:
    """Global arrays [rows, ...] from each process's `host_rows` of them, the leaves of `local`."""
    own = host_rows(rows)

    def make(array: np.ndarray) -> jax.Array:
        axes = spec("batch", *[None] * (array.ndim - 1))
        sharding = NamedSharding(jax.sharding.get_mesh(), axes)
        shard = lambda index: array[np.searchsorted(own, np.arange(rows)[index[0]])]
        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, shard)

    return jax.tree.map(make, local)
