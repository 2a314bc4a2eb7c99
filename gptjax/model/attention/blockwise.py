"""Causal attention for XLA:CPU, forward and backward, a block of queries at a time.

Everything is one device's share. Shapes: b sequences, T queries, S keys, h query heads, k key
heads, R = h/k queries of a group, C head_dim, Q = R*T queries of a key head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.config.registry import ATTENTION_BACKENDS
from gptjax.model.attention.backends import LocalBackend
from gptjax.model.layers import NEVER


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end, first key) of each block of queries: it sees only keys from the first key
    to its end."""
    size = max(64, -(-length // 16))
    first_key = lambda start: 0 if window is None else max(0, start - window + 1) // size * size
    return [(a, min(a + size, length), first_key(a)) for a in range(0, length, size)]


def _block_mask(
    a: int, e: int, s: int, segments_bT: jax.Array | None, window: int | None
) -> jax.Array:
    """Mask of keys s..e against queries a..e, transposed: [1 or b, 1, S, 1, T]."""
    key, query = jnp.arange(s, e)[:, None], jnp.arange(a, e)[None]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    mask = mask[None]
    if segments_bT is not None:
        mask = mask & (segments_bT[:, s:e, None] == segments_bT[:, None, a:e])
    return mask[:, None, :, None]


_product = functools.partial(jnp.einsum, "bkij,bkjl->bkil")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blockwise(
    q_bThC: jax.Array,
    k_bTkC: jax.Array,
    v_bTkC: jax.Array,
    segments_bT: jax.Array | None,
    window: int | None,
    scale: float,
) -> jax.Array:
    """Attention of a block of queries at a time to the keys that it sees, [b, T, h, C].

    Scores are transposed, [keys, queries], so that every product, forward and backward, has both
    operands in row-major order, for which the CPU's matrix kernels are fast, and the softmax runs
    over the major axis. The masked half of the score matrix is never computed.
    """
    return _blockwise_fwd(q_bThC, k_bTkC, v_bTkC, segments_bT, window, scale)[0]


def _blockwise_fwd(
    q_bThC: jax.Array,
    k_bTkC: jax.Array,
    v_bTkC: jax.Array,
    segments_bT: jax.Array | None,
    window: int | None,
    scale: float,
) -> tuple[jax.Array, Any]:
    b, t, h, c = q_bThC.shape
    k = k_bTkC.shape[2]
    r = h // k
    # The barriers make the transposed copies real: fused into the products they are strided reads.
    q_bkCRT = lax.optimization_barrier(q_bThC.reshape(b, t, k, r, c).transpose(0, 2, 4, 3, 1))
    k_bkTC = lax.optimization_barrier(k_bTkC.transpose(0, 2, 1, 3))
    v_bkCT = lax.optimization_barrier(v_bTkC.transpose(0, 2, 3, 1))
    outs, probabilities = [], []
    for a, e, s in _blocks(t, window):
        q_bkCQ = q_bkCRT[..., a:e].reshape(b, k, c, r * (e - a))
        score = _product(k_bkTC[:, :, s:e], q_bkCQ).astype(jnp.float32) * scale
        score = score.reshape(b, k, e - s, r, e - a)
        score = jnp.where(_block_mask(a, e, s, segments_bT, window), score, NEVER)
        p = jnp.exp(score - score.max(2, keepdims=True))
        p = (p / p.sum(2, keepdims=True)).astype(q_bThC.dtype)
        p_bkSQ = p.reshape(b, k, e - s, r * (e - a))
        outs.append(_product(v_bkCT[..., s:e], p_bkSQ).reshape(b, k, c, r, e - a))
        probabilities.append(p_bkSQ)
    out_bThC = jnp.concatenate(outs, -1).transpose(0, 4, 1, 3, 2).reshape(b, t, h, c)
    return out_bThC, (q_bThC, k_bkTC, v_bTkC, probabilities)


def _blockwise_bwd(
    window: int | None, scale: float, residuals: Any, do_bThC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_bThC, k_bkTC, v_bTkC, probabilities = residuals
    b, t, h, c = q_bThC.shape
    k = k_bkTC.shape[1]
    r = h // k
    q_bkRTC = lax.optimization_barrier(q_bThC.reshape(b, t, k, r, c).transpose(0, 2, 3, 1, 4))
    k_bkCT = lax.optimization_barrier(k_bkTC.swapaxes(2, 3))
    v_bkTC = lax.optimization_barrier(v_bTkC.transpose(0, 2, 1, 3))
    do_bTkRC = do_bThC.reshape(b, t, k, r, c)
    do_bkRTC = lax.optimization_barrier(do_bTkRC.transpose(0, 2, 3, 1, 4))
    do_bkCRT = lax.optimization_barrier(do_bTkRC.transpose(0, 2, 4, 3, 1))
    blocks = _blocks(t, window)
    dqs = []
    dk_parts: list[list[jax.Array]] = [[] for _ in blocks]
    dv_parts: list[list[jax.Array]] = [[] for _ in blocks]
    for (a, e, s), p_bkSQ in zip(blocks, probabilities, strict=True):
        queries = r * (e - a)
        do_bkQC = do_bkRTC[:, :, :, a:e].reshape(b, k, queries, c)
        dv_bkSC = _product(p_bkSQ, do_bkQC)
        dp = _product(v_bkTC[:, :, s:e], do_bkCRT[..., a:e].reshape(b, k, c, queries))
        p, dp = p_bkSQ.astype(jnp.float32), dp.astype(jnp.float32)
        ds_bkSQ = (p * (dp - (p * dp).sum(2, keepdims=True)) * scale).astype(q_bThC.dtype)
        dk_bkSC = _product(ds_bkSQ, q_bkRTC[:, :, :, a:e].reshape(b, k, queries, c))
        dqs.append(_product(k_bkCT[..., s:e], ds_bkSQ).reshape(b, k, c, r, e - a))
        for j, (first, end, _) in enumerate(blocks):
            if s <= first < e:
                dk_parts[j].append(dk_bkSC[:, :, first - s : end - s])
                dv_parts[j].append(dv_bkSC[:, :, first - s : end - s])
    dq_bThC = jnp.concatenate(dqs, -1).transpose(0, 4, 1, 3, 2).reshape(b, t, h, c)
    dk_bkTC, dv_bkTC = (
        jnp.concatenate([sum(part[1:], part[0]) for part in parts], 2)
        for parts in (dk_parts, dv_parts)
    )
    return dq_bThC, dk_bkTC.swapaxes(1, 2), dv_bkTC.swapaxes(1, 2), None


blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


@ATTENTION_BACKENDS.register("blockwise")
class Blockwise(LocalBackend):
    """`blockwise` on each device."""

    platforms = ("cpu",)
    features = frozenset({"segments", "window", "grouped"})
    auto_rank = 30

    def attend_local(
        self,
        q_bThC: jax.Array,
        k_bTkC: jax.Array,
        v_bTkC: jax.Array,
        segments_bT: jax.Array | None,
        window: int | None,
        scale: float,
    ) -> jax.Array:
        """Causal attention on one device's share, [b, T, h, C]."""
        return blockwise(q_bThC, k_bTkC, v_bTkC, segments_bT, window, scale)
