"""The decoder: embeddings, the stack of blocks, the final norm, and the output layer.

Parameters are one plain nested dict, the same whether the stack is scanned or unrolled: every
parameter of the blocks has a leading axis of layers. A stack whose attention alternates is scanned
over one period of its pattern, so that `blocks/layer_j` holds the layers j, j + period,
j + 2 period, …

The stack runs in one of three ways, on the same parameters: `_scanned_stack`, `_pipelined_stack`
where layers are split over the stages of a pipeline, and `_cached_stack` in decoding.

Shapes: B sequences, T positions, N = B*T tokens, D embed, V vocabulary, L layers.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import layers
from gptjax.model.attention import layer as attention
from gptjax.model.attention.backends import Requirements, Sizes, choose
from gptjax.model.attention.layer import Cache
from gptjax.model.blocks import (
    Block,
    Execution,
    periods_of,
    scan_periods,
    window_of,
)
from gptjax.model.layers import Tokens
from gptjax.model.moe import Routing
from gptjax.parallel import matmul, pipeline, sequence, sharding
from gptjax.parallel.matmul import Layout
from gptjax.runtime.hardware import Target

Params = dict[str, Any]
Caches = tuple[Cache, ...]  # one for each place of the attention pattern


class Outputs(NamedTuple):
    """The decoder's results.

    x_ND: final hidden states in the compute dtype. routing: with experts, each layer's routing
    statistics, stacked [L, ...].
    """

    x_ND: jax.Array
    routing: Routing | None


class Decoder(nn.Module):
    """All parameters of a decoder, in the order in which they are drawn; see `init`."""

    cfg: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(self, x_ND: jax.Array, tokens: Tokens) -> None:
        cfg, periods = self.cfg, periods_of(self.cfg)
        table, axes = (cfg.table, cfg.embed), ("vocab", "w_embed")
        layers.weight(self, "embed", table, axes, cfg.init_std)
        if cfg.positions == "learned":
            shape = (cfg.context, cfg.embed)
            layers.weight(self, "positions", shape, (None, "w_embed"), cfg.init_std)
        stack = scan_periods(cfg, self.execution, periods, name="blocks")
        stack(x_ND, jnp.arange(periods), tokens)
        if cfg.norm_position == "pre":
            layers.Norm(cfg, name="norm_final")(x_ND)
        if not cfg.tied_embeddings:
            layers.weight(self, "head", table, axes, cfg.init_std)


# --- the three ways to run the stack -------------------------------------------------------------


def _scanned_stack(
    cfg: ModelConfig,
    execution: Execution,
    blocks: Params,
    x_ND: jax.Array,
    numbers: jax.Array,
    tokens: Tokens,
) -> tuple[jax.Array, Routing | None]:
    """Consecutive periods of the stack, of these numbers, one after another."""
    stack = scan_periods(cfg, execution, len(numbers))
    return stack.apply({"params": blocks}, x_ND, numbers, tokens)


def _pipelined_stack(
    cfg: ModelConfig, execution: Execution, blocks: Params, x_ND: jax.Array, tokens: Tokens
) -> tuple[jax.Array, Routing | None]:
    """The stack in the stages of a pipeline; see parallel/pipeline.py."""
    compute = execution.compute
    return pipeline.run(
        functools.partial(_scanned_stack, cfg, execution),
        blocks,
        x_ND,
        tokens,
        compute.rounds,
        compute.microbatches or sharding.axis_size("layers"),
    )


def _cached_stack(
    cfg: ModelConfig,
    compute: ComputeConfig,
    layout: Layout,
    blocks: Params,
    x_ND: jax.Array,
    positions_BT: jax.Array,
    caches: Caches,
) -> tuple[jax.Array, Caches]:
    """The stack on new tokens, which see those in the caches."""

    def period(carry: tuple[jax.Array, Caches], given: Any) -> Any:
        (x_ND, caches), (params, index) = carry, given
        new_caches = []
        for j, kind in enumerate(cfg.pattern):
            x_ND, cache = _cached_block(
                cfg,
                window_of(cfg, kind),
                layout,
                params[f"layer_{j}"],
                x_ND,
                positions_BT,
                caches[j],
                index,
            )
            new_caches.append(cache)
        return (x_ND, tuple(new_caches)), None

    length = periods_of(cfg)
    carry, _ = lax.scan(
        period,
        (x_ND, caches),
        (blocks, jnp.arange(length)),
        unroll=1 if compute.scan_layers else length,
    )
    return carry


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _cached_block(
    cfg: ModelConfig,
    window: int | None,
    layout: Layout,
    params: Params,
    x_ND: jax.Array,
    positions_BT: jax.Array,
    cache: Cache,
    period: jax.Array,
) -> tuple[jax.Array, Cache]:
    """A block over a cache. A jitted function, so that equal layers are traced once."""
    block = Block(cfg, window, "reference", training=False, layout=layout)
    tokens = Tokens(positions_BT)
    outputs: Any = block.apply({"params": params}, x_ND, tokens, cache, 0, period)
    return outputs[:2]  # without routing statistics


# --- embeddings ----------------------------------------------------------------------------------


def _embed(
    params: Params,
    cfg: ModelConfig,
    compute: ComputeConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None,
    layout: Layout,
) -> jax.Array:
    """Embeddings of tokens, and of their positions where those are learned, [N, D]."""
    (b, t), dtype = tokens_BT.shape, jnp.dtype(compute.dtype)
    flat = lambda ids_BT: sequence.flatten(ids_BT, layout.gathered)
    x_ND = matmul.lookup(params["embed"], flat(tokens_BT), dtype, layout)
    if cfg.positions == "learned":
        table_SD = params["positions"]
        if positions_BT is None:
            x_ND += _repeat(table_SD[:t].astype(dtype), b, layout)
        else:
            x_ND += matmul.lookup(table_SD, flat(positions_BT), dtype, layout)
    return x_ND


def _repeat(x_TD: jax.Array, b: int, layout: Layout) -> jax.Array:
    """The embeddings of one sequence's positions for each of `b` sequences, [N, D]."""
    t, d = x_TD.shape
    x_TD = jax.sharding.reshard(x_TD, sharding.spec(None, "embed"))
    x_BTD = jnp.broadcast_to(x_TD, (b, t, d), out_sharding=sharding.spec("batch", None, None))
    x_ND = sequence.flatten(x_BTD, layout.gathered)
    return jax.sharding.reshard(x_ND, sharding.spec(layout.axis, "embed"))


def _zigzag(a_BT: jax.Array) -> jax.Array:
    """[B, T, ...] from natural to zigzag order, split over the context axis."""
    axes = sharding.spec("batch", "seq", *[None] * (a_BT.ndim - 2))
    return jax.sharding.reshard(sequence.to_zigzag(a_BT), axes)


# --- the decoder ---------------------------------------------------------------------------------


def attention_calls(
    cfg: ModelConfig,
    compute: ComputeConfig,
    length: int,
    *,
    segments: bool,
    training: bool,
) -> list[tuple[Requirements, Sizes]]:
    """What each layer of a period asks of its attention backend, in sequences of `length`."""
    parts = sharding.axis_size("seq")
    sizes = Sizes(compute.dtype, length // parts, cfg.head)
    return [
        (
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
        )
        for kind in cfg.pattern
    ]


def attention_backends(
    cfg: ModelConfig,
    compute: ComputeConfig,
    target: Target,
    length: int,
    *,
    segments: bool,
    training: bool,
) -> tuple[str, ...]:
    """The attention backend of each layer of a period, for sequences of `length` tokens.

    Raises ConfigError, see `backends.choose`.
    """
    calls = attention_calls(cfg, compute, length, segments=segments, training=training)
    return tuple(choose(compute.attention, need, sizes, target) for need, sizes in calls)


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters, laid out over the ambient mesh: the same numbers on every mesh."""
    b, t = sharding.axis_size("batch"), 2 * sharding.axis_size("seq")
    layout = matmul.choose_layout(b * t)
    execution = Execution(ComputeConfig(), ("reference",) * len(cfg.pattern), False, layout)
    axes = sharding.spec(layout.axis, "embed")
    x_ND = jnp.zeros((b * t, cfg.embed), jnp.float32, out_sharding=axes)
    positions_BT = jnp.zeros((b, t), jnp.int32, out_sharding=sharding.spec("batch", "seq"))
    params = Decoder(cfg, execution).init(key, x_ND, Tokens(positions_BT))["params"]
    return with_layers_on(params, "layers") if sharding.axis_size("layers") > 1 else params


def with_layers_on(params: Params, axis: str | None) -> Params:
    """The parameters with the blocks' leading axis on a logical axis: "layers", or None (whole)."""

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
    training: bool = False,
) -> Outputs:
    """The decoder on whole sequences of tokens, [B, T].

    `positions_BT` are 0, 1, … for each sequence if not given. `segments_BT` number the documents of
    packed sequences, each masked from the others. With `keys_B2`, key data for each sequence,
    dropout is on; with `training`, experts have their capacity.
    """
    b, t = tokens_BT.shape
    layout = matmul.choose_layout(b * t)
    backends = attention_backends(
        cfg,
        compute,
        sharding.target(),
        t,
        segments=segments_BT is not None,
        training=keys_B2 is not None,
    )
    execution = Execution(compute, backends, training, layout)
    x_ND = _embed(params, cfg, compute, tokens_BT, positions_BT, layout)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(
            jnp.arange(t), (b, t), out_sharding=sharding.spec("batch", None)
        )
    keys_BT2 = None if keys_B2 is None else layers.position_keys(keys_B2, t)
    tokens = jax.tree.map(_zigzag, Tokens(positions_BT, segments_BT, keys_BT2))
    x_ND = layers.dropout(x_ND, cfg.dropout, tokens.keys_N2(), 0)
    blocks = params["blocks"]
    if sharding.axis_size("layers") > 1:
        x_ND, routing = _pipelined_stack(cfg, execution, blocks, x_ND, tokens)
    else:
        numbers = jnp.arange(periods_of(cfg))
        x_ND, routing = _scanned_stack(cfg, execution, blocks, x_ND, numbers, tokens)
    if routing is not None:  # [periods, layers of a period, ...] to [L, ...]
        routing = jax.tree.map(lambda a: a.reshape(cfg.layers, *a.shape[2:]), routing)
    return Outputs(_final_norm(params, cfg, x_ND), routing)


def decode(
    params: Params,
    cfg: ModelConfig,
    compute: ComputeConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    caches: Caches,
) -> tuple[jax.Array, Caches]:
    """Final hidden states of new tokens, which see those in the caches, and caches with them.

    `tokens_BT` are few tokens of each sequence, at `positions_BT`. A token at a position below zero
    is padding: it is not cached, and its output is undefined.
    """
    layout = matmul.choose_layout(tokens_BT.size, decoding=True)
    x_ND = _embed(params, cfg, compute, tokens_BT, positions_BT, layout)
    x_ND, caches = _cached_stack(cfg, compute, layout, params["blocks"], x_ND, positions_BT, caches)
    return _final_norm(params, cfg, x_ND), caches


def _final_norm(params: Params, cfg: ModelConfig, x_ND: jax.Array) -> jax.Array:
    if cfg.norm_position == "post":
        return x_ND
    return layers.normalize(cfg, x_ND, **params["norm_final"])


def head(params: Params) -> jax.Array:
    """The output layer [V, D]: a table of its own, or the embedding's."""
    return params["head"] if "head" in params else params["embed"]


def logits(params: Params, cfg: ModelConfig, x_ND: jax.Array) -> jax.Array:
    """Logits of the vocabulary in float32, [N, cfg.table]; NEVER for entries that pad the table."""
    y_NV = matmul.scores(x_ND, head(params), matmul.layout_of(x_ND))
    y_NV = layers.soft_cap(y_NV, cfg.logit_soft_cap)
    if cfg.table == cfg.vocab_size:
        return y_NV
    ids_V = jnp.arange(cfg.table, out_sharding=sharding.spec("vocab"))
    return jnp.where(ids_V < cfg.vocab_size, y_NV, layers.NEVER)


def empty_caches(
    cfg: ModelConfig, sequences: int, capacity: int, dtype: str, chunk: int = 1
) -> Caches:
    """Caches for so many sequences of up to `capacity` tokens, at most `chunk` of them at a time.

    A layer with a window keeps the tokens that the first of a chunk sees, and the chunk.
    """

    def one(kind: str) -> Cache:
        window = window_of(cfg, kind)
        size = capacity if window is None else min(capacity, window + chunk - 1)
        shape = (periods_of(cfg), sequences, cfg.kv, size, cfg.head)
        out_sharding = sharding.spec(*attention.CACHE_AXES)
        return Cache(*(jnp.zeros(shape, dtype, out_sharding=out_sharding) for _ in range(2)))

    return tuple(map(one, cfg.pattern))


def unrolled(cfg: ModelConfig) -> ModelConfig:
    """The same model as one period, for the parameters that `split_layers` returns."""
    return replace(cfg, pattern=cfg.pattern * periods_of(cfg))


def _split(stacked: jax.Array, consume: bool) -> list[jax.Array]:
    """The layers of a stacked parameter, which on a CPU share its memory where they are aligned.

    Elsewhere, with `consume`, the stacked one is freed.
    """
    if len(stacked) == 1:
        return [stacked]
    if sharding.platform() != "cpu":
        layers_ = _slices(stacked)
        if consume and not isinstance(stacked, jax.core.Tracer):
            jax.block_until_ready(layers_)
            stacked.delete()
        return layers_
    shards = [(shard.device, np.asarray(shard.data)) for shard in stacked.addressable_shards]

    def one(i: int) -> jax.Array:
        parts = [jax.device_put(part[i : i + 1], device) for device, part in shards]
        shape = (1, *stacked.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, stacked.sharding, parts)

    return [one(i) for i in range(len(stacked))]


@jax.jit
def _slices(stacked: jax.Array) -> list[jax.Array]:
    return [stacked[i : i + 1] for i in range(len(stacked))]


def split_layers(params: Params, cfg: ModelConfig, consumed: Any) -> Params:
    """Parameters of `unrolled(cfg)`, an array for each layer.

    On a CPU it shares the memory of the stacked one where it is aligned; elsewhere those arrays are
    freed for which `consumed`, a tree like the parameters, is true. XLA for CPUs and GPUs
    copies a layer's parameters out of a stacked one before it uses them, in a loop over the layers
    or without: on a CPU that halves the speed of decoding.
    """
    blocks: Params = {}
    for j in range(len(cfg.pattern)):
        stacked, structure = jax.tree.flatten(params["blocks"][f"layer_{j}"])
        free = jax.tree.leaves(consumed["blocks"][f"layer_{j}"])
        layers_of = zip(*map(_split, stacked, free), strict=True)
        for i, leaves in enumerate(layers_of):
            name = f"layer_{i * len(cfg.pattern) + j}"
            blocks[name] = jax.tree.unflatten(structure, leaves)
    return params | {"blocks": blocks}
