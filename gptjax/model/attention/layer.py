"""The causal self-attention layer, and its key-value cache.

Shapes: B sequences, T queries, S slots of a cache, H query heads, K key heads, R = H/K queries of a
group, C head_dim, D embed, N = B*T tokens, F = H*C or K*C, P periods of the attention pattern; in
lower case, one device's share. Query head h reads key head h // R.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.kernels import cpu
from gptjax.model.attention.backends import Inputs, attend
from gptjax.model.attention.reference import dot_product
from gptjax.model.layers import (
    Tokens,
    add_bias,
    alibi_bias,
    alibi_slopes,
    rms_norm,
    rope,
    vector,
    weight,
)
from gptjax.parallel import sequence, sharding
from gptjax.parallel.matmul import Layout, column_parallel, row_parallel


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, for the layers at one place of the attention pattern.

    keys_PBKSC, values_PBKSC: [periods, B, K, S, C]. Position p lies in slot p modulo S: a layer
    with a window keeps its last S positions, any other has a slot for each. Slots that have not
    been written are never read.
    """

    keys_PBKSC: jax.Array
    values_PBKSC: jax.Array


jax.tree_util.register_dataclass(Cache, ["keys_PBKSC", "values_PBKSC"], [])

CACHE_AXES = (None, "batch", "kv_heads", None, None)


class SelfAttention(nn.Module):
    """Projections, attention, output projection. Parameters q, k, v, o and their biases."""

    cfg: ModelConfig
    window: int | None
    backend: str
    layout: Layout

    @nn.compact
    def __call__(
        self,
        x_ND: jax.Array,
        tokens: Tokens,
        dropout_id: jax.Array | int,
        cache: Cache | None,
        period: jax.Array,
    ) -> tuple[jax.Array, Cache | None]:
        """[N, D], and with a cache, that of this period with the new tokens in it."""
        cfg, axis = self.cfg, self.layout.gathered
        q_BTHC, k_BTKC, v_BTKC = self._project(x_ND, tokens.positions_BT)
        inputs = Inputs(
            q_BTHC, k_BTKC, v_BTKC, tokens, cfg.attention_scale, self.window, dropout_id
        )
        if cache is None:
            out_BTHC = attend(cfg, inputs, backend_name=self.backend)
        else:
            cache, out_BTHC = attend_cache(cfg, inputs, cache, period)

        c = cfg.head
        std = cfg.init_std / (2 * cfg.layers) ** 0.5
        w_HCD = weight(self, "o", (cfg.heads, c, cfg.embed), ("heads", "head_dim", "w_embed"), std)
        bias_D = vector(self, "o_bias", (cfg.embed,), (None,), 0.0) if cfg.linear_bias else None
        out_NF = sequence.flatten_zigzag(out_BTHC, "heads", axis)
        w_FD = w_HCD.reshape(cfg.heads * c, cfg.embed)
        return add_bias(row_parallel(out_NF, w_FD, self.layout), bias_D), cache

    def _project(
        self, x_ND: jax.Array, positions_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, C], keys and values [B, T, K, C], normalised and rotated."""
        cfg, b, c = self.cfg, len(positions_BT), self.cfg.head
        kinds = {"q": (cfg.heads, "heads"), "k": (cfg.kv, "kv_heads"), "v": (cfg.kv, "kv_heads")}
        weights_DHC = [
            weight(self, name, (cfg.embed, n, c), ("w_embed", axis, "head_dim"), cfg.init_std)
            for name, (n, axis) in kinds.items()
        ]
        weights_DF = tuple(w.reshape(cfg.embed, -1) for w in weights_DHC)
        projected = column_parallel(x_ND, weights_DF, "heads", self.layout)

        def heads(name: str, y_NF: jax.Array) -> jax.Array:
            n, axis = kinds[name]
            if cfg.linear_bias:
                bias = vector(self, f"{name}_bias", (n, c), (axis, "head_dim"), 0.0)
                y_NF = add_bias(y_NF, bias.reshape(n * c))
            return sequence.unflatten(y_NF, b, (n, c), (axis, "head_dim"), self.layout.gathered)

        q_BTHC, k_BTKC, v_BTKC = (heads(*one) for one in zip(kinds, projected, strict=True))
        if cfg.qk_norm:
            q_BTHC, k_BTKC = (
                rms_norm(x, vector(self, name, (c,), (None,), 1.0), cfg.norm_eps)
                for name, x in (("q_scale", q_BTHC), ("k_scale", k_BTKC))
            )
        if cfg.positions == "rope":
            q_BTHC, k_BTKC = (rope(x, positions_BT, cfg.rope) for x in (q_BTHC, k_BTKC))
        return q_BTHC, k_BTKC, v_BTKC


# --- attention over the cache --------------------------------------------------------------------


def attend_cache(
    cfg: ModelConfig, inputs: Inputs, cache: Cache, period: jax.Array
) -> tuple[Cache, jax.Array]:
    """Writes the new keys and values into their slots, and attends to those up to each query.

    A token at a position below zero is padding: it is not written, and its output is undefined.
    """
    if _cpu_kernel_serves(cfg, inputs.q_BTHC, cache):
        return _attend_cache_on_cpu(inputs, cache, period)
    q_BTHC, positions_BT = inputs.q_BTHC, inputs.tokens.positions_BT
    size = cache.keys_PBKSC.shape[3]
    slots_BT = jnp.where(positions_BT < 0, size, positions_BT % size)
    # XLA would lay the cache out as its products want it, and transpose all of it for each burst.
    stores = (
        sharding.row_major(_write(cache.keys_PBKSC, inputs.k_BTKC, slots_BT, period)),
        sharding.row_major(_write(cache.values_PBKSC, inputs.v_BTKC, slots_BT, period)),
    )
    cache = Cache(*stores)
    keys, values = (store[0] if len(store) == 1 else store[period] for store in stores)
    # The last position written to each slot, below zero where there was none yet.
    last_B1 = positions_BT.max(1, keepdims=True)
    key_BS = last_B1 - (last_B1 - jnp.arange(size)) % size
    distance_BTS = key_BS[:, None] - positions_BT[..., None]
    mask_BTS = (distance_BTS <= 0) & (key_BS >= 0)[:, None]
    if inputs.window is not None:
        mask_BTS &= distance_BTS > -inputs.window
    bias = None
    if cfg.positions == "alibi":
        bias = alibi_bias(cfg, alibi_slopes(cfg.heads), positions_BT, key_BS)
    keys, values = keys.astype(q_BTHC.dtype), values.astype(q_BTHC.dtype)
    cap = cfg.attention_soft_cap
    return cache, dot_product(q_BTHC, keys, values, mask_BTS, inputs.scale, bias, cap)


def _write(
    store_PBKSC: jax.Array, new_BTKC: jax.Array, slots_BT: jax.Array, period: jax.Array
) -> jax.Array:
    """The cache with new tokens in their slots; each device writes its own sequences and heads."""

    def local(
        store_PbkSC: jax.Array, new_bTkC: jax.Array, slots_bT: jax.Array, period: jax.Array
    ) -> jax.Array:
        b_b1 = jnp.arange(slots_bT.shape[0])[:, None]
        slots = store_PbkSC.at[period, b_b1, :, slots_bT]
        return slots.set(new_bTkC.astype(store_PbkSC.dtype), mode="drop", unique_indices=True)

    stored = sharding.spec(*CACHE_AXES)
    new = sharding.spec("batch", None, "kv_heads", None)
    return jax.shard_map(
        local,
        in_specs=(stored, new, sharding.spec("batch", None), jax.P()),
        out_specs=stored,
        check_vma=False,
    )(store_PBKSC, new_BTKC, slots_BT, period)


def _cpu_kernel_serves(cfg: ModelConfig, q_BTHC: jax.Array, cache: Cache) -> bool:
    """Whether this is one token a sequence for which `kernels.cpu` has attention.

    Its scale is 1/sqrt(head_dim).
    """
    return (
        q_BTHC.shape[1] == 1
        and q_BTHC.dtype == cache.keys_PBKSC.dtype
        and cfg.positions != "alibi"
        and not cfg.attention_soft_cap
        and cfg.head % cpu.WIDTH == 0
        and sharding.platform() == "cpu"
        and cpu.ready()
    )


def _attend_cache_on_cpu(
    inputs: Inputs, cache: Cache, period: jax.Array
) -> tuple[Cache, jax.Array]:
    """Attention of one token a sequence by `kernels.cpu`, on each device's sequences and heads.

    XLA would copy a cache that is both written and read; here it sees one operation.
    """

    def local(
        new: tuple[jax.Array, jax.Array, jax.Array],
        cache: Cache,
        positions_bT: jax.Array,
        period: jax.Array,
    ) -> tuple[Cache, jax.Array]:
        q_bhC, k_bkC, v_bkC = (x[:, 0] for x in new)
        out_bhC, keys_PbkSC, values_PbkSC = cpu.attention(
            q_bhC,
            k_bkC,
            v_bkC,
            cache.keys_PBKSC,
            cache.values_PBKSC,
            positions_bT[:, 0],
            period,
            inputs.window,
        )
        return Cache(keys_PbkSC, values_PbkSC), out_bhC[:, None]

    heads = sharding.spec("batch", None, "heads", None)
    new = sharding.spec("batch", None, "kv_heads", None)
    stored = jax.tree.map(lambda _: sharding.spec(*CACHE_AXES), cache)
    return jax.shard_map(
        local,
        in_specs=((heads, new, new), stored, sharding.spec("batch", None), jax.P()),
        out_specs=(stored, heads),
        check_vma=False,
    )(
        (inputs.q_BTHC, inputs.k_BTKC, inputs.v_BTKC),
        cache,
        inputs.tokens.positions_BT,
        period,
    )
