"""Training: the state, the step, and the loop.

`fit` takes the initialiser and the loss, so that pre-training and fine-tuning share the loop.

A step is a pure function of (state, batch, seed); a batch is a pure function of (seed, step); so a
run continued from a checkpoint is the run that was never interrupted.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpoints
from gptjax.config import Config, LogConfig
from gptjax.errors import NumericError, Preempted
from gptjax.evaluate import Evaluator
from gptjax.model.decoder import Params
from gptjax.parallel import sharding
from gptjax.runtime import compilation_cache, distributed
from gptjax.runtime.preemption import Interrupt, Interrupted
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watch
from gptjax.training import optimizer, param_groups
from gptjax.training.metrics import Throughput, Writers, perplexity
from gptjax.training.param_groups import Factors

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
        return self.params if self.ema is None else param_groups.joined(self.params, self.ema)


def dropout_keys(cfg: Config, step: jax.Array) -> jax.Array:
    """Key data [B, 2] for the sequences of a step's batch: one for each, however it is split."""
    key = jax.random.fold_in(run_dir.init_and_dropout_keys(cfg)[1], step)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(cfg.train.batch))
    return jax.sharding.reshard(jax.random.key_data(keys_B), sharding.spec("batch", None))


def create_state(
    cfg: Config, init_fn: Callable[[jax.Array], Params], factors: Factors | None = None
) -> TrainState:
    """The state before the first step, laid out over the ambient mesh. To be jitted."""
    return state_of(cfg, init_fn(run_dir.init_and_dropout_keys(cfg)[0]), factors)


def state_of(cfg: Config, params: Params, factors: Factors | None = None) -> TrainState:
    """The state before the first step from these parameters. To be jitted, and they donated.

    With `factors` (parameters.py), what is frozen has no optimizer state and no moving average.
    """
    learning, _ = param_groups.split(params, factors)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.make(cfg, factors).init(learning),
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
    cfg: Config, loss_fn: LossFn, state: TrainState, batch: Any, factors: Factors | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step, and its metrics. `factors` are those that the state was made with.

    Where loss or gradient is not finite, parameters and optimizer stay as they are. What is frozen
    counts neither for the gradient's norm nor for that of the parameters, and keeps its bits.
    """
    keys_B2 = dropout_keys(cfg, state.step) if cfg.drops else None
    learning, frozen = param_groups.split(state.params, factors)
    held = lambda new, old: param_groups.held(new, old, factors)
    loss_of = lambda learning, *rest: loss_fn(param_groups.joined(frozen, learning), *rest)
    grads, sums = gradients(cfg, loss_of, learning, batch, keys_B2)
    grads = held(grads, jax.tree.map(jnp.zeros_like, grads))
    grad_norm = optimizer.global_norm(grads)
    updates, opt_state = optimizer.make(cfg, factors).update(grads, state.opt_state, learning)
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
        params=param_groups.joined(frozen, params),
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


# --- the loop --------------------------------------------------------------------------------


def compile_step(
    cfg: Config, loss_fn: LossFn, state: Any, batch: Any, factors: Factors | None = None
) -> Any:
    """The train step for the ambient mesh, compiled; `state` and `batch` may be abstract."""
    step = jax.jit(lambda s, b: train_step(cfg, loss_fn, s, b, factors), donate_argnums=0)
    kind = jax.sharding.get_mesh().devices.flat[0].device_kind
    return step.lower(state, batch).compile(compiler_options=compilation_cache.options(kind))


def fit(
    cfg: Config,
    *,
    init_fn: Callable[[jax.Array], Params],
    loss_fn: LossFn,
    abstract_batch: Any,
    batches: Callable[[int, int], Iterator[Any]],
    evaluators: Iterable[Evaluator],
    tasks: Iterable[Evaluator] = (),
    sampler: Callable[[int, Params], None],
    checkpoints: Checkpoints,
    writers: Callable[[int], Writers],
    throughput: Throughput,
    watch: Watch,
    progress: Progress,
    start: Callable[[], TrainState] | None = None,
    factors: Factors | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Trains to the end of the budget; returns the last state and the last evaluation.

    `batches(first, last)` yields this process's rows, on the host, of the batches of steps
    first..last-1, counted from 0; `abstract_batch` is what they are on the devices, all rows;
    `writers(step)` opens the metrics of a run that goes on after that step. `evaluators` are run
    every eval.every steps, `tasks` every eval.tasks_every. Restores the newest valid checkpoint if
    there is one, and otherwise begins with what `init_fn` draws, or with the state, laid out alike,
    that `start` makes; tells `watch` where it is. `factors` say what learns (parameters.py). What
    is due at a step is done after its checkpoint, and again by a run that goes on from there.

    Raises Preempted when told to stop, after saving; NumericError after nonfinite_limit steps in a
    row; CheckpointError and OutputError as `Checkpoints` does.
    """
    groups = [(cfg.eval.every, list(evaluators)), (cfg.eval.tasks_every, list(tasks))]
    evaluated: dict[str, float] = {}
    agreed = reached_preemption_sync_point if distributed.several() else None
    with checkpoints, Interrupt(agreed) as interrupt:
        # --- state, restored or fresh; the step compiles while the first batch is read ---
        try:
            with interrupt.at_once():
                fresh = lambda: create_state(cfg, init_fn, factors)
                watch.at("restore", 0)
                restored = checkpoints.restore_newest(sharding.abstract(fresh))
                state: TrainState = restored or (start or jax.jit(fresh))()
                first = int(state.step)
                last = max(first, cfg.train.steps)
                if restored is not None:
                    progress.say(f"resumed after step {first} of {last}")
                sink, source = writers(first), batches(first, last)
                watch.at("compile", first)
                if first < last:
                    began = time.monotonic()
                    with (
                        ThreadPoolExecutor(1) as reader,
                        compilation_cache.cache_report() as cached,
                    ):
                        reading = reader.submit(next, source)
                        step_fn = compile_step(cfg, loss_fn, state, abstract_batch, factors)
                        progress.say(f"compiled in {time.monotonic() - began:.1f} s ({cached()})")
                        batch = reading.result()
                    progress.say(throughput.description)
        except Interrupted:
            assert interrupt.signal is not None
            raise Preempted(f"told to stop by {interrupt.signal.name} before a step") from None

        def due(period: int, step: int) -> bool:
            return period > 0 and step % period == 0 and 0 < step < last

        def evaluators_at(step: int, end: bool = False) -> list[Evaluator]:
            """Those that are due; at the end all are."""
            return [one for period, group in groups if end or due(period, step) for one in group]

        def observe(step: int, now: list[Evaluator], sample: bool) -> None:
            """Evaluation and samples; a signal ends them, for they can be had again."""
            with contextlib.suppress(Interrupted), interrupt.at_once():
                if now:
                    values: dict[str, float] = {}
                    for evaluator in now:
                        watch.at("eval", step)
                        values.update(evaluator.run(state.averaged))
                    evaluated.update(values)
                    sink.write(step, values)
                    shown = ", ".join(f"{k} {v:.4f}" for k, v in values.items())
                    progress.say(f"step {step}: {shown}")
                if sample:
                    watch.at("eval", step)
                    sampler(step, state.averaged)

        # --- the loop: dispatch a step, then look at the one before it ---
        observe(first, evaluators_at(first), due(cfg.eval.sample_every, first))
        pending: tuple[int, Mapping[str, jax.Array]] | None = None
        clock = _Clock(cfg.train.batch_tokens)
        with progress.bar("train", last, first) as bar, _Profile(cfg.log, checkpoints) as profile:

            def look() -> None:
                """Waits for the pending step and reports it."""
                nonlocal pending
                if pending is None:
                    return
                step, values = pending[0], jax.device_get(pending[1])
                metrics, pending = {k: float(v) for k, v in values.items()}, None
                clock.step_done()
                dropped = metrics.get("moe_dropped", 0.0)  # of a mixture's assignments
                more = {"dropped": dropped} if dropped else {}
                bar.update(step, loss=metrics["loss"], tokens_per_second=clock.rate, **more)
                if metrics["nonfinite"]:
                    progress.say(
                        f"step {step}: loss or gradient not finite; parameters left as they are"
                    )
                if metrics["nonfinite"] >= cfg.train.nonfinite_limit:
                    raise NumericError(
                        f"loss or gradient was not finite {cfg.train.nonfinite_limit} steps in a "
                        f"row, the last of them step {step}; lower optim.lr, or look at the data"
                    )
                if step % cfg.log.every == 0 or step == last:
                    metrics["perplexity"] = perplexity(metrics["loss"])
                    metrics |= throughput.of(clock.rate) | clock.report()
                    sink.write(step, metrics)

            for step in range(first + 1, last + 1):
                profile.before(step)
                watch.at("step", step)
                state, metrics = step_fn(state, sharding.global_batch(batch, cfg.train.batch))
                if step < last:
                    watch.at("data", step + 1)
                    with clock.waiting():
                        batch = next(source)
                    watch.at("step", step)
                look()
                pending = step, metrics
                profile.after(step, metrics)

                save = due(cfg.checkpoint.every, step) or step == last
                now, sample = evaluators_at(step), due(cfg.eval.sample_every, step)
                interrupt.poll(step)
                if save or now or sample or interrupt.signal:
                    look()
                    with clock.paused():
                        if save:
                            watch.at("save", step)
                            checkpoints.save(step, state)
                        observe(step, now, sample)
                for problem in checkpoints.failures():
                    progress.say(f"{problem}; training goes on")
                if interrupt.signal:
                    watch.at("save", step)
                    if not save:
                        checkpoints.save(step, state)
                    checkpoints.finish()
                    raise Preempted(f"told to stop by {interrupt.signal.name}; saved step {step}")

        # --- the end: the last checkpoint is safe, then evaluation and samples ---
        watch.at("save", last)
        checkpoints.finish()
        observe(last, evaluators_at(last, end=True), sample=True)
        sink.close()
        if interrupt.signal:
            raise Preempted(f"told to stop by {interrupt.signal.name}; saved step {last}")
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


class _Profile:
    """A trace of the configured steps by jax.profiler, in the run folder; none if they are past."""

    def __init__(self, cfg: LogConfig, checkpoints: Checkpoints) -> None:
        self._first, self._steps = cfg.profile_start, cfg.profile_steps
        self._folder = checkpoints.folder.parent / "profile"
        self._tracing = False

    def __enter__(self) -> "_Profile":
        return self

    def before(self, step: int) -> None:
        """Begins the trace if this is its first step."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def after(self, step: int, metrics: Any) -> None:
        """Ends the trace if this was its last step."""
        if self._tracing and step == self._first + self._steps - 1:
            jax.block_until_ready(metrics)
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
