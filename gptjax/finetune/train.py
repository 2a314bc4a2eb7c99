"""Fine-tuning: a base's parameters and the rows of examples, handed to the training loop.

RUN/finetune.json          the examples' fingerprints, the special tokens
RUN/classification.json    accuracy, F1 and confusion matrix of the last evaluation
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jax

from gptjax import bucket, config
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.checkpoint.fingerprint import sha256_of
from gptjax.config import Config
from gptjax.finetune import adapter_checkpoint
from gptjax.finetune import params as base_params
from gptjax.finetune.adapter_checkpoint import AdapterCheckpointer
from gptjax.finetune.base_model import BASE_STEP, BaseModel, tokenizer_of
from gptjax.finetune.classification import ChooseTask, ClassifyTask
from gptjax.finetune.conversations import Conversations
from gptjax.finetune.examples import Examples
from gptjax.finetune.sft import SFTTask
from gptjax.finetune.task import FinetuneTask
from gptjax.finetune.tokenize import SpecialTokens
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.runtime import distributed
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training import callbacks, metrics, param_groups, standard
from gptjax.training.trainer import Trainer

REPORT = "classification.json"
FEW_STEPS = 20
"""Fewer optimizer steps than these are told."""


def finetune(
    cfg: Config,
    base: BaseModel,
    examples: Mapping[str, Examples | Conversations],
    rows: Mapping[str, Any],
    watchdog: Watchdog,
    progress: Progress,
) -> dict[str, float]:
    """Trains on the rows of "train" and evaluates on those of "valid"; the last evaluation.

    The run folder is claimed already. Raises what `Trainer.fit` raises, and MismatchError for a run
    that was begun with other examples.
    """
    if cfg.finetune.lora.rank:
        base = base.at_step(run_dir.examples_of(cfg.run).get(BASE_STEP))
    task = _task(cfg, base, examples, rows, progress)
    trainable, total = param_groups.count_trainable(
        base_params.abstract_tree(cfg), task.lr_multipliers
    )
    _record(cfg, base, examples, rows, progress)
    if cfg.steps < FEW_STEPS:
        progress.say(
            f"only {cfg.steps} optimizer steps in all, which seldom teach anything: raise "
            f"finetune.epochs={cfg.finetune.epochs}, or lower "
            f"train.batch_tokens={cfg.train.batch_tokens}"
        )
    backends = _attention_backends(cfg)
    progress.say(f"attention: {', '.join(dict.fromkeys(backends))}")
    progress.say(f"trains {trainable:,} of {total:,} parameters, {trainable / total:.2%}")
    checkpointer = _checkpointer(task, backends, progress)
    writers = metrics.metric_writers(cfg)
    evaluators = task.evaluators(progress)
    evaluate = callbacks.Evaluate(lambda step: evaluators, writers, watchdog, progress)
    todo = standard.standard_callbacks(cfg, checkpointer, evaluate, watchdog, progress)
    Trainer(cfg, task, checkpointer, todo, watchdog=watchdog, progress=progress).fit()
    report = task.report(progress)
    if report and distributed.first():
        run_dir.write_json(bucket.path_of(cfg.run) / REPORT, report)
    return evaluate.results


def _task(
    cfg: Config,
    base: BaseModel,
    examples: Mapping[str, Examples | Conversations],
    rows: Mapping[str, Any],
    progress: Progress,
) -> FinetuneTask[Any]:
    """The configured kind of task."""
    if cfg.finetune.task == "answer":
        valid = examples["valid"]
        assert isinstance(valid, Conversations)
        return SFTTask(cfg, base, rows, valid, progress.say)
    kind = ClassifyTask if cfg.finetune.task == "classify" else ChooseTask
    return kind(cfg, base, rows, progress.say)


def _attention_backends(cfg: Config) -> tuple[str, ...]:
    return decoder.attention_backends(
        cfg.model,
        cfg.compute,
        sharding.target(),
        cfg.train.seq_len,
        segments=cfg.finetune.task == "answer",
        training=True,
    )


def _checkpointer(
    task: FinetuneTask[Any], backends: tuple[str, ...], progress: Progress
) -> Checkpointer:
    """The run's checkpointer: of whole states, or with adapters of their trainable part."""
    cfg, base, multipliers = task.cfg, task.base, task.lr_multipliers
    describe = lambda step: _metadata(cfg, backends, step)
    folder = bucket.path_of(cfg.run) / run_dir.CHECKPOINTS
    common = folder, cfg.checkpoint, describe, progress.say
    if multipliers is None or not cfg.finetune.lora.rank:
        return Checkpointer(*common)
    frozen = lambda: adapter_checkpoint.frozen_part(cfg, base, multipliers, progress.say)
    return AdapterCheckpointer(*common, lr_multipliers=multipliers, frozen=frozen)


def _record(
    cfg: Config,
    base: BaseModel,
    examples: Mapping[str, Examples | Conversations],
    rows: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Writes and tells what the run is trained on."""
    facts: dict[str, Any] = {}
    tokenizer = tokenizer_of(base)
    if base.step is not None:
        facts[BASE_STEP] = base.step
    if cfg.finetune.outputs:
        facts["special"] = SpecialTokens.of(tokenizer)._asdict()
    for name, given in examples.items():
        cut = rows[name].cut
        facts[name] = {"sha256": given.sha256, "examples": len(given), "cut": cut}
        progress.say(
            f"{name}: {len(given):,} examples of {given.path} in {len(rows[name]):,} rows, "
            f"{cut:,} of them cut to train.seq_len={cfg.train.seq_len}"
        )
        if isinstance(given, Conversations) and given.without_end:
            progress.say(
                f"{name}: in {given.without_end:,} of {len(given):,} conversations no token of the "
                "answers ends a text, so the model does not learn to stop there: the chat template "
                "should end each turn with the tokenizer's EOS"
            )
    distributed.agree(run_dir.facts(cfg) | {"the examples": repr(facts)})
    run_dir.record_tuned(cfg, tokenizer, facts)


def _metadata(cfg: Config, backends: tuple[str, ...], step: int) -> dict[str, Any]:
    """The run's part of a checkpoint's metadata."""
    return {
        "tokens_seen": step * cfg.train.batch_tokens,
        "config": config.to_dict(cfg),
        "config_sha256": sha256_of(config.to_dict(cfg)),
        "finetune": asdict(cfg.finetune),
        "rng": {"impl": str(jax.config.jax_default_prng_impl), "seed": cfg.train.seed},
        "mesh": dict(jax.sharding.get_mesh().shape),
        "attention": backends,
    }
