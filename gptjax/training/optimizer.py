"""Optimizers, each a registered class; from optax."""

from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import optax

from gptjax import param_tree
from gptjax.config import Config
from gptjax.config.registry import OPTIMIZERS
from gptjax.errors import ConfigError
from gptjax.training import param_groups
from gptjax.training.lr_schedule import learning_rate
from gptjax.training.param_groups import LrMultipliers


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a parameter is a weight matrix or an embedding table, which weight decay applies to.

    The leading axis of layers of the stacked blocks does not count as a dimension.
    """
    return leaf.ndim - _in_stack(path) >= 2 and not path[-1].key.endswith("bias")


class UpdateRule(Protocol):
    """An optimizer: the direction of an update, before weight decay and the learning rate.

    Registered by its name in `optim.name` (config/registry.py), from outside the package too:

        @OPTIMIZERS.register("sgd")
        class Sgd(UpdateRule):
            moments = 0

            def build(self, cfg): return optax.identity()

    moments: float32 values that its state has for each parameter, for the planner. layerwise: each
    layer's state depends on that layer alone, so that interleaved pipeline schedules
    (compute.rounds above 1) may order the layers in their own way.
    """

    moments: ClassVar[int]
    layerwise: ClassVar[bool] = True

    def build(self, cfg: Config) -> optax.GradientTransformation:
        """The transformation of gradients to directions, which the learning rate then scales."""
        ...


@OPTIMIZERS.register("adamw")
class AdamW(UpdateRule):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    moments = 2

    def build(self, cfg: Config) -> optax.GradientTransformation:
        return _adam(cfg)


@OPTIMIZERS.register("lion")
class Lion(UpdateRule):
    """The sign of a momentum (Chen et al. 2023)."""

    moments = 1

    def build(self, cfg: Config) -> optax.GradientTransformation:
        return optax.scale_by_lion(cfg.optim.b1, cfg.optim.b2)


@OPTIMIZERS.register("adafactor")
class Adafactor(UpdateRule):
    """Factored second moments, a row and a column of a matrix (Shazeer and Stern 2018)."""

    moments = 0
    layerwise = False  # small parameters are factored over their axis of layers

    def build(self, cfg: Config) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


@OPTIMIZERS.register("muon")
class Muon(UpdateRule):
    """Orthogonal updates (Jordan et al. 2024) for the matrices of the blocks, Adam for all else.

    Updates are scaled to the size of Adam's (Liu et al. 2025), so one learning rate serves both.
    """

    moments = 2

    def build(self, cfg: Config) -> optax.GradientTransformation:
        with_path = jax.tree_util.tree_map_with_path
        muon = optax.contrib.muon(
            -1.0,  # a direction: the caller's rate has the sign
            beta=cfg.optim.b1,
            muon_weight_dimension_numbers=lambda params: with_path(_muon_dimensions, params),
            consistent_rms=0.2,
        )
        return optax.partition(
            {"muon": _auto_sharded(muon), "adam": _adam(cfg)},
            lambda params: with_path(_muon_or_adam, params),
        )


def make_optimizer(
    cfg: Config, lr_multipliers: LrMultipliers | None = None
) -> optax.GradientTransformation:
    """Clipping, the update rule, decay of matrices only, the schedule, and any `lr_multipliers`.

    The state is a dict by these names, which are so the paths in a checkpoint. Raises ConfigError
    where the update rule does not go with the pipeline's schedule.
    """
    o = cfg.optim
    rule: UpdateRule = OPTIMIZERS[o.name]()
    if cfg.compute.rounds > 1 and not rule.layerwise:
        raise ConfigError(
            [
                f"compute.rounds={cfg.compute.rounds}: not with optim.name={o.name}, whose state "
                "is not by layer; set it to 1"
            ]
        )
    transforms = [
        ("clip", optax.clip_by_global_norm(o.clip) if o.clip else optax.identity()),
        (o.name, rule.build(cfg)),
        ("decay", optax.add_decayed_weights(o.weight_decay, mask=_matrices)),
        ("rate", optax.scale_by_learning_rate(learning_rate(cfg))),
    ]
    if lr_multipliers is not None:
        transforms.append(("lr_multipliers", scale_by_multipliers(lr_multipliers)))
    return optax.named_chain(*transforms)


def scale_by_multipliers(lr_multipliers: LrMultipliers) -> optax.GradientTransformation:
    """Multiplies updates, decay included: a learning rate for each parameter or layer."""
    return optax.stateless(lambda updates, _: param_groups.scale_updates(updates, lr_multipliers))


def _in_stack(path: tuple[Any, ...]) -> bool:
    """Whether a parameter belongs to the stacked blocks, with a leading axis of layers."""
    return any(getattr(key, "key", None) == "blocks" for key in path)


def _matrices(params: Any) -> Any:
    """Which parameters are matrices."""
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _adam(cfg: Config) -> optax.GradientTransformation:
    return optax.scale_by_adam(cfg.optim.b1, cfg.optim.b2, cfg.optim.eps)


def _muon_or_adam(path: tuple[Any, ...], leaf: Any) -> str:
    """A parameter's rule: muon for the matrices of the blocks but the router, adam for others."""
    matrix = _in_stack(path) and is_matrix(path, leaf) and path[-1].key != "router"
    return "muon" if matrix else "adam"


def _muon_dimensions(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers:
    """The dimensions that a parameter reduces over, and those that it writes."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return optax.contrib.MuonDimensionNumbers(*param_tree.sides(name, leaf.ndim))


def _auto_sharded(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation with its update partitioned by XLA, sharded as gradients and state are.

    A product of a matrix with its transpose meets one mesh axis twice, which explicit sharding
    refuses.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        out = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (grads, state))
        return jax.sharding.auto_axes(transform.update, out_sharding=out)(grads, state, params)

    return optax.GradientTransformation(transform.init, update)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves together, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
