"""Defaults of a fine-tuned run: from the base's model, the recipe, and the size of the data.

Until the data are read, some fields hold a placeholder for a default: train.tokens, train.seq_len
and train.batch_tokens 0, and optim.lr, optim.warmup_tokens, eval.every and checkpoint.every -1.
"""

from dataclasses import replace
from pathlib import Path

from gptjax import bucket, config
from gptjax.config import Config, FinetuneConfig, ModelConfig, StartConfig
from gptjax.errors import ConfigError
from gptjax.finetune import conversations, packing, tokenize
from gptjax.finetune.base_model import BaseModel, tokenizer_of
from gptjax.finetune.conversations import Conversations
from gptjax.finetune.examples import Examples, labels_of
from gptjax.finetune.packing import PackedRows
from gptjax.finetune.tokenize import SpecialTokens, TokenizedExamples
from gptjax.tokenizer import Tokenizer

BATCH = 32
"""Examples of an optimizer step (for the task answer, packed rows), without train.batch_tokens."""
LR = 6.25e-5
"""The default learning rate; adapters have ten times as much, which suits them over a wide range of
models and data (Schulman et al. 2025, LoRA Without Regret)."""
WARMUP = 0.002
"""The default warm-up, as a share of the training."""
_STEP = 8  # rows are as long as the longest example, rounded up to a multiple of this


def begun(base: BaseModel, task: str, data: str, valid: str) -> Config:
    """The recipe's configuration (Radford et al. 2018, section 4.1), for overrides to change."""
    name = Path(base.path.removeprefix("hf:")).name
    parent = Path("runs") if base.path.startswith("hf:") else bucket.path_of(base.path).parent
    cfg = base.cfg
    return replace(
        cfg,
        run=str(parent / f"{name}-{task}"),
        optim=replace(
            cfg.optim,
            name="adamw",
            lr=-1.0,
            lr_schedule="linear",
            warmup_tokens=-1,
            decay_tokens=0,
            final_lr_ratio=0.0,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            clip=1.0,
        ),
        train=replace(
            cfg.train,
            tokens=0,
            batch_tokens=0,
            seq_len=0,
            accumulation=1,
            z_loss=0.0,
            ema_decay=0.0,
            batch_ramp_tokens=0,
            batch_start_tokens=0,
            batch_increment_tokens=0,
        ),
        stages={},
        start=StartConfig(),
        finetune=FinetuneConfig(task=task, base=base.path, data=data, valid=valid),  # type: ignore
        eval=replace(cfg.eval, every=-1, tasks=(), sample_every=0),
        checkpoint=replace(cfg.checkpoint, every=-1),
    )


def check_model(base: ModelConfig, given: ModelConfig) -> None:
    """Raises ConfigError where an override changes the model, and not only its training."""
    learning = lambda m: replace(
        m,
        dropout=base.dropout,
        moe=replace(
            m.moe,
            capacity=base.moe.capacity,
            balance_loss=base.moe.balance_loss,
            router_z_loss=base.moe.router_z_loss,
        ),
    )
    ours, theirs = config.flatten(learning(given)), config.flatten(base)
    problems = [
        f"model.{name}={ours[name]!r}: the base has {theirs[name]!r}, and parameters to match"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if problems:
        raise ConfigError(problems)


def resolved(cfg: Config, longest: int, rows: int) -> Config:
    """The configuration with all placeholders replaced.

    `longest`: tokens of the longest row; `rows`: number of rows in an epoch.
    """
    t = cfg.train
    seq_len = t.seq_len or min(-(-longest // _STEP) * _STEP, cfg.model.context)
    t = replace(t, seq_len=seq_len, batch_tokens=t.batch_tokens or BATCH * seq_len)
    epoch = max(1, -(-rows // max(1, t.batch)))
    steps = -(-max(1, cfg.finetune.epochs) * rows // max(1, t.batch))
    t = replace(t, tokens=t.tokens or steps * t.batch_tokens)
    o, every, save = cfg.optim, cfg.eval.every, cfg.checkpoint.every
    lr = (LR * (10 if cfg.finetune.lora.rank else 1)) if o.lr == -1 else o.lr
    warmup = round(WARMUP * t.tokens) if o.warmup_tokens == -1 else o.warmup_tokens
    return replace(
        cfg,
        train=t,
        optim=replace(o, lr=lr, warmup_tokens=warmup),
        eval=replace(cfg.eval, every=epoch if every == -1 else every),
        checkpoint=replace(cfg.checkpoint, every=epoch if save == -1 else save),
    )


def labelled(
    cfg: Config, tokenizer: Tokenizer, train: Examples, valid: Examples
) -> tuple[Config, TokenizedExamples, TokenizedExamples]:
    """The configuration for labelled examples, and the examples tokenized.

    The vocabulary grows where it has no room for the special tokens. Raises DataError as
    `labels_of` and `tokenize.to_arrays` do.
    """
    labels = labels_of(train, valid) if cfg.finetune.task == "classify" else ()
    if cfg.finetune.labels:
        raise ConfigError(["finetune.labels: are those of the data; give none"])
    special = SpecialTokens.of(tokenizer)
    texts = [tokenize.encode(examples, tokenizer) for examples in (train, valid)]
    cfg = resolved(cfg, max(map(tokenize.longest, texts)), len(train))
    if cfg.train.seq_len < len(special) + 2:
        raise ConfigError([f"train.seq_len={cfg.train.seq_len}: too short for two texts"])
    cfg = replace(
        cfg,
        model=replace(cfg.model, vocab_size=max(cfg.model.vocab_size, special.extract + 1)),
        finetune=replace(cfg.finetune, labels=labels),
    )
    rows = [
        tokenize.to_arrays(one, ids, special, cfg.train.seq_len, labels, tokenizer.eos_id)
        for one, ids in zip((train, valid), texts, strict=True)
    ]
    return cfg, rows[0], rows[1]


def answered(
    cfg: Config, base: BaseModel, train: Conversations, valid: Conversations
) -> tuple[Config, PackedRows, PackedRows]:
    """The configuration for conversations, and their packed rows.

    Rows are as long as the base's sequences, or as the longest conversation where that is longer
    and fits the context. Raises DataError as `packing.pack` does.
    """
    if not cfg.train.seq_len:
        longest = max(map(conversations.longest, (train, valid)))
        longest = max(-(-longest // _STEP) * _STEP, base.cfg.train.seq_len)
        seq_len = min(longest, cfg.model.context)
        cfg = replace(cfg, train=replace(cfg.train, seq_len=seq_len))
    length, fill = cfg.train.seq_len, tokenizer_of(base).eos_id
    rows = [packing.pack(one, length, fill) for one in (train, valid)]
    return resolved(cfg, length, len(rows[0])), rows[0], rows[1]
