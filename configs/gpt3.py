"""GPT-3 (Brown et al. 2020) in the eight sizes of its table 2.1.

    gptjax train configs/gpt3.py:gpt3_125m --data.sources 'corpus/*.jsonl.zst'

Peak rates and batches are the table's; Adam with betas 0.9 and 0.95, decay 0.1, clipping at 1,
warm-up over 375 million tokens, a cosine to a tenth by 260 billion tokens, a constant rate up to
300 billion. The batch grows linearly from 32 thousand tokens over the first 4 to 12 billion tokens,
by the size of the model; which size has which length was not published, and here it is 4, 6, 8
and 12 billion for the table's four batches. It grows in the steps that the table's batches allow,
of 32 or 96 thousand tokens. The paper alternates full attention with locally banded sparse patterns
whose details were never published; full attention is the usual substitute, and `--model.pattern
full window --model.window 256` alternates it with a sliding window.

Two rows of the table are inconsistent. 1.3B has 24 heads of 128 for a width of 2048: here 16, so
that attention is as wide as the model. 13B has a width of 5140, which 40 heads do not divide:
`gpt3_13b` has the printed width, with 20 heads of 257, and `gpt3_13b_5120` has 40 heads of 128.
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


def gpt3_125m() -> Config:
    """12 layers of 768."""
    return _gpt3("125m", layers=12, embed=768, heads=12, lr=6e-4, **_HALF)


def gpt3_350m() -> Config:
    """24 layers of 1024."""
    return _gpt3("350m", layers=24, embed=1024, heads=16, lr=3e-4, **_HALF)


def gpt3_760m() -> Config:
    """24 layers of 1536."""
    return _gpt3("760m", layers=24, embed=1536, heads=16, lr=2.5e-4, **_HALF)


def gpt3_1_3b() -> Config:
    """24 layers of 2048, 16 heads of 128."""
    return _gpt3("1.3b", layers=24, embed=2048, heads=16, lr=2e-4, **_ONE)


def gpt3_2_7b() -> Config:
    """32 layers of 2560."""
    return _gpt3("2.7b", layers=32, embed=2560, heads=32, lr=1.6e-4, **_ONE)


def gpt3_6_7b() -> Config:
    """32 layers of 4096."""
    return _gpt3("6.7b", layers=32, embed=4096, heads=32, lr=1.2e-4, **_TWO)


def gpt3_13b() -> Config:
    """40 layers of 5140, as printed."""
    return _gpt3("13b", layers=40, embed=5140, heads=20, lr=1e-4, **_TWO)


def gpt3_13b_5120() -> Config:
    """40 layers of 5120, 40 heads of 128."""
    return _gpt3("13b-5120", layers=40, embed=5120, heads=40, lr=1e-4, **_TWO)


def gpt3_175b() -> Config:
    """96 layers of 12288."""
    return _gpt3("175b", layers=96, embed=12288, heads=96, lr=0.6e-4, **_THREE)


# Tokens of a batch, of what it grows by, and of its growth.
_HALF = {"batch": 524_288, "increment": 32_768, "ramp": 4_000_000_000}
_ONE = {"batch": 1_048_576, "increment": 32_768, "ramp": 6_000_000_000}
_TWO = {"batch": 2_097_152, "increment": 98_304, "ramp": 8_000_000_000}
_THREE = {"batch": 3_276_800, "increment": 98_304, "ramp": 12_000_000_000}


def _gpt3(
    size: str,
    *,
    layers: int,
    embed: int,
    heads: int,
    lr: float,
    batch: int,
    increment: int,
    ramp: int,
) -> Config:
    return Config(
        run=f"runs/gpt3-{size}",
        model=ModelConfig(vocab_size=50257, context=2048, layers=layers, embed=embed, heads=heads),
        compute=ComputeConfig(dtype="bfloat16", remat="block", loss_chunks=8),
        tokenizer=TokenizerConfig(
            kind="huggingface", algorithm="byte_bpe", vocab_size=50257, sample_bytes=200_000_000
        ),
        data=DataConfig(store="data/corpus", valid_fraction=0.001),
        optim=OptimConfig(lr=lr, warmup_tokens=375_000_000, decay_tokens=259_625_000_000),
        train=TrainConfig(
            tokens=300_000_000_000,
            batch_tokens=batch,
            batch_ramp_tokens=ramp,
            batch_start_tokens=32_768,
            batch_increment_tokens=increment,
            seq_len=2048,
        ),
        eval=EvalConfig(every=2000, batch=64),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
    )
