"""Arrays between hosts and the mesh: this process's rows, and whole arrays gathered."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.parallel.sharding import spec


def host_rows(rows: int) -> np.ndarray:
    """This process's rows of a global batch of `rows` on the ambient mesh, ascending, int64."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch"))
    slices = [s[0] for s in sharding.addressable_devices_indices_map((rows,)).values()]
    return np.unique(np.concatenate([np.arange(rows)[s] for s in slices]))


def to_host(tree: Any) -> Any:
    """Whole arrays as numpy's, in every process, from wherever their parts lie."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.device_get(_everywhere(tree))


@jax.jit
def _everywhere(tree: Any) -> Any:
    return jax.sharding.reshard(tree, PartitionSpec())


def global_batch(local: Any, rows: int) -> Any:
    """Global arrays [rows, ...] of which the leaves of `local` hold this process's `host_rows`."""
    own = host_rows(rows)

    def make(array: np.ndarray) -> jax.Array:
        axes = spec("batch", *[None] * (array.ndim - 1))
        sharding = NamedSharding(jax.sharding.get_mesh(), axes)
        part = lambda index: array[np.searchsorted(own, np.arange(rows)[index[0]])]
        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

    return jax.tree.map(make, local)
