"""The jitted parts: prefill, rows that take a prompt over, and a burst of decoding.

A prompt's last token is not prefilled: the first step of decoding reads it, as every step reads the
token before the one that it draws. So a prefill has no logits, and is shared by all samples of a
prompt. A short prompt is not prefilled at all: steps of decoding read it token by token, in place
of what they would draw, which takes no longer and needs no program of its own.

Rows are independent. A row draws from its own stream, keyed by (seed, prompt, sample, position), so
its continuation does not hang on the rows beside it, nor on how decoding is cut into bursts; but
for the rounding of products, whose sums may be ordered by how many rows there are.

Shapes: B rows, b prompts, T tokens of a chunk, S capacity, V vocabulary, U tokens of a burst,
m stop tokens, r tokens that are read, a alternatives.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import decoder
from gptjax.model.attention.layer import CACHE_AXES
from gptjax.model.decoder import Caches, Params
from gptjax.model.layers import NEVER
from gptjax.parallel import sharding
from gptjax.sample.logits_processors import Knobs, adjust

BURST = 64
"""Most tokens that a row draws before the host looks at them."""
READ = 8
"""Most tokens of a prompt that steps of decoding read, after its first."""


class Rows(NamedTuple):
    """What decoding knows of each row. `seen_BV`, `counts_BV` are None where none has penalties."""

    token_B: jax.Array  # the last one
    prompt_Br: jax.Array  # what is read after positions 0, 1, …; below zero where that has ended
    position_B: jax.Array  # its position; below zero for a row with nothing to do
    left_B: jax.Array  # tokens still to draw
    stop_Bm: jax.Array
    stream_B3: jax.Array  # its draws' own: seed, prompt, sample
    knobs: Knobs
    seen_BV: jax.Array | None
    counts_BV: jax.Array | None


class Plan(NamedTuple):
    """What a program is compiled for, beyond shapes: what any of its rows needs.

    `logprobs`: None, or how many alternatives are given with each token.
    """

    drawn: bool
    filtered: bool
    logprobs: int | None


class Drawn(NamedTuple):
    """Tokens of a burst, [B, U], below zero before a row draws and after its end, and their
    log-probabilities; those of the likeliest tokens, [B, U, a], where asked for.
    """

    tokens_BU: jax.Array
    logprobs_BU: jax.Array | None
    top_ids_BUa: jax.Array | None
    top_logprobs_BUa: jax.Array | None


def decoding_params(params: Params, model: ModelConfig, dtype: str) -> tuple[Params, ModelConfig]:
    """Matrices in the dtype that they are used in, and on CPUs each layer in arrays of its own.

    Vectors, positions and routers, which are little and used in float32, stay as they are.
    """
    if jax.tree.map(lambda leaf: leaf.dtype, params) != dtypes(params, dtype):
        params = _cast(params, dtype)
    params = decoder.with_layers_on(params, None)
    if sharding.platform() != "cpu":
        return params, model
    return decoder.split_layers(params, model), decoder.unrolled(model)


def dtypes(params: Params, dtype: str) -> Params:
    """The dtype that decoding in `dtype` has each parameter in."""
    small = ("scale", "bias", "positions", "router")

    def of(path: tuple[Any, ...], leaf: jax.Array | jax.ShapeDtypeStruct) -> jnp.dtype:
        return leaf.dtype if str(path[-1].key).endswith(small) else jnp.dtype(dtype)

    return jax.tree_util.tree_map_with_path(of, params)


@functools.partial(jax.jit, static_argnums=1)
def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf, kind: leaf.astype(kind), params, dtypes(params, dtype))


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=(2,))
def prefill(
    params: Params,
    chunk: tuple[jax.Array, jax.Array],
    caches: Caches,
    model: ModelConfig,
    compute: ComputeConfig,
) -> Caches:
    """The caches with a chunk's tokens [b, T] in them, at its positions; below zero is no token."""
    tokens_bT, positions_bT = chunk
    return decoder.decode(params, model, compute, tokens_bT, positions_bT, caches)[1]


@functools.partial(jax.jit, donate_argnums=(0,))
def take_over(caches: Caches, prompts: Caches, rows_bn: jax.Array) -> Caches:
    """The caches with prompt i in the rows `rows_bn[i]`; a row past the last is none."""
    return jax.tree.map(lambda store, new: _take_over(store, new, rows_bn), caches, prompts)


@jax.jit
def _take_over(store_PBKSC: jax.Array, new_PbKSC: jax.Array, rows_bn: jax.Array) -> jax.Array:
    """The same for the keys or values of a layer; of its own, so that like ones are traced once."""

    def local(store_PBKSC, new_PbKSC, rows_bn):
        new_PbKSC = lax.all_gather(new_PbKSC, sharding.RULES["batch"], axis=1, tiled=True)
        size = min(store_PBKSC.shape[3], new_PbKSC.shape[3])
        local_bn = rows_bn - lax.axis_index(sharding.RULES["batch"]) * store_PBKSC.shape[1]
        local_bn = jnp.where(local_bn < 0, store_PBKSC.shape[1], local_bn)  # no wrapping

        def put(i: jax.Array, store_PBKSC: jax.Array) -> jax.Array:
            rows = store_PBKSC.at[:, local_bn[:, i], :, :size]
            return rows.set(new_PbKSC[:, :, :, :size], mode="drop")

        return lax.fori_loop(0, rows_bn.shape[1], put, store_PBKSC)

    stored = sharding.spec(*CACHE_AXES)
    return jax.shard_map(
        local, in_specs=(stored, stored, jax.P()), out_specs=stored, check_vma=False
    )(store_PBKSC, new_PbKSC, rows_bn)


@functools.partial(jax.jit, donate_argnums=(0,))
def seat(rows: Rows, chosen_B: jax.Array, new: Rows) -> Rows:
    """The rows, with those that are chosen replaced."""

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(lax.expand_dims(chosen_B, range(1, old.ndim)), new, old)

    return jax.tree.map(choose, rows, new)


def _on_own_rows(function: Any, *args: jax.Array) -> jax.Array:
    """A vmap over rows of what the compiler may not split by itself."""
    return jax.sharding.auto_axes(jax.vmap(function), out_sharding=sharding.spec("batch"))(*args)


def _draw(logits_BV: jax.Array, rows: Rows, plan: Plan) -> jax.Array:
    """The next token of each row, from the stream of its position."""
    logits_BV = adjust(logits_BV, rows.knobs, rows.seen_BV, rows.counts_BV, filtered=plan.filtered)
    likeliest_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    if not plan.drawn:
        return likeliest_B

    def one(stream_3, position, logits_V):
        key = jax.random.key(stream_3[0])
        for number in (stream_3[1], stream_3[2], position):
            key = jax.random.fold_in(key, number)
        return jax.random.categorical(key, logits_V)

    drawn_B = _on_own_rows(one, rows.stream_B3, rows.position_B + 1, logits_BV)
    return jnp.where(rows.knobs.temperature_B > 0, drawn_B.astype(jnp.int32), likeliest_B)


def next_logits(
    params: Params,
    model: ModelConfig,
    compute: ComputeConfig,
    token_B: jax.Array,
    position_B: jax.Array,
    caches: Caches,
    vocab_size: jax.Array,
) -> tuple[jax.Array, Caches]:
    """Logits [B, V] of what follows a token at a position, and the caches with it in them.

    Ids from `vocab_size` on are NEVER: a table may have more rows than the tokenizer has pieces.
    """
    x_BD, caches = decoder.decode(
        params, model, compute, token_B[:, None], position_B[:, None], caches
    )
    logits_BV = decoder.logits(params, model, x_BD)
    logits_BV = jax.sharding.reshard(logits_BV, sharding.spec("batch", None))
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, NEVER)
    return logits_BV, caches


@functools.partial(jax.jit, static_argnums=(6, 7, 8), donate_argnums=(1, 2))
def burst(
    params: Params,
    rows: Rows,
    caches: Caches,
    limit: jax.Array,
    refill: jax.Array,
    vocab_size: jax.Array,
    model: ModelConfig,
    compute: ComputeConfig,
    plan: Plan,
) -> tuple[Rows, Caches, Drawn]:
    """Reads or draws up to `limit` (at most BURST) tokens for each row.

    Ends earlier when every row has ended; with `refill`, as soon as one has. A stop token is among
    a row's tokens, and ends it. What it gives of tokens is whole on every device.
    """
    b = len(rows.token_B)
    a = plan.logprobs
    per_token = sharding.spec("batch", None)
    make = lambda value, dtype, *rest: jnp.full(
        (b, BURST, *rest), value, dtype, out_sharding=jax.P(*per_token, *[None] * len(rest))
    )
    empty = Drawn(
        make(-1, jnp.int32),
        None if a is None else make(0, jnp.float32),
        make(0, jnp.int32, a) if a else None,
        make(0, jnp.float32, a) if a else None,
    )
    began_B = rows.position_B >= 0

    def go_on(carry: Any) -> jax.Array:
        step, rows, _, _ = carry
        going_B = rows.position_B >= 0
        ended = refill & (began_B & ~going_B).any()
        return (step < limit) & going_B.any() & ~ended

    def one(carry: Any) -> Any:
        step, rows, caches, drawn = carry
        going_B = rows.position_B >= 0
        logits_BV, caches = next_logits(
            params, model, compute, rows.token_B, rows.position_B, caches, vocab_size
        )
        here_Br = jnp.arange(rows.prompt_Br.shape[1]) == rows.position_B[:, None]
        next_B = jnp.where(here_Br, rows.prompt_Br, -1).max(1)
        reading_B = next_B >= 0
        token_B = jnp.where(reading_B, next_B, _draw(logits_BV, rows, plan))
        drawing_B = going_B & ~reading_B
        put = lambda store, new: store.at[:, step].set(new)
        drawn = drawn._replace(tokens_BU=put(drawn.tokens_BU, jnp.where(drawing_B, token_B, -1)))
        if a is not None:
            logprobs_BV = jax.nn.log_softmax(logits_BV, -1)
            chosen_BV = jnp.arange(logits_BV.shape[-1]) == token_B[:, None]
            chosen_B = jnp.where(chosen_BV, logprobs_BV, 0).sum(-1)
            drawn = drawn._replace(logprobs_BU=put(drawn.logprobs_BU, chosen_B))
            if a:
                top_Ba, ids_Ba = lax.top_k(logprobs_BV, a)
                drawn = drawn._replace(
                    top_ids_BUa=put(drawn.top_ids_BUa, ids_Ba),
                    top_logprobs_BUa=put(drawn.top_logprobs_BUa, top_Ba),
                )
        left_B = rows.left_B - drawing_B
        stopped_B = (token_B[:, None] == rows.stop_Bm).any(-1) | (left_B <= 0)
        stopped_B &= drawing_B
        seen_BV, counts_BV = rows.seen_BV, rows.counts_BV
        if seen_BV is not None:
            now_BV = (jnp.arange(seen_BV.shape[1]) == token_B[:, None]) & drawing_B[:, None]
            seen_BV, counts_BV = seen_BV | now_BV, counts_BV + now_BV
        rows = rows._replace(
            token_B=token_B,
            position_B=jnp.where(going_B & ~stopped_B, rows.position_B + 1, -1),
            left_B=left_B,
            seen_BV=seen_BV,
            counts_BV=counts_BV,
        )
        return step + 1, rows, caches, drawn

    _, rows, caches, drawn = lax.while_loop(go_on, one, (jnp.int32(0), rows, caches, empty))
    whole = lambda x: jax.sharding.reshard(x, jax.P(*[None] * x.ndim))
    return rows, caches, jax.tree.map(whole, drawn)
