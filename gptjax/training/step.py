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
from gptjax.model.decoder import Params
from gptjax.parallel import sharding
from gptjax.runtime import compilation_cache
from gptjax.training import optimizer, param_groups
from gptjax.training.param_groups import LrMultipliers

LossFn = Callable[[Params, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]
"""(params, batch, dropout key data [B, 2] or None) -> (sum to differentiate, sums by name).

Both are sums over the batch's targets, whose number is the sum "targets"; "loss" is there too. Each
other sum, divided by the targets, is a metric; an array gives its largest and smallest entry."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    step: int32, steps done. nonfinite: int32, how many in a row just now changed nothing because
    loss or gradient was not finite. ema: a second set of the parameters that learn, or None.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None
    nonfinite: jax.Array

    @property
    def averaged(self) -> Params:
        """The parameters to evaluate and to sample from: the moving average where one is kept."""
        return self.params if self.ema is None else param_groups.combine(self.params, self.ema)


def dropout_keys(cfg: Config, step: jax.Array) -> jax.Array:
    """Key data [B, 2] for the sequences of a step's batch: one for each, however it is split."""
    key = jax.random.fold_in(init_and_dropout_keys(cfg)[1], step)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(cfg.train.batch))
    return jax.sharding.reshard(jax.random.key_data(keys_B), sharding.spec("batch", None))


def create_state(
    cfg: Config, init_fn: Callable[[jax.Array], Params], lr_multipliers: LrMultipliers | None = None
) -> TrainState:
    """The state before the first step, laid out over the ambient mesh. To be jitted."""
    return state_of(cfg, init_fn(init_and_dropout_keys(cfg)[0]), lr_multipliers)


def state_of(
    cfg: Config, params: Params, lr_multipliers: LrMultipliers | None = None
) -> TrainState:
    """The state before the first step from these parameters. To be jitted, and they donated.

    With `lr_multipliers` (parameters.py), what is frozen has no optimizer state and no moving average.
    """
    learning, _ = param_groups.partition(params, lr_multipliers)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.make_optimizer(cfg, lr_multipliers).init(learning),
        ema=jax.tree.map(jnp.copy, learning) if cfg.train.ema_decay else None,
        nonfinite=jnp.int32(0),
    )


def gradients(
    cfg: Config, loss_fn: LossFn, params: Params, batch: Any, keys_B2: jax.Array | None
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient of the mean loss over the batch's targets, and the batch's sums.

    With accumulation, sums and gradients of sums are added up and divided once, so a target weighs
    the same whichever part it is in.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)
    parts = cfg.train.accumulation
    if parts == 1:
        grads, sums = grad_fn(params, batch, keys_B2)
    else:

        def add(total: Any, part: tuple[Any, jax.Array | None]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, *part)), None

        split = jax.tree.map(lambda rows: _split(rows, parts), (batch, keys_B2))
        shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda rows: rows[0], split))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding.spec), shapes
        )
        (grads, sums), _ = lax.scan(add, zeros, split)
    return jax.tree.map(lambda g: g / sums["targets"], grads), sums


def _split(rows_B: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [parts, B/parts, ...], part i taking every parts-th row: each device its own."""
    b, *rest = rows_B.shape
    axes = sharding.spec("batch", *[None] * (len(rest) + 1))
    return lax.reshape(rows_B, (b // parts, parts, *rest), out_sharding=axes).swapaxes(0, 1)


def train_step(
    cfg: Config,
    loss_fn: LossFn,
    state: TrainState,
    batch: Any,
    lr_multipliers: LrMultipliers | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step, and its metrics. `lr_multipliers` are those that the state was made with.

    Where loss or gradient is not finite, parameters and optimizer stay as they are. What is frozen
    counts neither for the gradient's norm nor for that of the parameters, and keeps its bits.
    """
    keys_B2 = dropout_keys(cfg, state.step) if cfg.drops else None
    learning, frozen = param_groups.partition(state.params, lr_multipliers)
    held = lambda new, old: param_groups.where_trainable(new, old, lr_multipliers)
    loss_of = lambda learning, *rest: loss_fn(param_groups.combine(frozen, learning), *rest)
    grads, sums = gradients(cfg, loss_of, learning, batch, keys_B2)
    grads = held(grads, jax.tree.map(jnp.zeros_like, grads))
    grad_norm = optimizer.global_norm(grads)
    updates, opt_state = optimizer.make_optimizer(cfg, lr_multipliers).update(
        grads, state.opt_state, learning
    )
    params = held(optax.apply_updates(learning, updates), learning)
    ema = state.ema
    if ema is not None:
        decay = cfg.train.ema_decay
        ema = held(jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params), ema)

    means = {k: v / sums["targets"] for k, v in sums.items() if k != "targets"}
    loss = means["loss"]
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    params = keep(params, learning)
    new = TrainState(
        step=state.step + 1,
        params=param_groups.combine(frozen, params),
        # The schedule goes by the step, whether or not it changed anything.
        opt_state=keep(opt_state, state.opt_state) | {"rate": opt_state["rate"]},
        ema=keep(ema, state.ema),
        nonfinite=jnp.where(finite, 0, state.nonfinite + 1),
    )
    metrics = {
        "grad_norm": grad_norm,
        "param_norm": optimizer.global_norm(params),
        "lr": jnp.float32(optimizer.learning_rate(cfg)(state.step)),
        "nonfinite": new.nonfinite,
    }
    for name, mean in means.items():
        if mean.ndim:
            metrics |= {f"{name}_max": mean.max(), f"{name}_min": mean.min()}
        else:
            metrics[name] = mean
    return new, metrics


def compile_step(
    cfg: Config,
    loss_fn: LossFn,
    state: Any,
    batch: Any,
    lr_multipliers: LrMultipliers | None = None,
) -> Any:
    """The train step for the ambient mesh, compiled; `state` and `batch` may be abstract."""
    step = jax.jit(lambda s, b: train_step(cfg, loss_fn, s, b, lr_multipliers), donate_argnums=0)
    kind = jax.sharding.get_mesh().devices.flat[0].device_kind
    return step.lower(state, batch).compile(compiler_options=compilation_cache.options(kind))


def init_and_dropout_keys(cfg: Config) -> jax.Array:
    """The two keys that all of a run's randomness in parameters and steps comes from."""
    return jax.random.split(jax.random.key(cfg.train.seed))
