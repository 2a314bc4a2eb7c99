"""The training loop.

`fit` takes the initialiser and the loss, so that pre-training and fine-tuning share the loop.

A step is a pure function of (state, batch, seed); a batch is a pure function of (seed, step); so a
run continued from a checkpoint is the run that was never interrupted.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import Config, LogConfig
from gptjax.errors import NumericError, Preempted
from gptjax.model.decoder import Params
from gptjax.parallel import arrays, sharding
from gptjax.runtime import compilation_cache, distributed
from gptjax.runtime.preemption import Interrupted, PreemptionHandler
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training.metrics import Throughput, Writers, perplexity
from gptjax.training.param_groups import LrMultipliers
from gptjax.training.step import LossFn, TrainState, compile_step, create_state

# --- the loop --------------------------------------------------------------------------------


class Evaluator(Protocol):
    """Anything that measures parameters."""

    def run(self, params: Params) -> Mapping[str, float]:
        """Names and values of what was measured."""


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
    checkpoints: Checkpointer,
    writers: Callable[[int], Writers],
    throughput: Throughput,
    watch: Watchdog,
    progress: Progress,
    start: Callable[[], TrainState] | None = None,
    lr_multipliers: LrMultipliers | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Trains to the end of the budget; returns the last state and the last evaluation.

    `batches(first, last)` yields this process's rows, on the host, of the batches of steps
    first..last-1, counted from 0; `abstract_batch` is what they are on the devices, all rows;
    `writers(step)` opens the metrics of a run that goes on after that step. `evaluators` are run
    every eval.every steps, `tasks` every eval.tasks_every. Restores the newest valid checkpoint if
    there is one, and otherwise begins with what `init_fn` draws, or with the state, laid out alike,
    that `start` makes; tells `watch` where it is. `lr_multipliers` say what learns (parameters.py). What
    is due at a step is done after its checkpoint, and again by a run that goes on from there.

    Raises Preempted when told to stop, after saving; NumericError after nonfinite_limit steps in a
    row; CheckpointError and OutputError as `Checkpointer` does.
    """
    groups = [(cfg.eval.every, list(evaluators)), (cfg.eval.tasks_every, list(tasks))]
    evaluated: dict[str, float] = {}
    agreed = reached_preemption_sync_point if distributed.several() else None
    with checkpoints, PreemptionHandler(agreed) as interrupt:
        # --- state, restored or fresh; the step compiles while the first batch is read ---
        try:
            with interrupt.at_once():
                fresh = lambda: create_state(cfg, init_fn, lr_multipliers)
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
                        step_fn = compile_step(cfg, loss_fn, state, abstract_batch, lr_multipliers)
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
                state, metrics = step_fn(state, arrays.global_batch(batch, cfg.train.batch))
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

    def __init__(self, cfg: LogConfig, checkpoints: Checkpointer) -> None:
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
