"""Fine-tuning: the base's parameters, the rows of the examples and an objective, to `train.fit`.

RUN/finetune.json          the examples' fingerprints, the special tokens
RUN/classification.json    accuracy, F1 and confusion matrix of the last evaluation
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config, distributed, metrics, run, sharding, train, weights
from gptjax.checkpoint import Checkpoints, sha256_of
from gptjax.config import Config
from gptjax.data.order import Order
from gptjax.finetune import answering, classifying, heads
from gptjax.finetune.encoding import Special
from gptjax.finetune.examples import Examples
from gptjax.finetune.exchanges import Exchanges
from gptjax.finetune.recipe import Base
from gptjax.model import counts, decoder
from gptjax.model.decoder import Params
from gptjax.progress import Progress
from gptjax.tokenizer import Tokenizer
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
    answers = cfg.finetune.task == "answer"
    _record(cfg, base.tokenizer, given, rows, progress)
    backends = decoder.attention_backends(
        cfg.model,
        cfg.compute,
        sharding.platform(),
        cfg.train.seq_len,
        segments=answers,
        training=True,
    )
    progress.say(f"attention: {', '.join(dict.fromkeys(backends))}")
    order = Order(len(rows["train"]), cfg.train.batch, cfg.train.seed)

    def batches(first: int, last: int) -> Iterator[Any]:
        own = sharding.host_rows(cfg.train.batch)
        return (rows["train"].take(order.ids(step, own)) for step in range(first, last))

    labels = classifying.LabelQuality(cfg, rows["valid"], progress) if not answers else None
    objective = answering if answers else classifying
    _, evaluated = train.fit(
        cfg,
        init_fn=functools.partial(run.init_params, cfg),
        start=lambda: begin(cfg, base, progress.say),
        loss_fn=objective.training_loss(cfg),
        abstract_batch=_abstract(cfg, rows["train"].take(np.arange(1))),
        batches=batches,
        evaluators=[labels or answering.AnswerLoss(cfg, rows["valid"], progress)],
        tasks=[] if labels else [answering.AnswersRight(cfg, given["valid"], base.tokenizer)],
        sampler=lambda step, params: None,
        checkpoints=Checkpoints(
            Path(cfg.run) / run.CHECKPOINTS, cfg.checkpoint, _describe(cfg, backends), progress.say
        ),
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


def _abstract(cfg: Config, row: Mapping[str, np.ndarray]) -> Any:
    """Shapes and layouts of a training batch on the ambient mesh, from one of its rows."""
    mesh = jax.sharding.get_mesh()

    def one(example: np.ndarray) -> jax.ShapeDtypeStruct:
        axes = sharding.spec("batch", *[None] * (example.ndim - 1))
        shape = (cfg.train.batch, *example.shape[1:])
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, axes))

    return jax.tree.map(one, dict(row))


def begin(cfg: Config, base: Base, say: Callable[[str], None]) -> TrainState:
    """The state before the first step: the base's parameters, new rows and layers beside them."""
    if base.path.startswith("hf:"):
        params = weights.read_params(weights.open_source(Path(base.path.removeprefix("hf:"))))
        say(f"begins from {base.path}")
    else:
        params, step = run.restore_params(base.path, base.cfg, say)
        say(f"begins from {base.path} after its step {step}")
    params = {name: tree for name, tree in params.items() if name != heads.NAME}
    special = Special.of(base.tokenizer) if cfg.finetune.outputs else None
    make = lambda params: train.state_of(
        cfg, params if special is None else extended(cfg, params, special)
    )
    return jax.jit(make, donate_argnums=0)(params)


def extended(cfg: Config, base: Params, special: Special) -> Params:
    """A base's parameters with random rows for the special tokens, and a fresh task's layer."""
    key = train.init_key(cfg)
    fresh = run.init_params(cfg, key)
    tables = {
        name: _with_rows(base[name], fresh[name], special)
        for name in ("embed", "head")
        if name in base
    }
    return base | tables | {heads.NAME: fresh[heads.NAME]}


def _with_rows(old_VD: jax.Array, fresh_VD: jax.Array, special: Special) -> jax.Array:
    """A table with rows of its own up to the special tokens, and fresh ones from there on."""
    axes = jax.typeof(fresh_VD).sharding.spec
    more = len(fresh_VD) - len(old_VD)
    if more:
        whole = jax.sharding.reshard(old_VD, jax.P(None, axes[1]))
        zeros = jnp.zeros((more, old_VD.shape[1]), old_VD.dtype, out_sharding=jax.P(None, axes[1]))
        old_VD = jax.sharding.reshard(jnp.concatenate([whole, zeros]), axes)
    ids_V = jnp.arange(len(fresh_VD), out_sharding=jax.P(axes[0]))
    new_V = (ids_V >= special.start) & (ids_V <= special.extract)
    return jnp.where(new_V[:, None], fresh_VD, old_VD)


def _record(
    cfg: Config,
    tokenizer: Tokenizer,
    given: Mapping[str, Examples | Exchanges],
    rows: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Writes down and tells what is learnt from."""
    facts: dict[str, Any] = {}
    if cfg.finetune.outputs:
        facts["special"] = Special.of(tokenizer)._asdict()
    for name, examples in given.items():
        cut = rows[name].cut
        facts[name] = {"sha256": examples.sha256, "examples": len(examples), "cut": cut}
        progress.say(
            f"{name}: {len(examples):,} examples of {examples.path} in {len(rows[name]):,} rows, "
            f"{cut:,} of them cut to train.seq_len={cfg.train.seq_len}"
        )
    distributed.agree(run.facts(cfg) | {"the examples": repr(facts)})
    run.record_tuned(cfg, tokenizer, facts)


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
