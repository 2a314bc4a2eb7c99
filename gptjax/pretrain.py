"""Pre-training: the store, the model and the objective, handed to `train.fit`."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from gptjax import config, sample
from gptjax import tokenizer as tokenizers
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer, sha256_of
from gptjax.config import Config
from gptjax.data import loader, store
from gptjax.errors import DataError
from gptjax.evaluate import Scorer, Task, ValidationLoss, named, read_tasks
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.model.flops import ModelCost
from gptjax.parallel import arrays
from gptjax.parallel import pipeline as stages
from gptjax.runtime import distributed
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training import metrics, objective, trainer
from gptjax.training.trainer import Evaluator

SAMPLES = "samples"


def pretrain(
    cfg: Config, manifest: store.Manifest, watch: Watchdog, progress: Progress
) -> dict[str, float]:
    """Trains the configured model on a prepared store; returns the final evaluation.

    The run folder is claimed already (`run.claim`). Raises what `train.fit` raises, DataError for a
    store that does not suit, MismatchError for one that another run was begun with.
    """
    files = read_tasks(cfg.eval.tasks, cfg.eval.task_limit)
    data = loader.TrainData.open(cfg, manifest)
    tokenizer = tokenizers.load(epath.Path(cfg.data.store))
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"model.vocab_size={cfg.model.vocab_size}: the tokenizer of {cfg.data.store} has "
            f"{tokenizer.vocab_size} pieces; raise it"
        )
    prompts = [tokenizer.prompt(text) for text in cfg.eval.prompts]
    settings = sample.SamplingParams(
        temperature=cfg.eval.temperature,
        top_p=cfg.eval.top_p,
        max_tokens=cfg.eval.sample_tokens,
        seed=cfg.train.seed,
    )
    sample.check(cfg.model, prompts, settings, tokenizer.vocab_size)
    distributed.agree({"the store's tokens": manifest.fingerprint(), **run_dir.facts(cfg)})
    run_dir.record(cfg, tokenizer, manifest)
    backends = objective.backends(cfg)
    progress.say(f"attention: {', '.join(dict.fromkeys(backends))}")

    def batches(first: int, last: int) -> Iterator[Any]:
        rows = arrays.host_rows(cfg.train.batch)
        return (vars(batch) for batch in data.batches(first, last, rows, cfg.data.prefetch))

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
            "attention": backends,
        }

    # With several rounds of a pipeline, layers lie in another order than the model's.
    periods = cfg.model.layers // len(cfg.model.pattern)
    order = stages.order(periods, cfg.compute.rounds).tolist()
    ordered = lambda params, to: params | {"blocks": stages.reordered(params["blocks"], to)}
    in_model_order = lambda params: ordered(params, np.argsort(order))
    checkpoints = Checkpointer(
        Path(cfg.run) / run_dir.CHECKPOINTS,
        cfg.checkpoint,
        describe,
        progress.say,
        None if order == list(range(periods)) else order,
    )

    def sampler(step: int, params: Params) -> None:
        with_text = sample.Sampler(in_model_order(params), cfg.model, cfg.compute, tokenizer)
        done = with_text.generate(cfg.eval.prompts, settings)
        pairs = zip(cfg.eval.prompts, done, strict=True)
        shown = [f"--- prompt {prompt!r}\n{prompt}{one.text}\n" for prompt, one in pairs]
        progress.say(f"samples at step {step}\n{''.join(shown)}".rstrip("\n"))
        if not distributed.first():
            return
        try:
            folder = Path(cfg.run) / SAMPLES
            folder.mkdir(exist_ok=True)
            (folder / f"{step}.txt").write_text("".join(shown))
        except OSError as error:
            progress.say(f"samples were not written: {error}")

    compute = replace(cfg.compute, rounds=1, microbatches=0)
    scorer = Scorer(cfg.model, compute, cfg.eval.batch, progress)
    tasks = [
        _InModelOrder(Task(file, tokenizer, scorer, name), in_model_order)
        for file, name in zip(files, named(files), strict=True)
    ]
    _, evaluated = trainer.fit(
        cfg,
        init_fn=lambda key: ordered(decoder.init(cfg.model, key), order),
        loss_fn=objective.training_loss(cfg, manifest.tokenizer["eos_id"]),
        abstract_batch=objective.abstract_batch(cfg),
        batches=batches,
        evaluators=[ValidationLoss(cfg, manifest, progress)],
        tasks=tasks,
        sampler=sampler,
        checkpoints=checkpoints,
        writers=functools.partial(metrics.writers, cfg),
        throughput=metrics.Throughput(
            ModelCost(cfg.model).flops_per_token(cfg.train.seq_len),
            cfg.compute.dtype,
            cfg.log.peak_tflops,
        ),
        watch=watch,
        progress=progress,
    )
    return evaluated


@dataclass(frozen=True)
class _InModelOrder:
    """An evaluator that is given the layers in the model's order."""

    evaluator: Evaluator
    in_model_order: Callable[[Params], Params]

    def run(self, params: Params) -> Mapping[str, float]:
        return self.evaluator.run(self.in_model_order(params))
