"""Pre-training on a laptop: a small decoder on the Python library's source files, no download.

    gptjax train configs/quickstart.py

README.md shows the expected results.
"""

from gptjax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)


def main() -> Config:
    """GPT-2's architecture: 4 layers of width 256, vocabulary 4096, windows of 256 tokens.

    Muon reaches 3.50 nats per token in 538 steps. On another validation text it reached 4.38, where
    AdamW reached 4.75 in 684 steps of equal size.
    """
    return Config(
        run="runs/quickstart",
        model=ModelConfig(
            vocab_size=4096, context=512, layers=4, embed=256, heads=4, linear_bias=False
        ),
        compute=ComputeConfig(scan_layers=False, loss_chunks=2),
        tokenizer=TokenizerConfig(vocab_size=4096),
        data=DataConfig(store="data/quickstart", valid_fraction=0.02),
        optim=OptimConfig(name="muon", lr=2e-3, warmup_tokens=60_000, final_lr_ratio=0.05),
        train=TrainConfig(tokens=1_100_000, batch_tokens=2048, seq_len=256),
        eval=EvalConfig(prompts=("def", "import", "class"), sample_tokens=96),
        checkpoint=CheckpointConfig(every=200),
        log=LogConfig(every=10),
    )
