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

from gptjax import config, distributed, metrics, parameters, run, sharding, train
from gptjax.checkpoint import Checkpoints, sha256_of
from gptjax.config import Config
from gptjax.data.order import Order
from gptjax.evaluate import Evaluator
from gptjax.finetune import answering, classifying, separate, start
from gptjax.finetune.base import Base, pinned
from gptjax.finetune.encoding import Special
from gptjax.finetune.examples import Examples
from gptjax.finetune.exchanges import Exchanges
from gptjax.finetune.separate import BASE_STEP, SeparateCheckpoints
from gptjax.model import counts, decoder
from gptjax.parameters import Factors, Tree
from gptjax.progress import Progress
from gptjax.train import TrainState
from gptjax.watch import Watch

REPORT = "classification.json"


def tune(
    cfg: Config,
    base: Base,
    given: Mapping[str, Examples | Exchanges],
    rows: Mapping[str, Any],
    watch: Watch,
    progress: Progress,
) -> dict[str, float]:
    """Learns from the rows of "train" and measures on those of "valid"; the last evaluation.

    The run folder is claimed already. Raises what `train.fit` raises, and MismatchError for a run
    that was begun with other examples.
    """
    answers, factors = cfg.finetune.task == "answer", start.factors(cfg)
    learning, total = parameters.counts(start.abstract(cfg), factors)
    if cfg.finetune.lora.rank:
        base = pinned(base, run.examples_of(cfg.run).get(BASE_STEP))
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
        own = sharding.host_rows(cfg.train.batch)
        return (rows["train"].take(order.ids(step, own)) for step in range(first, last))

    def begin() -> TrainState:
        tree = start.tree(cfg, start.params(cfg, base, progress.say))
        return jax.jit(lambda t: train.state_of(cfg, t, factors), donate_argnums=0)(tree)

    def plain(evaluator: Evaluator) -> Evaluator:
        return _Plain(cfg, evaluator) if cfg.finetune.lora.rank else evaluator

    labels = classifying.LabelQuality(cfg, rows["valid"], progress) if not answers else None
    right = answering.AnswersRight(cfg, given["valid"], base.tokenizer) if answers else None
    loss = (answering if answers else classifying).training_loss(cfg)
    _, evaluated = train.fit(
        cfg,
        init_fn=lambda key: start.tree(cfg, run.init_params(cfg, key)),
        start=begin,
        factors=factors,
        loss_fn=lambda tree, batch, keys_B2: loss(start.plain(cfg, tree), batch, keys_B2),
        abstract_batch=_abstract(cfg, rows["train"].take(np.arange(1))),
        batches=batches,
        evaluators=[plain(labels or answering.AnswerLoss(cfg, rows["valid"], progress))],
        tasks=[plain(right)] if right else [],
        sampler=lambda step, params: None,
        checkpoints=_checkpoints(cfg, base, backends, factors, progress.say),
        writers=functools.partial(run.writers, cfg),
        throughput=metrics.Throughput(
            counts.flops_per_token(cfg.model, cfg.train.seq_len),
            cfg.compute.dtype,
            cfg.log.peak_tflops,
        ),
        watch=watch,
        progress=progress,
    )
    if labels and distributed.first():
        run.write_json(Path(cfg.run) / REPORT, labels.report)
    if labels and (names := cfg.finetune.labels):
        matrix = classifying.table(names, labels.report["confusion"])
        progress.say(f"confusion, true labels down and predicted ones across\n{matrix}")
    return evaluated


@dataclass(frozen=True)
class _Plain:
    """An evaluator of the model's parameters, given the tree that training takes."""

    cfg: Config
    evaluator: Evaluator

    def run(self, tree: Tree) -> dict[str, float]:
        return self.evaluator.run(start.plain(self.cfg, tree))


def _checkpoints(
    cfg: Config,
    base: Base,
    backends: tuple[str, ...],
    factors: Factors | None,
    say: Callable[[str], None],
) -> Checkpoints:
    """Of everything; with adapters, of what learns, beside the base."""
    given = Path(cfg.run) / run.CHECKPOINTS, cfg.checkpoint, _describe(cfg, backends), say
    if factors is None or not cfg.finetune.lora.rank:
        return Checkpoints(*given)
    frozen = lambda: separate.frozen_of(cfg, base, factors, say)
    return SeparateCheckpoints(*given, factors=factors, frozen=frozen)


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
    given: Mapping[str, Examples | Exchanges],
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
    distributed.agree(run.facts(cfg) | {"the examples": repr(facts)})
    run.record_tuned(cfg, base.tokenizer, facts)


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
