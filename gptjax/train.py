"""Training: the state, the step, and the loop.

`fit` takes the initialiser and the loss, so that pre-training and fine-tuning share the loop.

A step is a pure function of (state, batch, seed); a batch is a pure function of (seed, step); so a
run continued from a checkpoint is the run that was never interrupted.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gptjax import compilation, optim, sharding
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config
from gptjax.errors import NumericError, Preempted
from gptjax.evaluate import Evaluator
from gptjax.interrupt import Interrupt
from gptjax.metrics import Throughput, Writers, perplexity
from gptjax.model.decoder import Params
from gptjax.progress import Progress

LossFn = Callable[[Params, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]
"""(params, batch, dropout key or None) -> (sum to differentiate, sums with "ce" and "targets")."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    step: int32, steps done. nonfinite: int32, how many in a row just now changed nothing because
    loss or gradient was not finite. ema: a second set of parameters, or None.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None
    nonfinite: jax.Array


def create_state(cfg: Config, init_fn: Callable[[jax.Array], Params]) -> TrainState:
    """The state before the first step, laid out over the ambient mesh. To be jitted."""
    params = init_fn(jax.random.key(cfg.train.seed))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optim.make(cfg).init(params),
        ema=jax.tree.map(jnp.copy, params) if cfg.train.ema_decay else None,
        nonfinite=jnp.int32(0),
    )


def gradients(
    cfg: Config, loss_fn: LossFn, params: Params, batch: Any, key: jax.Array | None
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient of the mean loss over the batch's targets, and the batch's sums.

    With accumulation, sums and gradients of sums are added up and divided once, so a target weighs
    the same whichever part it is in.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)
    parts = cfg.train.accumulation
    if parts == 1:
        grads, sums = grad_fn(params, batch, key)
    else:

        def add(total: Any, part: tuple[jax.Array, Any]) -> tuple[Any, None]:
            index, rows = part
            part_key = None if key is None else jax.random.fold_in(key, index)
            return jax.tree.map(jnp.add, total, grad_fn(params, rows, part_key)), None

        split = jax.tree.map(lambda rows: _split(rows, parts), batch)
        first = jax.tree.map(lambda rows: rows[0], split)
        shapes = jax.eval_shape(grad_fn, params, first, key)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding.spec), shapes
        )
        (grads, sums), _ = lax.scan(add, zeros, (jnp.arange(parts), split))
    return jax.tree.map(lambda g: g / sums["targets"], grads), sums


def _split(rows_B: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [parts, B/parts, ...], part i taking every parts-th row: each device its own."""
    b, *rest = rows_B.shape
    axes = sharding.spec("batch", *[None] * (len(rest) + 1))
    return lax.reshape(rows_B, (b // parts, parts, *rest), out_sharding=axes).swapaxes(0, 1)


def train_step(
    cfg: Config, loss_fn: LossFn, state: TrainState, batch: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step, and its metrics.

    Where loss or gradient is not finite, parameters and optimizer stay as they are.
    """
    key = None
    if cfg.model.dropout:
        key = jax.random.fold_in(jax.random.key(cfg.train.seed + 1), state.step)
    grads, sums = gradients(cfg, loss_fn, state.params, batch, key)
    grad_norm = optim.global_norm(grads)
    updates, opt_state = optim.make(cfg).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        decay = cfg.train.ema_decay
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)

    loss = sums["ce"] / sums["targets"]
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    new = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        ema=keep(ema, state.ema),
        nonfinite=jnp.where(finite, 0, state.nonfinite + 1),
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "param_norm": optim.global_norm(new.params),
        "lr": jnp.float32(optim.learning_rate(cfg)(state.step)),
        "nonfinite": new.nonfinite,
    }
    if cfg.train.z_loss:
        metrics["z_loss"] = sums["z"] / sums["targets"]
    return new, metrics


# --- the loop --------------------------------------------------------------------------------


def fit(
    cfg: Config,
    *,
    init_fn: Callable[[jax.Array], Params],
    loss_fn: LossFn,
    batches: Callable[[int], Iterator[Any]],
    evaluators: Iterable[Evaluator],
    sampler: Callable[[int, Params], None],
    checkpoints: Checkpoints,
    writers: Callable[[int], Writers],
    throughput: Throughput,
    progress: Progress,
) -> tuple[TrainState, dict[str, float]]:
    """Trains to the end of the budget; returns the last state and the last evaluation.

    `batches(step)` yields device batches from that step on; `writers(step)` opens the metrics of a
    run that goes on after that step. Restores the newest valid checkpoint if there is one.

    Raises Preempted when told to stop, after saving; NumericError after nonfinite_limit steps in a
    row; CheckpointError and OutputError as `Checkpoints` does.
    """
    # --- state: restored, or fresh ---
    abstract = sharding.abstract(lambda: create_state(cfg, init_fn))
    restored = checkpoints.restore_newest(abstract)
    state: TrainState = restored or jax.jit(lambda: create_state(cfg, init_fn))()
    first, last = int(state.step), cfg.train.steps
    if restored is not None:
        progress.say(f"resumed after step {first} of {last}")
    sink = writers(first)
    evaluators = list(evaluators)

    # --- the step, compiled once, ahead of the first batch's arrival ---
    source = batches(first)
    batch = next(source, None)
    step_fn = None
    if batch is not None:
        began = time.monotonic()
        step = jax.jit(lambda s, b: train_step(cfg, loss_fn, s, b), donate_argnums=0)
        with compilation.cache_report() as cached:
            step_fn = step.lower(state, batch).compile()
        progress.say(f"compiled in {time.monotonic() - began:.1f} s ({cached()})")
        progress.say(throughput.description)

    evaluated: dict[str, float] = {}

    def evaluate(step: int, state: TrainState) -> None:
        params = state.params if state.ema is None else state.ema
        for evaluator in evaluators:
            evaluated.update(evaluator.run(params))
        sink.write(step, evaluated)
        progress.say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in evaluated.items()))

    def due(period: int, step: int) -> bool:
        return period > 0 and step % period == 0 and step < last

    # --- the loop: dispatch a step, then look at the one before it ---
    pending: tuple[int, Mapping[str, jax.Array]] | None = None
    clock = _Clock(cfg.train.batch_tokens)
    with checkpoints, Interrupt() as interrupt, progress.bar("train", last, first) as bar:

        def look(pending: tuple[int, Mapping[str, jax.Array]] | None) -> None:
            if pending is None:
                return
            step, metrics = pending[0], {k: float(v) for k, v in jax.device_get(pending[1]).items()}
            clock.step_done()
            bar.update(step, loss=metrics["loss"], tokens_per_second=clock.rate)
            if metrics["nonfinite"]:
                progress.say(
                    f"step {step}: loss or gradient not finite; parameters left as they are"
                )
            if metrics["nonfinite"] >= cfg.train.nonfinite_limit:
                raise NumericError(
                    f"loss or gradient was not finite {cfg.train.nonfinite_limit} steps in a row, "
                    f"the last of them step {step}; lower optim.lr, or look at the data"
                )
            if step % cfg.log.every == 0 or step == last:
                metrics["perplexity"] = perplexity(metrics["loss"])
                metrics |= throughput.of(clock.rate) | clock.report()
                sink.write(step, metrics)

        for step in range(first + 1, last + 1):
            assert batch is not None
            assert step_fn is not None
            if step == cfg.log.profile_start:
                jax.profiler.start_trace(str(checkpoints.folder.parent / "profile"))
            state, metrics = step_fn(state, batch)
            with clock.waiting():
                batch = next(source, None)
            look(pending)
            pending = step, metrics
            if step == cfg.log.profile_start + cfg.log.profile_steps - 1 >= cfg.log.profile_steps:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()

            stop = interrupt.signal is not None
            if due(cfg.checkpoint.every, step) or stop:
                look(pending)
                pending = None
                checkpoints.save(step, state)
            for problem in checkpoints.failures():
                progress.say(f"{problem}; training goes on")
            if stop:
                raise_saved(checkpoints, step, interrupt)
            if due(cfg.eval.every, step) or due(cfg.eval.sample_every, step):
                look(pending)
                pending = None
                with clock.paused():
                    if due(cfg.eval.every, step):
                        evaluate(step, state)
                    if due(cfg.eval.sample_every, step):
                        sampler(step, state.params)
        look(pending)

        # --- the end: the last checkpoint, evaluation and samples ---
        if first < last:
            checkpoints.save(last, state)
            checkpoints.finish()
    evaluate(last, state)
    sampler(last, state.params if state.ema is None else state.ema)
    sink.close()
    return state, evaluated


class _Clock:
    """Tokens per second, and the share of time spent waiting for data, since the last report."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.rate = 0.0
        self._reset()

    def _reset(self) -> None:
        self._began, self._steps, self._waited = time.monotonic(), 0, 0.0

    def step_done(self) -> None:
        self._steps += 1
        self.rate = self._steps * self._tokens / (time.monotonic() - self._began)

    def report(self) -> dict[str, float]:
        """The share of waiting; begins the next window."""
        share = self._waited / (time.monotonic() - self._began)
        self._reset()
        return {"data_wait": share}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is spent waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began


def raise_saved(checkpoints: Checkpoints, step: int, interrupt: Interrupt) -> None:
    """Waits until the checkpoint of this step is safe, then ends the run."""
    checkpoints.finish()
    assert interrupt.signal is not None
    raise Preempted(f"told to stop by {interrupt.signal.name}; saved step {step}")
