"""What a fine-tuned run begins from: a run folder or a Hugging Face folder."""

from dataclasses import dataclass, replace
from pathlib import Path

from gptjax import config
from gptjax import tokenizer as tokenizers
from gptjax.config import Config
from gptjax.errors import CheckpointError, ConfigError, DataError
from gptjax.finetune import tokenize
from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Base:
    """A base; `step` is the checkpoint to take, None the newest that is whole."""

    path: str
    cfg: Config
    tokenizer: Tokenizer
    step: int | None = None


def base_of(path: str) -> Base:
    """Looks at a base, and reads no parameters. Touches no device.

    Raises ConfigError and DataError for what is none, CheckpointError for a run without parameters.
    """
    if path.startswith("hf:"):
        from gptjax.hf import safetensors

        source = safetensors.open_source(Path(path.removeprefix("hf:")))
        told: list[str] = []
        tokenizer = safetensors.tokenizer_of(source, told.append)
        if tokenizer is None:
            raise DataError(told[-1])
        kind = config.TokenizerConfig(kind=tokenizer.kind, path=path.removeprefix("hf:"))
        kind = replace(kind, vocab_size=tokenizer.vocab_size)
        cfg = Config(model=source.model, tokenizer=kind)
        short = min(cfg.eval.sample_tokens, max(1, source.model.context // 2))
        cfg = replace(cfg, eval=replace(cfg.eval, sample_tokens=short))
        return Base(path, cfg, tokenizer)
    from gptjax.checkpoint.checkpointer import Checkpointer
    from gptjax.checkpoint.run_dir import CHECKPOINTS

    cfg, folder = config.load(path), Path(path)
    if not folder.is_dir():
        raise ConfigError([f"{path}: must be a run folder, or hf:FOLDER"])
    if cfg.finetune.lora.rank:
        raise ConfigError(
            [f"{path}: is adapters beside a base; merge them: gptjax convert {path} NEW"]
        )
    if not Checkpointer(folder / CHECKPOINTS).steps():
        raise CheckpointError(f"{path}: this run has no checkpoint yet")
    tokenizer = tokenizers.load(folder)
    tokenize.check_ids(tokenizer, cfg.model.vocab_size)
    return Base(path, cfg, tokenizer)


def pinned(base: Base, recorded: int | None) -> Base:
    """The base at the step that a run has recorded, or otherwise at its newest: for adapters, which
    go with those parameters and no others."""
    if base.path.startswith("hf:"):
        return base
    from gptjax.checkpoint.checkpointer import Checkpointer
    from gptjax.checkpoint.run_dir import CHECKPOINTS

    if recorded is None:
        recorded = Checkpointer(Path(base.path) / CHECKPOINTS).steps()[-1]
    return replace(base, step=recorded)
