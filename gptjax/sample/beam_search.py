"""Beam search, one program from the first token to the last.

Each prompt has `width` live beams and `width` places for finished ones, kept apart: a finished
continuation never takes a live beam's place. At each step the best continuations of all live beams
are looked at, enough of them that `width` go on even if all better ones end. Those among the first
`width` that end are finished, with their log-probability divided by length ** length_penalty (Wu et
al. 2016, without the coverage term), and compete with the finished ones for their places.

Shapes: b prompts, W beams, B = b*W rows, T prompt length, U longest continuation, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model.attention.layer import CACHE_AXES
from gptjax.model.decoder import Caches, Params
from gptjax.model.layers import NEVER
from gptjax.parallel import sharding
from gptjax.sample.decoding import next_logits


class Beams(NamedTuple):
    """Continuations, best first: tokens [b, W, U], lengths and scores [b, W].

    A score is a live beam's log-probability, and a finished one's divided by its length's power;
    NEVER where there is none.
    """

    tokens_bWU: jax.Array
    lengths_bW: jax.Array
    scores_bW: jax.Array


class _State(NamedTuple):
    step: jax.Array
    live: Beams
    finished: Beams
    open_b: jax.Array  # prompts whose finished beams could still become better
    caches: Caches


def _pick(beams: Beams, index_bn: jax.Array) -> Beams:
    """Some of the beams of each prompt."""
    pick = lambda x: jnp.take_along_axis(
        x, index_bn.reshape(*index_bn.shape, *[1] * (x.ndim - 2)), 1
    )
    return Beams(*map(pick, beams))


def _best(beams: Beams, n: int) -> Beams:
    """The n best of each prompt, best first; of equal ones those that stand first."""
    return _pick(beams, lax.top_k(beams.scores_bW, n)[1])


def _join(one: Beams, other: Beams) -> Beams:
    return Beams(*(jnp.concatenate(pair, 1) for pair in zip(one, other, strict=True)))


def _reorder(caches: Caches, rows_B: jax.Array) -> Caches:
    """The caches with row `rows_B[i]` in place of row i."""
    out = sharding.spec(*CACHE_AXES)
    return jax.tree.map(lambda store: store.at[:, rows_B].get(out_sharding=out), caches)


@functools.partial(jax.jit, static_argnums=(9, 10, 11, 12, 13))
def search(
    params: Params,
    last_b: jax.Array,
    position_b: jax.Array,
    caches: Caches,
    length_penalty: jax.Array,
    max_tokens: jax.Array,
    vocab_size: jax.Array,
    at_once: jax.Array,
    never: jax.Array,
    model: ModelConfig,
    compute: ComputeConfig,
    stop_ids: tuple[int, ...],
    width: int,
    room: int,
) -> Beams:
    """The best continuations of prompts whose last tokens are `last_b`, at `position_b`.

    The caches have b*W rows, those of a prompt one after the other, each with the prompt before its
    last token in it; a position below zero is no prompt. A continuation that reaches `max_tokens`,
    which is at most `room`, counts as finished. `at_once` and `never` are early stopping True and
    "never", see `settings.BeamSearchParams`.
    """
    b, w = len(last_b), width
    candidates = w * max(2, 1 + len(stop_ids))
    whole = jax.P()

    def blank(n: int, score: float) -> Beams:
        return Beams(
            jnp.zeros((b, n, room), jnp.int32),
            jnp.zeros((b, n), jnp.int32),
            jnp.full((b, n), score, jnp.float32),
        )

    def scored(total: jax.Array, length: jax.Array) -> jax.Array:
        return total / length.astype(jnp.float32) ** length_penalty

    @functools.partial(jax.sharding.auto_axes, out_sharding=whole, axes=None)
    def advance(logits_BV, step, live, finished, open_b):
        v = logits_BV.shape[-1]
        logprobs_bWV = jax.nn.log_softmax(logits_BV, -1).reshape(b, w, v)
        total_bn = (logprobs_bWV + live.scores_bW[:, :, None]).reshape(b, w * v)
        scores_bc, index_bc = lax.top_k(total_bn, candidates)
        parent_bc, token_bc = index_bc // v, (index_bc % v).astype(jnp.int32)
        after = _pick(live, parent_bc)
        after = Beams(
            after.tokens_bWU.at[:, :, step].set(token_bc), after.lengths_bW + 1, scores_bc
        )
        ends_bc = (token_bc[..., None] == jnp.array(stop_ids, jnp.int32)).any(-1)
        ends_bc |= step + 1 >= max_tokens

        places_bc = jnp.arange(candidates) < w
        done_bc = ends_bc & places_bc & open_b[:, None] & (scores_bc > NEVER / 2)
        done = after._replace(
            scores_bW=jnp.where(done_bc, scored(scores_bc, after.lengths_bW), NEVER)
        )
        finished = _best(_join(finished, done), w)

        going_bc = jnp.where(ends_bc, NEVER, scores_bc)
        chosen_bW = lax.top_k(going_bc, w)[1]
        live = _pick(after._replace(scores_bW=going_bc), chosen_bW)
        parents_bW = jnp.take_along_axis(parent_bc, chosen_bW, 1)

        full_b = (finished.scores_bW > NEVER).all(1)
        reach = jnp.where((length_penalty > 0) & never, max_tokens, step + 1)
        hope_b = scored(live.scores_bW[:, 0], reach)
        better_b = hope_b > finished.scores_bW.min(1)
        open_b &= ~full_b | (better_b & ~at_once)
        rows_B = (jnp.arange(b)[:, None] * w + parents_bW).reshape(-1)
        return live, finished, open_b, rows_B

    def go_on(state: _State) -> jax.Array:
        return (state.step < max_tokens) & state.open_b.any()

    rows_spec = sharding.spec("batch")

    def one(state: _State) -> _State:
        tokens_bW = jnp.where(
            state.step == 0, last_b[:, None], state.live.tokens_bWU[:, :, state.step - 1]
        )
        to_rows = lambda x: jax.sharding.reshard(x.reshape(-1), rows_spec)
        position_bW = jnp.broadcast_to((position_b + state.step)[:, None], (b, w))
        logits_BV, caches = next_logits(
            params,
            model,
            compute,
            to_rows(tokens_bW),
            to_rows(position_bW),
            state.caches,
            vocab_size,
        )
        logits_BV = jax.sharding.reshard(logits_BV, whole)
        live, finished, open_b, rows_B = advance(
            logits_BV, state.step, state.live, state.finished, state.open_b
        )
        caches = _reorder(caches, jax.sharding.reshard(rows_B, rows_spec))
        return _State(state.step + 1, live, finished, open_b, caches)

    live = blank(w, 0.0)
    # At first all beams of a prompt are the same one.
    live = live._replace(scores_bW=jnp.where(jnp.arange(w) == 0, live.scores_bW, NEVER))
    state = _State(jnp.int32(0), live, blank(w, NEVER), position_b >= 0, caches)
    return lax.while_loop(go_on, one, state).finished
