"""The compiled train steps of a run, one for each shape of a batch and each model of a stage."""

import time
from concurrent.futures import Future
from threading import Thread
from typing import Any

import jax

from gptjax.checkpoint import run_dir
from gptjax.config import Config, ModelConfig, phases
from gptjax.config.phases import Phase
from gptjax.runtime import compilation_cache, distributed
from gptjax.runtime.progress import Progress
from gptjax.training.step import compile_step
from gptjax.training.task import Task

THREAD = "compile ahead"
Key = tuple[int, int, int, ModelConfig]


class StepPrograms:
    """The train step of each phase of a run, compiled for the ambient mesh.

    While one phase is trained the step of the next is compiled, in another thread, so that the
    devices wait for the first one only.
    """

    def __init__(self, cfg: Config, task: Task, progress: Progress) -> None:
        self._cfg, self._task, self._progress = cfg, task, progress
        self._phases = phases.phases(cfg)
        self._unit = phases.rows_unit(cfg, dict(jax.sharding.get_mesh().shape))
        self._compiled: dict[Key, Future[Any]] = {}
        self._current: Key | None = None

    def of(self, phase: Phase, state: Any) -> Any:
        """The step of a phase: a function of (state, batch), whose state is laid out as this one.

        Tells how long it was waited for.
        """
        began, key = time.monotonic(), self._key(phase)
        ahead = key in self._compiled
        with compilation_cache.cache_report() as cached:
            if not ahead:
                self._submit(phase, state)
            step = self._compiled[key].result()
            took = time.monotonic() - began
            how = f"compiled in {took:.1f} s ({cached()})"
            how = f"compiled meanwhile, waited for {took:.1f} s" if ahead else how
            shape = f"batches of {phase.batch} x {phase.seq_len} tokens: " if self._several else ""
            if key != self._current:
                self._progress.say(f"{shape}{how}")
        self._compiled, self._current = {key: self._compiled[key]}, key
        self._ahead(phase, state)
        return step

    @property
    def _several(self) -> bool:
        """Whether the run has several programs."""
        return len({self._key(phase) for phase in self._phases}) > 1

    def _key(self, phase: Phase) -> Key:
        model = phases.model_of(self._cfg, phase.stage)
        return phase.batch, phase.seq_len, self._accumulation(phase), model

    def _accumulation(self, phase: Phase) -> int:
        return phases.accumulation_of(self._cfg, phase, self._unit)

    def _ahead(self, phase: Phase, state: Any) -> None:
        """Begins to compile the next phase's step; tells at once where that fails."""
        following = next((one for one in self._phases if one.first >= phase.last), None)
        if following is None or self._key(following) in self._compiled:
            return

        def tell(done: Future[Any]) -> None:
            if error := done.exception():
                self._progress.say(
                    f"the program of step {following.first + 1:,} was not compiled, and "
                    f"training will end there: {str(error).partition(chr(10))[0][:300]}"
                )

        self._submit(following, state).add_done_callback(tell)

    def _dump(self, phase: Phase, step: Any) -> None:
        """Writes a compiled step as text, beside the run's other logs."""
        name = f"step-{phase.first + 1}-{phase.batch}x{phase.seq_len}.txt"
        try:
            folder = run_dir.log_folder(self._cfg.run) / "hlo"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(step.as_text())
        except OSError as error:
            self._progress.say(f"log.dump_hlo: {name} was not written: {error}")

    def _submit(self, phase: Phase, state: Any) -> Future[Any]:
        mesh, task = jax.sharding.get_mesh(), self._task
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )

        future: Future[Any] = Future()

        def go() -> None:
            try:
                with jax.set_mesh(mesh):
                    step = compile_step(
                        self._cfg,
                        task.loss_fn(phase),
                        abstract,
                        task.abstract_batch(phase),
                        task.lr_multipliers,
                        self._accumulation(phase),
                    )
            except BaseException as error:
                future.set_exception(error)
            else:
                if self._cfg.log.dump_hlo and distributed.first():
                    self._dump(phase, step)
                future.set_result(step)

        # No end of the process waits for it, as one of a pool's would.
        Thread(target=go, name=THREAD, daemon=True).start()
        self._compiled[self._key(phase)] = future
        return future
