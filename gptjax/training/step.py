"""The train step: a pure function of (state, batch, seed).

A batch is a pure function of (seed, step), so a run continued from a checkpoint is the run that was
never interrupted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gptjax.config import Config
from gptjax.parallel import sharding
from gptjax.param_tree import Tree
from gptjax.runtime import xla_options
from gptjax.training import lr_schedule, optimizer, param_groups
from gptjax.training.param_groups import LrMultipliers

Sums = dict[str, jax.Array]
"""Sums over a batch's targets by name; their number is "targets", the cross-entropy is "loss".

Each other sum, divided by the targets, is a metric; an array gives its largest and smallest
entry."""
LossFn = Callable[[Tree, Any, jax.Array | None], tuple[jax.Array, Sums]]
"""(training tree, batch, dropout key data [B, 2] or None) -> (loss to differentiate, sums).

The loss is a sum over the batch's targets, as the sums are."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    step: int32, number of steps done. params: the training tree. ema: the moving average of its
    trainable part, or None. nonfinite: int32, number of the newest consecutive steps that changed
    no parameter because loss or gradient was not finite.
    """

    step: jax.Array
    params: Tree
    opt_state: optax.OptState
    ema: Tree | None
    nonfinite: jax.Array

    @property
    def averaged(self) -> Tree:
        """The training tree to evaluate and sample: averaged where a moving average is kept."""
        return self.params if self.ema is None else param_groups.combine(self.params, self.ema)


def init_and_dropout_keys(cfg: Config) -> jax.Array:
    """The run's two random keys: of the initial parameters, and of the steps' dropout."""
    return jax.random.split(jax.random.key(cfg.train.seed))


def dropout_keys(cfg: Config, step: jax.Array, batch: int) -> jax.Array:
    """Key data [B, 2], one for each sequence of a step's batch, however the batch is split."""
    key = jax.random.fold_in(init_and_dropout_keys(cfg)[1], step)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    return jax.sharding.reshard(jax.random.key_data(keys_B), sharding.spec("batch", None))


def create_state(
    cfg: Config, init_fn: Callable[[jax.Array], Tree], lr_multipliers: LrMultipliers | None = None
) -> TrainState:
    """The state before the first step, laid out over the ambient mesh. To be jitted."""
    return state_from_params(cfg, init_fn(init_and_dropout_keys(cfg)[0]), lr_multipliers)


def state_from_params(
    cfg: Config, params: Tree, lr_multipliers: LrMultipliers | None = None
) -> TrainState:
    """The state before the first step, from given parameters. To be jitted, with them donated.

    Frozen leaves (see param_groups.py) have no optimizer state and no moving average.
    """
    trainable, _ = param_groups.partition(params, lr_multipliers)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.make_optimizer(cfg, lr_multipliers).init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if cfg.train.ema_decay else None,
        nonfinite=jnp.int32(0),
    )


def state_of(cfg: Config, params: Tree, lr_multipliers: LrMultipliers | None = None) -> TrainState:
    """`state_from_params`, computed on the ambient mesh; consumes the parameters."""
    build = lambda tree: state_from_params(cfg, tree, lr_multipliers)
    return jax.jit(build, donate_argnums=0)(params)


def gradients(
    loss_fn: LossFn, params: Tree, batch: Any, keys_B2: jax.Array | None, accumulation: int
) -> tuple[Tree, Sums]:
    """The gradient of the mean loss over the batch's targets, and the batch's sums.

    With accumulation, in so many sequential steps, sums and gradients of sums are added up over the
    microbatches and divided once, so every target has the same weight whichever microbatch it is
    in.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if accumulation == 1:
        grads, sums = grad_fn(params, batch, keys_B2)
    else:

        def add(total: Any, microbatch: tuple[Any, jax.Array | None]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, *microbatch)), None

        microbatches = jax.tree.map(lambda a: _microbatches(a, accumulation), (batch, keys_B2))
        shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda a: a[0], microbatches))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding.spec), shapes
        )
        (grads, sums), _ = lax.scan(add, zeros, microbatches)
    return jax.tree.map(lambda g: g / sums["targets"], grads), sums


def _microbatches(a_B: jax.Array, count: int) -> jax.Array:
    """[B, ...] as [count, B/count, ...]; a microbatch has every count-th sequence, so that each
    device keeps its own.
    """
    b, *rest = a_B.shape
    axes = sharding.spec("batch", *[None] * (len(rest) + 1))
    return lax.reshape(a_B, (b // count, count, *rest), out_sharding=axes).swapaxes(0, 1)


def train_step(
    cfg: Config,
    loss_fn: LossFn,
    state: TrainState,
    batch: Any,
    lr_multipliers: LrMultipliers | None = None,
    accumulation: int | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step, and its metrics; `lr_multipliers` as the state was created with.

    The batch is split into `accumulation` sequential steps, by default train.accumulation. Where
    loss or gradient is not finite, parameters and optimizer stay as they are. Frozen leaves and
    layers keep their bits and count in no norm.
    """
    rows = len(jax.tree.leaves(batch)[0])
    keys_B2 = dropout_keys(cfg, state.step, rows) if cfg.drops else None
    trainable, frozen = param_groups.partition(state.params, lr_multipliers)
    where_trainable = lambda new, old: param_groups.where_trainable(new, old, lr_multipliers)
    loss_of = lambda tree, *rest: loss_fn(param_groups.combine(frozen, tree), *rest)
    grads, sums = gradients(
        loss_of, trainable, batch, keys_B2, accumulation or cfg.train.accumulation
    )
    grads = where_trainable(grads, jax.tree.map(jnp.zeros_like, grads))
    grad_norm = optimizer.global_norm(grads)
    means = {name: total / sums["targets"] for name, total in sums.items() if name != "targets"}
    finite = jnp.isfinite(means["loss"]) & jnp.isfinite(grad_norm)
    rule = optimizer.make_optimizer(cfg, lr_multipliers)
    params, opt_state = _update(rule, grads, state.opt_state, trainable, finite, lr_multipliers)
    ema = state.ema
    if ema is not None:
        decay = cfg.train.ema_decay
        average = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        ema = _if(finite, where_trainable(average, ema), ema)

    new = TrainState(
        step=state.step + 1,
        params=param_groups.combine(frozen, params),
        opt_state=opt_state,
        ema=ema,
        nonfinite=jnp.where(finite, 0, state.nonfinite + 1),
    )
    metrics = {
        "grad_norm": grad_norm,
        "param_norm": optimizer.global_norm(params),
        "lr": jnp.float32(lr_schedule.learning_rate(cfg)(state.step)),
        "nonfinite": new.nonfinite,
    }
    return new, metrics | _scalars(means)


def _update(
    rule: optax.GradientTransformation,
    grads: Tree,
    opt_state: Any,
    params: Tree,
    finite: jax.Array,
    lr_multipliers: LrMultipliers | None,
) -> tuple[Tree, Any]:
    """The parameters and the optimizer's state after a step; as they were where it is not finite.

    On a CPU the state is computed after the parameters, and the update once more for it: else
    XLA:CPU copies the old state, or keeps the new one in an array of its own until then (before
    JAX 0.12 it copies all the same).
    """
    updates, new_state = rule.update(grads, opt_state, params)
    new = param_groups.where_trainable(optax.apply_updates(params, updates), params, lr_multipliers)
    new = _if(finite, new, params)
    if sharding.platform() == "cpu":
        new, opt_state = lax.optimization_barrier((new, opt_state))
        _, new_state = rule.update(grads, opt_state, params)
    # The schedule advances with the step, whether or not the step changed any parameter.
    return new, _if(finite, new_state, opt_state) | {"rate": new_state["rate"]}


def _if(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _scalars(means: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of means: scalars as they are, of arrays the largest and the smallest entry."""
    metrics: dict[str, jax.Array] = {}
    for name, mean in means.items():
        if mean.ndim:
            metrics |= {f"{name}_max": mean.max(), f"{name}_min": mean.min()}
        else:
            metrics[name] = mean
    return metrics


def compile_step(
    cfg: Config,
    loss_fn: LossFn,
    state: Any,
    batch: Any,
    lr_multipliers: LrMultipliers | None = None,
    accumulation: int | None = None,
) -> Any:
    """The train step compiled for the ambient mesh; `state` and `batch` may be abstract."""
    whole = lambda s, b: train_step(cfg, loss_fn, s, b, lr_multipliers, accumulation)
    step = jax.jit(whole, donate_argnums=0)
    kind = jax.sharding.get_mesh().devices.flat[0].device_kind
    options = xla_options.for_device(kind, deterministic=cfg.compute.deterministic)
    return step.lower(state, batch).compile(compiler_options=options)
