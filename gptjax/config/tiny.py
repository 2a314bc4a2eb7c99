"""A tiny copy of a configuration: the same features, with a model, rows and text that are small."""

from dataclasses import replace

from gptjax.config.mesh import MeshConfig
from gptjax.config.model import ModelConfig
from gptjax.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MixturePart,
    SpikeConfig,
    StageConfig,
    StartConfig,
    TokenizerConfig,
    WatchConfig,
)

ROWS, LENGTH = 16, 32  # of a batch
_LONGER = 64  # of rows in stages that are longer than the others


def tiny(cfg: Config, folder: str, steps: int) -> Config:
    """A configuration that a CPU trains in seconds, on text in FOLDER/text/ or, for the parts of a
    mixture, in FOLDER/text/PART/.

    What stays is what makes one run unlike another: the kind of every layer, the optimizer and its
    schedule, accumulation, growing batches, stages, mixtures, packing, masks, averages, types. It
    is trained with a tokenizer of bytes, from drawn parameters, on a mesh of its own.
    """
    batch_tokens, train = ROWS * LENGTH, cfg.train
    total = steps * batch_tokens
    grows = bool(train.batch_ramp_tokens)
    stages = _stages(cfg, total)
    if stages:
        known = sum(one.tokens for one in stages.values())
        rest = not all(one.tokens for one in stages.values())
        total = max(total, known + 2 * batch_tokens) if rest else known
    return replace(
        cfg,
        run=f"{folder}/run",
        model=_model(cfg.model),
        mesh=MeshConfig(),
        compute=replace(cfg.compute, rounds=1, microbatches=0),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=_data(cfg.data, folder),
        optim=replace(
            cfg.optim,
            warmup_tokens=min(cfg.optim.warmup_tokens, total // 4),
            decay_tokens=min(cfg.optim.decay_tokens, total // 4),
        ),
        train=replace(
            train,
            tokens=total,
            batch_tokens=batch_tokens,
            batch_start_tokens=batch_tokens // 2 if grows else 0,
            batch_increment_tokens=batch_tokens // 2 if grows else 0,
            batch_ramp_tokens=total // 4 if grows else 0,
            seq_len=LENGTH,
            accumulation=min(2, train.accumulation),
            leave_out=(),
        ),
        stages=stages,
        start=StartConfig(),
        eval=EvalConfig(every=0, batch=ROWS, sample_tokens=4),
        spike=SpikeConfig(),
        checkpoint=CheckpointConfig(every=5, keep=3),
        log=LogConfig(every=1, tensorboard=False, compile_cache=""),
        watch=WatchConfig(),
    )


def _stages(cfg: Config, total: int) -> dict[str, StageConfig]:
    """The stages, with their shares of so many tokens, and two batches at least."""
    batch_tokens, train = ROWS * LENGTH, cfg.train
    share = lambda tokens: max(2 * batch_tokens, tokens * total // train.tokens)
    return {
        name: replace(
            one,
            tokens=share(one.tokens) if one.tokens else 0,
            seq_len=one.seq_len and (_LONGER if one.seq_len > train.seq_len else LENGTH),
            batch_tokens=one.batch_tokens and batch_tokens,
        )
        for name, one in cfg.stages.items()
    }


def _data(data: DataConfig, folder: str) -> DataConfig:
    """The text in a folder, used as that of the configuration."""
    mixture: dict[str, MixturePart] = {
        name: replace(
            part, sources=(f"{folder}/text/{name}",), valid_sources=(), store="", epochs=0.0
        )
        for name, part in data.mixture.items()
    }
    return DataConfig(
        sources=DataConfig().sources if mixture else (f"{folder}/text",),
        mixture=mixture,
        exhausted=data.exhausted,
        store=f"{folder}/store",
        workers=1,
        documents=data.documents,
        packing=data.packing,
        valid_fraction=0.1,
    )


def _model(model: ModelConfig) -> ModelConfig:
    """Two periods of the same layers, of width 64 and eight heads."""
    kv_heads = model.kv_heads
    if kv_heads is not None and kv_heads != model.heads:
        kv_heads = 1 if kv_heads == 1 else 2
    else:
        kv_heads = None if kv_heads is None else 8
    moe, rope = model.moe, model.rope
    if moe.experts:
        experts = 8 if moe.experts >= 8 else moe.experts
        hidden = moe.hidden and 32
        moe = replace(moe, experts=experts, top_k=min(moe.top_k, experts), hidden=hidden)
    if rope.original_context:
        rope = replace(rope, original_context=LENGTH)
    return replace(
        model,
        vocab_size=264,
        context=2 * _LONGER,
        layers=2 * len(model.pattern),
        embed=64,
        heads=8,
        kv_heads=kv_heads,
        head_dim=model.head_dim and 8,
        mlp=model.mlp and 128,
        moe=moe,
        rope=rope,
        window=model.window and 16,
    )
