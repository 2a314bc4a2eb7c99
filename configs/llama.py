"""Llama 1, 2 (Touvron et al. 2023) and 3 (Dubey et al. 2024): RMSNorm, rotary positions, SwiGLU.

    gptjax train configs/llama.py:llama2_7b --data.sources 'corpus/*.jsonl.zst'

Shapes are those of the released configurations. Llama 1 and 2: AdamW with betas 0.9 and 0.95, decay
0.1, clipping at 1, 2000 steps of warm-up, a cosine to a tenth, 4 million tokens a step. Of Llama 3
the peak rates, the number of tokens and the 8000 steps of warm-up are published, and of 405B the
stages: batches of 4 million tokens in sequences of 4096, after 252 million tokens 8 million in
sequences of 8192, after 2.87 trillion 16 million; then 800 billion tokens in six lengths up to
128k, and at last a linear decay to zero over 40 million. `llama31_405b` has them. Not published are
the lengths between (here four, each twice the one before, of 200 billion tokens each), the data of
each stage, and when the rotary positions were scaled (here from the first long stage on). The
paper's cosine ends after 1.2 million steps, which with these batches are more than 15.6 trillion
tokens: here it ends with the last long stage, and goes by tokens as the warm-up does. The average
of the last checkpoints is not reproduced. Of 8B and 70B nothing is published but that their recipes
are similar: their batch is 4 million tokens throughout. 3.2 was distilled, and 3.3 is 3.1 trained
further; these presets have 3's recipe.
"""

from dataclasses import replace
from typing import Any

from gptjax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
)


def llama1_7b() -> Config:
    """6.7 billion parameters."""
    return _llama("1-7b", **_7B, norm_eps=1e-6, context=2048, lr=3e-4, tokens=1.0)


def llama1_13b() -> Config:
    """13.0 billion parameters."""
    return _llama("1-13b", **_13B, norm_eps=1e-6, context=2048, lr=3e-4, tokens=1.0)


def llama1_33b() -> Config:
    """32.5 billion parameters."""
    shape = {"layers": 60, "embed": 6656, "mlp": 17920, "heads": 52}
    return _llama("1-33b", **shape, norm_eps=1e-6, context=2048, lr=1.5e-4, tokens=1.4)


def llama1_65b() -> Config:
    """65.3 billion parameters."""
    shape = {"layers": 80, "embed": 8192, "mlp": 22016, "heads": 64}
    return _llama("1-65b", **shape, norm_eps=1e-5, context=2048, lr=1.5e-4, tokens=1.4)


def llama2_7b() -> Config:
    """6.7 billion parameters."""
    return _llama("2-7b", **_7B, context=4096, lr=3e-4, tokens=2.0)


def llama2_13b() -> Config:
    """13.0 billion parameters."""
    return _llama("2-13b", **_13B, context=4096, lr=3e-4, tokens=2.0)


def llama2_70b() -> Config:
    """69.0 billion parameters."""
    return _llama("2-70b", **_70B, context=4096, lr=1.5e-4, tokens=2.0)


def llama3_8b() -> Config:
    """8.0 billion parameters, context 8192."""
    return _llama3("3-8b", **_8B, context=8192, lr=3e-4)


def llama3_70b() -> Config:
    """70.6 billion parameters, context 8192."""
    return _llama3("3-70b", **_70B, context=8192, lr=1.5e-4)


def llama31_8b() -> Config:
    """Llama 3 8B for 128k tokens."""
    return _llama3("3.1-8b", **_8B, rope_factor=8.0, lr=3e-4)


def llama31_70b() -> Config:
    """Llama 3 70B for 128k tokens."""
    return _llama3("3.1-70b", **_70B, rope_factor=8.0, lr=1.5e-4)


def llama31_405b() -> Config:
    """405.9 billion parameters."""
    shape = {"layers": 126, "embed": 16384, "mlp": 53248, "heads": 128, "kv_heads": 8}
    cfg = _llama3("3.1-405b", **shape, rope_factor=8.0, lr=8e-5, tokens=15.6)
    first, batch = _BATCH, 4 * _BATCH
    short = StageConfig(rope_scaling="none")
    stages = {
        "start": replace(short, tokens=252_000_000, seq_len=4096, batch_tokens=first),
        "doubled": replace(short, tokens=2_870_000_000_000 - 252_000_000, batch_tokens=2 * first),
        "main": short,
    }
    for length in (16_384, 32_768, 65_536, 131_072):
        stages[f"{length // 1024}k"] = StageConfig(tokens=200_000_000_000, seq_len=length)
    stages["anneal"] = StageConfig(tokens=40_000_000, seq_len=131_072, lr_schedule="linear")
    warmup = 61 * first + 7939 * 2 * first  # 8000 steps, of which the first stage has 61
    return replace(
        cfg,
        optim=replace(cfg.optim, warmup_tokens=warmup, final_lr_ratio=0.01),
        train=replace(cfg.train, batch_tokens=batch, accumulation=4),
        stages=stages,
    )


def llama32_1b() -> Config:
    """1.2 billion parameters, tied."""
    shape = {"layers": 16, "embed": 2048, "mlp": 8192, "heads": 32, "kv_heads": 8}
    return _llama3("3.2-1b", **shape, rope_factor=32.0, lr=3e-4, tied=True)


def llama32_3b() -> Config:
    """3.2 billion parameters, tied."""
    shape = {"layers": 28, "embed": 3072, "mlp": 8192, "heads": 24, "kv_heads": 8}
    return _llama3("3.2-3b", **shape, rope_factor=32.0, lr=3e-4, tied=True)


def llama33_70b() -> Config:
    """The shapes of 3.1 70B."""
    return _llama3("3.3-70b", **_70B, rope_factor=8.0, lr=1.5e-4)


_BATCH = 4_194_304  # tokens of a step
_7B = {"layers": 32, "embed": 4096, "mlp": 11008, "heads": 32}
_13B = {"layers": 40, "embed": 5120, "mlp": 13824, "heads": 40}
_8B = {"layers": 32, "embed": 4096, "mlp": 14336, "heads": 32, "kv_heads": 8}
_70B = {"layers": 80, "embed": 8192, "mlp": 28672, "heads": 64, "kv_heads": 8}


def _llama3(
    size: str,
    *,
    lr: float,
    context: int = 131_072,
    rope_factor: float = 1.0,
    tokens: float = 15.0,
    tied: bool = False,
    **shape: int,
) -> Config:
    """Llama 3's recipe; `shape` are ModelConfig's sizes."""
    rope = RopeConfig(theta=5e5)
    if rope_factor > 1:
        rope = replace(rope, scaling="low_frequency", factor=rope_factor, original_context=8192)
    tokenizer = TokenizerConfig(
        kind="huggingface", algorithm="byte_bpe", vocab_size=128_256, sample_bytes=200_000_000
    )
    model = {"context": context, "rope": rope, "tied_embeddings": tied, **shape}
    return _llama(
        size, lr=lr, tokens=tokens, tokenizer=tokenizer, warmup_steps=8000, seq_len=8192, **model
    )


def _llama(
    size: str,
    *,
    lr: float,
    tokens: float,
    tokenizer: TokenizerConfig | None = None,
    warmup_steps: int = 2000,
    seq_len: int | None = None,
    **model: Any,
) -> Config:
    """The common recipe; `tokens` in trillions, `model` are further fields of ModelConfig."""
    tokenizer = tokenizer or TokenizerConfig(vocab_size=32_000, sample_bytes=200_000_000)
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        activation="swiglu",
        norm="rmsnorm",
        positions="rope",
        linear_bias=False,
        **{"tied_embeddings": False, **model},
    )
    return Config(
        run=f"runs/llama-{size}",
        model=cfg,
        compute=ComputeConfig(dtype="bfloat16", remat="block", loss_chunks=8),
        tokenizer=tokenizer,
        data=DataConfig(store="data/corpus", valid_fraction=0.001),
        optim=OptimConfig(lr=lr, warmup_tokens=warmup_steps * _BATCH),
        train=TrainConfig(
            tokens=round(tokens * 1e12), batch_tokens=_BATCH, seq_len=seq_len or cfg.context
        ),
        eval=EvalConfig(every=2000, batch=64),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
    )
