"""Causal self-attention: the backends, the table of what each supports, and the layer.

A backend is asked for exactly what the model and the batch need (`Need`). One that does not declare
a feature is never handed it: `choose` takes the fastest that fits, and a backend that the
configuration names but that does not fit is an error, never a silent change of the mathematics.

Shapes: B batch, T queries, S keys, H query heads, K key heads, R = H/K queries of a group,
C head_dim, D embed, N = B*T tokens. Query head h reads key head h // R.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from gptjax.config import ModelConfig
from gptjax.errors import ConfigError
from gptjax.kernels import cpu
from gptjax.model import layers
from gptjax.model.attention import ring, vendor
from gptjax.model.layers import (
    NEVER,
    add_bias,
    alibi_bias,
    alibi_slopes,
    rms_norm,
    rope,
    vector,
    weight,
)
from gptjax.parallel import sharding
from gptjax.parallel.matmul import column_parallel, row_parallel, rows_of


@dataclass(frozen=True)
class Need:
    """What one call of attention needs of its backend, beyond causal masking."""

    segments: bool = False
    window: bool = False
    grouped: bool = False
    alibi: bool = False
    soft_cap: bool = False
    dropout: bool = False
    context: bool = False  # sequences split over devices

    def names(self) -> list[str]:
        """The features that are needed."""
        return [name for name, wanted in vars(self).items() if wanted]


@dataclass(frozen=True)
class Sizes:
    """What else a backend may be particular about."""

    dtype: str
    length: int
    head: int = 64


@dataclass(frozen=True)
class Backend:
    """An implementation, where it runs, and which features of `Need` it has.

    If `local`, `attend(q_BTHC, k_BTKC, v_BTKC, segments_BT, window)` is called on one device's
    share, otherwise `attend(cfg, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, window)` on
    whole arrays. `dtypes` are those that it takes, `length_unit` what divides a device's part of a
    sequence, `head_limit` its widest head; if `split`, it is for a context axis alone.
    """

    attend: Callable[..., jax.Array] | None
    platforms: tuple[str, ...]
    features: frozenset[str]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    length_unit: int = 1
    head_limit: int = 2**31
    local: bool = True
    split: bool = False

    def refusal(self, need: Need, sizes: Sizes, platform: str) -> str | None:
        """Why it cannot serve a call, or None if it can."""
        missing = [feature for feature in need.names() if feature not in self.features]
        if platform not in self.platforms:
            return f"needs a {'/'.join(self.platforms)}"
        if missing:
            return f"does not support {', '.join(missing)}"
        if self.split and not need.context:
            return "needs mesh.context of at least 2"
        if sizes.dtype not in self.dtypes:
            return f"needs compute.dtype={'/'.join(self.dtypes)}"
        if sizes.length % self.length_unit:
            return f"needs sequences of a multiple of {self.length_unit}, not {sizes.length}"
        if sizes.head > self.head_limit:
            return f"needs heads of at most {self.head_limit}, not {sizes.head}"
        return None


# --- reference -------------------------------------------------------------------------------


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


# --- blockwise: the CPU's --------------------------------------------------------------------


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


BACKENDS: dict[str, Backend] = {  # fastest first, for each platform
    "splash": Backend(
        vendor.splash,
        ("tpu",),
        frozenset({"segments", "window", "grouped", "soft_cap", "context"}),
        length_unit=128,
        local=False,
    ),
    "cudnn": Backend(
        vendor.cudnn, ("gpu",), frozenset({"window", "grouped"}), ("bfloat16",), head_limit=128
    ),
    "blockwise": Backend(blockwise, ("cpu",), frozenset({"segments", "window", "grouped"})),
    "ring": Backend(
        ring.attend,
        ("cpu", "gpu", "tpu"),
        frozenset({"segments", "window", "grouped", "alibi", "soft_cap", "context"}),
        local=False,
        split=True,
    ),
    "reference": Backend(
        None,
        ("cpu", "gpu", "tpu"),
        frozenset({"segments", "window", "grouped", "alibi", "soft_cap", "dropout", "context"}),
    ),
}


def choose(wanted: str, need: Need, sizes: Sizes, platform: str) -> str:
    """The backend to use on a platform ("cpu", "gpu", "tpu").

    "auto" takes the first that can serve the call. Raises ConfigError where the one that the
    configuration names cannot.
    """
    for name, backend in BACKENDS.items():
        why = backend.refusal(need, sizes, platform)
        if wanted == name and why:
            raise ConfigError([f"compute.attention={name}: {why}; use auto or reference"])
        if wanted in (name, "auto") and not why:
            return name
    raise AssertionError("the reference backend has every feature")


def attend(
    cfg: ModelConfig,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    positions_BT: jax.Array,
    *,
    backend: str,
    segments_BT: jax.Array | None = None,
    window: int | None = None,
    keys_BT2: jax.Array | None = None,
    site: jax.Array | int = 0,
) -> jax.Array:
    """Causal attention over whole sequences by the named backend, [B, T, H, C].

    With `keys_BT2`, keys of each place (`layers.place_keys`), weights are dropped at `site`.
    """
    chosen = BACKENDS[backend]
    if chosen.attend is None:
        drop = functools.partial(_drop, cfg, keys_BT2, site)
        return _reference(cfg, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, window, drop)
    if not chosen.local:
        return chosen.attend(cfg, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, window)
    heads = sharding.spec("batch", "seq", "heads", None)
    rows = sharding.spec("batch", "seq")
    local: Any = lambda q, k, v, segments: chosen.attend(q, k, v, segments, window)
    return jax.shard_map(
        local,
        in_specs=(heads, heads, heads, None if segments_BT is None else rows),
        out_specs=heads,
        check_vma=False,
    )(q_BTHC, k_BTKC, v_BTKC, segments_BT)


def _drop(cfg, keys_BT2, site, p_BKRTS):
    """Dropout of attention weights; a query's key, and the head, decide."""
    if keys_BT2 is None or cfg.dropout == 0:
        return p_BKRTS
    places = sharding.places(p_BKRTS.shape[-1])
    whole = sharding.spec("batch", None, None)
    heads = sharding.spec("batch", "heads", None, None, None)

    def local(p_bkrTS, keys_bT2, site):
        b, k, r, t, s = p_bkrTS.shape
        first = lax.axis_index(sharding.RULES["heads"]) * k * r
        fold = lambda key_2, head: jax.random.key_data(
            jax.random.fold_in(jax.random.wrap_key_data(key_2), head)
        )
        by_head = jax.vmap(jax.vmap(fold, (0, None)), (None, 0))
        keys_hN2 = by_head(keys_bT2.reshape(b * t, 2), first + jnp.arange(k * r))
        keys_bhT2 = keys_hN2.reshape(k * r, b, t, 2).swapaxes(0, 1)
        # Weights of keys in their own order, as the context axis does not have them.
        in_order = p_bkrTS[..., np.argsort(places)].reshape(b, k * r, t, s)
        return layers.dropped(in_order, cfg.dropout, keys_bhT2, site)[..., places].reshape(
            p_bkrTS.shape
        )

    return jax.shard_map(local, in_specs=(heads, whole, jax.P()), out_specs=heads, check_vma=False)(
        p_BKRTS, jax.sharding.reshard(keys_BT2, whole), jnp.uint32(site)
    )


def _reference(cfg, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, window, drop):
    """The reference over whole sequences, which each device of a context axis computes whole."""
    t = q_BTHC.shape[1]
    places = sharding.places(t)

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


# --- the layer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, for the layers of one place of the pattern.

    keys_PBKSC, values_PBKSC: [periods, B, K, S, C]. Position p lies in slot p modulo S: a layer
    with a window keeps a ring of its last S positions, any other has a slot for each. Slots that
    have not been written hold nothing that is read.
    """

    keys_PBKSC: jax.Array
    values_PBKSC: jax.Array


jax.tree_util.register_dataclass(Cache, ["keys_PBKSC", "values_PBKSC"], [])

CACHE_AXES = (None, "batch", "kv_heads", None, None)


def _write(
    store_PBKSC: jax.Array, new_BTKC: jax.Array, slots_BT: jax.Array, period: jax.Array
) -> jax.Array:
    """The cache with new rows in their slots; each device writes its own rows and heads."""

    def local(store_PBKSC, new_BTKC, slots_BT, period):
        rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
        slots = store_PBKSC.at[period, rows_B1, :, slots_BT]
        return slots.set(new_BTKC.astype(store_PBKSC.dtype), mode="drop", unique_indices=True)

    stored = sharding.spec(*CACHE_AXES)
    new = sharding.spec("batch", None, "kv_heads", None)
    return jax.shard_map(
        local,
        in_specs=(stored, new, sharding.spec("batch", None), jax.P()),
        out_specs=stored,
        check_vma=False,
    )(store_PBKSC, new_BTKC, slots_BT, period)


class SelfAttention(nn.Module):
    """Projections, attention, output projection. Parameters q, k, v, o and their biases."""

    cfg: ModelConfig
    window: int | None
    backend: str

    @nn.compact
    def __call__(
        self,
        x_ND: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        keys_BT2: jax.Array | None,
        site: jax.Array | int,
        cache: Cache | None,
        period: jax.Array,
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.cfg
        b, c = len(positions_BT), cfg.head
        held = "tokens" if cache is None else "batch"

        kinds = {"q": (cfg.heads, "heads"), "k": (cfg.kv, "kv_heads"), "v": (cfg.kv, "kv_heads")}
        weights_DF = [
            weight(self, name, (cfg.embed, n, c), ("w_embed", axis, "head_dim"), cfg.init_std)
            for name, (n, axis) in kinds.items()
        ]
        flat = tuple(w.reshape(cfg.embed, -1) for w in weights_DF)
        projected = column_parallel(x_ND, flat, "heads")

        def heads(name: str, y_NF: jax.Array) -> jax.Array:
            n, axis = kinds[name]
            if cfg.linear_bias:
                bias = vector(self, f"{name}_bias", (n, c), (axis, "head_dim"), 0.0)
                y_NF = add_bias(y_NF, bias.reshape(n * c))
            return sharding.sequences(y_NF, b, (n, c), (axis, "head_dim"), held)

        q_BTHC, k_BTKC, v_BTKC = (heads(*one) for one in zip(kinds, projected, strict=True))
        if cfg.qk_norm:
            q_BTHC, k_BTKC = (
                rms_norm(x, vector(self, name, (c,), (None,), 1.0), cfg.norm_eps)
                for name, x in (("q_scale", q_BTHC), ("k_scale", k_BTKC))
            )
        if cfg.positions == "rope":
            q_BTHC, k_BTKC = (rope(x, positions_BT, cfg.rope) for x in (q_BTHC, k_BTKC))

        if cache is None:
            out_BTHC = attend(
                cfg,
                q_BTHC,
                k_BTKC,
                v_BTKC,
                positions_BT,
                backend=self.backend,
                segments_BT=segments_BT,
                window=self.window,
                keys_BT2=keys_BT2,
                site=site,
            )
        else:
            cache, out_BTHC = self._attend_cache(
                q_BTHC, k_BTKC, v_BTKC, positions_BT, cache, period
            )

        std = cfg.init_std / (2 * cfg.layers) ** 0.5
        w_HCD = weight(self, "o", (cfg.heads, c, cfg.embed), ("heads", "head_dim", "w_embed"), std)
        bias_D = vector(self, "o_bias", (cfg.embed,), (None,), 0.0) if cfg.linear_bias else None
        out_NF = sharding.rows_of_sequences(out_BTHC, "heads", held)
        w_FD = w_HCD.reshape(cfg.heads * c, cfg.embed)
        return add_bias(row_parallel(out_NF, w_FD, rows_of(x_ND)), bias_D), cache

    def _attend_cache(self, q_BTHC, k_BTKC, v_BTKC, positions_BT, cache, period):
        """Writes the new keys into their slots, and attends to all up to each query's own.

        A position below zero is no token: it is not written, and its result means nothing.
        """
        if self._natively(q_BTHC, cache):
            new = (q_BTHC, k_BTKC, v_BTKC)
            return _attend_natively(*new, cache, positions_BT, period, self.window)
        size = cache.keys_PBKSC.shape[3]
        slots_BT = jnp.where(positions_BT < 0, size, positions_BT % size)
        cache = Cache(
            _write(cache.keys_PBKSC, k_BTKC, slots_BT, period),
            _write(cache.values_PBKSC, v_BTKC, slots_BT, period),
        )
        stores = (cache.keys_PBKSC, cache.values_PBKSC)
        keys, values = (store[0] if len(store) == 1 else store[period] for store in stores)
        # What a slot holds: the last position written to it, below zero where there was none yet.
        last_B1 = positions_BT.max(1, keepdims=True)
        held_BS = last_B1 - (last_B1 - jnp.arange(size)) % size
        distance_BTS = held_BS[:, None] - positions_BT[..., None]
        mask_BTS = (distance_BTS <= 0) & (held_BS >= 0)[:, None]
        if self.window is not None:
            mask_BTS &= distance_BTS > -self.window
        bias = None
        if self.cfg.positions == "alibi":
            bias = alibi_bias(self.cfg, alibi_slopes(self.cfg.heads), positions_BT, held_BS)
        keys, values = keys.astype(q_BTHC.dtype), values.astype(q_BTHC.dtype)
        cap = self.cfg.attention_soft_cap
        return cache, dot_product(q_BTHC, keys, values, mask_BTS, bias, cap)

    def _natively(self, q_BTHC: jax.Array, cache: Cache) -> bool:
        """Whether this is one token a row that `kernels.cpu` can attend for."""
        cfg = self.cfg
        return (
            q_BTHC.shape[1] == 1
            and q_BTHC.dtype == cache.keys_PBKSC.dtype
            and cfg.positions != "alibi"
            and not cfg.attention_soft_cap
            and cfg.head % cpu.WIDTH == 0
            and sharding.platform() == "cpu"
            and cpu.ready()
        )


def _attend_natively(q_BTHC, k_BTKC, v_BTKC, cache, positions_BT, period, window):
    """The cache with one token a row in it, and that token's attention; each device has its own
    rows and heads. XLA, which copies a cache that is both written and read, sees one operation.
    """

    def local(q_BTHC, k_BTKC, v_BTKC, keys_PBKSC, values_PBKSC, positions_BT, period):
        one = (x[:, 0] for x in (q_BTHC, k_BTKC, v_BTKC))
        stores = (keys_PBKSC, values_PBKSC)
        out_BHC, *stores = cpu.attention(*one, *stores, positions_BT[:, 0], period, window)
        return *stores, out_BHC[:, None]

    heads = sharding.spec("batch", None, "heads", None)
    new = sharding.spec("batch", None, "kv_heads", None)
    stored = sharding.spec(*CACHE_AXES)
    *stores, out_BTHC = jax.shard_map(
        local,
        in_specs=(heads, new, new, stored, stored, sharding.spec("batch", None), jax.P()),
        out_specs=(stored, stored, heads),
        check_vma=False,
    )(q_BTHC, k_BTKC, v_BTKC, cache.keys_PBKSC, cache.values_PBKSC, positions_BT, period)
    return Cache(*stores), out_BTHC
