"""A tiny model that shows every part of a run in seconds: bytes, two layers of width 64.

gptjax train configs/debug.py --data.sources README.md --data.valid-sources CHANGELOG.md
"""

from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)


def main() -> Config:
    """40 steps of 16 windows of 64 bytes."""
    return Config(
        run="runs/debug",
        model=ModelConfig(vocab_size=258, context=128, layers=2, embed=64, heads=4),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(store="data/debug", workers=1),
        optim=OptimConfig(lr=3e-3, warmup_tokens=4096),
        train=TrainConfig(tokens=40_960, batch_tokens=1024, seq_len=64),
        eval=EvalConfig(every=20, sample_tokens=32),
        checkpoint=CheckpointConfig(every=10),
    )
