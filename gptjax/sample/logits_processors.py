"""Logits processors: pure functions on the logits of a batch, with a setting for each slot.

`process_logits` applies them in this order, each to the result of those before it: bias and bans,
repetition penalty, presence and frequency penalties, temperature, top-k, top-p, min-p.

Top-k and top-p find their threshold by bisection over the bits of a float instead of sorting: 32
passes over the vocabulary, which for 50,000 tokens is several times faster, and needs only sums, so
that logits may be sharded over the vocabulary. Ties with the last kept token are kept.

Shapes: B slots, V vocabulary, n biased tokens.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.model.layers import NEVER
from gptjax.parallel import sharding

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)
"""Arrays on the device, or on the host."""


class ProcessorParams(NamedTuple, Generic[ArrayT]):
    """The processors' settings for each slot, as arrays; see `SamplingParams`."""

    bias_ids_Bn: ArrayT  # an id past the vocabulary biases nothing
    bias_Bn: ArrayT
    repetition_B: ArrayT
    presence_B: ArrayT
    frequency_B: ArrayT
    temperature_B: ArrayT
    top_k_B: ArrayT
    top_p_B: ArrayT
    min_p_B: ArrayT


def add_bias(logits_BV: jax.Array, ids_Bn: jax.Array, bias_Bn: jax.Array) -> jax.Array:
    """Logits with a bias added to those of some tokens; a bias of NEVER bans a token."""
    add = lambda logits_V, ids_n, bias_n: logits_V.at[ids_n].add(bias_n, mode="drop")
    return jax.vmap(add)(logits_BV, ids_Bn, bias_Bn)


def penalise_repetition(
    logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array
) -> jax.Array:
    """Logits with those of tokens in prompt or continuation divided by the penalty if positive, and
    multiplied by it if negative (Keskar et al. 2019).
    """
    penalty_B1 = penalty_B[:, None]
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, penalised, logits_BV)


def penalise_presence(
    logits_BV: jax.Array, counts_BV: jax.Array, presence_B: jax.Array, frequency_B: jax.Array
) -> jax.Array:
    """Logits minus the presence penalty for tokens in the continuation, and minus the frequency
    penalty for each time that they are in it.
    """
    return logits_BV - (counts_BV > 0) * presence_B[:, None] - counts_BV * frequency_B[:, None]


def scale_temperature(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Logits divided by the temperature."""
    return logits_BV / temperature_B[:, None]


def keep_top_k(logits_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """Top-k: all but the k largest logits set to NEVER; ties with the k-th stay; 0 keeps all."""
    k_B = jnp.where(k_B > 0, k_B, logits_BV.shape[-1])
    return _truncate(logits_BV, lambda kept_BV: kept_BV.sum(-1) >= k_B)


def keep_top_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Top-p: all but the nucleus set to NEVER (Holtzman et al. 2020), which is the smallest set of
    likeliest tokens whose probabilities sum to p.
    """
    weight_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    # p=1 keeps every token, however the sums are rounded.
    needed_B = jnp.where(p_B >= 1, jnp.inf, p_B * weight_BV.sum(-1))
    return _truncate(
        logits_BV, lambda kept_BV: jnp.where(kept_BV, weight_BV, 0).sum(-1) >= needed_B
    )


def keep_min_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Min-p: tokens less than p times as likely as the likeliest set to NEVER (Nguyen et al. 2024);
    0 keeps all.
    """
    least_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(p_B)[:, None]
    return jnp.where(logits_BV >= least_B1, logits_BV, NEVER)


def _truncate(logits_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Logits below a threshold set to NEVER: the highest threshold that keeps `enough` tokens.

    `enough` takes the mask [B, V] of the tokens that would be kept; if no threshold satisfies it,
    all are kept.
    """
    # Floats as integers of the same order. The search sets the threshold's bits, highest first: on
    # GPUs four at once, as every turn of a loop takes the time to start its kernels.
    bits_BV = lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    bits = 4 if sharding.platform() == "gpu" else 1

    def refine(i: jax.Array, threshold_B: jax.Array) -> jax.Array:
        shift = jnp.uint32(32 - bits) - bits * i.astype(jnp.uint32)
        higher_B = (threshold_B | (jnp.uint32(digit) << shift) for digit in range(1, 1 << bits))
        digit_B = sum(enough(order_BV >= one_B[:, None]).astype(jnp.uint32) for one_B in higher_B)
        return threshold_B | (digit_B << shift)

    threshold_B = lax.fori_loop(0, 32 // bits, refine, jnp.zeros_like(order_BV.max(-1)))
    return jnp.where(order_BV >= threshold_B[:, None], logits_BV, NEVER)


def process_logits(
    logits_BV: jax.Array,
    params: ProcessorParams[jax.Array],
    seen_BV: jax.Array | None,
    counts_BV: jax.Array | None,
    *,
    truncation: bool,
) -> jax.Array:
    """The logits to draw from, after all processors; at temperature 0 the largest is to be taken.

    `seen_BV` and `counts_BV`, see `decoding.Slots`, may be None if no slot has penalties;
    `truncation` may be false if no slot has top-k, top-p or min-p.
    """
    if params.bias_ids_Bn.shape[1]:
        logits_BV = add_bias(logits_BV, params.bias_ids_Bn, params.bias_Bn)
    if seen_BV is not None and counts_BV is not None:
        logits_BV = penalise_repetition(logits_BV, seen_BV, params.repetition_B)
        logits_BV = penalise_presence(logits_BV, counts_BV, params.presence_B, params.frequency_B)
    temperature_B = jnp.where(params.temperature_B > 0, params.temperature_B, 1)
    logits_BV = scale_temperature(logits_BV, temperature_B)
    if truncation:
        logits_BV = keep_top_k(logits_BV, params.top_k_B)
        logits_BV = keep_top_p(logits_BV, params.top_p_B)
        logits_BV = keep_min_p(logits_BV, params.min_p_B)
    return logits_BV
