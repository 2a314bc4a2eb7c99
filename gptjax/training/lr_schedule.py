"""The learning rate of each step, by the tokens seen; shapes of its curves from optax."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from gptjax.config import Config, StageConfig, phases
from gptjax.config.phases import Phase

Number = jax.Array | float


@dataclass(frozen=True)
class _Curve:
    """The rate of a stage: `at` a step, and where it ends, which the next stage may go on from."""

    at: Callable[[jax.Array], Number]
    end: Number


def learning_rate(cfg: Config) -> optax.Schedule:
    """The schedule by optimizer step, of a run with its stages.

    Lengths are configured in tokens, and a batch that has not grown yet counts as the part of
    train.batch_tokens that it is. A stage has either its part of the whole run's curve (`optim`) or
    a curve of its own.
    """
    found, size = phases.phases(cfg), cfg.train.batch_tokens
    firsts = {phase.stage: phase.first for phase in reversed(found)}
    alike = all(phase.batch_tokens == size for phase in found)
    whole = _of_run(cfg, alike)
    of_step = lambda step: whole(*((step, step + 1) if alike else _span(found, 0, size, step)))
    curves: list[_Curve] = []
    begin = 0
    for stage, end in phases.ends(cfg).items():
        one = cfg.stages.get(stage)
        if one is None or one.lr_schedule == "optim":
            curves.append(_Curve(of_step, whole(jnp.float32(end / size), jnp.float32(end / size))))
        else:
            own = [phase for phase in found if phase.stage == stage]
            start = curves[-1].end if curves else cfg.optim.lr
            curves.append(_of_stage(cfg, one, own, (begin, end), start))
        begin = end

    def schedule(step: jax.Array) -> Number:
        rate = curves[0].at(step)
        for stage, curve in zip([*cfg.stages][1:], curves[1:], strict=True):
            rate = jnp.where(step >= firsts[stage], curve.at(step), rate)
        return rate

    return schedule


def _of_run(cfg: Config, alike: bool) -> Callable[[Number, Number], Number]:
    """The rate of a step by the tokens before it and after it, in units of train.batch_tokens: of
    batches that are all `alike`, by the number of steps. Linear warm-up from zero, then one of
    * cosine, linear: over decay_tokens, or all that is left, to final_lr_ratio of the peak, and
      constant from there (Brown et al. 2020, appendix B);
    * wsd: constant, and a decay over the last decay_tokens (Hu et al. 2024), linear or by
      1 - sqrt of its progress (Hägele et al. 2024);
    * inverse_sqrt: lr sqrt(warm-up / step) (Vaswani et al. 2017);
    * constant.
    """
    o, batch = cfg.optim, cfg.train.batch_tokens
    units = (lambda tokens: round(tokens / batch)) if alike else lambda tokens: tokens / batch
    warmup = units(o.warmup_tokens)
    rest = max(1, -(-cfg.train.tokens // batch) - warmup)
    decay = max(1, units(o.decay_tokens)) if o.decay_tokens else rest
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
        from_step = max(1, warmup) if alike else warmup
        after = lambda step: o.lr * jnp.sqrt(from_step / (from_step + step))
    else:
        after = optax.constant_schedule(o.lr)
    if not warmup:
        return lambda begun, done: after(begun)
    # Step 0 already learns: the ramp reaches 1/warmup there and the peak at its end.
    ramp = lambda done: o.lr * jnp.minimum(done, warmup) / warmup
    return lambda begun, done: jnp.where(begun < warmup, ramp(done), after(begun - warmup))


def _of_stage(
    cfg: Config,
    one: StageConfig,
    own: Sequence[Phase],
    span: tuple[int, int],
    before: Number,
) -> _Curve:
    """The curve of a stage's own phases, between the tokens at which it begins and ends; it goes on
    from the rate at which the stage before ends."""
    (begin, end), peak = span, cfg.optim.lr
    start = before if one.lr_ratio is None else peak * one.lr_ratio
    last = peak * one.final_lr_ratio
    if one.lr_schedule == "constant":
        return _Curve(lambda step: jnp.float32(start), start)

    def at(step: jax.Array) -> Number:
        progress = jnp.clip(_span(own, begin, end - begin, step)[0], 0.0, 1.0)
        left = {
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "1-sqrt": 1 - jnp.sqrt(progress),
        }[one.lr_schedule]
        return last + (start - last) * left

    return _Curve(at, last)


def _span(
    found: Sequence[Phase], begin: int, unit: int, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens from `begin` to before a step of these phases and to after it, in units."""
    firsts = jnp.array([phase.first for phase in found])
    tokens = jnp.array([(phase.tokens - begin) / unit for phase in found], jnp.float32)
    grown = jnp.array([phase.batch_tokens / unit for phase in found], jnp.float32)
    at = jnp.maximum(jnp.searchsorted(firsts, step, side="right") - 1, 0)
    begun = tokens[at] + (step - firsts[at]) * grown[at]
    return begun, begun + grown[at]
