"""The training loop: restore, compile, step, report.

The loop dispatches a step and then looks at the metrics of the step before it, so that the devices
never wait for the host. All else that happens during training is a callback (callbacks.py).
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import Config, phases
from gptjax.config.phases import Phase
from gptjax.errors import MismatchError, NumericError, Preempted
from gptjax.parallel import arrays, sharding
from gptjax.runtime import distributed
from gptjax.runtime.preemption import Interrupted, PreemptionHandler
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training import audit
from gptjax.training.callbacks import Callback, Snapshot, StepTimer
from gptjax.training.left_out import Entry, LeftOut, Rewind, advanced
from gptjax.training.programs import StepPrograms
from gptjax.training.spikes import Spike, SpikeWatch
from gptjax.training.step import TrainState, create_state
from gptjax.training.task import Task


class Trainer:
    """Trains a task to the end of its budget, from its newest valid checkpoint if there is one.

    Callbacks run in the order of their list: with `Save` before `Evaluate`, a step's checkpoint is
    committed to before anything is measured at that step, and a resumed run measures it again.
    """

    def __init__(
        self,
        cfg: Config,
        task: Task,
        checkpointer: Checkpointer,
        callbacks: Sequence[Callback],
        *,
        watchdog: Watchdog,
        progress: Progress,
    ) -> None:
        self._cfg, self._task, self._checkpointer = cfg, task, checkpointer
        self._spikes, self._left_out = SpikeWatch(cfg.spike), LeftOut(cfg.run, cfg.train.leave_out)
        self._callbacks: list[Callback] = [self._spikes, *callbacks]
        self._watchdog, self._progress = watchdog, progress
        checkpointer.more = self._of_checkpoint
        checkpointer.settle = cfg.spike.before + cfg.spike.after if cfg.spike.threshold else 0
        self._timer = StepTimer()
        self._phases = phases.phases(cfg)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def fit(self) -> TrainState:
        """Trains; returns the last state.

        Raises Preempted when told to stop, after saving; NumericError where the loss stays not
        finite; CheckpointError and OutputError as `Checkpointer` does.
        """
        agreed = reached_preemption_sync_point if distributed.several() else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._checkpointer)
            self._preemption = stack.enter_context(PreemptionHandler(agreed))
            for callback in self._callbacks:
                stack.callback(callback.close)
            audit.check(self._cfg)
            self._programs = StepPrograms(self._cfg, self._task, self._progress)
            while True:
                try:
                    state = self._train_all(self._start())
                    break
                except Spike as spike:
                    self._rewind(spike)
            if self._preemption.signal:
                raise Preempted(f"{self._told_to_stop}; saved step {self._last}")
        return state

    def _train_all(self, state: TrainState) -> TrainState:
        """Trains from a state to the end. Raises Spike."""
        repeated = [callback for callback in self._callbacks if callback.repeats_on_resume]
        self._run_due(repeated, self._first, state)
        for step in range(self._first + 1, self._last + 1):
            state = self._train_one(step, state)
        self._report()
        return state

    # --- before the first step ---

    def _start(self) -> TrainState:
        """The state, restored or fresh, with the step compiled and the first batch read."""
        try:
            with self._preemption.at_once():
                self._watchdog.at("restore", 0)
                state, resumed = self._restore()
                self._first = int(state.step)
                self._last = max(self._first, self._phases[-1].last)
                if resumed:
                    self._progress.say(f"resumed after step {self._first} of {self._last}")
                for callback in self._callbacks:
                    callback.begin(self._first, self._last)
                self._batches = self._task.batches(self._first, self._last)
                self._watchdog.at("compile", self._first)
                if self._first < self._last:
                    self._compile(state)
                return state
        except Interrupted:
            raise Preempted(f"{self._told_to_stop} before a step") from None

    def _restore(self) -> tuple[TrainState, bool]:
        """The state of the newest valid checkpoint, or a fresh one; whether it was restored."""
        cfg, task = self._cfg, self._task
        self._forget_stale()
        fresh = lambda: create_state(cfg, task.init, task.lr_multipliers)
        restored: TrainState | None = self._checkpointer.restore_newest(sharding.abstract(fresh))
        if restored is not None:
            self._check_left_out()
            return restored, True
        self._left_out.record()
        state = task.starting_state() or jax.jit(fresh)()
        if cfg.spike.threshold:  # there is always a checkpoint to go back to
            self._checkpointer.save(0, state)
        return state, False

    def _compile(self, state: TrainState) -> None:
        """Compiles the step, and reads the first batch meanwhile."""
        self._phase = phases.phase_at(self._phases, self._first)
        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(next, self._batches)
            self._step_fn = self._programs.of(self._phase, state)
            self._batch = reading.result()
        self._timer.reset()

    # --- one step ---

    def _train_one(self, step: int, state: TrainState) -> TrainState:
        """Dispatches a step, reports the one before it, and runs what is due."""
        for callback in self._callbacks:
            callback.before_step(step)
        if (phase := phases.phase_at(self._phases, step - 1)) != self._phase:
            self._begin_phase(phase, step, state)
        self._watchdog.at("step", step)
        metrics: dict[str, jax.Array] = {}
        if step in self._left_out:
            state = advanced(state)
        else:
            batch = arrays.global_batch(self._batch, phase.batch)
            state, metrics = self._compute(step, state, batch)
        if step < self._last:
            self._read_batch(step)
        self._report()
        self._pending = (step, metrics) if metrics else None
        for callback in self._callbacks:
            callback.dispatched(step, metrics)
        self._preemption.poll(step)
        self._run_due(self._callbacks, step, state)
        if self._preemption.signal and step < self._last:
            self._stop(step, state)
        return state

    def _compute(
        self, step: int, state: TrainState, batch: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Dispatches the step's program, twice where the step is audited."""
        every = self._cfg.watch.audit_every
        if every and step % every == 0:
            return audit.audited(self._step_fn, state, batch, step, self._cfg.run)
        done: tuple[TrainState, dict[str, jax.Array]] = self._step_fn(state, batch)
        return done

    def _begin_phase(self, phase: Phase, step: int, state: TrainState) -> None:
        """Tells of a stage that begins with a step, and takes the step's program."""
        self._report()
        if phase.stage != self._phase.stage:
            self._progress.say(f"stage {phase.stage} begins with step {step:,}")
        self._watchdog.at("compile", step)
        # Several processes have to agree before they stop, which they do after a step.
        alone = contextlib.nullcontext() if distributed.several() else self._preemption.at_once()
        try:
            with self._timer.paused(), alone:
                self._phase, self._step_fn = phase, self._programs.of(phase, state)
        except Interrupted:
            self._stop(step - 1, state)

    def _read_batch(self, step: int) -> None:
        """Reads the batch of the next step while the devices compute this one."""
        self._watchdog.at("data", step + 1)
        with self._timer.waiting():
            self._batch = next(self._batches)
        self._watchdog.at("step", step)

    def _report(self) -> None:
        """Waits for the pending step, and hands its metrics to the callbacks."""
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        self._timer.step_done(phases.phase_at(self._phases, step - 1).batch_tokens)
        for callback in self._callbacks:
            callback.on_metrics(step, metrics, self._timer)

    def _run_due(self, callbacks: Sequence[Callback], step: int, state: TrainState) -> None:
        """Runs the callbacks that are due at a step; a signal ends those that can be repeated."""
        due = [callback for callback in callbacks if callback.due(step)]
        if not due:
            return
        self._report()
        snapshot = Snapshot(step, state, self._task)
        with self._timer.paused():
            for callback in due:
                if callback.repeats_on_resume:
                    with contextlib.suppress(Interrupted), self._preemption.at_once():
                        callback.run(snapshot)
                else:
                    callback.run(snapshot)

    # --- spikes, and steps that are left out ---

    def _of_checkpoint(self, step: int) -> dict[str, Any]:
        """What the loop adds to a checkpoint's metadata."""
        window = self._spikes.window()
        left_out = {"left_out": self._left_out.up_to(step)} if self._left_out.entries else {}
        return left_out | ({"spike_window": window} if window else {})

    def _rewind(self, spike: Spike) -> None:
        """Leaves out the steps around a spike, in the run's file. Raises NumericError where it was
        one too many."""
        cfg, done = self._cfg.spike, self._left_out.rewinds
        self._pending = None
        self._watchdog.at("save", spike.step)
        self._checkpointer.finish()
        first, last = max(1, spike.step - cfg.before), spike.step + cfg.after
        saved = [step for step in self._checkpointer.steps() if step < first]
        if len(done) >= cfg.rewinds or not saved:
            limit = (
                f"{len(done)} rewinds (spike.rewinds={cfg.rewinds}): {'; '.join(map(str, done))}"
            )
            why = limit if saved else f"there is no checkpoint before step {first}"
            raise NumericError(f"{spike}; the run is not rewound again, after {why}")
        rewind = Rewind(spike.step, spike.why, saved[-1])
        self._left_out.entries.append(Entry(first, last, rewind))
        self._left_out.record()
        self._progress.say(f"{rewind}: steps {first:,} to {last:,} are left out")
        for callback in self._callbacks:
            callback.close()

    def _forget_stale(self) -> None:
        """Removes the checkpoints that a rewind has made worthless: those after it, and those that
        a process left which was killed while it was rewound."""
        if self._left_out.rewinds:
            steps = self._checkpointer.steps() if distributed.first() else []
            self._checkpointer.forget([step for step in steps if self._is_stale(step)])

    def _is_stale(self, step: int) -> bool:
        try:
            return self._left_out.is_stale(self._checkpointer.meta(step))
        except Exception:  # of many kinds: a damaged checkpoint is told when it is to be restored
            return False

    def _check_left_out(self) -> None:
        """Continues from what a restored checkpoint says. Raises MismatchError where it was trained
        on steps that are now to be left out."""
        meta = self._checkpointer.restored
        step = int(meta["step"])
        then, now = [tuple(one) for one in meta.get("left_out", ())], self._left_out.up_to(step)
        if then != now:
            told = lambda ranges: ", ".join(f"{a}-{b}" for a, b in ranges) or "none"
            raise MismatchError(
                f"train.leave_out: up to step {step} the run has left out {told(then)}, and is to "
                f"leave out {told(now)}; name later steps, or another --run"
            )
        self._left_out.record()
        self._spikes.restore(meta.get("spike_window", {}))

    # --- told to stop ---

    def _stop(self, step: int, state: TrainState) -> None:
        """Saves the step, if that has not been done, and raises Preempted."""
        self._report()
        self._watchdog.at("save", step)
        if self._checkpointer.last_step != step:
            self._checkpointer.save(step, state)
        self._checkpointer.finish()
        raise Preempted(f"{self._told_to_stop}; saved step {step}")

    @property
    def _told_to_stop(self) -> str:
        signal: Any = self._preemption.signal
        return f"told to stop by {signal.name}"
