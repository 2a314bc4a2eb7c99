"""Optimizers and learning-rate schedules, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax import param_tree
from gptjax.config import Config
from gptjax.training import param_groups
from gptjax.training.param_groups import LrMultipliers


def learning_rate(cfg: Config) -> optax.Schedule:
    """The schedule by optimizer step. Lengths are configured in tokens.

    Linear warm-up from zero, then cosine or linear to final_lr_ratio of the peak, or constant, or
    wsd (constant, and linear over the last decay_tokens; Hu et al. 2024).
    """
    o, batch = cfg.optim, cfg.train.batch_tokens
    warmup = round(o.warmup_tokens / batch)
    rest = max(1, cfg.train.steps - warmup)
    last = o.lr * o.final_lr_ratio
    if o.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(o.lr, rest, alpha=o.final_lr_ratio)
    elif o.lr_schedule == "linear":
        after = optax.linear_schedule(o.lr, last, rest)
    elif o.lr_schedule == "wsd":
        decay = max(1, round(o.decay_tokens / batch))
        after = optax.linear_schedule(o.lr, last, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(o.lr)
    # Step 0 already learns: the ramp reaches 1/warmup there and the peak at its end.
    ramp = lambda step: o.lr * (step + 1) / warmup
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a parameter is a weight matrix or an embedding table: what weight decay is for.

    Parameters of the stack have a leading axis of layers, which does not count.
    """
    return leaf.ndim - _in_stack(path) >= 2 and not path[-1].key.endswith("bias")


def make_optimizer(
    cfg: Config, lr_multipliers: LrMultipliers | None = None
) -> optax.GradientTransformation:
    """Clipping, the update rule, decay on matrices only, the schedule, and with `lr_multipliers` those.

    The state is a dict by these names, which so are the paths in a checkpoint.
    """
    o, rate = cfg.optim, learning_rate(cfg)
    clip = optax.clip_by_global_norm(o.clip) if o.clip else optax.identity()
    matrices = lambda params: jax.tree_util.tree_map_with_path(is_matrix, params)
    if o.name == "adamw":
        direction = optax.scale_by_adam(o.b1, o.b2, o.eps)
    elif o.name == "lion":
        direction = optax.scale_by_lion(o.b1, o.b2)
    elif o.name == "adafactor":
        direction = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    else:
        direction = _muon(cfg)
    return optax.named_chain(
        ("clip", clip),
        (o.name, direction),
        ("decay", optax.add_decayed_weights(o.weight_decay, mask=matrices)),
        ("rate", optax.scale_by_learning_rate(rate)),
        *(
            []
            if lr_multipliers is None
            else [("lr_multipliers", scale_by_multipliers(lr_multipliers))]
        ),
    )


def scale_by_multipliers(lr_multipliers: LrMultipliers) -> optax.GradientTransformation:
    """Multiplies updates, decay and all, as if each parameter or layer had a rate of its own."""
    return optax.stateless(lambda updates, _: param_groups.scale_updates(updates, lr_multipliers))


def _in_stack(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is one of the blocks', with a leading axis of layers."""
    return any(getattr(key, "key", None) == "blocks" for key in path)


def _muon(cfg: Config) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, Adam for all else.

    Updates are scaled to the size of Adam's (Liu et al. 2025), so one learning rate serves both.
    """
    o = cfg.optim

    def kind(path: tuple[Any, ...], leaf: Any) -> str:
        matrix = _in_stack(path) and is_matrix(path, leaf) and path[-1].key != "router"
        return "muon" if matrix else "adam"

    def dimensions(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return optax.contrib.MuonDimensionNumbers(*param_tree.sides(name, leaf.ndim))

    with_path = jax.tree_util.tree_map_with_path
    muon = optax.contrib.muon(
        -1.0,  # a direction: the caller's rate has the sign
        beta=o.b1,
        muon_weight_dimension_numbers=lambda params: with_path(dimensions, params),
        consistent_rms=0.2,
    )
    return optax.partition(
        {"muon": _auto_sharded(muon), "adam": optax.scale_by_adam(o.b1, o.b2, o.eps)},
        lambda params: with_path(kind, params),
    )


def _auto_sharded(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, its update partitioned by XLA: products of a matrix with itself meet one mesh axis
    twice, which explicit sharding refuses. Results lie as the gradients and the state do.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        out = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (grads, state))
        return jax.sharding.auto_axes(transform.update, out_sharding=out)(grads, state, params)

    return optax.GradientTransformation(transform.init, update)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves together, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
