"""Qwen3's mixture of experts (Yang et al. 2025): 128 narrow experts, 8 for each token.

    gptjax train configs/qwen3_moe.py:qwen3_30b_a3b --data.sources 'corpus/*.jsonl.zst'

Shapes are those of the released configuration. The published recipe gives 36 trillion tokens in
three stages; rates and batches were not published, and are Llama 3's here.
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


def qwen3_30b_a3b() -> Config:
    """30.5 billion parameters, 3.4 of them active."""
    batch = 4_194_304
    return Config(
        run="runs/qwen3-30b-a3b",
        model=ModelConfig(
            vocab_size=151_936,
            context=40_960,
            layers=48,
            embed=2048,
            heads=32,
            kv_heads=4,
            head_dim=128,
            mlp=6144,
            activation="swiglu",
            moe=MoeConfig(experts=128, top_k=8, hidden=768, balance_loss=8 * 0.001),
            norm="rmsnorm",
            norm_eps=1e-6,
            qk_norm=True,
            positions="rope",
            rope=RopeConfig(theta=1e6),
            linear_bias=False,
            tied_embeddings=False,
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="block", loss_chunks=8),
        tokenizer=TokenizerConfig(
            kind="huggingface", algorithm="byte_bpe", vocab_size=151_669, sample_bytes=200_000_000
        ),
        data=DataConfig(store="data/corpus", valid_fraction=0.001),
        optim=OptimConfig(lr=3e-4, warmup_tokens=2000 * batch),
        train=TrainConfig(tokens=30_000_000_000_000, batch_tokens=batch, seq_len=4096),
        eval=EvalConfig(every=2000, batch=64),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
    )
