"""GPT-1 (Radford et al. 2018): normalisation after each sub-layer, learned positions, GELU.

    gptjax train configs/gpt1.py:base --data.sources 'books/*.txt' --data.store data/books

The recipe is the paper's: Adam with a peak of 2.5e-4 after 2000 steps of warm-up and a cosine to
zero, 64 windows of 512 tokens a step, dropout of 0.1, decay of 0.01 on matrices. Its 100 epochs of
BooksCorpus are about 100 billion tokens. The decoder here uses the tanh approximation of GELU, as
the released code does.
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


def base() -> Config:
    """117M parameters: 12 layers of 768, context 512."""
    return Config(
        run="runs/gpt1",
        model=ModelConfig(
            vocab_size=40478,
            context=512,
            layers=12,
            embed=768,
            heads=12,
            norm_position="post",
            dropout=0.1,
        ),
        compute=ComputeConfig(loss_chunks=4),
        tokenizer=TokenizerConfig(vocab_size=40478, sample_bytes=200_000_000),
        data=DataConfig(store="data/corpus", valid_fraction=0.001),
        optim=OptimConfig(
            lr=2.5e-4,
            warmup_tokens=2000 * 64 * 512,
            final_lr_ratio=0.0,
            b2=0.999,
            weight_decay=0.01,
        ),
        train=TrainConfig(tokens=100_000_000_000, batch_tokens=64 * 512, seq_len=512),
        eval=EvalConfig(every=5000, batch=64),
        checkpoint=CheckpointConfig(every=5000, keep_every=100_000),
    )
