"""Loading a model for use: a run folder, a run with adapters, or a Hugging Face folder.

`find_model` looks at a path and reads configuration and tokenizer; `load_model` reads the
parameters too, on a mesh of the devices at hand. Sampling, serving, evaluation, prediction,
conversion and the base of a fine-tuned run all go through these two.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Thread
from typing import Protocol

import jax

from gptjax import bucket, config
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import (
    Config,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    TokenizerConfig,
    TrainConfig,
    phases,
)
from gptjax.config.limits import unknown_scheme
from gptjax.data.mixture import Manifests
from gptjax.errors import CheckpointError, ConfigError
from gptjax.finetune import adapter_checkpoint
from gptjax.finetune import params as base_params
from gptjax.finetune.adapter_checkpoint import AdapterCheckpointer
from gptjax.finetune.base_model import BASE_STEP, BaseModel, check_base
from gptjax.hf import read_tokenizer, safetensors
from gptjax.model.decoder import Params
from gptjax.parallel import sharding
from gptjax.parallel.mesh import entered_mesh
from gptjax.param_tree import Tree
from gptjax.sample import Sampler
from gptjax.tokenizer import Tokenizer

Say = Callable[[str], None]


def _silent(line: str) -> None:
    """Says nothing."""


class ModelSource(BaseModel, Protocol):
    """A model on disk, of which only the configuration and the tokenizer have been read."""

    def config_here(self) -> Config:
        """The configuration to use the model with on the devices of this machine."""


@dataclass(frozen=True)
class RunModel:
    """A run folder. `manifests` are those of the stores it was trained on, if any."""

    path: str
    cfg: Config
    tokenizer: Tokenizer | None
    manifests: Manifests | None
    step: int | None = None

    def config_here(self) -> Config:
        """The run's configuration, with attention and mesh as they suit the devices here.

        Layers are restored in the model's order, which is that of a pipeline with one round.
        """
        compute = replace(self.cfg.compute, attention="auto", rounds=1, microbatches=0)
        cfg = replace(self.cfg, run=self.path, compute=compute)
        devices = jax.device_count()
        try:
            cfg.check(devices, jax.process_count())
        except ConfigError:
            batch = -(-cfg.eval.batch // devices) * devices
            cfg = replace(cfg, mesh=MeshConfig(), eval=replace(cfg.eval, batch=batch))
        return cfg

    def at_step(self, step: int | None) -> "RunModel":
        """The run at a checkpoint; None: at its newest. Raises CheckpointError if it has none."""
        step = _steps(self.path)[-1] if step is None else step
        return replace(self, cfg=_trained(run_dir.open_run(self.path)[0], [step]), step=step)

    def read_params(self, say: Say = _silent) -> tuple[Params, int | None]:
        """The parameters, averaged where the run keeps a moving average, and their step."""
        return run_dir.restore_params(self.path, self.cfg, say, self.step)


@dataclass(frozen=True)
class AdapterRun(RunModel):
    """A run folder whose checkpoints hold adapters beside a base that lies elsewhere."""

    def read_params(self, say: Say = _silent) -> tuple[Params, int | None]:
        """The parameters, the adapters merged into their base, and the step."""
        tree, step = self.read_tree(say)
        return base_params.model_params(self.cfg, tree), step

    def read_tree(self, say: Say = _silent) -> tuple[Tree, int]:
        """The training tree, averaged where the run keeps a moving average, and its step.

        Raises ConfigError where the base is not where the run says, CheckpointError where its
        checkpoint or the run's is not found, MismatchError where the base has changed.
        """
        cfg, base = self.cfg, self._base(say)
        multipliers = base_params.lr_multipliers(cfg)
        assert multipliers is not None
        checkpointer = AdapterCheckpointer(
            bucket.path_of(self.path) / run_dir.CHECKPOINTS,
            say=say,
            lr_multipliers=multipliers,
            frozen=lambda: adapter_checkpoint.frozen_part(cfg, base, multipliers, say),
        )
        part = "ema" if cfg.train.ema_decay else "params"
        restored = checkpointer.restore_tree(base_params.abstract_tree(cfg), part)
        if restored is None:
            raise CheckpointError(f"{self.path}: this run has no checkpoint yet")
        return restored

    def _base(self, say: Say) -> BaseModel:
        """The base, at the checkpoint that the adapters were trained beside."""
        path = self.cfg.finetune.base
        try:
            base = find_base(path, say)
        except ConfigError as error:
            raise ConfigError(
                [
                    f"{self.path}: its adapters need finetune.base={path}, which its config.json "
                    f"may name anew: {problem}"
                    for problem in error.problems
                ]
            ) from None
        return base.at_step(run_dir.examples_of(self.path).get(BASE_STEP))


@dataclass(frozen=True)
class HuggingFaceModel:
    """A Hugging Face folder; `path` begins with hf:."""

    path: str
    source: safetensors.Source
    tokenizer: Tokenizer | None
    step: None = None

    @property
    def cfg(self) -> Config:
        """A configuration with the folder's model and tokenizer, and everything else by default."""
        model, folder = self.source.model, self.path.removeprefix("hf:")
        eval = EvalConfig(sample_tokens=max(1, min(128, model.context // 2)))
        return Config(model=model, tokenizer=tokenizer_config(self.tokenizer, folder), eval=eval)

    def config_here(self) -> Config:
        """The configuration that `config_of` makes."""
        return config_of(self.source.model, self.tokenizer, self.path.removeprefix("hf:"))

    def at_step(self, step: int | None) -> "HuggingFaceModel":
        """Itself: there are no steps."""
        return self

    def read_params(self, say: Say = _silent) -> tuple[Params, int | None]:
        """The parameters, and no step."""
        return safetensors.read_params(self.source), None


def find_model(path: str, say: Say = _silent) -> RunModel | HuggingFaceModel:
    """The model of a run folder or a Hugging Face folder (hf:FOLDER, or one with safetensors).

    Raises ConfigError for a path that does not exist, and what `run_dir.open_run` and
    `safetensors.open_source` raise.
    """
    check_exists(path.removeprefix("hf:"))
    if is_hugging_face(path):
        folder = path.removeprefix("hf:")
        source = safetensors.open_source(bucket.local_copy(folder))
        for note in source.notes:
            say(note)
        return HuggingFaceModel(f"hf:{folder}", source, read_tokenizer.tokenizer_of(source, say))
    cfg, tokenizer, manifests = run_dir.open_run(path)
    cfg = _trained(cfg, Checkpointer(bucket.path_of(path) / run_dir.CHECKPOINTS).steps())
    kind = AdapterRun if cfg.finetune.lora.rank else RunModel
    return kind(path, cfg, tokenizer, manifests)


def _trained(cfg: Config, steps: Sequence[int]) -> Config:
    """The configuration of a run with its model as a stage has it at its newest step."""
    return phases.trained(cfg, steps[-1]) if cfg.stages and steps else cfg


def check_exists(path: str) -> None:
    """Raises ConfigError for a path that does not exist; with the command that fetches a hub's
    model, if it may be the name of one.
    """
    if not path:
        raise ConfigError([f"{path!r}: give a folder"])
    if why := unknown_scheme(path):
        raise ConfigError([f"{path}: {why}"])
    place = bucket.path_of(path)
    if place.is_dir() or place.exists():
        return
    hint = ""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path):
        folder = path.rsplit("/", 1)[-1]
        hint = (
            "; gptjax downloads nothing. If it is a model of the Hugging Face hub: hf download "
            f"{path} --local-dir {folder}, then give hf:{folder}"
        )
    raise ConfigError([f"{path}: no such folder{hint}"])


def find_base(path: str, say: Say = _silent) -> RunModel | HuggingFaceModel:
    """The model of a path, to fine-tune. Touches no device.

    Raises ConfigError and DataError for what cannot be fine-tuned, CheckpointError for a run
    without parameters.
    """
    if not path.startswith("hf:"):
        check_exists(path)
        if is_hugging_face(path):
            raise ConfigError([f"{path}: is a Hugging Face folder; give hf:{path}"])
        config.load(path)
        _steps(path)
    base = find_model(path, say)
    check_base(base)
    return base


def _steps(path: str) -> list[int]:
    """Steps of a run's checkpoints. Raises CheckpointError where there is none."""
    steps = Checkpointer(bucket.path_of(path) / run_dir.CHECKPOINTS).steps()
    if not steps:
        raise CheckpointError(f"{path}: this run has no checkpoint yet")
    return steps


def is_hugging_face(path: str) -> bool:
    """Whether a path names a Hugging Face folder, by hf: before it or by the files in it."""
    place = bucket.path_of(path)
    of_run = bucket.remote(path) and (place / config.CONFIG_FILE).exists()
    return path.startswith("hf:") or (not of_run and any(place.glob("*.safetensors*")))


def config_of(model: ModelConfig, tokenizer: Tokenizer | None, target: str) -> Config:
    """A configuration to use a model with, its parameters split over as many devices as divide."""
    devices = jax.device_count()
    shards = next(n for n in range(devices, 0, -1) if devices % n == 0 == model.embed % n)
    batch = -(-32 // devices) * devices
    seq_len = min(model.context, 1024)
    return Config(
        run=target,
        model=model,
        mesh=MeshConfig(fsdp=shards),
        tokenizer=tokenizer_config(tokenizer, target),
        train=TrainConfig(seq_len=seq_len, batch_tokens=seq_len * batch),
        eval=EvalConfig(batch=batch, sample_tokens=max(1, min(128, model.context // 2))),
    )


def tokenizer_config(tokenizer: Tokenizer | None, folder: str) -> TokenizerConfig:
    """The configuration of a tokenizer whose files are in a folder."""
    cfg = TokenizerConfig(path=folder)
    if tokenizer is None:
        return cfg
    return replace(cfg, kind=tokenizer.kind, vocab_size=tokenizer.vocab_size)


@dataclass(frozen=True)
class LoadedModel:
    """A model on the ambient mesh; `step` is its checkpoint's, None for a Hugging Face folder."""

    name: str
    cfg: Config
    tokenizer: Tokenizer | None
    params: Params
    step: int | None

    def sampler(self, *, slots: int = 32, consume: bool = False) -> Sampler:
        """A sampler of it; see there for what it keeps of the parameters, and for `consume`."""
        cfg = self.cfg
        return Sampler(
            self.params, cfg.model, cfg.compute, self.tokenizer, slots=slots, consume=consume
        )


@contextmanager
def load_model(
    path: str,
    *,
    dtype: str | None = None,
    say: Say = _silent,
    check: Callable[[Config, Tokenizer | None], None] = lambda cfg, tokenizer: None,
    precompile: Callable[[Sampler], None] | None = None,
) -> Iterator[LoadedModel]:
    """The model of a run folder or a Hugging Face folder, with its mesh as the ambient one.

    `dtype` is the element type to compute in, float32 or bfloat16; by default the run's own.
    `check` is called before the parameters are read, and may raise. On a CPU `precompile` is called
    while they are read, with a sampler of the same model whose parameters are zero, so that the
    programs it runs are compiled by then; an error in it is left to the real run to meet. Raises
    what `find_model` and `read_params` raise.
    """
    source = find_model(path, say)
    cfg, tokenizer = source.config_here(), source.tokenizer
    if dtype is not None:
        cfg = replace(cfg, compute=replace(cfg.compute, dtype=dtype))  # type: ignore[arg-type]
    check(cfg, tokenizer)
    with entered_mesh(cfg):
        with _precompiling(cfg, tokenizer, precompile):
            params, step = source.read_params(say)
        yield LoadedModel(path, cfg, tokenizer, params, step)


@contextmanager
def _precompiling(
    cfg: Config, tokenizer: Tokenizer | None, precompile: Callable[[Sampler], None] | None
) -> Iterator[None]:
    """A thread of its own for `precompile`, where zeros cost no memory and nobody else waits."""
    if precompile is None or sharding.platform() != "cpu" or jax.process_count() > 1:
        yield
        return
    mesh = jax.sharding.get_mesh()

    def go() -> None:
        with suppress(Exception), jax.set_mesh(mesh):
            zeros = safetensors.zeros(cfg.model, cfg.compute.dtype)
            precompile(Sampler(zeros, cfg.model, cfg.compute, tokenizer))

    thread = Thread(target=go, name="precompile")
    thread.start()
    yield  # an error here is told at once, and the thread's end awaited at the interpreter's
    thread.join()
