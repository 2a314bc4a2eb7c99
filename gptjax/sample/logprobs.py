"""Log-probabilities of given tokens, by the forward pass of training.

Shapes: B rows, T tokens, N = B*T, c positions of a slice, V vocabulary, a alternatives.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.model.layers import NEVER
from gptjax.parallel import sequence, sharding

SLICE = 2048
"""Tokens whose scores of the whole vocabulary are held at a time, or one of each row."""


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def score(
    params: Params,
    tokens_BT: jax.Array,
    vocab_size: jax.Array,
    model: ModelConfig,
    compute: ComputeConfig,
    alternatives: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each token but the first, its log-probability after those before it, [B, T-1]; and ids and
    log-probabilities of the likeliest tokens in its place, [B, T-1, a].

    Ids from `vocab_size` on have no chance, as in decoding. Whole on every device.
    """
    b, t = tokens_BT.shape
    x_ND = decoder.apply(params, model, compute, tokens_BT).x_ND
    held_ND = jax.sharding.reshard(x_ND, sharding.spec("tokens", "embed"))
    x_BTD = sequence.gather_natural(sequence.unflatten(held_ND, b, (x_ND.shape[-1],), ("embed",)))
    whole = lambda x: jax.sharding.reshard(x, jax.P(*[None] * x.ndim))
    parts = []
    width = max(1, SLICE // b)
    for start in range(0, t - 1, width):
        stop = min(start + width, t - 1)
        n = b * (stop - start)
        x_nD = sequence.flatten(x_BTD[:, start:stop], "batch")
        scores_nV = decoder.logits(params, model, x_nD)
        scores_nV = jax.sharding.reshard(scores_nV, sharding.spec("batch", None))
        scores_nV = jnp.where(jnp.arange(scores_nV.shape[-1]) < vocab_size, scores_nV, NEVER)
        next_n = sequence.flatten(tokens_BT[:, start + 1 : stop + 1], "batch")
        logprobs_nV = jax.nn.log_softmax(scores_nV, -1)
        at_nV = jnp.arange(scores_nV.shape[-1]) == next_n[:, None]
        own_n = jnp.where(at_nV, logprobs_nV, 0).sum(-1)
        top_na, ids_na = (
            lax.top_k(logprobs_nV, alternatives)
            if alternatives
            else (
                jnp.zeros((n, 0), jnp.float32),
                jnp.zeros((n, 0), jnp.int32),
            )
        )
        parts.append(
            [whole(x).reshape(b, stop - start, *x.shape[1:]) for x in (own_n, ids_na, top_na)]
        )
    return tuple(jnp.concatenate(column, 1) for column in zip(*parts, strict=True))  # type: ignore
