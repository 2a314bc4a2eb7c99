"""Parameter initialisers, which give the same bits on every mesh."""

import functools
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.parallel.sharding import spec


@functools.cache
def _normal_quantiles() -> np.ndarray:
    """The quantiles of N(0, 1) at the middles of 2**16 equal intervals of probability, float32."""
    half = [-NormalDist().inv_cdf((i + 0.5) / 2**16) for i in range(2**15)]
    return np.array([-x for x in half] + half[::-1], np.float32)


def normal(std: float) -> Callable[..., jax.Array]:
    """An initialiser of N(0, std**2), bit for bit the same on every mesh.

    Random bits do not depend on the layout (partitionable threefry). The logarithm that turns them
    into normal numbers does, in its last bit, because the size of a device's share decides how it
    is vectorised. So 16 random bits choose one of 2**16 quantiles made on the host; the largest is
    4.2 std.
    """

    def init(key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
        out = spec(*axes)
        bits = jax.random.bits(key, shape, jnp.uint16, out_sharding=out)
        return std * jnp.asarray(_normal_quantiles()).at[bits].get(out_sharding=out)

    return init


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float, out: Any) -> jax.Array:
    """Uniform over +-bound, with sharding `out`: 2**16 values, the same bits on every mesh.

    The integers are exact in float32, and each value is rounded once, in the product.
    """
    bits = jax.random.bits(key, shape, jnp.uint16, out_sharding=out)
    return (2 * bits.astype(jnp.float32) - (2**16 - 1)) * jnp.float32(bound / 2**16)


def constant(value: float) -> Callable[..., jax.Array]:
    """An initialiser that sets every element to one value."""

    def init(key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
        return jnp.full(shape, value, jnp.float32, out_sharding=spec(*axes))

    return init
