"""The training tree of a fine-tuned run, and which of it is trainable.

The training tree is the model's parameters, with the task's head; with adapters it is a tree of the
base and of the adapters (lora.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.config import Config
from gptjax.finetune import lora
from gptjax.finetune.base_model import BaseModel, tokenizer_of
from gptjax.finetune.tokenize import SpecialTokens
from gptjax.model import heads
from gptjax.model.decoder import Params
from gptjax.parallel import sharding
from gptjax.param_tree import Tree
from gptjax.training import param_groups
from gptjax.training.param_groups import LrMultipliers
from gptjax.training.step import init_and_dropout_keys


def starting_tree(cfg: Config, base: BaseModel, say: Callable[[str], None]) -> Tree:
    """The training tree to start from: the base's parameters, and fresh ones for the task."""
    params, step = base.read_params(say)
    say(f"begins from {base.path}" + (f" after its step {step}" if step is not None else ""))
    params = {name: leaves for name, leaves in params.items() if name != heads.NAME}
    if cfg.finetune.outputs:
        special = SpecialTokens.of(tokenizer_of(base))
        params = jax.jit(lambda p: with_task(cfg, p, special), donate_argnums=0)(params)
    return training_tree(cfg, params)


def with_task(cfg: Config, base: Params, special: SpecialTokens) -> Params:
    """A base's parameters with random rows for the special tokens, and a fresh task head."""
    fresh = heads.init_params(cfg, init_and_dropout_keys(cfg)[0])
    tables = {
        name: _with_special(base[name], fresh[name], special)
        for name in ("embed", "head")
        if name in base
    }
    return base | tables | {heads.NAME: fresh[heads.NAME]}


def _with_special(old_VD: jax.Array, fresh_VD: jax.Array, special: SpecialTokens) -> jax.Array:
    """A table with the old rows, lengthened where need be, and fresh ones for special tokens."""
    axes = jax.typeof(fresh_VD).sharding.spec
    more = len(fresh_VD) - len(old_VD)
    if more:
        whole = jax.sharding.reshard(old_VD, jax.P(None, axes[1]))
        zeros = jnp.zeros((more, old_VD.shape[1]), old_VD.dtype, out_sharding=jax.P(None, axes[1]))
        old_VD = jax.sharding.reshard(jnp.concatenate([whole, zeros]), axes)
    ids_V = jnp.arange(len(fresh_VD), out_sharding=jax.P(axes[0]))
    special_V = (ids_V >= special.start) & (ids_V <= special.extract)
    return jnp.where(special_V[:, None], fresh_VD, old_VD)


def training_tree(cfg: Config, params: Params) -> Tree:
    """The training tree of the model's parameters, with fresh adapters where it has any."""
    if not cfg.finetune.lora.rank:
        return params
    return lora.with_adapters(
        params, cfg.finetune.lora, jax.random.fold_in(init_and_dropout_keys(cfg)[0], 2)
    )


def model_params(cfg: Config, tree: Tree) -> Params:
    """The model's parameters of a training tree: its adapters merged."""
    return lora.merge(tree, cfg.finetune.lora) if cfg.finetune.lora.rank else tree


def lr_multipliers(cfg: Config) -> LrMultipliers | None:
    """The learning-rate multipliers of the training tree; None: all of it is trained alike.

    Raises ConfigError as `param_groups.lr_multipliers` and `lora.targets` do.
    """
    tune = cfg.finetune
    if not (tune.lora.rank or tune.freeze or tune.freeze_layers or tune.layer_decay < 1):
        return None
    multipliers = lora.lr_multipliers if tune.lora.rank else param_groups.lr_multipliers
    return multipliers(abstract_tree(cfg), tune, cfg.model)


def abstract_tree(cfg: Config) -> Tree:
    """Shapes and layouts of the training tree on the ambient mesh."""
    key = jax.random.key(0)
    return sharding.abstract(lambda: training_tree(cfg, heads.init_params(cfg, key)))
