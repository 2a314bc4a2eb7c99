"""The compiled train steps of a run, one for each shape of a batch and each model of a stage."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from gptjax.config import Config, ModelConfig, phases
from gptjax.config.phases import Phase
from gptjax.runtime import compilation_cache
from gptjax.runtime.progress import Progress
from gptjax.training.step import compile_step
from gptjax.training.task import Task

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
        self._thread = ThreadPoolExecutor(1, "compile")

    def of(self, phase: Phase, state: Any) -> Any:
        """The step of a phase: a function of (state, batch), whose state is laid out as this one.

        Tells how long it was waited for.
        """
        began, key = time.monotonic(), self._key(phase)
        with compilation_cache.cache_report() as cached:
            if key not in self._compiled:
                self._submit(phase, state)
            step = self._compiled[key].result()
            took = time.monotonic() - began
            shape = f"batches of {phase.batch} x {phase.seq_len} tokens: " if self._several else ""
            self._progress.say(f"{shape}compiled in {took:.1f} s ({cached()})")
        self._compiled = {key: self._compiled[key]}
        self._ahead(phase, state)
        return step

    @property
    def _several(self) -> bool:
        """Whether the run has several programs."""
        return len({self._key(phase) for phase in self._phases}) > 1

    def close(self) -> None:
        """Does not compile what has not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)

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
            if not done.cancelled() and (error := done.exception()):
                self._progress.say(
                    f"the program of step {following.first + 1:,} was not compiled, and "
                    f"training will end there: {str(error).splitlines()[0][:300]}"
                )

        self._submit(following, state).add_done_callback(tell)

    def _submit(self, phase: Phase, state: Any) -> Future[Any]:
        mesh, task = jax.sharding.get_mesh(), self._task
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )

        def go() -> Any:
            with jax.set_mesh(mesh):
                return compile_step(
                    self._cfg,
                    task.loss_fn(phase),
                    abstract,
                    task.abstract_batch(phase),
                    task.lr_multipliers,
                    self._accumulation(phase),
                )

        future = self._thread.submit(go)
        self._compiled[self._key(phase)] = future
        return future
