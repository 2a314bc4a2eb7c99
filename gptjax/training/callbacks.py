"""Callbacks of the training loop: saving, evaluation, samples, metrics, profiles."""

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax

from gptjax.checkpoint import replicas
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import Config, LogConfig, phases
from gptjax.errors import NumericError
from gptjax.model.decoder import Params
from gptjax.param_tree import leaves_by_path
from gptjax.runtime import distributed, goodput
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training.metrics import Writers, perplexity, throughput
from gptjax.training.step import TrainState
from gptjax.training.task import Task

_SESSION_EVERY_S = 10.0


@dataclass
class Snapshot:
    """The state after a step, as callbacks see it."""

    step: int
    state: TrainState
    task: Task

    @cached_property
    def model_params(self) -> Params:
        """The model's parameters, averaged where the run keeps a moving average."""
        return self.task.to_model_params(self.state.averaged)


class StepTimer:
    """Tokens per second, and the share of time spent waiting for data, since the last report."""

    def __init__(self) -> None:
        self.rate = 0.0
        self.reset()

    def reset(self) -> None:
        """Begins a new interval."""
        self._began, self._tokens, self._waited = time.monotonic(), 0, 0.0

    def step_done(self, tokens: int) -> None:
        """Counts a step of so many tokens."""
        self._tokens += tokens
        self.rate = self._tokens / (time.monotonic() - self._began)

    def report(self) -> dict[str, float]:
        """The share of waiting; begins the next interval."""
        share = self._waited / (time.monotonic() - self._began)
        self.reset()
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


class Callback:
    """Something that happens during training. Each method does nothing unless it is overridden."""

    repeats_on_resume = False
    """Whether a run resumed at a step where this is due does it again, as it comes after the save;
    for the same reason a signal to stop may interrupt it."""

    def begin(self, first: int, last: int) -> None:
        """Called once, with the step that the state is at and the last step to be trained."""
        self._last = last

    def before_step(self, step: int) -> None:
        """Called before a step is dispatched; steps are counted from 1."""

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Called when a step has been dispatched, and has perhaps not been computed yet."""

    def on_metrics(self, step: int, metrics: dict[str, float], timer: StepTimer) -> None:
        """Called with the metrics of each step, when they have reached the host."""

    def due(self, step: int) -> bool:
        """Whether `run` is to be called after a step."""
        return False

    def run(self, snapshot: Snapshot) -> None:
        """Called after a step at which this is due, in the order of the callbacks' list."""

    def close(self) -> None:
        """Called at the end, whether training was completed or failed."""


class Every(Callback):
    """Runs an action every so many steps, and after the last one; with 0 steps only then."""

    def __init__(
        self, steps: int, action: Callable[[Snapshot], None], *, repeats_on_resume: bool = True
    ) -> None:
        self._steps, self._action = steps, action
        self.repeats_on_resume = repeats_on_resume

    def due(self, step: int) -> bool:
        return is_due(self._steps, step, self._last)

    def run(self, snapshot: Snapshot) -> None:
        self._action(snapshot)


def is_due(period: int, step: int, last: int) -> bool:
    """Whether something with a period in steps is due; everything is due at the last step."""
    return step == last or (period > 0 and step > 0 and step % period == 0)


class Save(Every):
    """Saves the state every so many steps, after the last one, which it waits for, and where a
    stage ends: a run may go on from there in several ways."""

    def __init__(
        self,
        steps: int,
        checkpointer: Checkpointer,
        watchdog: Watchdog,
        progress: Progress,
        borders: Collection[int] = (),
    ) -> None:
        super().__init__(steps, self._save, repeats_on_resume=False)
        self._borders, self._local_every = borders, checkpointer.local_every
        self._checkpointer, self._watchdog, self._progress = checkpointer, watchdog, progress
        self._seconds = 0.0
        self._asked: set[int] = set()

    def ask(self, step: int) -> None:
        """Saves a step that is no multiple of the period too."""
        self._asked.add(step)

    def seconds(self) -> float:
        """For how long the loop stood still for saves since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        for problem in self._checkpointer.failures():
            self._progress.say(f"{problem}; training goes on")

    def due(self, step: int) -> bool:
        return self._due_for_run(step) or (step > 0 and step % (self._local_every or step + 1) == 0)

    def _due_for_run(self, step: int) -> bool:
        return step in self._borders or step in self._asked or super().due(step)

    def _save(self, snapshot: Snapshot) -> None:
        self._watchdog.at("save", snapshot.step)
        jax.block_until_ready(snapshot.state)  # the step itself is no part of what saving costs
        began = time.monotonic()
        local = not self._due_for_run(snapshot.step)
        self._checkpointer.save(snapshot.step, snapshot.state, local=local)
        if snapshot.step == self._last:
            self._checkpointer.finish()
        self._seconds += time.monotonic() - began


class Evaluator(Protocol):
    """A measurement of parameters."""

    def run(self, params: Params) -> Mapping[str, float]:
        """Names and values of what was measured."""


class Evaluate(Callback):
    """Runs evaluators, each with a period of its own in steps, and writes what they measure.

    Those of a step are `evaluators(step)`, as a stage may change the model. `results` holds the
    newest value of each metric.
    """

    repeats_on_resume = True

    def __init__(
        self,
        evaluators: Callable[[int], Sequence[tuple[int, Evaluator]]],
        writers: Writers,
        watchdog: Watchdog,
        progress: Progress,
    ) -> None:
        self._evaluators, self.writers = evaluators, writers
        self._watchdog, self._progress = watchdog, progress
        self.results: dict[str, float] = {}

    def _due(self, step: int) -> list[Evaluator]:
        return [one for period, one in self._evaluators(step) if is_due(period, step, self._last)]

    def due(self, step: int) -> bool:
        periods = [period for period, _ in self._evaluators(step)]
        return any(is_due(period, step, self._last) for period in periods)

    def run(self, snapshot: Snapshot) -> None:
        values: dict[str, float] = {}
        for evaluator in self._due(snapshot.step):
            self._watchdog.at("eval", snapshot.step)
            values.update(evaluator.run(snapshot.model_params))
        self.results.update(values)
        self.writers.write(snapshot.step, values)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._progress.say(f"step {snapshot.step}: {shown}")


class LogMetrics(Callback):
    """Writes training metrics every log.every steps, and those of the last step."""

    def __init__(
        self,
        cfg: Config,
        writers: Writers,
        progress: Progress,
        facts: Callable[[int], Mapping[str, float]] = lambda step: {},
    ) -> None:
        self._every, self._writers, self._facts = cfg.log.every, writers, facts
        self._throughput, self._progress = throughput(cfg), progress
        self._phases = phases.phases(cfg)

    def begin(self, first: int, last: int) -> None:
        super().begin(first, last)
        self._writers.open(first)
        if first < last:
            self._progress.say(self._throughput.description)

    def on_metrics(self, step: int, metrics: dict[str, float], timer: StepTimer) -> None:
        if step % self._every == 0 or step == self._last:
            phase = phases.phase_at(self._phases, step - 1)
            known = {"perplexity": perplexity(metrics["loss"]), "tokens": phase.tokens_at(step)}
            known |= self._throughput.of(timer.rate, phase.seq_len) | timer.report()
            known |= self._facts(step)
            self._writers.write(step, metrics | known)

    def close(self) -> None:
        self._writers.close()


class NonfiniteGuard(Callback):
    """Tells of steps whose loss or gradient was not finite, and ends a run of many in a row.

    Ends a run at once whose parameters are no longer finite, before they are saved.
    """

    def __init__(self, limit: int, progress: Progress) -> None:
        self._limit, self._progress = limit, progress

    def on_metrics(self, step: int, metrics: dict[str, float], timer: StepTimer) -> None:
        if not math.isfinite(metrics["param_norm"]):
            raise NumericError(
                f"step {step}: the optimizer's update made parameters that are not finite; they "
                "were not saved; go on from the last checkpoint with another optim.lr or optim.eps"
            )
        if metrics["nonfinite"]:
            self._progress.say(f"step {step}: loss or gradient not finite; parameters unchanged")
        if metrics["nonfinite"] >= self._limit:
            raise NumericError(
                f"loss or gradient was not finite {self._limit} steps in a row, the last of them "
                f"step {step}; lower optim.lr, or look at the data"
            )


class CheckReplicas(Callback):
    """Ends a run in which copies of an array differ, every so many steps and before each save."""

    def __init__(
        self, steps: int, save_every: int, watchdog: Watchdog, borders: Collection[int] = ()
    ) -> None:
        self._periods, self._watchdog = (steps, save_every) if steps else (), watchdog
        self._borders = borders if steps else ()

    def due(self, step: int) -> bool:
        return step in self._borders or any(
            is_due(period, step, self._last) for period in self._periods
        )

    def run(self, snapshot: Snapshot) -> None:
        self._watchdog.at("save", snapshot.step)
        if problems := replicas.differing(leaves_by_path(snapshot.state)):
            raise NumericError(
                f"step {snapshot.step}: copies of the same numbers differ, so a device computes or "
                f"remembers wrongly; nothing was saved: {'; '.join(problems[:3])}"
                + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
            )


class RecordSessions(Callback):
    """Adds lines to sessions.jsonl (runtime/goodput.py) while a run is trained, by process 0."""

    def __init__(self, folder: Path, watchdog: Watchdog, progress: Progress) -> None:
        self._file, self._watchdog, self._progress = folder / goodput.SESSIONS, watchdog, progress
        self._began = time.time() - sum(watchdog.seconds().values())
        self._before = goodput.read(self._file)
        self._first = self._step = 0
        self._spent: dict[str, float] = {}  # before the session
        self._closed: goodput.Session | None = None
        self._written, self._failed = 0.0, False

    def begin(self, first: int, last: int) -> None:
        super().begin(first, last)
        if self._closed is not None:  # the run was rewound
            self._before.append(self._closed)
            self._began, self._closed = self._closed.now, None
        self._first = self._step = first
        self._write()

    def on_metrics(self, step: int, metrics: dict[str, float], timer: StepTimer) -> None:
        self._step = step
        if time.monotonic() - self._written > _SESSION_EVERY_S:
            self._write()

    def share(self) -> float:
        """The goodput of the run up to now, from 0 to 1."""
        return goodput.share(goodput.summarize([*self._before, self._now()]))

    def close(self) -> None:
        self._write()
        self._closed, self._spent = self._now(), self._watchdog.seconds()

    def _now(self) -> goodput.Session:
        seconds = {k: v - self._spent.get(k, 0.0) for k, v in self._watchdog.seconds().items()}
        now = self._began + sum(seconds.values())
        return goodput.Session(self._began, now, self._first, self._step, seconds)

    def _write(self) -> None:
        self._written = time.monotonic()
        if not distributed.first():
            return
        try:
            with self._file.open("a") as stream:
                stream.write(json.dumps(asdict(self._now())) + "\n")
        except OSError as error:
            if not self._failed:
                self._progress.say(f"{self._file} was not written: {error}; training goes on")
            self._failed = True


class ShowProgress(Callback):
    """A progress bar over the steps, with loss and tokens per second."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stack = ExitStack()

    def begin(self, first: int, last: int) -> None:
        super().begin(first, last)
        if first < last:
            self._bar = self._stack.enter_context(self._progress.bar("train", last, first))

    def on_metrics(self, step: int, metrics: dict[str, float], timer: StepTimer) -> None:
        dropped = metrics.get("moe_dropped", 0.0)  # share of a mixture's assignments
        shown = {"loss": metrics["loss"], "tokens_per_second": timer.rate}
        self._bar.update(step, None, **shown | ({"dropped": dropped} if dropped else {}))
        if step == self._last:
            self.close()

    def close(self) -> None:
        self._stack.close()


class Profile(Callback):
    """A trace of the configured steps by jax.profiler; none if the run resumes after the first."""

    def __init__(self, cfg: LogConfig, folder: Path) -> None:
        self._first, self._steps, self._folder = cfg.profile_start, cfg.profile_steps, folder
        self._tracing = self.done = False

    def before_step(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def dispatched(self, step: int, metrics: Any) -> None:
        if self._tracing and step == self._first + self._steps - 1:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing, self.done = False, True
