"""GPT-2 (Radford et al. 2019) in its four sizes.

    gptjax train configs/gpt2.py:small --data.sources 'corpus/*.jsonl.zst'

Shapes are those of the released models. OpenAI never published the learning rate; the recipe is the
usual one for training these shapes from scratch: AdamW with betas 0.9 and 0.95, decay 0.1, clipping
at 1, half a million tokens a step, a cosine to a tenth of the peak. Peak rates for the larger sizes
follow GPT-3's table (Brown et al. 2020, table 2.1) for the nearest size. Byte-level BPE of 50257
pieces is trained on your text, as GPT-2's was on its own; --tokenizer.path takes GPT-2's files.
"""

from gptjax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)


def small() -> Config:
    """124M parameters: 12 layers of 768."""
    return _gpt2("small", layers=12, embed=768, heads=12, lr=6e-4)


def medium() -> Config:
    """355M parameters: 24 layers of 1024."""
    return _gpt2("medium", layers=24, embed=1024, heads=16, lr=3e-4)


def large() -> Config:
    """774M parameters: 36 layers of 1280."""
    return _gpt2("large", layers=36, embed=1280, heads=20, lr=2.5e-4)


def xl() -> Config:
    """1.6B parameters: 48 layers of 1600."""
    return _gpt2("xl", layers=48, embed=1600, heads=25, lr=2e-4)


def _gpt2(size: str, *, layers: int, embed: int, heads: int, lr: float) -> Config:
    return Config(
        run=f"runs/gpt2-{size}",
        model=ModelConfig(vocab_size=50257, context=1024, layers=layers, embed=embed, heads=heads),
        compute=ComputeConfig(dtype="bfloat16", remat="dots", loss_chunks=8),
        tokenizer=TokenizerConfig(
            kind="huggingface", algorithm="byte_bpe", vocab_size=50257, sample_bytes=200_000_000
        ),
        data=DataConfig(store="data/corpus", valid_fraction=0.001),
        optim=OptimConfig(lr=lr, warmup_tokens=375_000_000),
        train=TrainConfig(tokens=10_000_000_000, batch_tokens=524_288, seq_len=1024),
        eval=EvalConfig(every=1000, batch=64),
        checkpoint=CheckpointConfig(every=1000, keep_every=5000),
    )
