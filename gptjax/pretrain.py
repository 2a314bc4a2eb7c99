"""Pre-training: next-token prediction on a token store, handed to the training loop."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from gptjax.data import loader, prepare, store
from gptjax.errors import ConfigError, DataError
from gptjax.evaluate import Scorer, TaskEvaluator, ValidationLoss, read_tasks, task_names
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.parallel import arrays, mesh, pipeline
from gptjax.param_tree import Tree
from gptjax.runtime import distributed, preemption
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.tokenizer import Tokenizer
from gptjax.training import callbacks, metrics, objective
from gptjax.training.param_groups import LrMultipliers
from gptjax.training.step import Sums
from gptjax.training.trainer import Trainer

SAMPLES = "samples"


class PretrainTask:
    """Next-token prediction on the training split of a prepared store.

    In an interleaved pipeline schedule the training tree has the layers in the pipeline's order.
    """

    lr_multipliers: LrMultipliers | None = None

    def __init__(self, cfg: Config, manifest: store.Manifest) -> None:
        """Raises DataError for a store that does not suit the configuration."""
        self._cfg, self._data = cfg, loader.TrainData.open(cfg, manifest)
        self._loss = objective.training_loss(cfg, manifest.eos_id, manifest.start_id)
        periods = cfg.model.layers // len(cfg.model.pattern)
        self._order: list[int] = pipeline.order(periods, cfg.compute.rounds).tolist()

    @property
    def layer_order(self) -> list[int] | None:
        """The model's layer (of a pattern: period) at each place of the tree; None: the same."""
        return None if self._order == sorted(self._order) else self._order

    def init(self, key: jax.Array) -> Tree:
        return self._reordered(decoder.init(self._cfg.model, key), self._order)

    def starting_params(self) -> Tree | None:
        return None

    def loss(self, params: Tree, batch: Any, keys_B2: jax.Array | None) -> tuple[jax.Array, Sums]:
        return self._loss(params, batch, keys_B2)

    def abstract_batch(self) -> Any:
        return objective.abstract_batch(self._cfg)

    def batches(self, first: int, last: int) -> Iterator[Any]:
        rows = arrays.host_rows(self._cfg.train.batch)
        batches = self._data.batches(first, last, rows, self._cfg.data.prefetch)
        return (vars(batch) for batch in batches)

    def to_model_params(self, params: Tree) -> Params:
        return self._reordered(params, np.argsort(self._order).tolist())

    def _reordered(self, params: Tree, order: list[int]) -> Tree:
        if self.layer_order is None:
            return params
        return params | {"blocks": pipeline.reordered(params["blocks"], order)}


def train(cfg: Config | str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Trains a configuration in its run folder, from where it stands; returns the last evaluation.

    `cfg` is a Config, or a preset, a JSON file or a run folder, with `overrides` as the command
    line has them: ["--optim.lr", "3e-4"]. Prepares the data if need be, and joins the job of
    several processes that the environment describes. Raises a GptjaxError.
    """
    if isinstance(cfg, str):
        cfg = config.resolve(cfg, overrides)
    cfg.check()
    if cfg.finetune.task != "none":
        raise ConfigError([f"finetune.task={cfg.finetune.task}: use `gptjax finetune`"])
    read_tasks(cfg.eval.tasks)  # so that a bad line is told before text is prepared
    distributed.join(cfg.watch.lost, Progress().say)
    progress = Progress(shown=distributed.first())
    with Watchdog(cfg.watch) as watchdog, run_dir.claim(cfg, progress.say) as changes:
        for change in changes:
            progress.say(f"changed since the run was begun: {change}")
        cfg.check(jax.device_count(), jax.process_count())
        watchdog.at("prepare", 0)
        with (
            preemption.preemptible("the text was prepared; what is done is kept"),
            distributed.first_before_others(),
            prepare.shown(progress) as tell,
        ):
            begun_with = run_dir.begun_with(cfg)
            manifest = prepare.prepare(cfg, tell, progress.say, begun_with=begun_with)
        watchdog.at("restore", 0)
        with mesh.entered_mesh(cfg):
            return pretrain(cfg, manifest, watchdog, progress)


def pretrain(
    cfg: Config, manifest: store.Manifest, watchdog: Watchdog, progress: Progress
) -> dict[str, float]:
    """Trains the configured model on a prepared store; returns the final evaluation.

    The run folder is claimed already (`run_dir.claim`). Raises what `Trainer.fit` raises, DataError
    for a store that does not suit, MismatchError where the run was begun with another store.
    """
    files = read_tasks(cfg.eval.tasks, cfg.eval.task_limit)
    task = PretrainTask(cfg, manifest)
    tokenizer = _tokenizer(cfg, manifest)
    samples = WriteSamples(cfg, tokenizer, watchdog, progress)
    distributed.agree({"the store's tokens": manifest.fingerprint(), **run_dir.facts(cfg)})
    run_dir.record(cfg, tokenizer, manifest)
    backends = objective.attention_backends(cfg)
    progress.say(f"attention: {', '.join(dict.fromkeys(backends))}")
    checkpointer = Checkpointer(
        Path(cfg.run) / run_dir.CHECKPOINTS,
        cfg.checkpoint,
        lambda step: _metadata(cfg, manifest, backends, step),
        progress.say,
        task.layer_order,
    )
    # Evaluation sees the layers in the model's order, which is that of a schedule of one round.
    eval_cfg = replace(cfg, compute=replace(cfg.compute, rounds=1, microbatches=0))
    scorer = Scorer(cfg.model, eval_cfg.compute, cfg.eval.batch, progress)
    evaluators: list[tuple[int, callbacks.Evaluator]] = [
        (cfg.eval.every, ValidationLoss(eval_cfg, manifest, progress))
    ]
    for file, name in zip(files, task_names(files), strict=True):
        evaluators.append((cfg.eval.tasks_every, TaskEvaluator(file, tokenizer, scorer, name)))
    writers = metrics.metric_writers(cfg)
    evaluate = callbacks.Evaluate(evaluators, writers, watchdog, progress)
    todo = callbacks.standard_callbacks(cfg, checkpointer, evaluate, watchdog, progress)
    todo.append(callbacks.Every(cfg.eval.sample_every, samples))
    Trainer(cfg, task, checkpointer, todo, watchdog=watchdog, progress=progress).fit()
    return evaluate.results


def _tokenizer(cfg: Config, manifest: store.Manifest) -> Tokenizer:
    """The store's tokenizer. Raises DataError where the model's vocabulary has no room for it."""
    tokenizer = tokenizers.load(epath.Path(cfg.data.store), manifest.start_id)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"model.vocab_size={cfg.model.vocab_size}: the tokenizer of {cfg.data.store} has "
            f"{tokenizer.vocab_size} pieces; raise it"
        )
    return tokenizer


def _metadata(
    cfg: Config, manifest: store.Manifest, backends: tuple[str, ...], step: int
) -> dict[str, Any]:
    """The run's part of a checkpoint's metadata."""
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


class WriteSamples:
    """An action of the training loop: continues eval.prompts, shows them, keeps them in the run."""

    def __init__(
        self, cfg: Config, tokenizer: Tokenizer, watchdog: Watchdog, progress: Progress
    ) -> None:
        """Raises ConfigError for prompts that the model cannot continue."""
        self._cfg, self._tokenizer = cfg, tokenizer
        self._watchdog, self._progress = watchdog, progress
        self._params = sample.SamplingParams(
            temperature=cfg.eval.temperature,
            top_p=cfg.eval.top_p,
            max_tokens=cfg.eval.sample_tokens,
            seed=cfg.train.seed,
        )
        prompts = [tokenizer.prompt(text) for text in cfg.eval.prompts]
        sample.check(cfg.model, prompts, self._params, tokenizer.vocab_size)

    def __call__(self, snapshot: callbacks.Snapshot) -> None:
        self._watchdog.at("eval", snapshot.step)
        cfg = self._cfg
        sampler = sample.Sampler(snapshot.model_params, cfg.model, cfg.compute, self._tokenizer)
        completions = sampler.generate(cfg.eval.prompts, self._params)
        pairs = zip(cfg.eval.prompts, completions, strict=True)
        shown = [f"--- prompt {prompt!r}\n{prompt}{one.text}\n" for prompt, one in pairs]
        self._progress.say(f"samples at step {snapshot.step}\n{''.join(shown)}".rstrip("\n"))
        if not distributed.first():
            return
        try:
            folder = Path(cfg.run) / SAMPLES
            folder.mkdir(exist_ok=True)
            (folder / f"{snapshot.step}.txt").write_text("".join(shown))
        except OSError as error:
            self._progress.say(f"samples were not written: {error}")
