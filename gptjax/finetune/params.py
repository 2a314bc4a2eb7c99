"""What a fine-tuned run begins with, and what of that learns.

The tree that training takes is the model's parameters, the task's layer among them; with adapters
it is that tree and theirs (see lora.py).
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from gptjax.checkpoint import run_dir
from gptjax.config import Config
from gptjax.finetune import lora
from gptjax.finetune.base_model import Base
from gptjax.finetune.tokenize import Special
from gptjax.hf import safetensors
from gptjax.model import heads
from gptjax.model.decoder import Params
from gptjax.parallel import sharding
from gptjax.param_tree import Tree
from gptjax.training import param_groups
from gptjax.training.param_groups import LrMultipliers
from gptjax.training.step import init_and_dropout_keys


def params(cfg: Config, base: Base, say: Callable[[str], None]) -> Params:
    """The base's parameters on the ambient mesh, with what the task adds to them."""
    if base.path.startswith("hf:"):
        given = safetensors.read_params(
            safetensors.open_source(Path(base.path.removeprefix("hf:")))
        )
        say(f"begins from {base.path}")
    else:
        given, step = run_dir.restore_params(base.path, base.cfg, say, base.step)
        say(f"begins from {base.path} after its step {step}")
    given = {name: tree for name, tree in given.items() if name != heads.NAME}
    if not cfg.finetune.outputs:
        return given
    special = Special.of(base.tokenizer)
    return jax.jit(lambda p: extended(cfg, p, special), donate_argnums=0)(given)


def extended(cfg: Config, base: Params, special: Special) -> Params:
    """A base's parameters with random rows for the special tokens, and a fresh task's layer."""
    fresh = heads.init_params(cfg, init_and_dropout_keys(cfg)[0])
    tables = {
        name: _with_rows(base[name], fresh[name], special)
        for name in ("embed", "head")
        if name in base
    }
    return base | tables | {heads.NAME: fresh[heads.NAME]}


def _with_rows(old_VD: jax.Array, fresh_VD: jax.Array, special: Special) -> jax.Array:
    """A table with rows of its own up to the special tokens, and fresh ones from there on."""
    axes = jax.typeof(fresh_VD).sharding.spec
    more = len(fresh_VD) - len(old_VD)
    if more:
        whole = jax.sharding.reshard(old_VD, jax.P(None, axes[1]))
        zeros = jnp.zeros((more, old_VD.shape[1]), old_VD.dtype, out_sharding=jax.P(None, axes[1]))
        old_VD = jax.sharding.reshard(jnp.concatenate([whole, zeros]), axes)
    ids_V = jnp.arange(len(fresh_VD), out_sharding=jax.P(axes[0]))
    new_V = (ids_V >= special.start) & (ids_V <= special.extract)
    return jnp.where(new_V[:, None], fresh_VD, old_VD)


def tree(cfg: Config, given: Params) -> Tree:
    """The tree that training takes, of the model's parameters."""
    if not cfg.finetune.lora.rank:
        return given
    return lora.with_adapters(
        given, cfg.finetune.lora, jax.random.fold_in(init_and_dropout_keys(cfg)[0], 2)
    )


def plain(cfg: Config, learnt: Tree) -> Params:
    """The model's parameters, of the tree that training takes."""
    return lora.merge(learnt, cfg.finetune.lora) if cfg.finetune.lora.rank else learnt


def lr_multipliers(cfg: Config) -> LrMultipliers | None:
    """What of that tree learns, and how fast; None: all of it at one rate.

    Raises ConfigError as `parameters.lr_multipliers` and `lora.targets` do.
    """
    tune = cfg.finetune
    if not (tune.lora.rank or tune.freeze or tune.freeze_layers or tune.layer_decay < 1):
        return None
    of = lora.lr_multipliers if tune.lora.rank else param_groups.lr_multipliers
    return of(abstract(cfg), tune, cfg.model)


def abstract(cfg: Config) -> Tree:
    """Shapes and layouts of the tree that training takes."""
    key = jax.random.key(0)
    return sharding.abstract(lambda: tree(cfg, heads.init_params(cfg, key)))
