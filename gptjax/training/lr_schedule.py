"""The learning rate of each step, by the tokens seen; shapes of its curves from optax."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from gptjax.config import Config, StageConfig, phases
from gptjax.config.phases import Phase

Rate = Callable[[jax.Array, jax.Array], jax.Array]
"""The rate of a step, by the tokens before it and after it, in units of train.batch_tokens: of a
run whose batches all have that size, by the number of steps."""


def learning_rate(cfg: Config) -> optax.Schedule:
    """The schedule by optimizer step, of a run with its stages.

    Lengths are configured in tokens, and a batch that has not grown yet counts as the part of
    train.batch_tokens that it is. A stage has either its part of the whole run's curve (`optim`) or
    a curve of its own.
    """
    found, whole = phases.phases(cfg), _of_run(cfg)
    firsts = {phase.stage: phase.first for phase in reversed(found)}
    rates: list[Rate] = []
    begin = 0
    for stage, end in phases.ends(cfg).items():
        one = cfg.stages.get(stage)
        own = one is not None and one.lr_schedule != "optim"
        before = rates[-1] if rates else None
        rates.append(_of_stage(cfg, one, begin, end, before) if own and one else whole)
        begin = end

    def schedule(step: jax.Array) -> jax.Array:
        before, after = _batches_at(cfg, found, step)
        rate = rates[0](before, after)
        for stage, of_stage in zip([*cfg.stages][1:], rates[1:], strict=True):
            rate = jnp.where(step >= firsts[stage], of_stage(before, after), rate)
        return rate

    return schedule


def _of_run(cfg: Config) -> Rate:
    """Linear warm-up from zero, then one of
    * cosine, linear: over decay_tokens, or all that is left, to final_lr_ratio of the peak, and
      constant from there (Brown et al. 2020, appendix B);
    * wsd: constant, and a decay over the last decay_tokens (Hu et al. 2024), linear or by
      1 - sqrt of its progress (Hägele et al. 2024);
    * inverse_sqrt: lr sqrt(warm-up / step) (Vaswani et al. 2017);
    * constant.
    """
    o, batch = cfg.optim, cfg.train.batch_tokens
    warmup = round(o.warmup_tokens / batch)
    rest = max(1, -(-cfg.train.tokens // batch) - warmup)
    decay = max(1, round(o.decay_tokens / batch)) if o.decay_tokens else rest
    last = o.lr * o.final_lr_ratio
    after: optax.Schedule
    if o.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(o.lr, decay, alpha=o.final_lr_ratio)
    elif o.lr_schedule == "linear":
        after = optax.linear_schedule(o.lr, last, decay)
    elif o.lr_schedule == "wsd" and o.decay_shape == "linear":
        after = optax.linear_schedule(o.lr, last, decay, transition_begin=rest - decay)
    elif o.lr_schedule == "wsd":
        progress = optax.linear_schedule(0.0, 1.0, decay, transition_begin=rest - decay)
        after = lambda step: o.lr + (last - o.lr) * jnp.sqrt(progress(step))
    elif o.lr_schedule == "inverse_sqrt":
        from_step = max(1, warmup)
        after = lambda step: o.lr * jnp.sqrt(from_step / (from_step + step))
    else:
        after = optax.constant_schedule(o.lr)
    if not warmup:
        return lambda begun, done: after(begun)
    # Step 0 already learns: the ramp reaches 1/warmup there and the peak at its end.
    ramp = lambda done: o.lr * done / warmup
    return lambda begun, done: jnp.where(begun < warmup, ramp(done), after(begun - warmup))


def _of_stage(cfg: Config, one: StageConfig, begin: int, end: int, before: Rate | None) -> Rate:
    """The curve of a stage's own, between the tokens at which it begins and ends; it goes on from
    the rate at which the stage before ends."""
    size, peak = cfg.train.batch_tokens, cfg.optim.lr
    first, length = begin / size, (end - begin) / size
    last = peak * one.final_lr_ratio

    def rate(begun: jax.Array, done: jax.Array) -> jax.Array:
        if one.lr_ratio is not None:
            start = jnp.float32(peak * one.lr_ratio)
        elif before is None:
            start = jnp.float32(peak)
        else:
            start = before(jnp.float32(first), jnp.float32(first))
        progress = jnp.clip((begun - first) / length, 0.0, 1.0)
        left = {
            "constant": jnp.ones_like(progress),
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "1-sqrt": 1 - jnp.sqrt(progress),
        }[one.lr_schedule]
        return start if one.lr_schedule == "constant" else last + (start - last) * left

    return rate


def _batches_at(
    cfg: Config, found: Sequence[Phase], step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens before and after a step, in units of train.batch_tokens."""
    size = cfg.train.batch_tokens
    if all(phase.batch_tokens == size for phase in found):
        return step, step + 1
    firsts = jnp.array([phase.first for phase in found])
    tokens = jnp.array([phase.tokens / size for phase in found], jnp.float32)
    grown = jnp.array([phase.batch_tokens / size for phase in found], jnp.float32)
    at = jnp.searchsorted(firsts, step, side="right") - 1
    begun = tokens[at] + (step - firsts[at]) * grown[at]
    return begun, begun + grown[at]
