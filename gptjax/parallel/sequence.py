"""Sequences over the context axis, and their tokens as rows of one matrix.

Shapes: B sequences, T positions, N = B*T tokens, F features, c parts of the context axis.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.parallel.sharding import axis_size, spec


def places(length: int) -> np.ndarray:
    """The place within its sequence of each position, as they lie over the context axis.

    Of c parts, part i holds the i-th and the i-th last of 2c stretches, so that causal attention is
    the same work for each.
    """
    parts = axis_size("seq")
    if parts == 1:
        return np.arange(length)
    stretches = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([stretches[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


def placed(a_BT: jax.Array) -> jax.Array:
    """Whole sequences [B, T, ...] in the order of `places`: 2c stretches, moved as such."""
    parts = axis_size("seq")
    return _stretches(a_BT, [s for i in range(parts) for s in (i, 2 * parts - 1 - i)])


def in_order(a_BT: jax.Array) -> jax.Array:
    """The inverse of `placed`."""
    parts = axis_size("seq")
    at = [2 * s if s < parts else 2 * (2 * parts - 1 - s) + 1 for s in range(2 * parts)]
    return _stretches(a_BT, at)


def _stretches(a_BT: jax.Array, order: Sequence[int]) -> jax.Array:
    if len(order) == 2:  # of one part: their own order
        return a_BT
    stretches = jnp.split(a_BT, len(order), axis=1)
    return jnp.concatenate([stretches[i] for i in order], axis=1)


def to_rows(a_BT: jax.Array, rows: str = "tokens") -> jax.Array:
    """Sequences [B, T, ...] as rows [N, ...] on the logical axis `rows`: "tokens", or "batch" for
    few positions, which are not split over the context axis.

    Over that axis a row is a position in the order of `places`, with every device's part together.
    """
    b, t, *rest = a_BT.shape
    whole = [None] * len(rest)
    parts = axis_size("seq") if rows == "tokens" else 1
    if parts == 1:
        return lax.reshape(a_BT, (b * t, *rest), out_sharding=spec(rows, *whole))
    a_BcT = lax.reshape(
        placed(a_BT), (b, parts, t // parts, *rest), out_sharding=spec("batch", None, None, *whole)
    )
    a_cBT = jax.sharding.reshard(a_BcT, spec("batch", "seq", None, *whole)).swapaxes(0, 1)
    return lax.reshape(a_cBT, (b * t, *rest), out_sharding=spec(rows, *whole))


def sequences(
    a_NF: jax.Array, b: int, shape: Sequence[int], axes: Sequence[str | None], rows: str = "tokens"
) -> jax.Array:
    """Rows [N, F] as `b` sequences [B, T, *shape], in the order of `places`.

    `axes` are the logical axes of `shape`, into which F is cut.
    """
    n, parts = len(a_NF), axis_size("seq") if rows == "tokens" else 1
    if parts == 1:
        seq = "seq" if rows == "tokens" else None
        return lax.reshape(a_NF, (b, n // b, *shape), out_sharding=spec("batch", seq, *axes))
    a_cBT = lax.reshape(
        a_NF, (parts, b, n // b // parts, *shape), out_sharding=spec("seq", "batch", None, *axes)
    )
    return lax.reshape(
        a_cBT.swapaxes(0, 1), (b, n // b, *shape), out_sharding=spec("batch", "seq", *axes)
    )


def rows_of_sequences(a_BTF: jax.Array, axis: str | None, rows: str = "tokens") -> jax.Array:
    """The inverse of `sequences`: [B, T, ...] in the order of `places` as rows [N, F] on `axis`."""
    b, t = a_BTF.shape[:2]
    parts = axis_size("seq") if rows == "tokens" else 1
    width = math.prod(a_BTF.shape[2:])
    if parts == 1:
        return lax.reshape(a_BTF, (b * t, width), out_sharding=spec(rows, axis))
    a_BcTF = lax.reshape(
        a_BTF, (b, parts, t // parts, width), out_sharding=spec("batch", "seq", None, axis)
    )
    return lax.reshape(a_BcTF.swapaxes(0, 1), (b * t, width), out_sharding=spec(rows, axis))


def natural(a_BT: jax.Array) -> jax.Array:
    """Sequences in the order of `places` in their own order, whole on each device of the axis."""
    return in_order(jax.sharding.reshard(a_BT, spec("batch", *[None] * (a_BT.ndim - 1))))
