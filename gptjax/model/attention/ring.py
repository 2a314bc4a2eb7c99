"""Ring attention for sequences that are split over the context axis (Liu et al. 2023).

A device keeps its queries; keys and values go round, a device further at every step, while each
device attends to those at hand, with a running softmax. Nobody ever holds the keys of whole
sequences. The backward pass sends them round again, and with them the sums of their gradients,
which are home after a whole turn. What is next is sent off before what is at hand is used, so that
the two can overlap.

With sequences in the order of `sharding.places`, device i has stretches i and 2c-1-i of 2c. Of the
keys of a device before it, all its queries see the early half, and none the late one; of those of a
device after it, its late queries see all, and its early ones none. So every step is half a square
of queries and keys on every device, and nothing that causality hides is computed but the corners of
the blocks into which the squares are cut. Scores exist for one block at a time.

Shapes: B batch, T a device's tokens, N its blocks of S tokens each, H query heads, K key heads,
R = H/K, Q = R*S queries of a block for a key head, C head_dim. Scores are held transposed, keys x
queries, see `attention.blockwise`. Device i is the one that computes, j the one whose keys it has
at hand, of c.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.config import ModelConfig
from gptjax.config.validation import divisors
from gptjax.model import layers
from gptjax.model.layers import NEVER
from gptjax.parallel import sharding

_AXIS = sharding.RULES["seq"]
_BLOCK = 512  # tokens, or what divides half a device's and is nearest to that


class _Held(NamedTuple):
    """A device's keys and values, and what masks and biases go by: of all blocks, or of one.

    Shapes: [N, B, K, S, C] twice, [N, B, S] twice, [N] or less the N; start: a block's first place.
    """

    keys: jax.Array
    values: jax.Array
    segments: jax.Array | None
    positions: jax.Array | None
    start: jax.Array


def attend(
    cfg: ModelConfig,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Causal attention over whole sequences in the order of `sharding.places`, [B, T, H, C].

    Here T are all tokens. The context axis has at least two parts.
    """
    heads, rows = sharding.spec("batch", "seq", "heads", None), sharding.spec("batch", "seq")
    alibi = None
    if cfg.positions == "alibi":
        slopes_H = jax.sharding.reshard(layers.alibi_slopes(cfg.heads), sharding.spec("heads"))
        alibi = (slopes_H, positions_BT)
    return jax.shard_map(
        functools.partial(_ring, cfg, window),
        in_specs=(
            heads,
            heads,
            heads,
            None if segments_BT is None else rows,
            None if alibi is None else (sharding.spec("heads"), rows),
        ),
        out_specs=heads,
        check_vma=False,
    )(q_BTHC, k_BTKC, v_BTKC, segments_BT, alibi)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(cfg, window, q_BTHC, k_BTKC, v_BTKC, segments_BT, alibi):
    return _ring_fwd(cfg, window, q_BTHC, k_BTKC, v_BTKC, segments_BT, alibi)[0]


def _ring_fwd(cfg, window, q_BTHC, k_BTKC, v_BTKC, segments_BT, alibi):
    own = _held(k_BTKC, v_BTKC, segments_BT, alibi)
    q_NBKCQ = _query_blocks(q_BTHC, own)

    def see(q_BKCQ, query, key, so_far, _):
        out_BKCQ, max_BKQ, sum_BKQ = so_far
        score_BKSQ, _ = _scores(cfg, window, alibi, q_BKCQ, query, key)
        top_BKQ = jnp.maximum(max_BKQ, score_BKSQ.max(2))
        p_BKSQ = jnp.exp(score_BKSQ - top_BKQ[:, :, None])
        shrink_BKQ = jnp.exp(max_BKQ - top_BKQ)
        seen_BKCQ = _product("bksc,bksq->bkcq", key.values, p_BKSQ)
        out_BKCQ = out_BKCQ * shrink_BKQ[:, :, None] + seen_BKCQ
        return (out_BKCQ, top_BKQ, sum_BKQ * shrink_BKQ + p_BKSQ.sum(2)), ()

    zero_NBKCQ = jnp.zeros(q_NBKCQ.shape, jnp.float32)
    zero_NBKQ = zero_NBKCQ[:, :, :, 0]
    nothing = (zero_NBKCQ, zero_NBKQ + NEVER, zero_NBKQ)
    (out_NBKCQ, max_NBKQ, sum_NBKQ), _ = _go_round(see, window, q_NBKCQ, own, nothing, ())
    out_BTHC = _tokens(out_NBKCQ / sum_NBKQ[:, :, :, None], q_BTHC)
    lse_NBKQ = max_NBKQ + jnp.log(sum_NBKQ)
    return out_BTHC, (q_BTHC, k_BTKC, v_BTKC, segments_BT, alibi, out_BTHC, lse_NBKQ)


def _ring_bwd(cfg, window, residuals, do_BTHC):
    q_BTHC, k_BTKC, v_BTKC, segments_BT, alibi, out_BTHC, lse_NBKQ = residuals
    own = _held(k_BTKC, v_BTKC, segments_BT, alibi)
    q_NBKCQ, do_NBKCQ, out_NBKCQ = (_query_blocks(x, own) for x in (q_BTHC, do_BTHC, out_BTHC))
    delta_NBKQ = (do_NBKCQ.astype(jnp.float32) * out_NBKCQ.astype(jnp.float32)).sum(3)

    def see(of_query, query, key, dq_BKCQ, sums):
        q_BKCQ, do_BKCQ, lse_BKQ, delta_BKQ = of_query
        dk_BKSC, dv_BKSC = sums
        score_BKSQ, rise_BKSQ = _scores(cfg, window, alibi, q_BKCQ, query, key)
        p_BKSQ = jnp.exp(score_BKSQ - lse_BKQ[:, :, None])
        dp_BKSQ = _product("bksc,bkcq->bksq", key.values, do_BKCQ)
        ds_BKSQ = p_BKSQ * (dp_BKSQ - delta_BKQ[:, :, None]) * rise_BKSQ
        dk_BKSC += _product("bkcq,bksq->bksc", q_BKCQ, ds_BKSQ)
        dv_BKSC += _product("bkcq,bksq->bksc", do_BKCQ, p_BKSQ)
        return dq_BKCQ + _product("bksc,bksq->bkcq", key.keys, ds_BKSQ), (dk_BKSC, dv_BKSC)

    # In float32 on their way, too: a turn in bfloat16 would round each sum c times.
    of_queries = (q_NBKCQ, do_NBKCQ, lse_NBKQ, delta_NBKQ)
    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (q_NBKCQ, own.keys, own.values))
    dq_NBKCQ, *sums = zeros
    dq_NBKCQ, sums = _go_round(see, window, of_queries, own, dq_NBKCQ, tuple(sums))
    dk_BTKC, dv_BTKC = (
        x_NBKSC.transpose(1, 0, 3, 2, 4).reshape(k_BTKC.shape).astype(k_BTKC.dtype)
        for x_NBKSC in sums
    )
    return _tokens(dq_NBKCQ, q_BTHC), dk_BTKC, dv_BTKC, None, None


_ring.defvjp(_ring_fwd, _ring_bwd)


# --- the way round -------------------------------------------------------------------------------


def _go_round(
    see: Callable[..., Any],
    window: int | None,
    of_queries: Any,
    own: _Held,
    by_queries: Any,
    by_keys: Any,
) -> tuple[Any, Any]:
    """What a device's queries gather from all keys, and what its keys gather from all queries.

    `see(of_query, query, key, by_query, by_key)` is called with a block of each where the query
    sees the key, and gives the last two with what this adds to them; they begin as given, by_keys
    as zeros. `of_queries` are constants, a block of queries each; `query` and `key` are `_Held`.
    """
    # Tied to the queries: a scan over layers would make the masks of all blocks beforehand, a GiB.
    _, ids = lax.optimization_barrier((of_queries, own[2:]))
    own = _Held(own.keys, own.values, *ids)
    i, c, n = lax.axis_index(_AXIS), lax.axis_size(_AXIS), len(own.start)
    below = np.argwhere(np.tri(n))
    early_keys = np.argwhere(np.tile(np.arange(n) < n // 2, (n, 1)))
    late_queries = early_keys[:, ::-1] + [n // 2, 0]

    def visit(state, held, pairs):
        by_queries, by_keys = state
        # They are where these keys were before, and come while more is added up.
        came = by_keys if held is own else _pass_on(by_keys)

        def pair(state, places):
            places = tuple(places)
            query, key = _at(own, places[0]), _at(held, places[1])
            old = tuple(map(_at, state, places))
            new = lambda: see(_at(of_queries, places[0]), query, key, *old)
            if window is None:
                return tuple(map(_put, state, places, new())), None
            far = query.start - key.start - (key.keys.shape[2] - 1) >= window
            return tuple(map(_put, state, places, lax.cond(far, lambda: old, new))), None

        nothing = jax.tree.map(jnp.zeros_like, by_keys)
        (by_queries, more), _ = lax.scan(pair, (by_queries, nothing), pairs)
        return by_queries, jax.tree.map(jnp.add, came, more)

    def visit_other(state, held, step):
        j = (i - step) % c
        held = held._replace(start=_starts(j, own.keys))
        return visit(state, held, jnp.where(j < i, early_keys, late_queries))

    def turn(carry, step):
        state, held = carry
        coming = _pass_on(held)
        return (visit_other(state, held, step), coming), None

    coming = _pass_on(own._replace(start=None))
    state = visit((by_queries, by_keys), own, jnp.asarray(below))
    (state, held), _ = lax.scan(turn, (state, coming), jnp.arange(1, c - 1))
    by_queries, by_keys = visit_other(state, held, c - 1)
    return by_queries, _pass_on(by_keys)


def _pass_on(tree: Any) -> Any:
    """What the device before this one held."""
    c = lax.axis_size(_AXIS)
    return lax.ppermute(tree, _AXIS, [(i, (i + 1) % c) for i in range(c)])


def _starts(j: jax.Array, keys_NBKSC: jax.Array) -> jax.Array:
    """The places in whole sequences at which device j's blocks begin, [N]."""
    half, size = len(keys_NBKSC) // 2, keys_NBKSC.shape[3]
    stretch_21 = jnp.stack([j, 2 * lax.axis_size(_AXIS) - 1 - j])[:, None]
    return ((stretch_21 * half + np.arange(half)) * size).reshape(-1)


# --- blocks --------------------------------------------------------------------------------------


def _held(k_BTKC, v_BTKC, segments_BT, alibi):
    """This device's own keys, in blocks."""
    b, t = k_BTKC.shape[:2]
    size = min(divisors(t // 2), key=lambda size: abs(math.log(size / _BLOCK)))
    cut = lambda x_BT: x_BT.reshape(b, t // size, size, *x_BT.shape[2:])
    keys, values = (cut(x).transpose(1, 0, 3, 2, 4) for x in (k_BTKC, v_BTKC))
    segments = None if segments_BT is None else cut(segments_BT).swapaxes(0, 1)
    positions = None if alibi is None else cut(alibi[1]).swapaxes(0, 1)
    return _Held(keys, values, segments, positions, _starts(lax.axis_index(_AXIS), keys))


def _query_blocks(x_BTHC, own):
    """[B, T, H, C] as [N, B, K, C, Q]."""
    b, _, h, c = x_BTHC.shape
    n, _, k, s, _ = own.keys.shape
    x_BNSKRC = x_BTHC.reshape(b, n, s, k, h // k, c)
    return x_BNSKRC.transpose(1, 0, 3, 5, 4, 2).reshape(n, b, k, c, h // k * s)


def _tokens(x_NBKCQ, like_BTHC):
    """The inverse of `_query_blocks`, in the dtype of what is like it."""
    n, b, k, c, _ = x_NBKCQ.shape
    _, t, h, _ = like_BTHC.shape
    x_NBKCRS = x_NBKCQ.reshape(n, b, k, c, h // k, t // n)
    return x_NBKCRS.transpose(1, 0, 5, 2, 4, 3).reshape(like_BTHC.shape).astype(like_BTHC.dtype)


def _at(tree, index):
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def _put(tree, index, new):
    put = lambda a, x: lax.dynamic_update_index_in_dim(a, x, index, 0)
    return jax.tree.map(put, tree, new)


def _product(formula, a, b):
    """In float32, of operands in the dtype of the first."""
    wide = sharding.wide(a.dtype)
    y = jnp.einsum(formula, a, b.astype(a.dtype), preferred_element_type=wide)
    return y.astype(jnp.float32)


def _scores(cfg, window, alibi, q_BKCQ, query, key):
    """Scores of a block, [B, K, S, Q], and their derivatives by the products of q and k."""
    b, k, s, c = key.keys.shape
    score = _product("bksc,bkcq->bksq", key.keys, q_BKCQ) * c**-0.5
    rise = c**-0.5
    if cap := cfg.attention_soft_cap:
        bent = jnp.tanh(score / cap)
        score, rise = cap * bent, rise * (1 - bent * bent)
    score_BKSRT = score.reshape(b, k, s, -1, s)
    if alibi is not None:
        bias_BHTS = layers.alibi_bias(cfg, alibi[0], query.positions, key.positions)
        bias_BKRTS = bias_BHTS.reshape(b, k, -1, *bias_BHTS.shape[2:])
        score_BKSRT += bias_BKRTS.transpose(0, 1, 4, 2, 3)
    distance_ST = query.start + np.arange(s) - (key.start + np.arange(s)[:, None])
    seen_BST = (distance_ST >= 0)[None]
    if window is not None:
        seen_BST &= (distance_ST < window)[None]
    if key.segments is not None:
        seen_BST &= key.segments[:, :, None] == query.segments[:, None]
    score_BKSRT = jnp.where(seen_BST[:, None, :, None], score_BKSRT, NEVER)
    return score_BKSRT.reshape(score.shape), rise
