"""Softmax attention written for reading: the implementation that every backend is compared with.

Shapes: B batch, T queries, S keys, H query heads, K key heads, R = H/K queries of a group,
C head_dim. Query head h reads key head h // R.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.model import layers
from gptjax.model.layers import NEVER, alibi_bias, alibi_slopes
from gptjax.parallel import sequence, sharding


def dot_product(
    q_BTHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    mask_BTS: jax.Array,
    bias_BHTS: jax.Array | None = None,
    soft_cap: float = 0.0,
    drop: Callable[[jax.Array], jax.Array] = lambda p_BKRTS: p_BKRTS,
) -> jax.Array:
    """Softmax attention, written for reading; scores and softmax in float32.

    `mask_BTS` (or [1, T, S]) is true where a query may look; `bias_BHTS` is added to the scores;
    `drop` is dropout of the weights.
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
    s_BKRTS = shape(s_BKQS.astype(jnp.float32) * c**-0.5, b, k, r, t, s)
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
    places: np.ndarray | None = None,
) -> jax.Array:
    """True where query t of a whole sequence may look at key s, [1 or B, T, S].

    Queries and keys stand in the order of `places`, their own if it is not given.
    """
    places = np.arange(length) if places is None else places
    query, keys = jnp.asarray(places)[:, None], jnp.asarray(places)[None]
    mask = keys <= query
    if window is not None:
        mask &= keys > query - window
    if segments_BT is None:
        return mask[None]
    return mask & (segments_BT[:, :, None] == segments_BT[:, None, :])


def reference_attention(cfg, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, window, drop):
    """The reference over whole sequences, which each device of a context axis computes whole."""
    t = q_BTHC.shape[1]
    places = sequence.places(t)

    def whole(a: jax.Array) -> jax.Array:
        rows, _, *rest = jax.typeof(a).sharding.spec
        return jax.sharding.reshard(a, jax.P(rows, None, *rest))

    keys_BS = whole(positions_BT)
    mask_BTS = causal_mask(t, None if segments_BT is None else whole(segments_BT), window, places)
    bias = None
    if cfg.positions == "alibi":
        bias = alibi_bias(cfg, alibi_slopes(cfg.heads), keys_BS, keys_BS)
    q_BTHC, k_BTKC, v_BTKC = (whole(x) for x in (q_BTHC, k_BTKC, v_BTKC))
    k_BKTC, v_BKTC = k_BTKC.swapaxes(1, 2), v_BTKC.swapaxes(1, 2)
    out_BTHC = dot_product(q_BTHC, k_BKTC, v_BKTC, mask_BTS, bias, cfg.attention_soft_cap, drop)
    return jax.sharding.reshard(out_BTHC, sharding.spec("batch", "seq", "heads", None))
