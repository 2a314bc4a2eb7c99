"""Log-probabilities of given tokens, by the forward pass of training.

Shapes: B sequences, T tokens, N = B*T, n tokens of a slice of positions, V vocabulary,
a alternatives.
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
"""Most tokens whose logits are in memory at a time; but at least one of each sequence."""


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def score(
    params: Params,
    tokens_BT: jax.Array,
    vocab_size: jax.Array,
    model: ModelConfig,
    compute: ComputeConfig,
    alternatives: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of all tokens but the first, given those before [B, T-1]; ids and
    log-probabilities of the likeliest tokens in their places [B, T-1, a].

    Probabilities are over all rows of the model, as in decoding and evaluation; ids from
    `vocab_size` on, which are no tokens, are none of the likeliest. The results are replicated.
    """
    b, t = tokens_BT.shape
    x_ND = decoder.apply(params, model, compute, tokens_BT).x_ND
    x_ND = jax.sharding.reshard(x_ND, sharding.spec("tokens", "embed"))
    x_BTD = sequence.gather_natural(sequence.unflatten(x_ND, b, (x_ND.shape[-1],), ("embed",)))
    replicate = lambda x: jax.sharding.reshard(x, jax.P(*[None] * x.ndim))
    slices = []
    width = max(1, SLICE // b)
    for start in range(0, t - 1, width):
        stop = min(start + width, t - 1)
        n = b * (stop - start)
        x_nD = sequence.flatten(x_BTD[:, start:stop], "batch")
        logits_nV = decoder.logits(params, model, x_nD)
        logits_nV = jax.sharding.reshard(logits_nV, sharding.spec("batch", None))
        next_n = sequence.flatten(tokens_BT[:, start + 1 : stop + 1], "batch")
        logprobs_nV = jax.nn.log_softmax(logits_nV, -1)
        at_nV = jnp.arange(logits_nV.shape[-1]) == next_n[:, None]
        own_n = jnp.where(at_nV, logprobs_nV, 0).sum(-1)
        tokens_V = jnp.arange(logits_nV.shape[-1]) < vocab_size
        logprobs_nV = jnp.where(tokens_V, logprobs_nV, NEVER)
        top_na, ids_na = (
            lax.top_k(logprobs_nV, alternatives)
            if alternatives
            else (
                jnp.zeros((n, 0), jnp.float32),
                jnp.zeros((n, 0), jnp.int32),
            )
        )
        slices.append(
            [replicate(x).reshape(b, stop - start, *x.shape[1:]) for x in (own_n, ids_na, top_na)]
        )
    own_BT, ids_BTa, top_BTa = (jnp.concatenate(one, 1) for one in zip(*slices, strict=True))
    return own_BT, ids_BTa, top_BTa
