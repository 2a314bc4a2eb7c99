"""The compiled programs of sampling: prefill, insertion of prompts into slots, and decode.

Prefill leaves out a prompt's last token: the first decode step reads it, as every step reads the
token before the one that it draws. So a prefill computes no logits, and all samples of a prompt
share it. A short prompt has no prefill at all: decode steps read it token by token instead of
drawing, which takes no longer and needs no program of its own.

Slots are independent. A slot draws from its own random stream, keyed by (seed, prompt, sample,
position), so its continuation depends neither on the other slots nor on how decoding is cut into
bursts; the number of slots may only change the order, and so the rounding, of sums in products.

Shapes: B slots, R prompts, N slots of a prompt, T tokens of a chunk, S capacity, V vocabulary,
U steps of a burst, m stop tokens, r prompt tokens read by decode steps, a alternatives. Caches are
[P, B, K, S, C], as in `model/attention`; one device's share of them is [p, b, k, s, c].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import decoder
from gptjax.model.attention.layer import CACHE_AXES
from gptjax.model.decoder import Caches, Params
from gptjax.model.layers import NEVER
from gptjax.parallel import sharding
from gptjax.sample.logits_processors import ArrayT, ProcessorParams, process_logits

BURST = 64
"""Most decode steps before the host looks at the tokens."""
INLINE_PROMPT = 8
"""Most tokens of a prompt after its first that decode steps read, without a prefill."""


class Slots(NamedTuple, Generic[ArrayT]):
    """The state of every decode slot. `seen_BV` and `counts_BV` are None without penalties."""

    token_B: ArrayT  # the latest token, which the next step reads
    prompt_Br: ArrayT  # the prompt's token at position 1 + column; negative after its end
    position_B: ArrayT  # of the latest token; negative for a slot with nothing to do
    left_B: ArrayT  # tokens still to draw
    stop_Bm: ArrayT  # ids of stop tokens; negative for none
    stream_B3: ArrayT  # the random stream: seed, prompt, sample
    params: ProcessorParams[ArrayT]
    seen_BV: ArrayT | None  # whether a token is in prompt or continuation
    counts_BV: ArrayT | None  # how often a token is in the continuation


class DecodeOutput(NamedTuple):
    """The tokens of a burst [B, U], negative where a slot drew none; their log-probabilities
    [B, U], and ids and log-probabilities of the likeliest tokens [B, U, a], or None.
    """

    tokens_BU: jax.Array
    logprobs_BU: jax.Array | None
    top_ids_BUa: jax.Array | None
    top_logprobs_BUa: jax.Array | None


@dataclass(frozen=True)
class DecodeConfig:
    """The static arguments of decode: the model, and the features that any of the slots uses.

    `sampling`: temperature above 0; `truncation`: top-k, top-p or min-p; `logprobs`: the number of
    alternatives given with each token, or None for no log-probabilities.
    """

    model: ModelConfig
    compute: ComputeConfig
    sampling: bool = False
    truncation: bool = False
    logprobs: int | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that a decode step changes; `step` counts the steps of the burst."""

    step: jax.Array
    slots: Slots[jax.Array]
    caches: Caches
    output: DecodeOutput


# --- parameters --------------------------------------------------------------------------------


def decoding_params(
    params: Params, model: ModelConfig, dtype: str, *, consume: bool = False
) -> tuple[Params, ModelConfig]:
    """Parameters for decoding: matrices in `dtype`; but on TPUs, separate arrays for each layer.

    Vectors, positions and routers, which are small and used in float32, keep their dtype. With
    `consume`, the given arrays are freed on a GPU as they are split, so that none is there twice.
    """
    kinds = dtypes(params, dtype)
    cast = jax.tree.map(lambda leaf, kind: leaf.dtype != kind, params, kinds)
    if any(jax.tree.leaves(cast)):
        params = _cast(params, dtype)
    params = decoder.with_layers_on(params, None)
    if sharding.platform() == "tpu":
        return params, model
    consumed = jax.tree.map(lambda new: consume or new, cast)
    return decoder.split_layers(params, model, consumed), decoder.unrolled(model)


def dtypes(params: Params, dtype: str) -> Params:
    """The dtype of each parameter when decoding in `dtype`."""
    small = ("scale", "bias", "positions", "router")

    def of(path: tuple[Any, ...], leaf: jax.Array | jax.ShapeDtypeStruct) -> jnp.dtype:
        return leaf.dtype if str(path[-1].key).endswith(small) else jnp.dtype(dtype)

    return jax.tree_util.tree_map_with_path(of, params)


@functools.partial(jax.jit, static_argnums=1)
def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf, kind: leaf.astype(kind), params, dtypes(params, dtype))


# --- prompts -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=(2,))
def prefill(
    params: Params,
    chunk: tuple[jax.Array, jax.Array],
    caches: Caches,
    model: ModelConfig,
    compute: ComputeConfig,
) -> Caches:
    """The KV caches after a chunk of prompts: tokens and positions [R, T]; negative is no token."""
    tokens_RT, positions_RT = chunk
    return decoder.decode(params, model, compute, tokens_RT, positions_RT, caches)[1]


@functools.partial(jax.jit, donate_argnums=(0,))
def insert_prompts(caches: Caches, prompts: Caches, slots_RN: jax.Array) -> Caches:
    """The KV caches with prefilled prompt i in the slots `slots_RN[i]`; B or more is no slot."""
    return jax.tree.map(lambda store, new: _insert(store, new, slots_RN), caches, prompts)


@jax.jit
def _insert(store_PBKSC: jax.Array, new_PRKSC: jax.Array, slots_RN: jax.Array) -> jax.Array:
    """`insert_prompts` for one array; jitted, so that equal shapes are traced once."""

    def local(store_pbksc: jax.Array, new_prksc: jax.Array, slots_RN: jax.Array) -> jax.Array:
        new_pRksc = lax.all_gather(new_prksc, sharding.RULES["batch"], axis=1, tiled=True)
        size = min(store_pbksc.shape[3], new_pRksc.shape[3])
        local_RN = slots_RN - lax.axis_index(sharding.RULES["batch"]) * store_pbksc.shape[1]
        local_RN = jnp.where(local_RN < 0, store_pbksc.shape[1], local_RN)  # no wrapping

        def put(i: jax.Array, store_pbksc: jax.Array) -> jax.Array:
            target = store_pbksc.at[:, local_RN[:, i], :, :size]
            return target.set(new_pRksc[:, :, :, :size], mode="drop")

        return lax.fori_loop(0, slots_RN.shape[1], put, store_pbksc)

    stored = sharding.spec(*CACHE_AXES)
    return jax.shard_map(
        local, in_specs=(stored, stored, jax.P()), out_specs=stored, check_vma=False
    )(store_PBKSC, new_PRKSC, slots_RN)


@functools.partial(jax.jit, donate_argnums=(0,))
def replace_slots(
    slots: Slots[jax.Array], chosen_B: jax.Array, new: Slots[jax.Array]
) -> Slots[jax.Array]:
    """The slots, with the chosen ones replaced by those of `new`."""

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(lax.expand_dims(chosen_B, range(1, old.ndim)), new, old)

    return jax.tree.map(choose, slots, new)


# --- decode ------------------------------------------------------------------------------------


def next_logits(
    params: Params,
    model: ModelConfig,
    compute: ComputeConfig,
    token_B: jax.Array,
    position_B: jax.Array,
    caches: Caches,
    vocab_size: jax.Array,
) -> tuple[jax.Array, jax.Array, Caches]:
    """Logits [B, V] of the token after `token_B`, the logarithm of the sum of their exponentials
    [B], and the KV caches with `token_B` in them.

    Logits of ids from `vocab_size` on are NEVER: the model may have more rows than there are
    tokens. The sum is over all rows of the model, so that log-probabilities are its own.
    """
    x_BD, caches = decoder.decode(
        params, model, compute, token_B[:, None], position_B[:, None], caches
    )
    logits_BV = decoder.logits(params, model, x_BD)
    logits_BV = jax.sharding.reshard(logits_BV, sharding.spec("batch", None))
    log_total_B = jax.nn.logsumexp(logits_BV, -1)
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, NEVER)
    return logits_BV, log_total_B, caches


def decode_step(
    params: Params, state: DecodeState, vocab_size: jax.Array, config: DecodeConfig
) -> DecodeState:
    """One token for each active slot: the next of its prompt, or one drawn from the model."""
    slots = state.slots
    active_B = slots.position_B >= 0
    logits_BV, log_total_B, caches = next_logits(
        params,
        config.model,
        config.compute,
        slots.token_B,
        slots.position_B,
        state.caches,
        vocab_size,
    )
    here_Br = jnp.arange(slots.prompt_Br.shape[1]) == slots.position_B[:, None]
    prompt_B = jnp.where(here_Br, slots.prompt_Br, -1).max(1)
    in_prompt_B = prompt_B >= 0
    token_B = jnp.where(in_prompt_B, prompt_B, _draw(logits_BV, slots, config))
    drawn_B = active_B & ~in_prompt_B
    output = _record(state.output, state.step, logits_BV - log_total_B[:, None], token_B, drawn_B)
    return DecodeState(state.step + 1, _advance(slots, token_B, drawn_B), caches, output)


def _draw(logits_BV: jax.Array, slots: Slots[jax.Array], config: DecodeConfig) -> jax.Array:
    """The next token of each slot [B], from the random stream of its position."""
    logits_BV = process_logits(
        logits_BV, slots.params, slots.seen_BV, slots.counts_BV, truncation=config.truncation
    )
    likeliest_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    if not config.sampling:
        return likeliest_B

    def one(stream_3: jax.Array, position: jax.Array, logits_V: jax.Array) -> jax.Array:
        key = jax.random.key(stream_3[0])
        for number in (stream_3[1], stream_3[2], position):
            key = jax.random.fold_in(key, number)
        return jax.random.categorical(key, logits_V)

    sampled_B = _vmap_slots(one, slots.stream_B3, slots.position_B + 1, logits_BV)
    return jnp.where(slots.params.temperature_B > 0, sampled_B.astype(jnp.int32), likeliest_B)


def _vmap_slots(function: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """A vmap over slots of a function whose sharding the compiler does not infer by itself."""
    return jax.sharding.auto_axes(jax.vmap(function), out_sharding=sharding.spec("batch"))(*args)


def _record(
    output: DecodeOutput,
    step: jax.Array,
    logprobs_BV: jax.Array,
    token_B: jax.Array,
    drawn_B: jax.Array,
) -> DecodeOutput:
    """The output with a step's tokens, and the log-probabilities that it has arrays for."""
    put = lambda store, new: store.at[:, step].set(new)
    output = output._replace(tokens_BU=put(output.tokens_BU, jnp.where(drawn_B, token_B, -1)))
    if output.logprobs_BU is None:
        return output
    chosen_BV = jnp.arange(logprobs_BV.shape[-1]) == token_B[:, None]
    chosen_B = jnp.where(chosen_BV, logprobs_BV, 0).sum(-1)
    output = output._replace(logprobs_BU=put(output.logprobs_BU, chosen_B))
    if output.top_ids_BUa is None:
        return output
    top_Ba, ids_Ba = lax.top_k(logprobs_BV, output.top_ids_BUa.shape[-1])
    return output._replace(
        top_ids_BUa=put(output.top_ids_BUa, ids_Ba),
        top_logprobs_BUa=put(output.top_logprobs_BUa, top_Ba),
    )


def _advance(slots: Slots[jax.Array], token_B: jax.Array, drawn_B: jax.Array) -> Slots[jax.Array]:
    """The slots after a step's tokens; those that drew a stop token, or their last, have ended."""
    left_B = slots.left_B - drawn_B
    ended_B = (token_B[:, None] == slots.stop_Bm).any(-1) | (left_B <= 0)
    ended_B &= drawn_B
    seen_BV, counts_BV = slots.seen_BV, slots.counts_BV
    if seen_BV is not None and counts_BV is not None:
        now_BV = (jnp.arange(seen_BV.shape[1]) == token_B[:, None]) & drawn_B[:, None]
        seen_BV, counts_BV = seen_BV | now_BV, counts_BV + now_BV
    active_B = (slots.position_B >= 0) & ~ended_B
    return slots._replace(
        token_B=token_B,
        position_B=jnp.where(active_B, slots.position_B + 1, -1),
        left_B=left_B,
        seen_BV=seen_BV,
        counts_BV=counts_BV,
    )


@functools.partial(jax.jit, static_argnums=6, donate_argnums=(1, 2))
def burst(
    params: Params,
    slots: Slots[jax.Array],
    caches: Caches,
    limit: jax.Array,
    refill: jax.Array,
    vocab_size: jax.Array,
    config: DecodeConfig,
) -> tuple[Slots[jax.Array], Caches, DecodeOutput]:
    """Up to `limit` decode steps, at most BURST, in one loop on the device.

    Ends earlier when every slot has ended; with `refill`, as soon as one has. A stop token is part
    of a slot's tokens, and ends it. The output is replicated.
    """
    began_B = slots.position_B >= 0

    def unfinished(state: DecodeState) -> jax.Array:
        active_B = state.slots.position_B >= 0
        ended = refill & (began_B & ~active_B).any()
        return (state.step < limit) & active_B.any() & ~ended

    state = DecodeState(
        jnp.int32(0), slots, caches, _empty_output(len(slots.token_B), config.logprobs)
    )
    state = lax.while_loop(
        unfinished, lambda state: decode_step(params, state, vocab_size, config), state
    )
    replicate = lambda x: jax.sharding.reshard(x, jax.P(*[None] * x.ndim))
    return state.slots, state.caches, jax.tree.map(replicate, state.output)


def _empty_output(slots: int, logprobs: int | None) -> DecodeOutput:
    """The output before the first step, sharded over the batch axes."""

    def full(value: int, dtype: Any, *rest: int) -> jax.Array:
        spec = jax.P(*sharding.spec("batch", None), *[None] * len(rest))
        return jnp.full((slots, BURST, *rest), value, dtype, out_sharding=spec)

    return DecodeOutput(
        full(-1, jnp.int32),
        None if logprobs is None else full(0, jnp.float32),
        full(0, jnp.int32, logprobs) if logprobs else None,
        full(0, jnp.float32, logprobs) if logprobs else None,
    )
