"""Causal attention for XLA:CPU, forward and backward, a block of queries at a time.

Shapes: B batch, T queries, S keys, H query heads, K key heads, R = H/K queries of a group,
C head_dim, Q = R*T queries of a key head.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.model.layers import NEVER


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end, first key) of each block of queries; keys before or after are masked."""
    size = max(64, -(-length // 16))
    first_key = lambda start: 0 if window is None else max(0, start - window + 1) // size * size
    return [(a, min(a + size, length), first_key(a)) for a in range(0, length, size)]


def _block_mask(a, e, s, segments_BT, window):
    """Mask of keys s..e against queries a..e, transposed: [1 or B, 1, S, 1, T]."""
    key, query = jnp.arange(s, e)[:, None], jnp.arange(a, e)[None]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    mask = mask[None]
    if segments_BT is not None:
        mask = mask & (segments_BT[:, s:e, None] == segments_BT[:, None, a:e])
    return mask[:, None, :, None]


_product = functools.partial(jnp.einsum, "bkij,bkjl->bkil")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    segments_BT: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Attention for XLA:CPU: a block of queries at a time against the keys it can see.

    Scores are held transposed, [keys, queries], so that every product, forward and backward, has
    both operands in row-major order, which is what the CPU's matrix kernels are fast at, and the
    softmax runs over the major axis. The masked half of the score matrix is never computed.
    """
    return _blockwise_fwd(q_BTHC, k_BTKC, v_BTKC, segments_BT, window)[0]


def _blockwise_fwd(q_BTHC, k_BTKC, v_BTKC, segments_BT, window):
    b, t, h, c = q_BTHC.shape
    k = k_BTKC.shape[2]
    r = h // k
    # The barriers make the transposed copies real: fused into the products they are strided reads.
    q_BKCRT = lax.optimization_barrier(q_BTHC.reshape(b, t, k, r, c).transpose(0, 2, 4, 3, 1))
    k_BKTC = lax.optimization_barrier(k_BTKC.transpose(0, 2, 1, 3))
    v_BKCT = lax.optimization_barrier(v_BTKC.transpose(0, 2, 3, 1))
    outs, probabilities = [], []
    for a, e, s in _blocks(t, window):
        q_BKCQ = q_BKCRT[..., a:e].reshape(b, k, c, r * (e - a))
        score = _product(k_BKTC[:, :, s:e], q_BKCQ).astype(jnp.float32) * c**-0.5
        score = score.reshape(b, k, e - s, r, e - a)
        score = jnp.where(_block_mask(a, e, s, segments_BT, window), score, NEVER)
        p = jnp.exp(score - score.max(2, keepdims=True))
        p = (p / p.sum(2, keepdims=True)).astype(q_BTHC.dtype)
        p_BKSQ = p.reshape(b, k, e - s, r * (e - a))
        outs.append(_product(v_BKCT[..., s:e], p_BKSQ).reshape(b, k, c, r, e - a))
        probabilities.append(p_BKSQ)
    out_BTHC = jnp.concatenate(outs, -1).transpose(0, 4, 1, 3, 2).reshape(b, t, h, c)
    return out_BTHC, (q_BTHC, k_BKTC, v_BTKC, probabilities)


def _blockwise_bwd(window, residuals, do_BTHC):
    q_BTHC, k_BKTC, v_BTKC, probabilities = residuals
    b, t, h, c = q_BTHC.shape
    k = k_BKTC.shape[1]
    r = h // k
    q_BKRTC = lax.optimization_barrier(q_BTHC.reshape(b, t, k, r, c).transpose(0, 2, 3, 1, 4))
    k_BKCT = lax.optimization_barrier(k_BKTC.swapaxes(2, 3))
    v_BKTC = lax.optimization_barrier(v_BTKC.transpose(0, 2, 1, 3))
    do_BTKRC = do_BTHC.reshape(b, t, k, r, c)
    do_BKRTC = lax.optimization_barrier(do_BTKRC.transpose(0, 2, 3, 1, 4))
    do_BKCRT = lax.optimization_barrier(do_BTKRC.transpose(0, 2, 4, 3, 1))
    blocks = _blocks(t, window)
    dqs = []
    dk_parts: list[list[jax.Array]] = [[] for _ in blocks]
    dv_parts: list[list[jax.Array]] = [[] for _ in blocks]
    for (a, e, s), p_BKSQ in zip(blocks, probabilities, strict=True):
        queries = r * (e - a)
        do_BKQC = do_BKRTC[:, :, :, a:e].reshape(b, k, queries, c)
        dv_BKSC = _product(p_BKSQ, do_BKQC)
        dp = _product(v_BKTC[:, :, s:e], do_BKCRT[..., a:e].reshape(b, k, c, queries))
        p, dp = p_BKSQ.astype(jnp.float32), dp.astype(jnp.float32)
        ds_BKSQ = (p * (dp - (p * dp).sum(2, keepdims=True)) * c**-0.5).astype(q_BTHC.dtype)
        dk_BKSC = _product(ds_BKSQ, q_BKRTC[:, :, :, a:e].reshape(b, k, queries, c))
        dqs.append(_product(k_BKCT[..., s:e], ds_BKSQ).reshape(b, k, c, r, e - a))
        for j, (first, end, _) in enumerate(blocks):
            if s <= first < e:
                dk_parts[j].append(dk_BKSC[:, :, first - s : end - s])
                dv_parts[j].append(dv_BKSC[:, :, first - s : end - s])
    dq_BTHC = jnp.concatenate(dqs, -1).transpose(0, 4, 1, 3, 2).reshape(b, t, h, c)
    dk_BKTC, dv_BKTC = (
        jnp.concatenate([sum(part[1:], part[0]) for part in parts], 2)
        for parts in (dk_parts, dv_parts)
    )
    return dq_BTHC, dk_BKTC.swapaxes(1, 2), dv_BKTC.swapaxes(1, 2), None


blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
