"""Pre-training: next-token prediction on a token store, handed to the training loop."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from gptjax import bucket, config, sample
from gptjax import tokenizer as tokenizers
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.checkpoint.fingerprint import sha256_of
from gptjax.config import Config, ModelConfig, phases
from gptjax.data import loader, mixture, prepare, prepare_mixture
from gptjax.data.mixture import Manifests
from gptjax.errors import ConfigError, DataError
from gptjax.evaluate import Scorer, TaskEvaluator, ValidationLoss, read_tasks, task_names
from gptjax.parallel import mesh
from gptjax.pretrain import warm_start
from gptjax.pretrain.task import PretrainTask
from gptjax.pretrain.warm_start import WarmStart
from gptjax.runtime import distributed, preemption
from gptjax.runtime.progress import Progress
from gptjax.runtime.watchdog import Watchdog
from gptjax.tokenizer import Tokenizer
from gptjax.training import callbacks as callback
from gptjax.training import metrics, objective, stage_table, standard
from gptjax.training.trainer import Trainer

SAMPLES = "samples"


def train(
    cfg: Config | str,
    overrides: Sequence[str] = (),
    callbacks: Sequence[callback.Callback] = (),
) -> dict[str, float]:
    """Trains a configuration in its run folder, from where it stands; returns the last evaluation.

    `cfg` is a whole Config, or a preset, a JSON file or a run folder, with `overrides` as the
    command line has them: ["--optim.lr", "3e-4"]. `callbacks` are called after gptjax's own, each
    at the same moments. Prepares the data if need be, and joins the job of several processes that
    the environment describes. Raises a GptjaxError.
    """
    if isinstance(cfg, str):
        cfg = warm_start.with_base(config.resolve(cfg, overrides), cfg, overrides)
    cfg.check()
    if cfg.finetune.task != "none":
        raise ConfigError([f"finetune.task={cfg.finetune.task}: use `gptjax finetune`"])
    read_tasks(cfg.eval.tasks)  # so that a bad line is told before text is prepared
    metrics.check_writers(cfg)
    distributed.join(cfg.watch.lost, Progress().say)
    progress = Progress(shown=distributed.first())
    with Watchdog(cfg.watch) as watchdog, run_dir.claim(cfg, progress.say) as changes:
        for change in changes:
            progress.say(f"changed since the run was begun: {change}")
        cfg.check(jax.device_count(), jax.process_count())
        start = WarmStart.find(cfg, progress.say)
        watchdog.at("prepare", 0)
        with (
            preemption.preemptible("the text was prepared; what is done is kept"),
            distributed.first_before_others(),
            prepare.shown(progress) as tell,
        ):
            begun_with = run_dir.begun_with(cfg)
            manifests = prepare_mixture.prepare_parts(
                cfg, tell, progress.say, begun_with=begun_with
            )
        watchdog.at("restore", 0)
        with mesh.entered_mesh(cfg):
            return pretrain(cfg, manifests, watchdog, progress, start, callbacks)


def pretrain(
    cfg: Config,
    manifests: Manifests,
    watchdog: Watchdog,
    progress: Progress,
    start: WarmStart | None = None,
    more: Sequence[callback.Callback] = (),
) -> dict[str, float]:
    """Trains the configured model on prepared stores; returns the final evaluation.

    `start` is the base of a run that is to begin with its parameters, `more` further callbacks.

    The run folder is claimed already (`run_dir.claim`). Raises what `Trainer.fit` raises, DataError
    for a store that does not suit, MismatchError where the run was begun with another store.
    """
    data = loader.TrainData.open(cfg, manifests)
    limited = mixture.limited(cfg, data.order, progress.say)
    for line in stage_table.lines(limited, data.order.epochs_at):
        progress.say(line)
    tokenizer = _tokenizer(cfg, manifests)
    writers = metrics.metric_writers(cfg)
    samples = WriteSamples(cfg, tokenizer, writers, watchdog, progress)
    distributed.agree({"the stores' tokens": repr(manifests.fingerprints()), **run_dir.facts(cfg)})
    run_dir.record(cfg, tokenizer, manifests)
    cfg = limited
    if start is not None:
        start.check_steps(cfg)
    task = PretrainTask(cfg, data, manifests, start, progress.say)
    found = phases.phases(cfg)
    lengths = {phase.seq_len for phase in found}
    backends = {length: objective.attention_backends(cfg, length) for length in lengths}
    chosen = [name for length in sorted(lengths) for name in backends[length]]
    progress.say(f"attention: {', '.join(dict.fromkeys(chosen))}")
    checkpointer = Checkpointer(
        bucket.path_of(cfg.run) / run_dir.CHECKPOINTS,
        cfg.checkpoint,
        lambda step: _metadata(cfg, manifests, backends, step),
        progress.say,
        task.layer_order,
        phases.borders(cfg),
    )
    evaluators = _evaluators(cfg, manifests, tokenizer, progress)
    evaluate = callback.Evaluate(evaluators, writers, watchdog, progress)
    todo = standard.standard_callbacks(cfg, checkpointer, evaluate, watchdog, progress, data.epochs)
    todo += [callback.Every(cfg.eval.sample_every, samples), *more]
    Trainer(cfg, task, checkpointer, todo, watchdog=watchdog, progress=progress).fit()
    return evaluate.results


def _evaluators(
    cfg: Config, manifests: Manifests, tokenizer: Tokenizer, progress: Progress
) -> Callable[[int], list[tuple[int, callback.Evaluator]]]:
    """The evaluators of a step, with their periods: made anew where a stage changes the model."""
    files = read_tasks(cfg.eval.tasks, cfg.eval.task_limit)
    # Evaluation sees the layers in the model's order, which is that of a schedule of one round.
    eval_cfg = replace(cfg, compute=replace(cfg.compute, rounds=1, microbatches=0))

    @functools.cache
    def of_model(model: ModelConfig) -> list[tuple[int, callback.Evaluator]]:
        scorer = Scorer(model, eval_cfg.compute, cfg.eval.batch, progress)
        loss = ValidationLoss(replace(eval_cfg, model=model), manifests, progress)
        tasks = [
            (cfg.eval.tasks_every, TaskEvaluator(file, tokenizer, scorer, name))
            for file, name in zip(files, task_names(files), strict=True)
        ]
        return [(cfg.eval.every, loss), *tasks]

    of_model(phases.trained(cfg, 0).model)  # whose problems are told before anything is trained
    return lambda step: of_model(phases.trained(cfg, step).model)


def _tokenizer(cfg: Config, manifests: Manifests) -> Tokenizer:
    """The stores' tokenizer. Raises DataError where the model's vocabulary has no room for it."""
    first = next(iter(mixture.part_configs(cfg).values())).data.store
    tokenizer = tokenizers.load(bucket.path_of(first), manifests.start_id)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"model.vocab_size={cfg.model.vocab_size}: the tokenizer of {first} has "
            f"{tokenizer.vocab_size} pieces; raise it"
        )
    return tokenizer


def _metadata(
    cfg: Config, manifests: Manifests, backends: Mapping[int, tuple[str, ...]], step: int
) -> dict[str, Any]:
    """The run's part of a checkpoint's metadata."""
    phase = phases.phase_at(phases.phases(cfg), max(0, step - 1))
    return {
        "tokens_seen": phase.tokens_at(step),
        "config": config.to_dict(cfg),
        "config_sha256": sha256_of(config.to_dict(cfg)),
        "tokenizer": manifests.tokenizer,
        "data": {
            "fingerprints": manifests.fingerprints(),
            "seed": cfg.train.seed,
            "cursor": step,
            "batch": phase.batch,
            "seq_len": phase.seq_len,
        },
        "rng": {"impl": str(jax.config.jax_default_prng_impl), "seed": cfg.train.seed},
        "mesh": dict(jax.sharding.get_mesh().shape),
        "attention": backends[phase.seq_len],
        **({"stage": phase.stage} if phase.stage else {}),
        **({"start": run_dir.start_of(cfg.run)} if cfg.start.base else {}),
    }


class WriteSamples:
    """An action of the training loop: continues eval.prompts, shows them, keeps them in the run."""

    def __init__(
        self,
        cfg: Config,
        tokenizer: Tokenizer,
        writers: metrics.Writers,
        watchdog: Watchdog,
        progress: Progress,
    ) -> None:
        """Raises ConfigError for prompts that the model cannot continue."""
        self._cfg, self._tokenizer, self._writers = cfg, tokenizer, writers
        self._watchdog, self._progress = watchdog, progress
        self._params = sample.SamplingParams(
            temperature=cfg.eval.temperature,
            top_p=cfg.eval.top_p,
            max_tokens=cfg.eval.sample_tokens,
            seed=cfg.train.seed,
        )
        prompts = [tokenizer.prompt(text) for text in cfg.eval.prompts]
        sample.check(cfg.model, prompts, self._params, tokenizer.vocab_size)

    def __call__(self, snapshot: callback.Snapshot) -> None:
        self._watchdog.at("eval", snapshot.step)
        cfg = self._cfg
        model = phases.trained(cfg, snapshot.step).model
        sampler = sample.Sampler(snapshot.model_params, model, cfg.compute, self._tokenizer)
        completions = sampler.generate(cfg.eval.prompts, self._params)
        pairs = zip(cfg.eval.prompts, completions, strict=True)
        shown = [f"--- prompt {prompt!r}\n{prompt}{one.text}\n" for prompt, one in pairs]
        self._progress.say(f"samples at step {snapshot.step}\n{''.join(shown)}".rstrip("\n"))
        if not distributed.first():
            return
        self._writers.text(snapshot.step, "samples", "".join(shown))
        try:
            folder = run_dir.log_folder(cfg.run) / SAMPLES
            folder.mkdir(exist_ok=True)
            (folder / f"{snapshot.step}.txt").write_text("".join(shown))
        except OSError as error:
            self._progress.say(f"samples were not written: {error}")
