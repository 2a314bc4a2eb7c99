"""LoRA (Hu et al. 2021): a frozen weight W is used as W + scale * a b, of low rank.

Adapters are a tree with the paths of the weights: a target [L, in..., out...] has
{"a": [L, in..., R], "b": [L, R, out...]}, an expert's [L, E, ...]. In training the two trees are
one, {"base": ..., "adapters": ...}, and learning-rate multipliers of 0 freeze the base: the step
takes it as an argument, keeps no optimizer state for it, and returns it as it was.

The product is added to the weight within the step. That costs, for each target, a matrix product of
the weight's size and inner dimension R, and memory for the sum and for its gradient while the step
runs. LoRA here saves the optimizer's state, two thirds of the memory of AdamW's training state, and
the size of checkpoints. There is no dropout on the adapter's input, which is never computed.

Shapes: L layers of a stack, E experts, R rank.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gptjax import param_tree
from gptjax.config import LoraConfig, ModelConfig, TuneConfig
from gptjax.model import heads
from gptjax.model.decoder import Params
from gptjax.model.init import uniform
from gptjax.param_tree import leaves_by_path, nested, sides
from gptjax.training import param_groups
from gptjax.training.param_groups import LrMultipliers

BASE, ADAPTERS = "base", "adapters"


def targets(params: Params, cfg: LoraConfig) -> list[str]:
    """Paths of the weights that get adapters: the matrices of the blocks that cfg.targets matches.

    Raises ConfigError for a pattern that matches no matrix; the message lists all of them.
    """

    def is_matrix(path: str, leaf: Any) -> bool:
        vector = path.endswith(("bias", "scale"))
        return path.startswith("blocks/") and leaf.ndim > 2 and not vector

    candidates = [path for path, leaf in leaves_by_path(params).items() if is_matrix(path, leaf)]
    return sorted(param_tree.matching(candidates, cfg.targets, "finetune.lora.targets"))


def init(params: Params, cfg: LoraConfig, key: jax.Array) -> Params:
    """Fresh adapters, sharded as their weights are: a random, b zero, so the product is zero.

    a is uniform over +-1/sqrt(inputs): Kaiming-uniform with a slope of sqrt(5), as in PEFT. It
    depends on nothing but the key and the path. Raises ConfigError as `targets` does.
    """
    leaves = leaves_by_path(params)

    def adapter(path: str) -> Params:
        shape, axes = leaves[path].shape, jax.typeof(leaves[path]).sharding.spec
        inputs, outputs = sides(path, len(shape))
        stack = tuple(range(inputs[0]))
        pick = lambda values, *dims: tuple(values[d] for group in dims for d in group)
        bound = 1 / math.sqrt(math.prod(pick(shape, inputs)))
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = uniform(
            own, (*pick(shape, stack, inputs), cfg.rank), bound, jax.P(*pick(axes, stack, inputs))
        )
        b = jnp.zeros(
            (*pick(shape, stack), cfg.rank, *pick(shape, outputs)),
            out_sharding=jax.P(*pick(axes, stack), None, *pick(axes, outputs)),
        )
        return {"a": a, "b": b}

    return nested({path: adapter(path) for path in targets(params, cfg)})


def merge_adapters(params: Params, adapters: Params, cfg: LoraConfig) -> Params:
    """Plain parameters: each target plus its adapter's scaled product, computed in float32."""
    leaves, matrices = leaves_by_path(params), leaves_by_path(adapters)
    changed = {}
    for path in (name.removesuffix("/a") for name in matrices if name.endswith("/a")):
        w, a, b = leaves[path], matrices[f"{path}/a"], matrices[f"{path}/b"]
        stack = tuple(range(sides(path, w.ndim)[0][0]))
        product = lax.dot_general(
            a,
            b,
            (((a.ndim - 1,), (len(stack),)), (stack, stack)),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
            out_sharding=jax.typeof(w).sharding.spec,
        )
        changed[path] = w + cfg.scale * product
    return param_groups.combine(params, nested(changed))


# --- training ----------------------------------------------------------------------------------


def with_adapters(params: Params, cfg: LoraConfig, key: jax.Array) -> Params:
    """The tree that training takes: the given base and fresh adapters."""
    return {BASE: params, ADAPTERS: jax.jit(init, static_argnums=1)(params, cfg, key)}


def merge(params: Params, cfg: LoraConfig) -> Params:
    """Plain parameters for evaluation, sampling and export, from the tree that training takes.

    Outside of jit, parameters without adapters are the base's own arrays.
    """
    leaves = leaves_by_path(params[BASE])
    paths = {path.rpartition("/")[0] for path in leaves_by_path(params[ADAPTERS])}
    adapted = nested({path: leaves[path] for path in paths})
    merged = jax.jit(merge_adapters, static_argnums=2)(adapted, params[ADAPTERS], cfg)
    return param_groups.combine(params[BASE], merged)


def lr_multipliers(params: Params, tune: TuneConfig, model: ModelConfig) -> LrMultipliers:
    """Learning-rate multipliers of the tree that training takes: 0 for the base, 1 for its task
    head, and those of `param_groups.lr_multipliers` for the adapters.

    Patterns of tune.freeze match the adapters' own paths, which end in a or b.
    """
    base = {
        f"{BASE}/{path}": float(path.startswith(f"{heads.NAME}/"))
        for path in leaves_by_path(params[BASE])
    }
    own = param_groups.lr_multipliers(params[ADAPTERS], tune, model)
    return base | {f"{ADAPTERS}/{path}": factor for path, factor in own.items()}
