"""Trainable and frozen parameters, and learning-rate multipliers by parameter path.

Arrays of the blocks have a leading axis of layers, so a multiplier may be a number for each.
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
"""By path what a parameter's update is multiplied with: a number, or one for each row of its
leading axis. What has only zeros is frozen: it has no gradient and no optimizer state."""


def lr_multipliers(params: Tree, cfg: TuneConfig, model: ModelConfig) -> LrMultipliers:
    """How fast each parameter learns, of all the optimizer's rate.

    Layer l of L by layer_decay**(L-1-l), embeddings and learned positions by layer_decay**L, also
    where the embedding is the output layer; everything else by 1.

    Raises ConfigError for a pattern that matches nothing, and where nothing is left to learn.
    """
    leaves, period = leaves_by_path(params), len(model.pattern)
    frozen = matching(leaves, cfg.freeze, "finetune.freeze")

    def one(path: str, leaf: Any) -> float | tuple[float, ...]:
        if path in frozen:
            return 0.0
        parts = path.split("/")
        if "blocks" in parts:
            first = int(parts[parts.index("blocks") + 1].removeprefix("layer_"))
            layers = [row * period + first for row in range(leaf.shape[0])]
            rates = (cfg.layer_decay ** (model.layers - 1 - layer) for layer in layers)
            return tuple(
                0.0 if layer < cfg.freeze_layers else rate
                for layer, rate in zip(layers, rates, strict=True)
            )
        return cfg.layer_decay**model.layers if {"embed", "positions"} & set(parts) else 1.0

    found = {path: one(path, leaf) for path, leaf in leaves.items()}
    if not any(map(_learns, found.values())):
        raise ConfigError(
            [
                f"finetune.freeze={' '.join(cfg.freeze)}, finetune.freeze_layers="
                f"{cfg.freeze_layers}: nothing is left to train; freeze less"
            ]
        )
    return found


def _learns(factor: float | tuple[float, ...]) -> bool:
    return bool(np.any(factor))


def partition(params: Tree, lr_multipliers: LrMultipliers | None) -> tuple[Tree, Tree]:
    """The part of a tree that learns, and the frozen rest. None: all of it learns."""
    if lr_multipliers is None:
        return params, {}
    leaves = leaves_by_path(params)
    chosen = {path: leaf for path, leaf in leaves.items() if _learns(lr_multipliers[path])}
    rest = {path: leaf for path, leaf in leaves.items() if path not in chosen}
    return nested(chosen), nested(rest)


def combine(below: Any, above: Any) -> Any:
    """One tree of two, leaves of the second before those of the first: `partition` undone."""
    if not isinstance(above, dict):
        return above
    return {**below, **{k: combine(below.get(k, {}), value) for k, value in above.items()}}


def where_trainable(new: Tree, old: Tree, lr_multipliers: LrMultipliers | None) -> Tree:
    """The new leaves, but the old rows where the factor is zero: bit for bit, whatever was added.

    Both trees have the leaves that learn.
    """

    def one(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
        factor = by_rows(path, new, lr_multipliers or {})
        return new if factor is None or factor.all() else jnp.where(_beside(new, factor), new, old)

    return jax.tree_util.tree_map_with_path(one, new, old)


def scale_updates(tree: Tree, lr_multipliers: LrMultipliers) -> Tree:
    """Each leaf times its factor, row by row where there is one for each."""

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        factor = by_rows(path, leaf, lr_multipliers)
        if factor is None or (factor == 1).all():
            return leaf
        return leaf * _beside(leaf, factor)

    return jax.tree_util.tree_map_with_path(one, tree)


def by_rows(path: Any, leaf: jax.Array, lr_multipliers: LrMultipliers) -> np.ndarray | None:
    """The factor of a leaf, float32 [] or [rows], by its key path; None where it has none."""
    factor = lr_multipliers.get(jax.tree_util.keystr(path, simple=True, separator="/"))
    return None if factor is None else np.float32(factor)


def _beside(leaf: jax.Array, factor: np.ndarray) -> jax.Array:
    """The factor in the leaf's number of dimensions, its rows laid out as the leaf's."""
    if factor.ndim == 0:
        return jnp.asarray(factor)
    rows = jnp.asarray(factor).reshape(-1, *[1] * (leaf.ndim - 1))
    axes = jax.typeof(leaf).sharding.spec[:1]
    return jax.sharding.reshard(rows, jax.P(*axes, *[None] * (leaf.ndim - 1)))


def count_trainable(params: Tree, lr_multipliers: LrMultipliers | None) -> tuple[int, int]:
    """Numbers of parameters that learn, and of all. Of a stack, only its layers that learn."""
    leaves = leaves_by_path(params)
    share = lambda path: (
        1.0 if lr_multipliers is None else float(np.mean(np.not_equal(lr_multipliers[path], 0)))
    )
    learning = sum(round(leaf.size * share(path)) for path, leaf in leaves.items())
    return learning, sum(leaf.size for leaf in leaves.values())
