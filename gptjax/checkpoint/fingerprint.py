"""Fingerprints of arrays: by them a checkpoint is verified, and two states are compared."""

import functools
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.param_tree import Leaves


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


def sha256_of(values: Any) -> str:
    """SHA-256 of JSON values, key order aside."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
