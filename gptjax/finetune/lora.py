"""LoRA (Hu et al. 2021): a weight W stays as it is, and W + scale * a b of low rank is used.

Adapters are a tree of their own, by the same paths, with {"a": [L, in..., R], "b": [L, R, out...]}
in the place of each target [L, in..., out...]; experts' have [L, E, ...]. In training the two trees
travel as one, {"base": ..., "adapters": ...}, of which the factors (see parameters.py) freeze the
base: it is an argument of the step, has no optimizer state, and is passed through.

The product is added within the step. That costs one product of the weights' size for each target, R
deep, and the memory of the sums; gradients of the whole targets exist while the step runs. What
LoRA saves here is the optimizer's state, two thirds of what AdamW holds, and the checkpoints. Since
the sum sees no activations, there is no dropout on the adapter's input.

Shapes: L layers (rows of a stack), E experts, R rank.
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
    """Paths of the weights that get adapters, among the matrices of the blocks.

    Raises ConfigError, with all of those, for a pattern that matches none.
    """

    def matrix(path: str, leaf: Any) -> bool:
        vector = path.endswith(("bias", "scale"))
        return path.startswith("blocks/") and leaf.ndim > 2 and not vector

    candidates = [path for path, leaf in leaves_by_path(params).items() if matrix(path, leaf)]
    return sorted(param_tree.matching(candidates, cfg.targets, "finetune.lora.targets"))


def init(params: Params, cfg: LoraConfig, key: jax.Array) -> Params:
    """Fresh adapters, laid out as their weights are: a uniform, b zero, so that nothing changes.

    a is uniform over +-1/sqrt(inputs) (Kaiming-uniform with a slope of sqrt(5), as PEFT has it). An
    adapter's numbers depend on the key and its path alone. Raises ConfigError as `targets` does.
    """
    leaves = leaves_by_path(params)

    def one(path: str) -> Params:
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

    return nested({path: one(path) for path in targets(params, cfg)})


def merge_adapters(params: Params, adapters: Params, cfg: LoraConfig) -> Params:
    """Plain parameters: each target plus what its adapter adds, in float32."""
    leaves, halves = leaves_by_path(params), leaves_by_path(adapters)
    changed = {}
    for path in (name.removesuffix("/a") for name in halves if name.endswith("/a")):
        w, a, b = leaves[path], halves[f"{path}/a"], halves[f"{path}/b"]
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
    """The tree that training takes: the base as given, and fresh adapters."""
    return {BASE: params, ADAPTERS: jax.jit(init, static_argnums=1)(params, cfg, key)}


def merge(params: Params, cfg: LoraConfig) -> Params:
    """The plain parameters that a tree of both stands for: to evaluate, sample and export. Outside
    of a jit, those without adapters are the base's own arrays."""
    leaves = leaves_by_path(params[BASE])
    paths = {path.rpartition("/")[0] for path in leaves_by_path(params[ADAPTERS])}
    below = nested({path: leaves[path] for path in paths})
    above = jax.jit(merge_adapters, static_argnums=2)(below, params[ADAPTERS], cfg)
    return param_groups.combine(params[BASE], above)


def lr_multipliers(params: Params, tune: TuneConfig, model: ModelConfig) -> LrMultipliers:
    """Of a tree of both: the base is frozen, and `parameters.lr_multipliers` says how adapters learn.

    A task's layer in the base learns as it does without adapters. Patterns of tune.freeze are those
    of the adapters' own paths, ending in a or b.
    """
    base = {
        f"{BASE}/{path}": float(path.startswith(f"{heads.NAME}/"))
        for path in leaves_by_path(params[BASE])
    }
    own = param_groups.lr_multipliers(params[ADAPTERS], tune, model)
    return base | {f"{ADAPTERS}/{path}": factor for path, factor in own.items()}
