"""Fine-tuning: the base's parameters, the rows of the examples and an objective, to `train.fit`.

RUN/finetune.json          the examples' fingerprints, the special tokens
RUN/classification.json    accuracy, F1 and confusion matrix of the last evaluation
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer, sha256_of
from gptjax.config import Config
from gptjax.data.permutation import Order
from gptjax.finetune import adapter_checkpoint, classification, sft
from gptjax.finetune import params as base_params
from gptjax.finetune.adapter_checkpoint import BASE_STEP, SeparateCheckpoints
from gptjax.finetune.base_model import Base, pinned
from gptjax.finetune.conversations import Conversations
from gptjax.finetune.examples import Examples
from gptjax.finetune.tokenize import Special
from gptjax.model import decoder, heads
from gptjax.model.flops import ModelCost
from gptjax.parallel import arrays, sharding
from gptjax.param_tree import Tree
from gptjax.runtime import distributed
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.training import metrics, param_groups, trainer
from gptjax.training.param_groups import LrMultipliers
from gptjax.training.step import TrainState, state_of
from gptjax.training.trainer import Evaluator

REPORT = "classification.json"


def tune(
    cfg: Config,
    base: Base,
    given: Mapping[str, Examples | Conversations],
    rows: Mapping[str, Any],
    watch: Watchdog,
    progress: Progress,
) -> dict[str, float]:
    """Learns from the rows of "train" and measures on those of "valid"; the last evaluation.

    The run folder is claimed already. Raises what `train.fit` raises, and MismatchError for a run
    that was begun with other examples.
    """
    answers, lr_multipliers = cfg.finetune.task == "answer", base_params.lr_multipliers(cfg)
    learning, total = param_groups.count_trainable(base_params.abstract(cfg), lr_multipliers)
    if cfg.finetune.lora.rank:
        base = pinned(base, run_dir.examples_of(cfg.run).get(BASE_STEP))
    _record(cfg, base, given, rows, progress)
    backends = decoder.attention_backends(
        cfg.model,
        cfg.compute,
        sharding.platform(),
        cfg.train.seq_len,
        segments=answers,
        training=True,
    )
    progress.say(f"attention: {', '.join(dict.fromkeys(backends))}")
    progress.say(f"learns {learning:,} of {total:,} parameters, {learning / total:.2%}")
    order = Order(len(rows["train"]), cfg.train.batch, cfg.train.seed)

    def batches(first: int, last: int) -> Iterator[Any]:
        own = arrays.host_rows(cfg.train.batch)
        return (rows["train"].take(order.ids(step, own)) for step in range(first, last))

    def begin() -> TrainState:
        tree = base_params.tree(cfg, base_params.params(cfg, base, progress.say))
        return jax.jit(lambda t: state_of(cfg, t, lr_multipliers), donate_argnums=0)(tree)

    def plain(evaluator: Evaluator) -> Evaluator:
        return _Plain(cfg, evaluator) if cfg.finetune.lora.rank else evaluator

    labels = classification.LabelQuality(cfg, rows["valid"], progress) if not answers else None
    right = sft.AnswersRight(cfg, given["valid"], base.tokenizer) if answers else None
    loss = (sft if answers else classification).training_loss(cfg)
    _, evaluated = trainer.fit(
        cfg,
        init_fn=lambda key: base_params.tree(cfg, heads.init_params(cfg, key)),
        start=begin,
        lr_multipliers=lr_multipliers,
        loss_fn=lambda tree, batch, keys_B2: loss(base_params.plain(cfg, tree), batch, keys_B2),
        abstract_batch=_abstract(cfg, rows["train"].take(np.arange(1))),
        batches=batches,
        evaluators=[plain(labels or sft.AnswerLoss(cfg, rows["valid"], progress))],
        tasks=[plain(right)] if right else [],
        sampler=lambda step, params: None,
        checkpoints=_checkpoints(cfg, base, backends, lr_multipliers, progress.say),
        writers=functools.partial(metrics.writers, cfg),
        throughput=metrics.Throughput(
            ModelCost(cfg.model).flops_per_token(cfg.train.seq_len),
            cfg.compute.dtype,
            cfg.log.peak_tflops,
        ),
        watch=watch,
        progress=progress,
    )
    if labels and distributed.first():
        run_dir.write_json(Path(cfg.run) / REPORT, labels.report)
    if labels and (names := cfg.finetune.labels):
        matrix = classification.table(names, labels.report["confusion"])
        progress.say(f"confusion, true labels down and predicted ones across\n{matrix}")
    return evaluated


@dataclass(frozen=True)
class _Plain:
    """An evaluator of the model's parameters, given the tree that training takes."""

    cfg: Config
    evaluator: Evaluator

    def run(self, tree: Tree) -> dict[str, float]:
        return self.evaluator.run(base_params.plain(self.cfg, tree))


def _checkpoints(
    cfg: Config,
    base: Base,
    backends: tuple[str, ...],
    lr_multipliers: LrMultipliers | None,
    say: Callable[[str], None],
) -> Checkpointer:
    """Of everything; with adapters, of what learns, beside the base."""
    given = Path(cfg.run) / run_dir.CHECKPOINTS, cfg.checkpoint, _describe(cfg, backends), say
    if lr_multipliers is None or not cfg.finetune.lora.rank:
        return Checkpointer(*given)
    frozen = lambda: adapter_checkpoint.frozen_of(cfg, base, lr_multipliers, say)
    return SeparateCheckpoints(*given, lr_multipliers=lr_multipliers, frozen=frozen)


def _abstract(cfg: Config, row: Mapping[str, np.ndarray]) -> Any:
    """Shapes and layouts of a training batch on the ambient mesh, from one of its rows."""
    mesh = jax.sharding.get_mesh()

    def one(example: np.ndarray) -> jax.ShapeDtypeStruct:
        axes = sharding.spec("batch", *[None] * (example.ndim - 1))
        shape = (cfg.train.batch, *example.shape[1:])
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, axes))

    return jax.tree.map(one, dict(row))


def _record(
    cfg: Config,
    base: Base,
    given: Mapping[str, Examples | Conversations],
    rows: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Writes down and tells what is learnt from."""
    facts: dict[str, Any] = {}
    if base.step is not None:
        facts[BASE_STEP] = base.step
    if cfg.finetune.outputs:
        facts["special"] = Special.of(base.tokenizer)._asdict()
    for name, examples in given.items():
        cut = rows[name].cut
        facts[name] = {"sha256": examples.sha256, "examples": len(examples), "cut": cut}
        progress.say(
            f"{name}: {len(examples):,} examples of {examples.path} in {len(rows[name]):,} rows, "
            f"{cut:,} of them cut to train.seq_len={cfg.train.seq_len}"
        )
    distributed.agree(run_dir.facts(cfg) | {"the examples": repr(facts)})
    run_dir.record_tuned(cfg, base.tokenizer, facts)


def _describe(cfg: Config, backends: tuple[str, ...]) -> Callable[[int], dict[str, Any]]:
    """What a checkpoint's metadata say of the run."""
    return lambda step: {
        "tokens_seen": step * cfg.train.batch_tokens,
        "config": config.to_dict(cfg),
        "config_sha256": sha256_of(config.to_dict(cfg)),
        "finetune": asdict(cfg.finetune),
        "rng": {"impl": str(jax.config.jax_default_prng_impl), "seed": cfg.train.seed},
        "mesh": dict(jax.sharding.get_mesh().shape),
        "attention": backends,
    }
