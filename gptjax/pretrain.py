"""Pre-training: the store, the model and the objective, handed to `train.fit`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from gptjax import config, metrics, run, sample, sharding, train
from gptjax import tokenizer as tokenizers
from gptjax.checkpoint import Checkpoints, sha256_of
from gptjax.config import Config
from gptjax.data import pipeline, store
from gptjax.data.order import Order
from gptjax.errors import DataError
from gptjax.evaluate import ValidationLoss, device_batch
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.objective import next_token
from gptjax.progress import Progress

SAMPLES_FILE = "samples.txt"


def pretrain(cfg: Config, manifest: store.Manifest, progress: Progress) -> dict[str, float]:
    """Trains the configured model on a prepared store; returns the final evaluation.

    The run folder is claimed already (`run.claim`). Raises what `train.fit` raises, DataError for a
    store that does not suit, MismatchError for one that another run was begun with.
    """
    tokenizer = tokenizers.load(Path(cfg.data.store))
    reader = store.Reader(cfg.data.store, "train", manifest)
    windows = pipeline.training_windows(len(reader), cfg.train.seq_len)
    if windows < 1:
        raise DataError(
            f"data.store={cfg.data.store}: {len(reader)} training tokens are no window of "
            f"train.seq_len={cfg.train.seq_len}; give more text"
        )
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"model.vocab_size={cfg.model.vocab_size}: the tokenizer of {cfg.data.store} has "
            f"{tokenizer.vocab_size} pieces; raise it"
        )
    run.record(cfg, tokenizer, manifest)
    order = Order(windows, cfg.train.batch, cfg.train.seed)

    def batches(step: int) -> Iterator[Any]:
        rows = sharding.host_rows(cfg.train.batch)
        stream = pipeline.train_batches(
            reader, order, cfg.train.seq_len, step, cfg.train.steps, rows, cfg.data.prefetch
        )
        return (device_batch(batch, cfg.train.batch) for batch in stream)

    def writers(step: int) -> metrics.Writers:
        folder = Path(cfg.run)
        kinds: list[Any] = [metrics.JsonlWriter]
        if cfg.log.tensorboard:
            kinds.append(metrics.TensorBoardWriter)
        if jax.process_index():
            kinds = []
        return metrics.Writers([kind(folder, step) for kind in kinds])

    def describe(step: int) -> dict[str, Any]:
        return {
            "tokens_seen": step * cfg.train.batch_tokens,
            "config": config.to_dict(cfg),
            "config_sha256": sha256_of(config.to_dict(cfg)),
            "tokenizer": manifest.tokenizer,
            "data": {
                "fingerprint": manifest.fingerprint(),
                "seed": cfg.train.seed,
                "cursor": step,
                "batch": cfg.train.batch,
                "seq_len": cfg.train.seq_len,
            },
            "rng": {"impl": str(jax.config.jax_default_prng_impl), "seed": cfg.train.seed},
            "mesh": dict(jax.sharding.get_mesh().shape),
        }

    checkpoints = Checkpoints(
        Path(cfg.run) / run.CHECKPOINTS, cfg.checkpoint, describe, progress.say
    )

    def sampler(step: int, params: Params) -> None:
        settings = sample.Settings(
            temperature=cfg.eval.temperature,
            top_p=cfg.eval.top_p,
            max_tokens=cfg.eval.sample_tokens,
            seed=cfg.train.seed,
        )
        prompts = cfg.eval.prompts
        texts = sample.continue_texts(params, cfg.model, cfg.compute, tokenizer, prompts, settings)
        with (Path(cfg.run) / SAMPLES_FILE).open("a") as stream:
            for prompt, text in zip(prompts, texts, strict=True):
                entry = f"--- step {step}, prompt {prompt!r}\n{prompt}{text}\n"
                stream.write(entry)
                progress.say(entry.rstrip("\n"))

    _, evaluated = train.fit(
        cfg,
        init_fn=lambda key: decoder.init(cfg.model, key),
        loss_fn=lambda params, batch, key: next_token(
            params, cfg, batch, manifest.tokenizer["eos_id"], key
        ),
        batches=batches,
        evaluators=[ValidationLoss(cfg, manifest, progress)],
        sampler=sampler,
        checkpoints=checkpoints,
        writers=writers,
        throughput=metrics.Throughput(
            decoder.flops_per_token(cfg.model, cfg.train.seq_len),
            cfg.compute.dtype,
            cfg.log.peak_tflops,
        ),
        progress=progress,
    )
    return evaluated
