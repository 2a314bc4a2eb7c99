"""The decoder: embeddings, the stack of blocks, and what it counts.

Parameters are one plain nested dict, the same whether the stack is scanned or unrolled: every
parameter of the blocks has a leading axis of layers. A stack whose attention alternates is scanned
over one period of it, so that `blocks/layer_j` holds the layers j, j + period, j + 2 period, …

Shapes: B batch, T sequence, N = B*T tokens, D embed, V vocabulary, L layers.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import layers
from gptjax.model.attention import layer as attention
from gptjax.model.attention.backends import Requirements, Sizes, choose
from gptjax.model.attention.layer import Cache, SelfAttention
from gptjax.model.feed_forward import FeedForward
from gptjax.model.moe import MoE, Routing
from gptjax.parallel import matmul, pipeline, sequence, sharding

Params = dict[str, Any]
Caches = tuple[Cache, ...]  # one for each place of the attention pattern

_REMAT = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(matmul.PRODUCT),
}


class Outputs(NamedTuple):
    """What the decoder gives: final hidden states in the compute dtype, the caches with the new
    tokens in them, and each layer's routing, its sums stacked [L, ...], where there are experts.
    """

    x_ND: jax.Array
    caches: Caches | None
    routing: Routing | None


class Tokens(NamedTuple):
    """What the blocks know of the tokens beside their hidden states.

    positions_BT and segments_BT in the order of `sharding.places`, or without a cache's; with
    dropout a key for each, by sequence and by row.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None = None
    keys_BT2: jax.Array | None = None

    def keys_N2(self) -> jax.Array | None:
        """The keys by row."""
        if self.keys_BT2 is None:
            return None
        return sequence.rows_of_sequences(self.keys_BT2, None)


class Block(nn.Module):
    """Attention and feed-forward, each on its branch of the residual stream."""

    cfg: ModelConfig
    window: int | None
    backend: str
    training: bool

    @nn.compact
    def __call__(self, x_ND, tokens, cache, layer, period):
        cfg = self.cfg
        attn = SelfAttention(cfg, self.window, self.backend, name="attn")
        norm_attn = layers.Norm(cfg, name="norm_attn")
        norm_mlp = norm_attn if cfg.shared_norm else layers.Norm(cfg, name="norm_mlp")
        site = 3 * layer + 1  # where it drops: weights here, the branches at the two that follow
        keys_N2 = tokens.keys_N2()
        drop = lambda y_ND, i: layers.dropout(y_ND, cfg.dropout, keys_N2, site + i)
        context = (*tokens, site, cache, period)

        def mlp(h_ND):
            if not cfg.moe.experts:
                return FeedForward(cfg, name="mlp")(h_ND), None
            return MoE(cfg, self.training, name="mlp")(h_ND, len(tokens.positions_BT))

        if cfg.norm_position == "post":
            y_ND, cache = attn(x_ND, *context)
            x_ND = norm_attn(x_ND + drop(y_ND, 1))
            y_ND, routing = mlp(x_ND)
            return norm_mlp(x_ND + drop(y_ND, 2)), cache, routing
        h_ND = norm_attn(x_ND)
        y_ND, cache = attn(h_ND, *context)
        if cfg.residual == "parallel":
            m_ND, routing = mlp(h_ND if cfg.shared_norm else norm_mlp(x_ND))
            return x_ND + drop(y_ND, 1) + drop(m_ND, 2), cache, routing
        x_ND = x_ND + drop(y_ND, 1)
        m_ND, routing = mlp(norm_mlp(x_ND))
        return x_ND + drop(m_ND, 2), cache, routing


@functools.partial(jax.jit, static_argnums=(5, 6))
def _cached_block(params, x_ND, positions_BT, cache, period, cfg, window):
    """A block over a cache; a program of its own, so that like layers are traced once."""
    block = Block(cfg, window, "reference", training=False)
    return block.apply({"params": params}, x_ND, Tokens(positions_BT), cache, 0, period)


class Period(nn.Module):
    """One period of the attention pattern: what the stack is scanned over."""

    cfg: ModelConfig
    compute: ComputeConfig
    backends: tuple[str, ...]
    training: bool

    @nn.compact
    def __call__(self, carry, index, tokens):
        cfg, compute = self.cfg, self.compute
        block = Block
        if compute.remat != "none":
            # Only a loop keeps XLA by itself from merging the recomputation with the original.
            block = nn.remat(
                Block, policy=_REMAT[compute.remat], prevent_cse=not compute.scan_layers
            )
        x_ND, caches = carry
        caches = [None] * len(cfg.pattern) if caches is None else list(caches)
        routings = []
        for j, kind in enumerate(cfg.pattern):
            window = cfg.window if kind == "window" else None
            if caches[j] is None:
                layer = index * len(cfg.pattern) + j
                x_ND, _, routing = block(
                    cfg, window, self.backends[j], self.training, name=f"layer_{j}"
                )(x_ND, tokens, None, layer, index)
            else:
                params = self.variables["params"][f"layer_{j}"]
                x_ND, caches[j], routing = _cached_block(
                    params, x_ND, tokens.positions_BT, caches[j], index, cfg, window
                )
            routings.append(routing)
        caches = None if caches[0] is None else tuple(caches)
        return (x_ND, caches), jax.tree.map(lambda *sums: jnp.stack(sums), *routings)


class Decoder(nn.Module):
    """Tokens to the final hidden states; `logits` turns those into scores of the vocabulary."""

    cfg: ModelConfig
    compute: ComputeConfig
    backends: tuple[str, ...]
    training: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        keys_B2: jax.Array | None = None,
        caches: Caches | None = None,
    ) -> Outputs:
        cfg, compute = self.cfg, self.compute
        b, t = tokens_BT.shape
        dtype = jnp.dtype(compute.dtype)
        table_VD = layers.weight(
            self, "embed", (cfg.table, cfg.embed), ("vocab", "w_embed"), cfg.init_std
        )
        held = "tokens" if caches is None else "batch"
        rows = matmul.stream(b * t) if caches is None else held
        flat = lambda ids_BT: sequence.to_rows(ids_BT, held)
        x_ND = matmul.lookup(table_VD, flat(tokens_BT), dtype, rows)
        if cfg.positions == "learned":
            places_SD = layers.weight(
                self, "positions", (cfg.context, cfg.embed), (None, "w_embed"), cfg.init_std
            )
            if positions_BT is None:
                x_ND += _tiled(places_SD[:t].astype(dtype), b, held, rows)
            else:
                x_ND += matmul.lookup(places_SD, flat(positions_BT), dtype, rows)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(
                jnp.arange(t), (b, t), out_sharding=sharding.spec("batch", None)
            )
        keys_BT2 = None if keys_B2 is None else layers.place_keys(keys_B2, t)
        tokens = Tokens(positions_BT, segments_BT, keys_BT2)
        if caches is None:  # from here on, sequences are as they lie over the context axis
            tokens = jax.tree.map(_placed, tokens)
        x_ND = layers.dropout(x_ND, cfg.dropout, tokens.keys_N2(), 0)

        periods = cfg.layers // len(cfg.pattern)
        period = (cfg, compute, self.backends, self.training)
        stack = _scan(*period, length=periods, name="blocks")
        if sharding.axis_size("layers") > 1 and caches is None and not self.is_initializing():
            x_ND, routing = pipeline.run(
                functools.partial(_stretch, period),
                self.variables["params"]["blocks"],
                x_ND,
                tokens,
                compute.rounds,
                compute.microbatches or sharding.axis_size("layers"),
            )
        else:
            (x_ND, caches), routing = stack((x_ND, caches), jnp.arange(periods), tokens)
        if cfg.norm_position == "pre":
            x_ND = layers.Norm(cfg, name="norm_final")(x_ND)
        if not cfg.tied_embeddings:
            layers.weight(self, "head", (cfg.table, cfg.embed), ("vocab", "w_embed"), cfg.init_std)
        if routing is not None:  # [periods, layers of a period, ...] to [L, ...]
            routing = jax.tree.map(lambda a: a.reshape(cfg.layers, *a.shape[2:]), routing)
        return Outputs(x_ND, caches, routing)


def _scan(
    cfg: ModelConfig,
    compute: ComputeConfig,
    backends: tuple[str, ...],
    training: bool,
    *,
    length: int,
    name: str | None = None,
) -> Period:
    """So many periods, one after another."""
    return nn.scan(
        Period,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=length,
        unroll=1 if compute.scan_layers else length,
    )(cfg, compute, backends, training, name=name)


def _stretch(period, blocks, x_ND, first, tokens):
    """Consecutive periods of the stack, of which the first has this number."""
    length = len(jax.tree.leaves(blocks)[0])
    (x_ND, _), routing = _scan(*period, length=length).apply(
        {"params": blocks}, (x_ND, None), first + jnp.arange(length), tokens
    )
    return x_ND, routing


def _placed(a_BT: jax.Array) -> jax.Array:
    """[B, T, ...] in the order of `sharding.places`, split over the context axis."""
    axes = sharding.spec("batch", "seq", *[None] * (a_BT.ndim - 2))
    return jax.sharding.reshard(sequence.placed(a_BT), axes)


def _tiled(places_TD: jax.Array, b: int, held: str, rows: str) -> jax.Array:
    """The places of one sequence for each of `b`, [N, D]."""
    t, d = places_TD.shape
    places_TD = jax.sharding.reshard(places_TD, sharding.spec(None, "embed"))
    x_BTD = jnp.broadcast_to(places_TD, (b, t, d), out_sharding=sharding.spec("batch", None, None))
    x_ND = sequence.to_rows(x_BTD, held)
    return jax.sharding.reshard(x_ND, sharding.spec(rows, "embed"))


def attention_backends(
    cfg: ModelConfig,
    compute: ComputeConfig,
    platform: str,
    length: int,
    *,
    segments: bool,
    training: bool,
) -> tuple[str, ...]:
    """The backend of each layer of a period, for sequences of `length` tokens.

    Raises ConfigError, see `attention.choose`.
    """
    parts = sharding.axis_size("seq")
    sizes = Sizes(compute.dtype, length // parts, cfg.head)
    return tuple(
        choose(
            compute.attention,
            Requirements(
                segments=segments,
                window=kind == "window",
                grouped=cfg.kv != cfg.heads,
                alibi=cfg.positions == "alibi",
                soft_cap=cfg.attention_soft_cap > 0,
                dropout=training and cfg.dropout > 0,
                context=parts > 1,
            ),
            sizes,
            platform,
        )
        for kind in cfg.pattern
    )


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters, laid out over the ambient mesh, the same numbers whatever the mesh."""
    decoder = Decoder(cfg, ComputeConfig(), ("reference",) * len(cfg.pattern))
    rows = sharding.axis_size("batch")
    length = 2 * sharding.axis_size("seq")
    tokens_BT = jnp.zeros((rows, length), jnp.int32, out_sharding=sharding.spec("batch", None))
    params = decoder.init(key, tokens_BT)["params"]
    return with_layers_on(params, "layers") if sharding.axis_size("layers") > 1 else params


def with_layers_on(params: Params, axis: str | None) -> Params:
    """The same, the blocks' leading axis on a logical axis: "layers", or None to have all."""

    def move(w: jax.Array) -> jax.Array:
        axes = jax.typeof(w).sharding.spec
        moved = jax.P(*sharding.spec(axis), *axes[1:])
        return w if moved == axes else jax.sharding.reshard(w, moved)

    return params | {"blocks": jax.tree.map(move, params["blocks"])}


def apply(
    params: Params,
    cfg: ModelConfig,
    compute: ComputeConfig,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    keys_B2: jax.Array | None = None,
    caches: Caches | None = None,
    training: bool = False,
) -> Outputs:
    """The decoder on [B, T] tokens.

    With `keys_B2`, key data for each sequence, dropout is on; with `training`, experts have their
    capacity. With `caches`, tokens are at `positions_BT` of their rows and see those cached before
    them; a position below zero is no token: it is not cached, and what comes out there means
    nothing.
    """
    if caches is None:
        backends = attention_backends(
            cfg,
            compute,
            sharding.platform(),
            tokens_BT.shape[1],
            segments=segments_BT is not None,
            training=keys_B2 is not None,
        )
    else:  # attention over a cache has one implementation
        backends = ("reference",) * len(cfg.pattern)
    return Decoder(cfg, compute, backends, training).apply(
        {"params": params}, tokens_BT, positions_BT, segments_BT, keys_B2, caches
    )


def head(params: Params) -> jax.Array:
    """The output layer [V, D]: its own table, or the embedding's."""
    return params.get("head", params["embed"])


def logits(params: Params, cfg: ModelConfig, x_ND: jax.Array) -> jax.Array:
    """Scores of the vocabulary in float32, [N, rows of the table]; rows added to it are NEVER."""
    y_NV = layers.soft_cap(matmul.scores(x_ND, head(params)), cfg.logit_soft_cap)
    if cfg.table == cfg.vocab_size:
        return y_NV
    ids_V = jnp.arange(cfg.table, out_sharding=sharding.spec("vocab"))
    return jnp.where(ids_V < cfg.vocab_size, y_NV, layers.NEVER)


def empty_caches(cfg: ModelConfig, rows: int, capacity: int, dtype: str, chunk: int = 1) -> Caches:
    """Caches for `rows` sequences of up to `capacity` tokens, which come up to `chunk` at a time.

    A layer with a window keeps what the first token of a chunk still sees, and the chunk.
    """

    def one(kind: str) -> Cache:
        size = min(capacity, cfg.window + chunk - 1) if kind == "window" else capacity
        shape = (cfg.layers // len(cfg.pattern), rows, cfg.kv, size, cfg.head)
        out_sharding = sharding.spec(*attention.CACHE_AXES)
        return Cache(*(jnp.zeros(shape, dtype, out_sharding=out_sharding) for _ in range(2)))

    return tuple(map(one, cfg.pattern))


def unrolled(cfg: ModelConfig) -> ModelConfig:
    """The same model as one period, for parameters that `split_layers` has made of its own."""
    return replace(cfg, pattern=cfg.pattern * (cfg.layers // len(cfg.pattern)))


def _layers(stacked: jax.Array) -> list[jax.Array]:
    """The layers of a stacked parameter, which share its memory where they are aligned in it."""
    shards = [(shard.device, np.asarray(shard.data)) for shard in stacked.addressable_shards]

    def one(i: int) -> jax.Array:
        parts = [jax.device_put(part[i : i + 1], device) for device, part in shards]
        shape = (1, *stacked.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, stacked.sharding, parts)

    return [one(i) for i in range(len(stacked))]


def split_layers(params: Params, cfg: ModelConfig) -> Params:
    """Parameters of `unrolled(cfg)`, on a CPU: arrays for each layer, which share the memory of the
    stacked ones where they are aligned in it.

    A loop over a stacked parameter copies each layer's out of it on XLA:CPU before it is used,
    which halves the speed of decoding.
    """
    blocks: Params = {}
    for j in range(len(cfg.pattern)):
        stacked, structure = jax.tree.flatten(params["blocks"][f"layer_{j}"])
        layers_of = zip(*map(_layers, stacked), strict=True)
        for i, leaves in enumerate(layers_of):
            name = f"layer_{i * len(cfg.pattern) + j}"
            blocks[name] = jax.tree.unflatten(structure, leaves)
    return params | {"blocks": blocks}
