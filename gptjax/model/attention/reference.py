"""Softmax attention written for reading: the implementation that every backend is compared with.

Shapes: B sequences, T queries, S keys, H query heads, K key heads, R = H/K queries of a group,
Q = R*T, C head_dim; in lower case, one device's share. Query head h reads key head h // R.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.config import ModelConfig
from gptjax.config.registry import ATTENTION_BACKENDS
from gptjax.model import layers
from gptjax.model.attention.backends import Backend, Inputs
from gptjax.model.layers import NEVER, alibi_bias, alibi_slopes
from gptjax.parallel import sequence, sharding


def dot_product(
    q_BTHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    mask_BTS: jax.Array,
    scale: float,
    bias_BHTS: jax.Array | None = None,
    soft_cap: float = 0.0,
    drop: Callable[[jax.Array], jax.Array] = lambda p_BKRTS: p_BKRTS,
) -> jax.Array:
    """Softmax attention (Vaswani et al. 2017); scores and softmax in float32.

    `mask_BTS` (or [1, T, S]) is true where a query sees a key; `scale` multiplies the scores before
    they are capped; `bias_BHTS` is added to them; `drop` is dropout of the weights.
    """
    b, t, h, c = q_BTHC.shape
    k, s = k_BKSC.shape[1:3]
    r = h // k
    shape = lambda x, *axes: lax.reshape(
        x, axes, out_sharding=sharding.spec("batch", "heads", *[None] * (len(axes) - 2))
    )
    grouped, whole = (
        sharding.spec("batch", None, "heads", *rest) for rest in ((None, None), (None,))
    )
    # Queries are the rows of one matrix for each key head: the shape that CPUs are fast at.
    q_BTKRC = lax.reshape(q_BTHC, (b, t, k, r, c), out_sharding=grouped)
    q_BKQC = shape(q_BTKRC.transpose(0, 2, 3, 1, 4), b, k, r * t, c)
    wide = sharding.wide(q_BTHC.dtype)
    s_BKQS = jnp.matmul(q_BKQC, k_BKSC.swapaxes(2, 3), preferred_element_type=wide)
    s_BKRTS = shape(s_BKQS.astype(jnp.float32) * scale, b, k, r, t, s)
    s_BKRTS = layers.soft_cap(s_BKRTS, soft_cap)
    if bias_BHTS is not None:
        s_BKRTS += bias_BHTS.reshape(bias_BHTS.shape[0], k, r, *bias_BHTS.shape[2:])
    s_BKRTS = jnp.where(mask_BTS[:, None, None], s_BKRTS, NEVER)
    p_BKRTS = drop(jax.nn.softmax(s_BKRTS, -1)).astype(q_BTHC.dtype)
    out_BKQC = jnp.matmul(shape(p_BKRTS, b, k, r * t, s), v_BKSC)
    out_BTKRC = shape(out_BKQC, b, k, r, t, c).transpose(0, 3, 1, 2, 4)
    return lax.reshape(out_BTKRC, (b, t, h, c), out_sharding=whole)


def causal_mask(
    length: int,
    segments_BT: jax.Array | None,
    window: int | None,
    positions_T: np.ndarray | None = None,
) -> jax.Array:
    """True where query t of a whole sequence sees key s, [1 or B, T, S].

    `positions_T` are the positions of queries and keys in the order in which they lie; None for
    natural order.
    """
    positions_T = np.arange(length) if positions_T is None else positions_T
    query, key = jnp.asarray(positions_T)[:, None], jnp.asarray(positions_T)[None]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    if segments_BT is None:
        return mask[None]
    return mask & (segments_BT[:, :, None] == segments_BT[:, None, :])


@ATTENTION_BACKENDS.register("reference")
class Reference(Backend):
    """`dot_product` over whole sequences, which are gathered over the context axis."""

    platforms = ("cpu", "gpu", "tpu")
    features = frozenset(
        {"segments", "window", "grouped", "alibi", "soft_cap", "dropout", "context"}
    )
    auto_rank = 50

    def attend(self, cfg: ModelConfig, inputs: Inputs) -> jax.Array:
        """Causal attention, [B, T, H, C]; every device of the context axis computes all of it."""
        tokens, t = inputs.tokens, inputs.q_BTHC.shape[1]
        order_T = sequence.zigzag_positions(t)
        positions_BT = _gather(tokens.positions_BT)
        segments_BT = None if tokens.segments_BT is None else _gather(tokens.segments_BT)
        mask_BTS = causal_mask(t, segments_BT, inputs.window, order_T)
        bias_BHTS = None
        if cfg.positions == "alibi":
            bias_BHTS = alibi_bias(cfg, alibi_slopes(cfg.heads), positions_BT, positions_BT)
        q_BTHC, k_BTKC, v_BTKC = (_gather(x) for x in (inputs.q_BTHC, inputs.k_BTKC, inputs.v_BTKC))
        out_BTHC = dot_product(
            q_BTHC,
            k_BTKC.swapaxes(1, 2),
            v_BTKC.swapaxes(1, 2),
            mask_BTS,
            inputs.scale,
            bias_BHTS,
            cfg.attention_soft_cap,
            lambda p_BKRTS: _drop(cfg.dropout, tokens.keys_BT2, inputs.dropout_id, p_BKRTS),
        )
        return jax.sharding.reshard(out_BTHC, sharding.spec("batch", "seq", "heads", None))


def _gather(a_BT: jax.Array) -> jax.Array:
    """[B, T, ...] gathered over the context axis, in zigzag order."""
    batch, _, *rest = jax.typeof(a_BT).sharding.spec
    return jax.sharding.reshard(a_BT, jax.P(batch, None, *rest))


def _drop(
    rate: float, keys_BT2: jax.Array | None, dropout_id: jax.Array | int, p_BKRTS: jax.Array
) -> jax.Array:
    """Dropout of attention weights, keyed by the query's key and the head."""
    if keys_BT2 is None or rate == 0:
        return p_BKRTS
    order_S = sequence.zigzag_positions(p_BKRTS.shape[-1])
    whole = sharding.spec("batch", None, None)
    heads = sharding.spec("batch", "heads", None, None, None)

    def local(p_bkRTS: jax.Array, keys_bT2: jax.Array, dropout_id: jax.Array) -> jax.Array:
        b, k, r, t, s = p_bkRTS.shape
        first_head = lax.axis_index("tensor") * k * r
        fold = lambda key_2, head: jax.random.key_data(
            jax.random.fold_in(jax.random.wrap_key_data(key_2), head)
        )
        by_head = jax.vmap(jax.vmap(fold, (0, None)), (None, 0))
        keys_hn2 = by_head(keys_bT2.reshape(b * t, 2), first_head + jnp.arange(k * r))
        keys_bhT2 = keys_hn2.reshape(k * r, b, t, 2).swapaxes(0, 1)
        # In the keys' natural order, so that the context axis changes nothing.
        natural = p_bkRTS[..., np.argsort(order_S)].reshape(b, k * r, t, s)
        dropped = layers.local_dropout(natural, rate, keys_bhT2, dropout_id)
        return dropped[..., order_S].reshape(p_bkRTS.shape)

    return jax.shard_map(local, in_specs=(heads, whole, jax.P()), out_specs=heads, check_vma=False)(
        p_BKRTS, jax.sharding.reshard(keys_BT2, whole), jnp.uint32(dropout_id)
    )
