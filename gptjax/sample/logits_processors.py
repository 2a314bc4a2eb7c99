"""What is done to the logits before a token is drawn: pure functions, each with a value per row.

`adjust` applies them in this order: bias and ban, repetition, presence and frequency, temperature,
top-k, top-p, min-p; each sees what those before it have left.

The cuts are thresholds, found by bisection over the bits of a float, not by sorting: 32 passes over
a row, which on a vocabulary of 50,000 is several times faster, and needs sums only, so that a row
may lie split over devices. Tokens as likely as the last one kept are kept.

Shapes: B rows, V vocabulary, n biased tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.model.layers import NEVER


class Knobs(NamedTuple):
    """The settings of each row, as data on the device; see `settings.SamplingParams`."""

    bias_ids_Bn: jax.Array  # an id past the vocabulary is none
    bias_Bn: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array


def add_bias(logits_BV: jax.Array, ids_Bn: jax.Array, bias_Bn: jax.Array) -> jax.Array:
    """Logits with a bias added to those of some tokens; NEVER bans."""
    add = lambda logits_V, ids_n, bias_n: logits_V.at[ids_n].add(bias_n, mode="drop")
    return jax.vmap(add)(logits_BV, ids_Bn, bias_Bn)


def penalise_repetition(
    logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array
) -> jax.Array:
    """Logits of tokens seen in prompt or continuation, divided by the penalty where above zero and
    multiplied where below (Keskar et al. 2019).
    """
    penalty_B1 = penalty_B[:, None]
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, penalised, logits_BV)


def penalise_presence(
    logits_BV: jax.Array, counts_BV: jax.Array, presence_B: jax.Array, frequency_B: jax.Array
) -> jax.Array:
    """Logits less a penalty for being in the continuation, and one for each time."""
    return logits_BV - (counts_BV > 0) * presence_B[:, None] - counts_BV * frequency_B[:, None]


def scale_temperature(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Logits divided by the temperature."""
    return logits_BV / temperature_B[:, None]


def keep_top_k(logits_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """All but the k largest of each row set to NEVER; ties with the k-th stay; k=0 keeps all."""
    k_B = jnp.where(k_B > 0, k_B, logits_BV.shape[-1])
    return _cut(logits_BV, lambda kept_BV: kept_BV.sum(-1) >= k_B)


def keep_top_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """The nucleus (Holtzman et al. 2020): the fewest most likely tokens whose mass reaches p."""
    weight_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    # p=1 keeps everything, whatever the rounding of the sums.
    needed_B = jnp.where(p_B >= 1, jnp.inf, p_B * weight_BV.sum(-1))
    return _cut(logits_BV, lambda kept_BV: jnp.where(kept_BV, weight_BV, 0).sum(-1) >= needed_B)


def keep_min_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Tokens at least p times as likely as the likeliest (Nguyen et al. 2024); p=0 keeps all."""
    least_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(p_B)[:, None]
    return jnp.where(logits_BV >= least_B1, logits_BV, NEVER)


def _cut(logits_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Sets to NEVER what is below the highest threshold that keeps `enough`, if any does.

    `enough` takes the mask of what would be kept.
    """
    # Floats as integers in the same order; the threshold is found from its highest bit down.
    bits_BV = lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def refine(i: jax.Array, threshold_B: jax.Array) -> jax.Array:
        higher_B = threshold_B | (sign >> i.astype(jnp.uint32))
        return jnp.where(enough(order_BV >= higher_B[:, None]), higher_B, threshold_B)

    threshold_B = lax.fori_loop(0, 32, refine, jnp.zeros_like(order_BV.max(-1)))
    return jnp.where(order_BV >= threshold_B[:, None], logits_BV, NEVER)


def adjust(
    logits_BV: jax.Array,
    knobs: Knobs,
    seen_BV: jax.Array | None,
    counts_BV: jax.Array | None,
    *,
    filtered: bool,
) -> jax.Array:
    """Logits to draw from; at temperature 0 the largest is the choice.

    `seen_BV` and `counts_BV` may be None where no row has penalties, `filtered` false where none
    cuts anything off.
    """
    if knobs.bias_ids_Bn.shape[1]:
        logits_BV = add_bias(logits_BV, knobs.bias_ids_Bn, knobs.bias_Bn)
    if seen_BV is not None and counts_BV is not None:
        logits_BV = penalise_repetition(logits_BV, seen_BV, knobs.repetition_B)
        logits_BV = penalise_presence(logits_BV, counts_BV, knobs.presence_B, knobs.frequency_B)
    temperature_B = jnp.where(knobs.temperature_B > 0, knobs.temperature_B, 1)
    logits_BV = scale_temperature(logits_BV, temperature_B)
    if filtered:
        logits_BV = keep_top_k(logits_BV, knobs.top_k_B)
        logits_BV = keep_top_p(logits_BV, knobs.top_p_B)
        logits_BV = keep_min_p(logits_BV, knobs.min_p_B)
    return logits_BV
