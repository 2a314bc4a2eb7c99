"""A bit that a device has wrong."""

import jax
import numpy as np


def with_flip(leaf: jax.Array, device: int) -> jax.Array:
    """The array, with one flipped bit in what one device holds."""
    shards = []
    for shard in leaf.addressable_shards:
        part = np.array(shard.data)
        if shard.device.id == device:
            part.reshape(-1).view(np.uint8)[0] ^= 1
        shards.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
