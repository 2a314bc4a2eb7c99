"""Ring attention for sequences that are split over the context axis (Liu et al. 2023).

A device keeps its queries; keys and values are sent round a ring, one device further at every step,
while each device attends to those it has, with an online softmax. No device ever has the keys of
whole sequences. The backward pass sends them round again, and with them the sums of their
gradients, which are back at their own device after a whole turn. The next keys are sent before the
present ones are used, so that communication and computation overlap.

With sequences in zigzag order (parallel/sequence.py), of 2P chunks device i has chunks i and
2P-1-i. All its queries see the early chunk of a device before it, and none of them the late one;
only its late queries see the keys of a device after it, and they see all of these. So every step is
half a square of queries and keys on every device, and nothing that the causal mask hides is
computed, except within the blocks on the diagonal. Scores exist for one block at a time.

`block_pairs` and `key_owner` are the schedule; `ring_pass` executes it; `update(query, key, acc)`
of the forward and the backward pass adds the contribution of a block of queries and one of keys.

Inside the shard_map everything is one device's share. Shapes: b sequences, t tokens, n blocks of S
tokens each, h query heads, k key heads, R = h/k, Q = R*S queries of a block for a key head, C
head_dim. Scores are transposed, keys x queries, see blockwise.py.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.config.registry import ATTENTION_BACKENDS
from gptjax.config.validation import divisors
from gptjax.model import layers
from gptjax.model.attention.backends import Backend, Inputs
from gptjax.model.layers import NEVER
from gptjax.parallel import sharding
from gptjax.parallel.matmul import PRODUCT

_AXIS = "context"
_BLOCK = 512  # tokens; the divisor of half a device's tokens that is nearest to it is taken


@ATTENTION_BACKENDS.register("ring")
class Ring(Backend):
    """Ring attention over the context axis."""

    platforms = ("cpu", "gpu", "tpu")
    features = frozenset({"segments", "window", "grouped", "alibi", "soft_cap", "context"})
    requires_context = True
    auto_rank = 40

    def attend(self, cfg: ModelConfig, inputs: Inputs) -> jax.Array:
        """Causal attention, [B, T, H, C]."""
        heads, tokens = sharding.spec("batch", "seq", "heads", None), sharding.spec("batch", "seq")
        segments_BT, alibi = inputs.tokens.segments_BT, None
        if cfg.positions == "alibi":
            slopes_H = jax.sharding.reshard(layers.alibi_slopes(cfg.heads), sharding.spec("heads"))
            alibi = (slopes_H, inputs.tokens.positions_BT)
        return jax.shard_map(
            functools.partial(_ring, _Settings(cfg, inputs.window, inputs.scale)),
            in_specs=(
                heads,
                heads,
                heads,
                None if segments_BT is None else tokens,
                None if alibi is None else (sharding.spec("heads"), tokens),
            ),
            out_specs=heads,
            check_vma=False,
        )(inputs.q_BTHC, inputs.k_BTKC, inputs.v_BTKC, segments_BT, alibi)


@dataclass(frozen=True)
class _Settings:
    cfg: ModelConfig
    window: int | None
    scale: float


class Places(NamedTuple):
    """The tokens' facts that masks and biases depend on, of all blocks or of one.

    segments_nbS and positions_nbS: None where no mask or bias needs them. start_n: the position in
    the whole sequence of each block's first token; None while keys are sent.
    """

    segments_nbS: Any
    positions_nbS: Any
    start_n: Any


class Blocks(NamedTuple):
    """Arrays of queries, or of keys and values, of all blocks or of one, and their places."""

    arrays: Any
    places: Places


Alibi = tuple[jax.Array, jax.Array] | None  # slopes_h, positions_bt


# --- the two passes ------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    settings: _Settings,
    q_bthC: jax.Array,
    k_btkC: jax.Array,
    v_btkC: jax.Array,
    segments_bt: jax.Array | None,
    alibi: Alibi,
) -> jax.Array:
    return _ring_fwd(settings, q_bthC, k_btkC, v_btkC, segments_bt, alibi)[0]


def _ring_fwd(
    settings: _Settings,
    q_bthC: jax.Array,
    k_btkC: jax.Array,
    v_btkC: jax.Array,
    segments_bt: jax.Array | None,
    alibi: Alibi,
) -> tuple[jax.Array, Any]:
    keys = key_blocks(k_btkC, v_btkC, segments_bt, alibi)
    q_nbkCQ = _query_blocks(q_bthC, keys)

    def update(query: Blocks, key: Blocks, acc: Any) -> Any:
        """One step of the online softmax (Milakov & Gimelshein 2018)."""
        (out_bkCQ, max_bkQ, sum_bkQ), _ = acc
        score_bkSQ, _ = _scores(settings, alibi, query, key)
        top_bkQ = jnp.maximum(max_bkQ, score_bkSQ.max(2))
        p_bkSQ = jnp.exp(score_bkSQ - top_bkQ[:, :, None])
        shrink_bkQ = jnp.exp(max_bkQ - top_bkQ)
        _, v_bkSC = key.arrays
        out_bkCQ = out_bkCQ * shrink_bkQ[:, :, None] + _product("bksc,bksq->bkcq", v_bkSC, p_bkSQ)
        return (out_bkCQ, top_bkQ, sum_bkQ * shrink_bkQ + p_bkSQ.sum(2)), ()

    zero_nbkCQ = jnp.zeros(q_nbkCQ.shape, jnp.float32)
    zero_nbkQ = zero_nbkCQ[:, :, :, 0]
    acc = (zero_nbkCQ, zero_nbkQ + NEVER, zero_nbkQ), ()
    (out_nbkCQ, max_nbkQ, sum_nbkQ), _ = ring_pass(update, settings.window, q_nbkCQ, keys, acc)
    out_bthC = kept(_from_query_blocks(out_nbkCQ / sum_nbkQ[:, :, :, None], q_bthC))
    lse_nbkQ = kept(max_nbkQ + jnp.log(sum_nbkQ))
    return out_bthC, (q_bthC, k_btkC, v_btkC, segments_bt, alibi, out_bthC, lse_nbkQ)


def _ring_bwd(
    settings: _Settings, residuals: Any, do_bthC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q_bthC, k_btkC, v_btkC, segments_bt, alibi, out_bthC, lse_nbkQ = residuals
    keys = key_blocks(k_btkC, v_btkC, segments_bt, alibi)
    q_nbkCQ, do_nbkCQ, out_nbkCQ = (_query_blocks(x, keys) for x in (q_bthC, do_bthC, out_bthC))
    delta_nbkQ = (do_nbkCQ.astype(jnp.float32) * out_nbkCQ.astype(jnp.float32)).sum(3)

    def update(query: Blocks, key: Blocks, acc: Any) -> Any:
        """Gradients of a block of queries and a block of keys (Dao et al. 2022)."""
        q_bkCQ, do_bkCQ, lse_bkQ, delta_bkQ = query.arrays
        k_bkSC, v_bkSC = key.arrays
        dq_bkCQ, (dk_bkSC, dv_bkSC) = acc
        score_bkSQ, slope_bkSQ = _scores(settings, alibi, query._replace(arrays=q_bkCQ), key)
        p_bkSQ = jnp.exp(score_bkSQ - lse_bkQ[:, :, None])
        dp_bkSQ = _product("bksc,bkcq->bksq", v_bkSC, do_bkCQ)
        ds_bkSQ = p_bkSQ * (dp_bkSQ - delta_bkQ[:, :, None]) * slope_bkSQ
        dk_bkSC += _product("bkcq,bksq->bksc", q_bkCQ, ds_bkSQ)
        dv_bkSC += _product("bkcq,bksq->bksc", do_bkCQ, p_bkSQ)
        return dq_bkCQ + _product("bksc,bksq->bkcq", k_bkSC, ds_bkSQ), (dk_bkSC, dv_bkSC)

    # Sent in float32: in bfloat16 each sum would be rounded at every step.
    queries = (q_nbkCQ, do_nbkCQ, lse_nbkQ, delta_nbkQ)
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q_nbkCQ, *keys.arrays)]
    acc = zeros[0], (zeros[1], zeros[2])
    dq_nbkCQ, sums = ring_pass(update, settings.window, queries, keys, acc)
    dk_btkC, dv_btkC = (
        x_nbkSC.transpose(1, 0, 3, 2, 4).reshape(k_btkC.shape).astype(k_btkC.dtype)
        for x_nbkSC in sums
    )
    return _from_query_blocks(dq_nbkCQ, q_bthC), dk_btkC, dv_btkC, None, None


_ring.defvjp(_ring_fwd, _ring_bwd)


def kept(x: jax.Array) -> jax.Array:
    """Marked to be kept by remat=dots, so that it runs no second forward pass round the ring."""
    return checkpoint_name(x, PRODUCT)


# --- the schedule --------------------------------------------------------------------------------


class BlockPairs(NamedTuple):
    """Pairs (query block, key block) of which the query sees the key, [pairs, 2].

    own: with a device's own keys. earlier: with those of a device before it. later: with those of a
    device after it; as many as `earlier`.
    """

    own: np.ndarray
    earlier: np.ndarray
    later: np.ndarray


def block_pairs(blocks: int) -> BlockPairs:
    """The pairs to compute for so many blocks a device, half of them in its early chunk."""
    half = blocks // 2
    early_keys = np.argwhere(np.tile(np.arange(blocks) < half, (blocks, 1)))
    late_queries = early_keys[:, ::-1] + [half, 0]
    return BlockPairs(np.argwhere(np.tri(blocks)), early_keys, late_queries)


def key_owner(device: Any, step: Any, devices: int) -> Any:
    """The device whose keys a device has at a step of the ring; at step 0 its own."""
    return (device - step) % devices


def block_starts(device: Any, devices: int, blocks: int, size: int) -> Any:
    """The positions in whole sequences at which a device's blocks of `size` begin, [blocks]."""
    half = blocks // 2
    chunk_21 = (np.array([0, 2 * devices - 1]) + np.array([1, -1]) * device)[:, None]
    return ((chunk_21 * half + np.arange(half)) * size).reshape(-1)


def ring_pass(
    update: Callable[[Blocks, Blocks, Any], Any],
    window: int | None,
    query_arrays: Any,
    keys: Blocks,
    acc: tuple[Any, Any] = ((), ()),
    diagonal: Callable[[Blocks, Blocks], tuple[Any, Any]] | None = None,
) -> tuple[Any, Any]:
    """One turn of the ring: accumulators by query block and by key block.

    `update(query, key, acc)` takes a block of each and their two accumulators, and returns these
    with the pair's contribution. `acc` are the accumulators to begin with, those by key zeros; or
    `diagonal(queries, keys)` returns those that have each block's pair with itself, where the
    causal mask cuts through, and `update` is called for the others alone.
    """
    # Tied to the queries: a scan over layers would make the masks of all blocks beforehand, a GiB.
    _, places = lax.optimization_barrier((query_arrays, keys.places))
    queries, keys = Blocks(query_arrays, places), Blocks(keys.arrays, places)
    n, _, _, size, _ = keys.arrays[0].shape
    device, devices = lax.axis_index(_AXIS), lax.axis_size(_AXIS)
    pairs = block_pairs(n)
    run = functools.partial(_run_pairs, update, window, queries)

    def step(acc: tuple[Any, Any], keys: Blocks, number: Any) -> tuple[Any, Any]:
        # Sums by key arrive from where these keys were, while more is computed.
        by_query, by_key = acc[0], _send_on(acc[1])
        owner = key_owner(device, number, devices)
        start_n = block_starts(owner, devices, n, size)
        keys = keys._replace(places=keys.places._replace(start_n=start_n))
        seen = jnp.where(owner < device, pairs.earlier, pairs.later)
        return run(keys, seen, by_query, by_key)

    def step_and_send(carry: Any, number: jax.Array) -> tuple[Any, None]:
        acc, keys = carry
        next_keys = _send_on(keys)
        return (step(acc, keys, number), next_keys), None

    arriving = _send_on(keys._replace(places=keys.places._replace(start_n=None)))
    own = pairs.own
    if diagonal is not None:
        acc, own = diagonal(queries, keys), own[own[:, 0] != own[:, 1]]
    acc = run(keys, jnp.asarray(own), *acc)
    (acc, keys), _ = lax.scan(step_and_send, (acc, arriving), jnp.arange(1, devices - 1))
    by_query, by_key = step(acc, keys, devices - 1)
    return by_query, _send_on(by_key)


def _run_pairs(
    update: Callable[[Blocks, Blocks, Any], Any],
    window: int | None,
    queries: Blocks,
    keys: Blocks,
    pairs: jax.Array,
    by_query: Any,
    by_key: Any,
) -> tuple[Any, Any]:
    """The accumulators with the contributions of these pairs of blocks."""

    def run_pair(acc: Any, pair: jax.Array) -> tuple[Any, None]:
        at = tuple(pair)
        query, key = _take(queries, at[0]), _take(keys, at[1])
        old = tuple(map(_take, acc, at))
        new = lambda: update(query, key, old)
        if window is None:
            return tuple(map(_put, acc, at, new())), None
        size = key.arrays[0].shape[2]
        beyond = query.places.start_n - key.places.start_n - (size - 1) >= window
        return tuple(map(_put, acc, at, lax.cond(beyond, lambda: old, new))), None

    zeros = jax.tree.map(jnp.zeros_like, by_key)
    (by_query, more), _ = lax.scan(run_pair, (by_query, zeros), pairs)
    return by_query, jax.tree.map(jnp.add, by_key, more)


def _send_on(tree: Any) -> Any:
    """Sends arrays to the next device of the ring, and returns those of the device before."""
    devices = lax.axis_size(_AXIS)
    return lax.ppermute(tree, _AXIS, [(i, (i + 1) % devices) for i in range(devices)])


def _take(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def _put(tree: Any, index: jax.Array, new: Any) -> Any:
    put = lambda a, x: lax.dynamic_update_index_in_dim(a, x, index, 0)
    return jax.tree.map(put, tree, new)


# --- blocks --------------------------------------------------------------------------------------


def key_blocks(
    k_btkC: jax.Array,
    v_btkC: jax.Array,
    segments_bt: jax.Array | None,
    alibi: Alibi = None,
    blocks: int = 0,
) -> Blocks:
    """This device's own keys and values, each [n, b, k, S, C]: blocks of about `_BLOCK` tokens, or
    so many of them."""
    b, t = k_btkC.shape[:2]
    near = min(divisors(t // 2), key=lambda size: abs(math.log(size / _BLOCK)))
    size = t // blocks if blocks else near
    cut = lambda x_bt: x_bt.reshape(b, t // size, size, *x_bt.shape[2:])
    arrays = tuple(cut(x).transpose(1, 0, 3, 2, 4) for x in (k_btkC, v_btkC))
    segments = None if segments_bt is None else cut(segments_bt).swapaxes(0, 1)
    positions = None if alibi is None else cut(alibi[1]).swapaxes(0, 1)
    start_n = block_starts(lax.axis_index(_AXIS), lax.axis_size(_AXIS), t // size, size)
    return Blocks(arrays, Places(segments, positions, start_n))


def _query_blocks(x_bthC: jax.Array, keys: Blocks) -> jax.Array:
    """[b, t, h, C] as [n, b, k, C, Q]."""
    b, _, h, c = x_bthC.shape
    n, _, k, s, _ = keys.arrays[0].shape
    x_bnSkRC = x_bthC.reshape(b, n, s, k, h // k, c)
    return x_bnSkRC.transpose(1, 0, 3, 5, 4, 2).reshape(n, b, k, c, h // k * s)


def _from_query_blocks(x_nbkCQ: jax.Array, like_bthC: jax.Array) -> jax.Array:
    """The inverse of `_query_blocks`, with the shape and dtype of `like_bthC`."""
    n, b, k, c, _ = x_nbkCQ.shape
    _, t, h, _ = like_bthC.shape
    x_nbkCRS = x_nbkCQ.reshape(n, b, k, c, h // k, t // n)
    return x_nbkCRS.transpose(1, 0, 5, 2, 4, 3).reshape(like_bthC.shape).astype(like_bthC.dtype)


def _product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum in float32, of operands in the dtype of the first."""
    wide = sharding.wide(a.dtype)
    y = jnp.einsum(formula, a, b.astype(a.dtype), preferred_element_type=wide)
    return y.astype(jnp.float32)


def _scores(
    settings: _Settings, alibi: Alibi, query: Blocks, key: Blocks
) -> tuple[jax.Array, jax.Array | float]:
    """Masked scores of a pair of blocks, [b, k, S, Q], and their derivative by q @ k."""
    cfg, k_bkSC = settings.cfg, key.arrays[0]
    b, k, s, _ = k_bkSC.shape
    score = _product("bksc,bkcq->bksq", k_bkSC, query.arrays) * settings.scale
    slope: jax.Array | float = settings.scale
    if cap := cfg.attention_soft_cap:
        bounded = jnp.tanh(score / cap)
        score, slope = cap * bounded, slope * (1 - bounded * bounded)
    score_bkSRS = score.reshape(b, k, s, -1, s)
    if alibi is not None:
        positions = (query.places.positions_nbS, key.places.positions_nbS)
        bias_bhSS = layers.alibi_bias(cfg, alibi[0], *positions)
        bias_bkRSS = bias_bhSS.reshape(b, k, -1, *bias_bhSS.shape[2:])
        score_bkSRS += bias_bkRSS.transpose(0, 1, 4, 2, 3)
    query_S = query.places.start_n + np.arange(s)
    distance_SS = query_S - (key.places.start_n + np.arange(s)[:, None])
    seen_bSS = (distance_SS >= 0)[None]
    if settings.window is not None:
        seen_bSS &= (distance_SS < settings.window)[None]
    if key.places.segments_nbS is not None:
        seen_bSS &= key.places.segments_nbS[:, :, None] == query.places.segments_nbS[:, None]
    score_bkSRS = jnp.where(seen_bSS[:, None, :, None], score_bkSRS, NEVER)
    return score_bkSRS.reshape(score.shape), slope
