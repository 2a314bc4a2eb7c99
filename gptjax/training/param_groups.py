"""Trainable and frozen parameters, and learning-rate multipliers by parameter path.

Arrays of the blocks have a leading axis of layers, so a multiplier may be a number for each layer.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig, TuneConfig
from gptjax.errors import ConfigError
from gptjax.param_tree import Tree, leaves_by_path, matching, nested

LrMultipliers = Mapping[str, float | tuple[float, ...]]
"""By path, a factor of the parameter's update: one number, or one for each layer of a stack. A leaf
with zeros only is frozen: it has no gradient and no optimizer state."""


def lr_multipliers(params: Tree, cfg: TuneConfig, model: ModelConfig) -> LrMultipliers:
    """The learning-rate multipliers that a configuration gives to each parameter.

    Layer l of L has layer_decay**(L-1-l), embeddings and learned positions layer_decay**L (also
    where the embedding is the output layer), everything else 1, and what is frozen 0.

    Raises ConfigError for a pattern that matches nothing, and where nothing is left to train.
    """
    leaves, period = leaves_by_path(params), len(model.pattern)
    frozen = matching(leaves, cfg.freeze, "finetune.freeze")

    def multiplier(path: str, leaf: Any) -> float | tuple[float, ...]:
        if path in frozen:
            return 0.0
        parts = path.split("/")
        if "blocks" in parts:
            first = int(parts[parts.index("blocks") + 1].removeprefix("layer_"))
            layers = [i * period + first for i in range(leaf.shape[0])]
            rates = (cfg.layer_decay ** (model.layers - 1 - layer) for layer in layers)
            return tuple(
                0.0 if layer < cfg.freeze_layers else rate
                for layer, rate in zip(layers, rates, strict=True)
            )
        return cfg.layer_decay**model.layers if {"embed", "positions"} & set(parts) else 1.0

    found = {path: multiplier(path, leaf) for path, leaf in leaves.items()}
    if not any(map(_trainable, found.values())):
        raise ConfigError(
            [
                f"finetune.freeze={' '.join(cfg.freeze)}, finetune.freeze_layers="
                f"{cfg.freeze_layers}: nothing is left to train; freeze less"
            ]
        )
    return found


def _trainable(multiplier: float | tuple[float, ...]) -> bool:
    """Whether some of a leaf is trainable."""
    return bool(np.any(multiplier))


def partition(params: Tree, lr_multipliers: LrMultipliers | None) -> tuple[Tree, Tree]:
    """The trainable part of a tree, and the frozen rest. None: all of it is trainable."""
    if lr_multipliers is None:
        return params, {}
    leaves = leaves_by_path(params)
    trainable = {path: leaf for path, leaf in leaves.items() if _trainable(lr_multipliers[path])}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trainable}
    return nested(trainable), nested(frozen)


def combine(below: Any, above: Any) -> Any:
    """One tree of two, leaves of the second taking precedence: the inverse of `partition`."""
    if not isinstance(above, dict):
        return above
    return {**below, **{k: combine(below.get(k, {}), value) for k, value in above.items()}}


def where_trainable(new: Tree, old: Tree, lr_multipliers: LrMultipliers | None) -> Tree:
    """The new leaves, with the old bits of layers whose multiplier is zero.

    Both trees have the trainable leaves.
    """

    def select(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
        factor = _multiplier(path, lr_multipliers or {})
        if factor is None or factor.all():
            return new
        return jnp.where(_broadcastable(factor, new), new, old)

    return jax.tree_util.tree_map_with_path(select, new, old)


def scale_updates(updates: Tree, lr_multipliers: LrMultipliers) -> Tree:
    """Each leaf times its multiplier, layer by layer where there is one for each."""

    def scale(path: Any, leaf: jax.Array) -> jax.Array:
        factor = _multiplier(path, lr_multipliers)
        if factor is None or (factor == 1).all():
            return leaf
        return leaf * _broadcastable(factor, leaf)

    return jax.tree_util.tree_map_with_path(scale, updates)


def _multiplier(path: Any, lr_multipliers: LrMultipliers) -> np.ndarray | None:
    """The multiplier of a leaf, float32 [] or [layers], by its key path; None where it has none."""
    factor = lr_multipliers.get(jax.tree_util.keystr(path, simple=True, separator="/"))
    return None if factor is None else np.asarray(factor, np.float32)


def _broadcastable(factor: np.ndarray, leaf: jax.Array) -> jax.Array:
    """A multiplier with as many dimensions as the leaf, its layers laid out as the leaf's."""
    if factor.ndim == 0:
        return jnp.asarray(factor)
    column = jnp.asarray(factor).reshape(-1, *[1] * (leaf.ndim - 1))
    axes = jax.typeof(leaf).sharding.spec[:1]
    return jax.sharding.reshard(column, jax.P(*axes, *[None] * (leaf.ndim - 1)))


def count_trainable(params: Tree, lr_multipliers: LrMultipliers | None) -> tuple[int, int]:
    """Numbers of trainable parameters and of all. Of a stack, only trainable layers count."""
    leaves = leaves_by_path(params)
    sizes = {path: leaf.size for path, leaf in leaves.items()}
    total = sum(sizes.values())
    if lr_multipliers is None:
        return total, total
    share = {path: float(np.mean(np.not_equal(lr_multipliers[path], 0))) for path in sizes}
    return sum(round(size * share[path]) for path, size in sizes.items()), total
