"""A run, or a Hugging Face folder, opened to be used and not trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

import jax

from gptjax import tokenizer as tokenizers
from gptjax.checkpoint import run_dir
from gptjax.config import (
    Config,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    TokenizerConfig,
    TrainConfig,
)
from gptjax.finetune import adapter_checkpoint
from gptjax.hf import safetensors
from gptjax.model.decoder import Params
from gptjax.parallel import sharding
from gptjax.parallel.mesh import entered_mesh
from gptjax.sample import Sampler
from gptjax.tokenizer import Tokenizer

_SAFETENSORS = "*.safetensors*"


@dataclass(frozen=True)
class LoadedModel:
    """A model on the ambient mesh; `step` is its checkpoint's, None in a Hugging Face folder."""

    name: str
    cfg: Config
    tokenizer: Tokenizer | None
    params: Params
    step: int | None

    def sampler(self, *, slots: int = 32) -> Sampler:
        """A sampler of it; see there for what it keeps of the parameters."""
        return Sampler(self.params, self.cfg.model, self.cfg.compute, self.tokenizer, slots=slots)


@contextmanager
def load_model(
    path: str,
    *,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    check: Callable[[Config, Tokenizer | None], None] = lambda cfg, tokenizer: None,
    precompile: Callable[[Sampler], None] | None = None,
) -> Iterator[LoadedModel]:
    """The model of a run folder or a Hugging Face folder, with its mesh as the ambient one.

    `dtype` is what to compute in, float32 or bfloat16, otherwise the run's own. `check` is called
    before the parameters are read, and may raise. On a CPU `precompile` is called while they are
    read, with a sampler of the same model whose parameters are zero, so that what it runs is
    compiled when it is wanted; an error in it is left to the real run to meet. Raises what
    `run.open_run`, `separate.restore_params` and `weights.open_source` raise.
    """
    folder = Path(path.removeprefix("hf:"))
    source, step = None, None
    if is_hugging_face(path):
        source = safetensors.open_source(folder)
        tokenizer = safetensors.tokenizer_of(source, say)
        cfg = config_of(source.model, tokenizer, str(folder))
    else:
        cfg, tokenizer, _ = run_dir.open_run(path)
    if dtype is not None:
        cfg = replace(cfg, compute=replace(cfg.compute, dtype=dtype))  # type: ignore[arg-type]
    check(cfg, tokenizer)
    with entered_mesh(cfg):
        with _precompiling(cfg, tokenizer, precompile):
            if source is not None:
                params = safetensors.read_params(source)
            else:
                params, step = adapter_checkpoint.restore_params(path, cfg, say)
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


def is_hugging_face(path: str) -> bool:
    """Whether it names a Hugging Face folder, by hf: before it or by what is in it."""
    return path.startswith("hf:") or any(Path(path).glob(_SAFETENSORS))


def config_of(model: ModelConfig, tokenizer: tokenizers.Tokenizer | None, target: str) -> Config:
    """A configuration that uses the model, its parameters split over as many devices as go."""
    devices = jax.device_count()
    shards = next(n for n in range(devices, 0, -1) if devices % n == 0 == model.embed % n)
    rows = -(-32 // devices) * devices
    seq_len = min(model.context, 1024)
    kind = TokenizerConfig(path=target)
    if tokenizer is not None:
        kind = replace(kind, kind=tokenizer.kind, vocab_size=tokenizer.vocab_size)
    return Config(
        run=target,
        model=model,
        mesh=MeshConfig(fsdp=shards),
        tokenizer=kind,
        train=TrainConfig(seq_len=seq_len, batch_tokens=seq_len * rows),
        eval=EvalConfig(batch=rows, sample_tokens=max(1, min(128, model.context // 2))),
    )
