"""Sequences split over the context axis in zigzag order, and sequences flattened to tokens.

Zigzag order balances causal attention. A sequence is cut into 2P chunks for P devices along the
context axis, and device i has chunks i and 2P-1-i, an early one and a late one: so each device's
queries see as many keys as any other's. With P = 1 it is the sequence's natural order.

Flat arrays of tokens have every device's tokens together: device by device along the context axis,
then sequence by sequence, then position by position in zigzag order.

Shapes: B sequences, T positions, N = B*T tokens, F features, P parts of the context axis.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.parallel.sharding import axis_size, spec


def zigzag_positions(length: int) -> np.ndarray:
    """The position within its sequence of each token in zigzag order, [length]."""
    parts = axis_size("seq")
    if parts == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * parts, -1)
    return chunks[_zigzag_chunks(parts)].reshape(-1)


def _zigzag_chunks(parts: int) -> list[int]:
    """The number of each chunk of a sequence in zigzag order."""
    return [chunk for i in range(parts) for chunk in (i, 2 * parts - 1 - i)]


def to_zigzag(a_BT: jax.Array) -> jax.Array:
    """Whole sequences [B, T, ...] from natural to zigzag order."""
    return _reorder_chunks(a_BT, _zigzag_chunks(axis_size("seq")))


def from_zigzag(a_BT: jax.Array) -> jax.Array:
    """Whole sequences [B, T, ...] from zigzag to natural order."""
    return _reorder_chunks(a_BT, np.argsort(_zigzag_chunks(axis_size("seq"))).tolist())


def _reorder_chunks(a_BT: jax.Array, order: Sequence[int]) -> jax.Array:
    if len(order) == 2:  # one part: natural order
        return a_BT
    chunks = jnp.split(a_BT, len(order), axis=1)
    return jnp.concatenate([chunks[i] for i in order], axis=1)


def flatten(a_BT: jax.Array, axis: str = "tokens") -> jax.Array:
    """Whole sequences [B, T, ...] in natural order as flat tokens [N, ...].

    The tokens lie on the logical axis `axis`: "tokens", or "batch" for few positions, which are not
    split over the context axis and stay in natural order.
    """
    b, t, *rest = a_BT.shape
    whole = [None] * len(rest)
    parts = axis_size("seq") if axis == "tokens" else 1
    if parts == 1:
        return lax.reshape(a_BT, (b * t, *rest), out_sharding=spec(axis, *whole))
    a_BPT = lax.reshape(
        to_zigzag(a_BT),
        (b, parts, t // parts, *rest),
        out_sharding=spec("batch", None, None, *whole),
    )
    a_PBT = jax.sharding.reshard(a_BPT, spec("batch", "seq", None, *whole)).swapaxes(0, 1)
    return lax.reshape(a_PBT, (b * t, *rest), out_sharding=spec(axis, *whole))


def unflatten(
    a_NF: jax.Array, b: int, shape: Sequence[int], axes: Sequence[str | None], axis: str = "tokens"
) -> jax.Array:
    """Flat tokens [N, F] as `b` sequences [B, T, *shape] in zigzag order.

    `axes` are the logical axes of `shape`, into which F is cut; `axis` as in `flatten`.
    """
    n, parts = len(a_NF), axis_size("seq") if axis == "tokens" else 1
    if parts == 1:
        seq = "seq" if axis == "tokens" else None
        return lax.reshape(a_NF, (b, n // b, *shape), out_sharding=spec("batch", seq, *axes))
    a_PBT = lax.reshape(
        a_NF, (parts, b, n // b // parts, *shape), out_sharding=spec("seq", "batch", None, *axes)
    )
    return lax.reshape(
        a_PBT.swapaxes(0, 1), (b, n // b, *shape), out_sharding=spec("batch", "seq", *axes)
    )


def flatten_zigzag(a_BTF: jax.Array, feature_axis: str | None, axis: str = "tokens") -> jax.Array:
    """The inverse of `unflatten`: [B, T, ...] in zigzag order as flat tokens [N, F]."""
    b, t = a_BTF.shape[:2]
    parts = axis_size("seq") if axis == "tokens" else 1
    width = math.prod(a_BTF.shape[2:])
    if parts == 1:
        return lax.reshape(a_BTF, (b * t, width), out_sharding=spec(axis, feature_axis))
    a_BPTF = lax.reshape(
        a_BTF, (b, parts, t // parts, width), out_sharding=spec("batch", "seq", None, feature_axis)
    )
    return lax.reshape(a_BPTF.swapaxes(0, 1), (b * t, width), out_sharding=spec(axis, feature_axis))


def gather_natural(a_BT: jax.Array) -> jax.Array:
    """Sequences [B, T, ...] in zigzag order, gathered over the context axis in natural order."""
    return from_zigzag(jax.sharding.reshard(a_BT, spec("batch", *[None] * (a_BT.ndim - 1))))
