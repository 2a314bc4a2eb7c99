"""Mixtral (Jiang et al. 2024): Llama's block with eight experts, two for each token.

    gptjax train configs/mixtral.py:mixtral_8x7b --data.sources 'corpus/*.jsonl.zst'

The public substitute for the GPT-4 class, whose architecture is unpublished. Shapes are those of
the released configurations. Mixtral's training was not published: rates, batch and budget are
Llama 2's; the balance loss's weight is the released one times top_k, because the released loss
equals top_k at an even load.
"""

from gptjax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    RopeConfig,
    TokenizerConfig,
    TrainConfig,
)


def mixtral_8x7b() -> Config:
    """46.7 billion parameters, 12.9 of them active."""
    return _mixtral("8x7b", layers=32, embed=4096, heads=32, mlp=14336, vocab=32_000, lr=3e-4)


def mixtral_8x22b() -> Config:
    """140.6 billion parameters, 39.2 of them active."""
    context = {"context": 65_536}
    shape = {"layers": 56, "embed": 6144, "heads": 48, "mlp": 16384}
    return _mixtral("8x22b", **shape, **context, vocab=32_768, lr=1.5e-4)


def _mixtral(size: str, *, vocab: int, lr: float, context: int = 32_768, **shape: int) -> Config:
    batch = 4_194_304
    return Config(
        run=f"runs/mixtral-{size}",
        model=ModelConfig(
            vocab_size=vocab,
            context=context,
            kv_heads=8,
            activation="swiglu",
            moe=MoeConfig(experts=8, top_k=2, balance_loss=2 * 0.02),
            norm="rmsnorm",
            positions="rope",
            rope=RopeConfig(theta=1e6),
            linear_bias=False,
            tied_embeddings=False,
            **shape,
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="block", loss_chunks=8),
        tokenizer=TokenizerConfig(vocab_size=vocab, sample_bytes=200_000_000),
        data=DataConfig(store="data/corpus", valid_fraction=0.001),
        optim=OptimConfig(lr=lr, warmup_tokens=2000 * batch),
        train=TrainConfig(tokens=2_000_000_000_000, batch_tokens=batch, seq_len=4096),
        eval=EvalConfig(every=2000, batch=64),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
    )
