"""Training again from a run's checkpoints, without writing: for `gptjax verify` and `replay`.

A batch is a pure function of (seed, step), so steps that are done again are the same steps. On the
run's mesh with the same versions they have the same bits; elsewhere the same numbers up to
rounding, and `RunAgain.bits_may_differ` says why.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax

from gptjax import bucket
from gptjax.checkpoint import listing, run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import Config, MeshConfig, phases
from gptjax.config.phases import Phase
from gptjax.data import loader, mixture
from gptjax.data.mixture import Manifests
from gptjax.errors import CheckpointError, ConfigError
from gptjax.parallel import arrays, mesh, sharding
from gptjax.pretrain.task import PretrainTask
from gptjax.runtime import distributed
from gptjax.runtime.progress import Progress
from gptjax.tokenizer import Tokenizer
from gptjax.training import objective
from gptjax.training.left_out import LeftOut, advanced
from gptjax.training.programs import StepPrograms
from gptjax.training.step import TrainState, create_state

COMPARED = ("loss", "grad_norm", "param_norm")
"""The metrics of a step that show whether it is the same."""


@dataclass
class RunAgain:
    """A run that is opened to train steps of it again. Writes nothing."""

    path: str
    cfg: Config
    tokenizer: Tokenizer
    manifests: Manifests
    data: loader.TrainData
    task: PretrainTask
    progress: Progress

    @cached_property
    def checkpoints(self) -> Checkpointer:
        """The run's checkpoints."""
        folder = bucket.path_of(self.path) / run_dir.CHECKPOINTS
        return Checkpointer(folder, say=self.progress.say, order=self.task.layer_order)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the run."""
        return phases.phases(self.cfg)

    @property
    def last(self) -> int:
        """The last step of the run's configuration."""
        return self.phases[-1].last

    @cached_property
    def recorded(self) -> dict[int, dict[str, float]]:
        """The metrics of the steps in metrics.jsonl; damaged lines are left out."""
        rows = listing.read_rows(bucket.path_of(self.path) / listing.METRICS_FILE)
        return {row["step"]: row for row in rows if "loss" in row}

    @cached_property
    def left_out(self) -> LeftOut:
        """The steps that the run leaves out."""
        return LeftOut(self.path, self.cfg.train.leave_out)

    def state_at(self, step: int) -> TrainState:
        """The state of a checkpoint; at step 0, that which the run began with.

        Raises CheckpointError where there is no valid checkpoint, and at step 0 of a run that began
        with the parameters of another.
        """
        cfg, task = self.cfg, self.task
        fresh = lambda: create_state(cfg, task.init, task.lr_multipliers)
        if step or 0 in self.checkpoints.steps():
            state: TrainState = self.checkpoints.restore(step, sharding.abstract(fresh))
            return state
        if cfg.start.base:
            raise CheckpointError(
                f"{self.path}: began with the parameters of {cfg.start.base}, and can be trained "
                "again from its checkpoints only; give a later step"
            )
        return jax.jit(fresh)()

    def checkpoint_before(self, step: int) -> int:
        """The newest checkpoint at a step or before it; 0 where there is none."""
        return max((one for one in self.checkpoints.steps() if one <= step), default=0)

    def steps(
        self, state: TrainState, last: int
    ) -> Iterator[tuple[int, TrainState, dict[str, float]]]:
        """Trains from a state, which it consumes, to a step: each step, its state and metrics.

        A state is that of the step until the next one is asked for. A step that the run has left
        out is left out again, and has no metrics.
        """
        programs = StepPrograms(self.cfg, self.task, self.progress)
        first, phase = int(state.step), None
        batches = self.task.batches(first, last)
        with self.progress.bar("train again", last, first) as bar:
            for step in range(first + 1, last + 1):
                if (now := phases.phase_at(self.phases, step - 1)) != phase:
                    phase, step_fn = now, programs.of(now, state)
                rows, metrics = next(batches), {}
                if step in self.left_out:
                    state = advanced(state)
                else:
                    state, on_device = step_fn(state, arrays.global_batch(rows, phase.batch))
                    metrics = {name: float(x) for name, x in jax.device_get(on_device).items()}
                bar.update(step, None, **{k: v for k, v in metrics.items() if k == "loss"})
                yield step, state, metrics

    def bits_may_differ(self, meta: Mapping[str, Any], step: int) -> str:
        """Why a step need not have the bits of a checkpoint of these metadata; empty if it must."""
        length = phases.phase_at(self.phases, max(0, step - 1)).seq_len
        now = {
            "mesh": dict(jax.sharding.get_mesh().shape),
            "processes": jax.process_count(),
            "device_kind": jax.devices()[0].device_kind,
            "attention": list(objective.attention_backends(self.cfg, length)),
            "jax": jax.__version__,
        }
        then = {**meta, "jax": meta.get("versions", {}).get("jax")}
        told = lambda value: (
            " x ".join(f"{name} {n}" for name, n in value.items() if n > 1) or "one device"
            if isinstance(value, dict)
            else str(value)
        )
        found = [
            f"{name} {told(value)}, then {told(then[name])}"
            for name, value in now.items()
            if then.get(name) is not None and then[name] != value
        ]
        return "; ".join(found)


@contextmanager
def opened(path: str, progress: Progress) -> Iterator[RunAgain]:
    """Opens a run on the mesh that it was trained on, or where that does not fit on the devices
    here, on all of them as fsdp has it.

    Raises ConfigError for a run that was not pre-trained, DataError and MismatchError for stores
    that are not those of the run.
    """
    cfg, tokenizer, manifests = run_dir.open_run(path)
    if manifests is None or tokenizer is None:
        raise ConfigError([f"{path}: only pre-training can be done again; this is another run"])
    distributed.join(cfg.watch.lost, progress.say)
    run_dir.check_store(cfg, manifests)
    cfg = _here(cfg)
    with mesh.entered_mesh(cfg):
        data = loader.TrainData.open(cfg, manifests)
        cfg = mixture.limited(cfg, data.order, lambda line: None)
        task = PretrainTask(cfg, data, manifests)
        yield RunAgain(path, cfg, tokenizer, manifests, data, task, progress)


def _here(cfg: Config) -> Config:
    """A configuration whose mesh fits the devices of this job, and that writes nothing."""
    cfg = replace(cfg, log=replace(cfg.log, dump_hlo=False))
    try:
        cfg.check(jax.device_count(), jax.process_count())
    except ConfigError:
        compute = replace(cfg.compute, rounds=1, microbatches=0)
        cfg = replace(cfg, mesh=MeshConfig(), compute=compute)
        cfg.check(jax.device_count(), jax.process_count())
    return cfg


@dataclass(frozen=True)
class Difference:
    """A metric of a step that is not what was recorded."""

    step: int
    name: str
    now: float
    then: float

    def __str__(self) -> str:
        return f"step {self.step}: {self.name} {self.now!r} now, {self.then!r} then"


def difference(
    step: int, now: Mapping[str, float], then: Mapping[str, float], bound: float
) -> Difference | None:
    """The first of the compared metrics that differs by more than a share of its value.

    With a bound of 0, that has other bits.
    """
    same: Callable[[float, float], bool] = lambda a, b: (
        a == b or (a != a and b != b) or abs(a - b) <= bound * abs(b)
    )
    wrong = (name for name in COMPARED if name in then and not same(now[name], then[name]))
    return next((Difference(step, name, now[name], then[name]) for name in wrong), None)
