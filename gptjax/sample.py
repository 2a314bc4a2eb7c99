"""Sampling: jitted prefill and decode over a preallocated key-value cache.

Separate from training: it imports neither optax nor tensorflow. Shapes are bucketed (rows and
prompt lengths to powers of two), so a new prompt inside a bucket compiles nothing, and the settings
are data, so changing them compiles nothing either.

Each row draws from its own stream, keyed by (seed, row, position): a prompt's continuation does not
depend on how many prompts run beside it.

Shapes: B rows, T prompt length (padded), S capacity, V vocabulary, N = B*T tokens, D embed.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax import sharding
from gptjax.config import ComputeConfig, ModelConfig
from gptjax.errors import ConfigError
from gptjax.model import decoder
from gptjax.model.attention import NEVER, Cache
from gptjax.model.decoder import Params
from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """How the next token is drawn, and when to stop.

    temperature 0 is greedy. top_k 0 and top_p 1 keep every token. max_tokens bounds the
    continuation; a stop token ends it earlier.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 128
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError with every value that makes no sense."""
        problems = []
        if not self.temperature >= 0:
            problems.append(f"temperature={self.temperature}: must not be negative")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k}: must not be negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.max_tokens < 1:
            problems.append(f"max_tokens={self.max_tokens}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed={self.seed}: must not be negative, and below 2**32")
        if problems:
            raise ConfigError(problems)


# --- filters: pure functions on logits, applied in this order ----------------------------------


def scale_temperature(logits_BV: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits divided by the temperature."""
    return logits_BV / temperature


def keep_top_k(logits_BV: jax.Array, k: jax.Array) -> jax.Array:
    """All but the k largest of each row set to NEVER; ties with the k-th stay; k=0 keeps all."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    last = jnp.where(k > 0, jnp.minimum(k, logits_BV.shape[-1]), logits_BV.shape[-1]) - 1
    threshold_B1 = lax.dynamic_slice_in_dim(sorted_BV, last, 1, axis=-1)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, NEVER)


def keep_top_p(logits_BV: jax.Array, p: jax.Array) -> jax.Array:
    """The nucleus (Holtzman et al. 2020): the fewest most likely tokens whose mass reaches p."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # p=1 keeps everything, whatever the rounding of the cumulative sum.
    kept_BV = (before_BV < p) | (p >= 1)
    threshold_B1 = jnp.where(kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, NEVER)


# --- the jitted parts --------------------------------------------------------------------------


class _Draw(NamedTuple):
    """Settings as data on the device."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    max_tokens: jax.Array
    key: jax.Array
    vocab_size: jax.Array


class _State(NamedTuple):
    """Of the decode loop. `tokens_BS` holds prompt and continuation, `lengths_B` its length."""

    tokens_BS: jax.Array
    lengths_B: jax.Array
    ended_B: jax.Array
    step: jax.Array
    cache: Cache


def _draw(logits_BV, positions_B, draw: _Draw, *, greedy: bool, filtered: bool):
    """The next token of each row, from the stream of its (row, position)."""
    logits_BV = jax.sharding.reshard(logits_BV, sharding.spec("batch", None))
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < draw.vocab_size, logits_BV, NEVER)
    if greedy:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = scale_temperature(logits_BV, draw.temperature)
    if filtered:
        logits_BV = keep_top_p(keep_top_k(logits_BV, draw.top_k), draw.top_p)

    def one(key, logits_V, row, position):
        key = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.categorical(key, logits_V).astype(jnp.int32)

    rows_B = jnp.arange(logits_BV.shape[0])
    each = jax.sharding.auto_axes(
        jax.vmap(one, in_axes=(None, 0, 0, 0)), out_sharding=sharding.spec("batch")
    )
    return each(draw.key, logits_BV, rows_B, positions_B)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=(2,))
def _prefill(
    params: Params,
    prompt_BT: jax.Array,
    cache: Cache,
    model: ModelConfig,
    compute: ComputeConfig,
) -> tuple[jax.Array, Cache]:
    """Final hidden states of the prompts, [N, D], and the cache with them in it."""
    b, t = prompt_BT.shape
    positions_BT = jnp.broadcast_to(
        jnp.arange(t), (b, t), out_sharding=sharding.spec("batch", "seq")
    )
    out = decoder.apply(params, model, compute, prompt_BT, positions_BT=positions_BT, cache=cache)
    return out.x_ND, out.cache


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9, 10), donate_argnums=(4,))
def _decode(
    params: Params,
    prompt_BT: jax.Array,
    lengths_B: jax.Array,
    x_ND: jax.Array,
    cache: Cache,
    draw: _Draw,
    model: ModelConfig,
    compute: ComputeConfig,
    stop_ids: tuple[int, ...],
    greedy: bool,
    filtered: bool,
) -> tuple[jax.Array, jax.Array, Cache]:
    """Continues every row until each has ended or is full: tokens [B, S], lengths [B], the cache.

    A row's stop token is among its tokens.
    """
    b, t = prompt_BT.shape
    capacity = cache.keys_LBSKC.shape[2]
    pick = functools.partial(_draw, draw=draw, greedy=greedy, filtered=filtered)
    rows_spec = sharding.spec("batch")

    def append(state: _State, logits_BV: jax.Array) -> _State:
        token_B = pick(logits_BV, state.lengths_B)
        slot_BS = jnp.arange(capacity)[None] == state.lengths_B[:, None]
        write_BS = slot_BS & ~state.ended_B[:, None]
        tokens_BS = jnp.where(write_BS, token_B[:, None], state.tokens_BS)
        lengths_B = state.lengths_B + ~state.ended_B
        stopped_B = (token_B[:, None] == jnp.array(stop_ids, jnp.int32)).any(-1)
        ended_B = state.ended_B | stopped_B | (lengths_B >= capacity)
        return _State(tokens_BS, lengths_B, ended_B, state.step + 1, state.cache)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < draw.max_tokens) & ~state.ended_B.all()

    def one(state: _State) -> _State:
        last_B1 = state.lengths_B[:, None] - 1
        here_BS = jnp.arange(capacity)[None] == last_B1
        token_B1 = jnp.where(here_BS, state.tokens_BS, 0).sum(1, keepdims=True)
        out = decoder.apply(
            params, model, compute, token_B1, positions_BT=last_B1, cache=state.cache
        )
        scores_BV = decoder.logits(params, model, out.x_ND)
        return append(state._replace(cache=out.cache), scores_BV)

    x_BTD = lax.reshape(
        x_ND, (b, t, x_ND.shape[-1]), out_sharding=sharding.spec("batch", "seq", "embed")
    )
    last_BT1 = (jnp.arange(t)[None] == lengths_B[:, None] - 1)[..., None]
    x_BD = jnp.where(last_BT1, x_BTD, 0).sum(1)
    state = _State(
        jnp.pad(prompt_BT, ((0, 0), (0, capacity - t))),
        lengths_B,
        jnp.zeros(b, bool, out_sharding=rows_spec),
        jnp.int32(0),
        cache,
    )
    state = append(state, decoder.logits(params, model, x_BD))
    state = lax.while_loop(unfinished, one, state)
    return state.tokens_BS, state.lengths_B, state.cache


# --- the API -----------------------------------------------------------------------------------


def _bucket(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << (n - 1).bit_length())


def check(model: ModelConfig, prompts: Sequence[Sequence[int]], settings: Settings) -> None:
    """Raises ConfigError for settings that make no sense, an empty prompt, a token outside the
    vocabulary, or a prompt that leaves no room in the model's context.
    """
    settings.check()
    longest = max(map(len, prompts), default=0)
    problems = []
    for number, prompt in enumerate(prompts):
        if not prompt:
            problems.append(f"prompt {number}: is empty; begin with the EOS token")
        elif not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            problems.append(f"prompt {number}: has ids outside 0..{model.vocab_size - 1}")
    if longest >= model.context:
        problems.append(
            f"a prompt has {longest} tokens, which leave no room in model.context={model.context}"
        )
    elif longest + settings.max_tokens > model.context:
        problems.append(
            f"max_tokens={settings.max_tokens}: with a prompt of {longest} tokens more than "
            f"model.context={model.context}; at most {model.context - longest} fit"
        )
    if problems:
        raise ConfigError(problems)


def generate(
    params: Params,
    model: ModelConfig,
    compute: ComputeConfig,
    prompts: Sequence[Sequence[int]],
    stop_ids: tuple[int, ...],
    settings: Settings,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continuations of token prompts, each up to and with the first of `stop_ids`, in their order.

    Only ids below `vocab_size` are drawn: a table may have more rows than the tokenizer has
    pieces. Raises ConfigError as `check` does.
    """
    check(model, prompts, settings)
    if not prompts:
        return []
    longest = max(map(len, prompts))
    shards = sharding.axis_size("batch")
    rows = -(-_bucket(len(prompts)) // shards) * shards
    length = min(_bucket(longest, 16), model.context)
    capacity = min(_bucket(longest + settings.max_tokens, 16), model.context)
    padded = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    prompt_BT, lengths_B = (_replicated_rows(a) for a in (padded, lengths))
    draw = _Draw(
        jnp.float32(settings.temperature),
        jnp.int32(settings.top_k),
        jnp.float32(settings.top_p),
        jnp.int32(settings.max_tokens),
        jax.random.key(settings.seed),
        jnp.int32(model.vocab_size if vocab_size is None else vocab_size),
    )
    cache = jax.jit(decoder.empty_cache, static_argnums=(0, 1, 2, 3))(
        model, rows, capacity, compute.dtype
    )
    x_ND, cache = _prefill(params, prompt_BT, cache, model, compute)
    tokens_BS, lengths_B, _ = _decode(
        params,
        prompt_BT,
        lengths_B,
        x_ND,
        cache,
        draw,
        model,
        compute,
        stop_ids,
        settings.temperature == 0,
        settings.top_k > 0 or settings.top_p < 1,
    )
    tokens, ends = jax.device_get((tokens_BS, lengths_B))
    return [tokens[i, len(prompt) : ends[i]].tolist() for i, prompt in enumerate(prompts)]


def _replicated_rows(rows: np.ndarray) -> jax.Array:
    """Host rows, the same on every process, laid out over the batch axis."""
    axes = sharding.spec("batch", *[None] * (rows.ndim - 1))
    return jax.device_put(rows, jax.NamedSharding(jax.sharding.get_mesh(), axes))


def continue_texts(
    params: Params,
    model: ModelConfig,
    compute: ComputeConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: Settings,
) -> list[str]:
    """Continuations of texts. Raises ConfigError as `check` does."""
    ids = [tokenizer.prompt(prompt) for prompt in prompts]
    stop = tokenizer.stop_ids
    outs = generate(params, model, compute, ids, stop, settings, tokenizer.vocab_size)
    return [tokenizer.decode([i for i in out if i not in stop]) for out in outs]
