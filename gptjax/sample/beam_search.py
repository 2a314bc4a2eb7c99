"""Beam search: one compiled program from the first token to the last.

Each prompt has `width` live beams and keeps its `width` best finished ones, apart: a finished
continuation never takes a live beam's place. Each step ranks the best candidates over all live
beams, enough of them that `width` live beams remain even if all better candidates end. Those among
the first `width` that end are finished, with their log-probability divided by length **
length_penalty (Wu et al. 2016, without the coverage term), and compete with the other finished
ones.

Shapes: R prompts, W beams, B = R*W slots, N candidates, U longest continuation, V vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model.attention.layer import CACHE_AXES
from gptjax.model.decoder import Caches, Params
from gptjax.model.layers import NEVER
from gptjax.parallel import sharding
from gptjax.sample.decoding import next_logits


class Beams(NamedTuple):
    """Continuations, best first: tokens [R, W, U], lengths and scores [R, W].

    A live beam's score is its log-probability, a finished one's is divided by the length penalty;
    NEVER where there is no beam.
    """

    tokens_RWU: jax.Array
    lengths_RW: jax.Array
    scores_RW: jax.Array


ScalarT = TypeVar("ScalarT", jax.Array, np.generic)
"""Scalars on the device, or on the host."""


class BeamOptions(NamedTuple, Generic[ScalarT]):
    """The scalars of a search, as data: changing them compiles nothing.

    `stop_early` and `exhaustive` are early stopping True and "never", see `BeamSearchParams`. A
    continuation that reaches `max_tokens` counts as finished.
    """

    length_penalty: ScalarT
    max_tokens: ScalarT
    vocab_size: ScalarT
    stop_early: ScalarT
    exhaustive: ScalarT


@dataclass(frozen=True)
class BeamConfig:
    """The static arguments of a search; `max_length` bounds `BeamOptions.max_tokens`."""

    model: ModelConfig
    compute: ComputeConfig
    stop_ids: tuple[int, ...]
    width: int
    max_length: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    """Everything that a step of the search changes."""

    step: jax.Array
    live: Beams
    finished: Beams
    open_R: jax.Array  # prompts whose finished beams could still become better
    caches: Caches


def _pick(beams: Beams, index_RN: jax.Array) -> Beams:
    """The beams of each prompt at the given indices."""
    pick = lambda x: jnp.take_along_axis(
        x, index_RN.reshape(*index_RN.shape, *[1] * (x.ndim - 2)), 1
    )
    return Beams(*map(pick, beams))


def _best(beams: Beams, n: int) -> Beams:
    """The n best of each prompt, best first; ties keep their order."""
    return _pick(beams, lax.top_k(beams.scores_RW, n)[1])


def _concatenate(one: Beams, other: Beams) -> Beams:
    return Beams(*(jnp.concatenate(pair, 1) for pair in zip(one, other, strict=True)))


def _reorder(caches: Caches, slots_B: jax.Array) -> Caches:
    """The KV caches with slot `slots_B[i]` in place of slot i."""
    out = sharding.spec(*CACHE_AXES)
    return jax.tree.map(lambda store: store.at[:, slots_B].get(out_sharding=out), caches)


def _length_penalised(
    total: jax.Array, length: jax.Array, options: BeamOptions[jax.Array]
) -> jax.Array:
    return total / length.astype(jnp.float32) ** options.length_penalty


def _candidates(
    logprobs_BV: jax.Array, step: jax.Array, live: Beams, n: int
) -> tuple[Beams, jax.Array, jax.Array]:
    """The n best one-token extensions of each prompt's live beams, the beam that each extends, and
    its token.
    """
    (r, w), v = live.scores_RW.shape, logprobs_BV.shape[-1]
    logprobs_RWV = logprobs_BV.reshape(r, w, v)
    total_RM = (logprobs_RWV + live.scores_RW[:, :, None]).reshape(r, w * v)
    scores_RN, index_RN = lax.top_k(total_RM, n)
    parent_RN, token_RN = index_RN // v, (index_RN % v).astype(jnp.int32)
    beams = _pick(live, parent_RN)
    tokens_RNU = beams.tokens_RWU.at[:, :, step].set(token_RN)
    return Beams(tokens_RNU, beams.lengths_RW + 1, scores_RN), parent_RN, token_RN


def _select(
    logprobs_BV: jax.Array, state: BeamState, options: BeamOptions[jax.Array], config: BeamConfig
) -> tuple[Beams, Beams, jax.Array, jax.Array]:
    """The live and finished beams after a step, the prompts still open, and the slot [B] that each
    live beam extends.
    """
    (r, w), step = state.live.scores_RW.shape, state.step
    n = w * max(2, 1 + len(config.stop_ids))
    candidates, parent_RN, token_RN = _candidates(logprobs_BV, step, state.live, n)
    scores_RN = candidates.scores_RW
    ends_RN = (token_RN[..., None] == jnp.array(config.stop_ids, jnp.int32)).any(-1)
    ends_RN |= step + 1 >= options.max_tokens

    first_RN = jnp.arange(n) < w
    done_RN = ends_RN & first_RN & state.open_R[:, None] & (scores_RN > NEVER / 2)
    penalised_RN = _length_penalised(scores_RN, candidates.lengths_RW, options)
    done = candidates._replace(scores_RW=jnp.where(done_RN, penalised_RN, NEVER))
    finished = _best(_concatenate(state.finished, done), w)

    live_RN = jnp.where(ends_RN, NEVER, scores_RN)
    chosen_RW = lax.top_k(live_RN, w)[1]
    live = _pick(candidates._replace(scores_RW=live_RN), chosen_RW)
    parent_RW = jnp.take_along_axis(parent_RN, chosen_RW, 1)

    full_R = (finished.scores_RW > NEVER).all(1)
    longest = (options.length_penalty > 0) & options.exhaustive
    reach = jnp.where(longest, options.max_tokens, step + 1)
    best_R = _length_penalised(live.scores_RW[:, 0], reach, options)
    better_R = best_R > finished.scores_RW.min(1)
    open_R = state.open_R & (~full_R | (better_R & ~options.stop_early))
    slots_B = (jnp.arange(r)[:, None] * w + parent_RW).reshape(-1)
    return live, finished, open_R, slots_B


def beam_step(
    params: Params,
    last_R: jax.Array,
    position_R: jax.Array,
    state: BeamState,
    options: BeamOptions[jax.Array],
    config: BeamConfig,
) -> BeamState:
    """Every live beam extended by a token. `last_R`, `position_R`: see `search`."""
    shape, slots_spec = state.live.scores_RW.shape, sharding.spec("batch")
    token_RW = jnp.where(
        state.step == 0, last_R[:, None], state.live.tokens_RWU[:, :, state.step - 1]
    )
    position_RW = jnp.broadcast_to((position_R + state.step)[:, None], shape)
    to_slots = lambda x: jax.sharding.reshard(x.reshape(-1), slots_spec)
    logits_BV, log_total_B, caches = next_logits(
        params,
        config.model,
        config.compute,
        to_slots(token_RW),
        to_slots(position_RW),
        state.caches,
        options.vocab_size,
    )
    logprobs_BV = jax.sharding.reshard(logits_BV - log_total_B[:, None], jax.P())

    @functools.partial(jax.sharding.auto_axes, out_sharding=jax.P(), axes=None)
    def select(
        logprobs_BV: jax.Array, step: jax.Array, live: Beams, finished: Beams, open_R: jax.Array
    ) -> tuple[Beams, Beams, jax.Array, jax.Array]:
        return _select(logprobs_BV, BeamState(step, live, finished, open_R, ()), options, config)

    live, finished, open_R, slots_B = select(
        logprobs_BV, state.step, state.live, state.finished, state.open_R
    )
    caches = _reorder(caches, jax.sharding.reshard(slots_B, slots_spec))
    return BeamState(state.step + 1, live, finished, open_R, caches)


@functools.partial(jax.jit, static_argnums=5)
def search(
    params: Params,
    last_R: jax.Array,
    position_R: jax.Array,
    caches: Caches,
    options: BeamOptions[jax.Array],
    config: BeamConfig,
) -> Beams:
    """The best continuations of prompts whose last tokens are `last_R`, at `position_R`.

    The KV caches have R*W slots, those of a prompt side by side, each with the prompt before its
    last token in it; a negative position is no prompt.
    """

    def empty(score_W: jax.Array) -> Beams:
        shape = (len(last_R), config.width)
        return Beams(
            jnp.zeros((*shape, config.max_length), jnp.int32),
            jnp.zeros(shape, jnp.int32),
            jnp.broadcast_to(score_W, shape),
        )

    never_W = jnp.full(config.width, NEVER, jnp.float32)
    # At first all beams of a prompt are the same one, so only one of them counts.
    first_W = jnp.where(jnp.arange(config.width) == 0, 0.0, never_W)
    state = BeamState(jnp.int32(0), empty(first_W), empty(never_W), position_R >= 0, caches)
    unfinished = lambda state: (state.step < options.max_tokens) & state.open_R.any()
    step = lambda state: beam_step(params, last_R, position_R, state, options, config)
    return lax.while_loop(unfinished, step, state).finished
