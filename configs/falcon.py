"""Falcon (Almazrouei et al. 2023), Falcon 2 and Falcon 3.

    gptjax train configs/falcon.py:falcon_7b --data.sources 'corpus/*.jsonl.zst'

7B: one key head, attention and feed-forward in parallel from one normalised input. 40B and 180B: 8
key heads and a normalisation for each branch. RW-1B: sequential, with biases and ALiBi. 2-11B: 8
key heads and one shared normalisation. 3: Llama's architecture with heads of width 256.

Peak and last rates, batches, tokens, z-loss and the tokens over which the batch grows (30 billion
for 7B, 100 billion for 40B and 180B) are those of the paper and the model cards. With how many
sequences it begins was not published: here 128, growing by 128. The recipes of RW-1B, 2-11B and 3
were not published in full: their rates and batches are those of the nearest Falcon. Some Falcon 3
models were made from others by pruning and growing.
"""

from dataclasses import replace

from gptjax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    TokenizerConfig,
    TrainConfig,
)

_SHAPE = ModelConfig(
    vocab_size=65_024,
    context=2048,
    head_dim=64,
    activation="gelu",
    residual="parallel",
    positions="rope",
    linear_bias=False,
)


def falcon_7b() -> Config:
    """6.9 billion parameters, one key head, one shared normalisation."""
    model = replace(_SHAPE, layers=32, embed=4544, heads=71, kv_heads=1, shared_norm=True)
    return _falcon("7b", model, lr=6e-4, batch=2304, tokens=1.5, ramp=30, final=0.02)


def falcon_40b() -> Config:
    """41.3 billion parameters, 8 key heads, a normalisation for each branch."""
    model = replace(_SHAPE, layers=60, embed=8192, heads=128, kv_heads=8)
    return _falcon("40b", model, lr=1.85e-4, batch=1152, tokens=1.0, ramp=100)


def falcon_180b() -> Config:
    """178.6 billion parameters, 8 key heads."""
    model = replace(_SHAPE, layers=80, embed=14848, heads=232, kv_heads=8)
    return _falcon("180b", model, lr=1.25e-4, batch=2048, tokens=3.5, ramp=100)


def falcon_rw_1b() -> Config:
    """1.3 billion parameters, ALiBi, sequential, with biases."""
    model = replace(
        _SHAPE,
        vocab_size=50_304,
        layers=24,
        embed=2048,
        heads=32,
        residual="sequential",
        positions="alibi",
        alibi="scaled_bf16",
        linear_bias=True,
    )
    return _falcon("rw-1b", model, lr=2e-4, batch=512, tokens=0.35)


def falcon2_11b() -> Config:
    """11 billion parameters, 8 key heads of 128, context 8192, one shared normalisation."""
    model = replace(
        _SHAPE,
        context=8192,
        layers=60,
        embed=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        shared_norm=True,
        rope=RopeConfig(theta=500_042.0),
        tied_embeddings=False,
    )
    return _falcon("2-11b", model, lr=3.7e-4, batch=2048, tokens=5.0)


def falcon3_1b() -> Config:
    """1.7 billion parameters."""
    return _falcon3("1b", layers=18, embed=2048, heads=8, mlp=8192, context=8192)


def falcon3_3b() -> Config:
    """3.2 billion parameters."""
    return _falcon3("3b", layers=22, embed=3072, heads=12, mlp=9216)


def falcon3_7b() -> Config:
    """7.5 billion parameters."""
    return _falcon3("7b", layers=28, embed=3072, heads=12, mlp=23040)


def falcon3_10b() -> Config:
    """10.3 billion parameters."""
    return _falcon3("10b", layers=40, embed=3072, heads=12, mlp=23040)


def _falcon3(
    size: str, *, layers: int, embed: int, heads: int, mlp: int, context: int = 32_768
) -> Config:
    model = ModelConfig(
        vocab_size=131_072,
        context=context,
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=4,
        head_dim=256,
        mlp=mlp,
        activation="swiglu",
        norm="rmsnorm",
        norm_eps=1e-6,
        positions="rope",
        rope=RopeConfig(theta=1_000_042.0),
        linear_bias=False,
        tied_embeddings=False,
    )
    return _falcon(f"3-{size}", model, lr=3.7e-4, batch=2048, tokens=14.0)


def _falcon(
    size: str,
    model: ModelConfig,
    *,
    lr: float,
    batch: int,
    tokens: float,
    ramp: int = 0,
    final: float = 0.1,
) -> Config:
    """The common recipe; `batch` in sequences of 2048 tokens, `tokens` in trillions, `ramp`, over
    which the batch grows, in billions; `final` is the last rate as a fraction of the peak."""
    batch_tokens, least = batch * 2048, 128 * 2048 if ramp else 0
    return Config(
        run=f"runs/falcon-{size}",
        model=model,
        compute=ComputeConfig(dtype="bfloat16", remat="block", loss_chunks=8),
        tokenizer=TokenizerConfig(
            kind="huggingface",
            algorithm="byte_bpe",
            vocab_size=model.vocab_size,
            sample_bytes=200_000_000,
        ),
        data=DataConfig(store="data/corpus", valid_fraction=0.001),
        optim=OptimConfig(lr=lr, warmup_tokens=4_000_000_000, b2=0.999, final_lr_ratio=final),
        train=TrainConfig(
            tokens=round(tokens * 1e12),
            batch_tokens=batch_tokens,
            batch_ramp_tokens=ramp * 1_000_000_000,
            batch_start_tokens=least,
            batch_increment_tokens=least,
            seq_len=min(model.context, 2048),
            z_loss=1e-4,
        ),
        eval=EvalConfig(every=2000, batch=64),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
    )
