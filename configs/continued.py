"""Pre-training that goes on from a model: a run, or a folder of Hugging Face's layout.

    gptjax train continued --start hf:FOLDER --data.sources 'new/*.jsonl.zst' --data.store data/new
    gptjax train continued:annealed --start runs/gpt2@40000 --start.optimizer --run runs/annealed

Model and tokenizer are those of the base; the model in these presets is only a place for it.
"""

from dataclasses import replace

from gptjax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    TrainConfig,
)


def main() -> Config:
    """Continued pre-training on other text: the learning rate is warmed up again, and decays again.

    Re-warming and re-decaying follow Ibrahim et al. 2024 (Simple and Scalable Strategies to
    Continually Pre-train Large Language Models), who warm up over 1 % of the tokens to the rate
    of pre-training, 3e-4 for 405 million to 10 billion parameters, and decay by a cosine to a
    tenth. They also mix 5 % of the old text in, against forgetting. Budget and batch are ours.
    """
    return Config(
        run="runs/continued",
        compute=ComputeConfig(dtype="bfloat16", remat="dots"),
        data=DataConfig(store="data/continued"),
        optim=OptimConfig(lr=3e-4, warmup_tokens=10_000_000, final_lr_ratio=0.1),
        train=TrainConfig(tokens=1_000_000_000, batch_tokens=524_288, seq_len=1024),
        eval=EvalConfig(every=500),
        checkpoint=CheckpointConfig(every=500),
    )


def annealed() -> Config:
    """The last phase of a run with a constant rate, on better text: a linear decay to zero.

    Llama 3 (Grattafiori et al. 2024, section 3.4.3) ends so over 40 billion tokens, and averages
    checkpoints meanwhile (train.ema_decay). Give the base's own optim.lr, and its batch.
    """
    cfg = main()
    return replace(
        cfg,
        run="runs/annealed",
        data=replace(cfg.data, store="data/annealed"),
        optim=replace(cfg.optim, lr_schedule="linear", warmup_tokens=0, final_lr_ratio=0.0),
    )
