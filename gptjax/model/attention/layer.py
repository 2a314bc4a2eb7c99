"""The causal self-attention layer, and its key-value cache.

Shapes: B batch, T queries, S keys, H query heads, K key heads, R = H/K queries of a group,
C head_dim, D embed, N = B*T tokens. Query head h reads key head h // R.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.kernels import cpu
from gptjax.model.attention.backends import attend
from gptjax.model.attention.reference import dot_product
from gptjax.model.layers import (
    add_bias,
    alibi_bias,
    alibi_slopes,
    rms_norm,
    rope,
    vector,
    weight,
)
from gptjax.parallel import sequence, sharding
from gptjax.parallel.matmul import column_parallel, row_parallel, rows_of


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
            return sequence.sequences(y_NF, b, (n, c), (axis, "head_dim"), held)

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
        out_NF = sequence.rows_of_sequences(out_BTHC, "heads", held)
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
