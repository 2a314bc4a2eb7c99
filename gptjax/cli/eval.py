"""What `gptjax eval` does: reads what it is given, opens the model, measures, and tells.

Files are read and checked before the model is. The JSON has the values by the names that metrics
have, their intervals, and under "repeat" all that the numbers depend on.
"""

import argparse
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np

import gptjax
from gptjax import config, load_model
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import fingerprints, leaves_by_path, sha256_of
from gptjax.config import Config, DataConfig
from gptjax.data import sources
from gptjax.errors import ConfigError, DataError
from gptjax.evaluate import bootstrap
from gptjax.evaluate.bootstrap import Statistic
from gptjax.evaluate.documents import Documents, TextLoss
from gptjax.evaluate.formats import TaskFile, read_tasks
from gptjax.evaluate.scoring import Scorer
from gptjax.evaluate.tasks import ANSWER_TOKENS, TaskEvaluator, task_names
from gptjax.evaluate.validation import ValidationLoss
from gptjax.load_model import LoadedModel
from gptjax.parallel import sharding
from gptjax.runtime import distributed
from gptjax.runtime.progress import Progress
from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """Of the command. 0 and None: as the model's configuration says, or no limit."""

    text: Sequence[str] = ()
    task: Sequence[str] = ()
    text_field: str = "text"
    length: int = 0
    stride: int = 0
    limit: int = 0
    batch: int = 0
    dtype: str | None = None
    seed: int = 0
    json: bool = False

    def check(self) -> None:
        """Raises ConfigError with every value that makes no sense."""
        problems = [
            f"--{name}={getattr(self, name)}: must not be negative"
            for name in ("length", "stride", "limit", "batch", "seed")
            if getattr(self, name) < 0
        ]
        for name in ("length", "stride", "text_field"):
            if getattr(self, name) != getattr(Options, name) and not self.text:
                problems.append(f"--{name.replace('_', '-')}: means nothing without --text")
        if self.limit and not (self.text or self.task):
            problems.append("--limit: means nothing without --text or --task")
        if problems:
            raise ConfigError(problems)

    def windows(self, cfg: Config) -> tuple[int, int]:
        """Length and stride of the windows of text. Raises ConfigError where they do not go."""
        length = self.length or min(cfg.train.seq_len, cfg.model.context)
        stride = self.stride or length
        if length > cfg.model.context:
            raise ConfigError([f"--length={length}: above model.context={cfg.model.context}"])
        if stride > length:
            raise ConfigError(
                [
                    f"--stride={stride}: above the window's length of {length}, so tokens between "
                    "windows would be left out"
                ]
            )
        return length, stride


@dataclass(frozen=True)
class Measured:
    """A value, its interval where it has one, and what it was measured on."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    over: str = ""


@dataclass(frozen=True)
class TokenBatch:
    """What the command line names, read and checked."""

    files: list[TaskFile]
    documents: Documents | None
    hashes: dict[str, str]

    @classmethod
    def read(cls, options: Options) -> "TokenBatch":
        """Raises ConfigError and DataError as `read_tasks` and `Documents.read` do."""
        files = read_tasks(options.task, options.limit, "--task")
        hashes = {file.path: file.sha256 for file in files}
        documents = None
        if options.text:
            cfg = DataConfig(text_field=options.text_field)
            documents = Documents.read(options.text, cfg, options.limit)
            for source in sources.resolve(tuple(options.text), "--text"):
                if isinstance(source, sources.File):
                    digest = hashlib.sha256(source.path.read_bytes())
                    hashes[str(source.path)] = digest.hexdigest()
        return cls(files, documents, hashes)


def evaluate(path: str, options: Options, progress: Progress, say: Callable[[str], None]) -> None:
    """Measures a run or a Hugging Face folder, and says the results.

    Raises ConfigError for options that make no sense, DataError for text and tasks that cannot be
    used, and what `opening.opened` does.
    """
    options.check()
    given = TokenBatch.read(options)
    own = not (options.text or options.task)
    manifest = _manifest(path) if own else None

    def check(cfg: Config, tokenizer: Tokenizer | None) -> None:
        options.windows(cfg)
        if tokenizer is None:
            raise DataError(f"{path}: its source had no tokenizer, so it cannot read text")

    with load_model.load_model(path, dtype=options.dtype, say=progress.say, check=check) as model:
        shards = sharding.axis_size("batch")
        rows = -(-(options.batch or model.cfg.eval.batch) // shards) * shards
        cfg = replace(model.cfg, eval=replace(model.cfg.eval, batch=rows))
        if manifest is not None:
            statistics, tokens = ValidationLoss(cfg, manifest, progress).measure(model.params)
            over = f"batches: {len(statistics[0].parts)}"
            measured = _with_intervals(statistics, over, options.seed)
            measured.append(Measured("valid_tokens", tokens))
        else:
            measured = _measure(
                model, given, options, Scorer(cfg.model, cfg.compute, rows, progress)
            )
        repeat = _repeat(model, given, options, rows)
    if options.json:
        intervals = {one.name: one.interval for one in measured if one.interval}
        values = {one.name: one.value for one in measured}
        place = {"run": path, "step": model.step}
        say(json.dumps(place | values | {"intervals": intervals, "repeat": repeat}))
        return
    say(path if model.step is None else f"{path} at step {model.step}")
    for one in measured:
        interval = "{:.4g} to {:.4g}".format(*one.interval) if one.interval else ""
        say(f"  {one.name:24} {one.value:<10.6g} {interval:20} {one.over}".rstrip())
    if any(one.interval for one in measured):
        say(
            f"  (intervals: {bootstrap.LEVEL:.0%}, of {bootstrap.RESAMPLES} resamples by bootstrap)"
        )


def _manifest(path: str) -> Any:
    """The manifest of a run's own validation text. Raises DataError where there is none."""
    if load_model.is_hugging_face(path):
        raise DataError(
            f"{path}: a model without validation text of its own; give --text or --task"
        )
    cfg, _, manifest = run_dir.open_run(path)
    if manifest is None:
        raise DataError(
            f"{path}: an imported or fine-tuned model, which has no validation text of its own; "
            "give --text or --task"
        )
    run_dir.check_store(cfg, manifest)
    return manifest


def _measure(
    model: LoadedModel, given: TokenBatch, options: Options, scorer: Scorer
) -> list[Measured]:
    """Every statistic of the text and the tasks, with its interval."""
    assert model.tokenizer is not None
    measured: list[Measured] = []
    if given.documents is not None:
        text = TextLoss(given.documents, model.tokenizer, scorer, *options.windows(model.cfg))
        over = _over("document", *given.documents.counted)
        measured += [
            *_with_intervals(text.measure(model.params), over, options.seed),
            Measured("text_tokens", text.tokens),
            Measured("text_bytes", text.bytes),
        ]
    for file, name in zip(given.files, task_names(given.files), strict=True):
        task = TaskEvaluator(file, model.tokenizer, scorer, name)
        over = _over("example", len(file.examples), file.total)
        measured += [
            *_with_intervals(task.measure(model.params), over, options.seed),
            Measured(f"{name}_cut", task.cut),
        ]
    return measured


def _with_intervals(statistics: list[Statistic], over: str, seed: int) -> list[Measured]:
    return [Measured(one.name, one.value, one.interval(seed), over) for one in statistics]


def _over(what: str, count: int, total: int | None) -> str:
    """How many, and of how many where they are not all; None: of more."""
    many = f"{count} {what}{'s' * (count != 1)}"
    if total == count:
        return many
    return f"{many}, the first" if total is None else f"{many}, the first of {total}"


def _repeat(model: LoadedModel, given: TokenBatch, options: Options, rows: int) -> dict[str, Any]:
    """All that the numbers depend on."""
    cfg, mesh = model.cfg, jax.sharding.get_mesh()
    settings: dict[str, Any] = {"batch": rows, "dtype": cfg.compute.dtype, "limit": options.limit}
    if given.documents is not None:
        length, stride = options.windows(cfg)
        settings |= {"length": length, "stride": stride, "text_field": options.text_field}
    if any(file.kind == "squad" for file in given.files):
        settings["answer_tokens"] = ANSWER_TOKENS
    settings |= {
        "seed": options.seed,
        "resamples": bootstrap.RESAMPLES,
        "level": bootstrap.LEVEL,
    }
    return {
        "model": config.to_dict(cfg.model),
        "params": sha256_of(fingerprints(leaves_by_path(model.params))),
        "tokenizer": model.tokenizer and model.tokenizer.fingerprint,
        "text": list(options.text),
        "tasks": list(options.task),
        "files": given.hashes,
        "settings": settings,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "device": mesh.devices.flat[0].device_kind,
        "versions": {
            "gptjax": gptjax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    distributed.join(config.WatchConfig().lost, Progress().say)
    first = distributed.first()
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    say = print if first else (lambda line: None)
    evaluate(args.run, options, Progress(shown=first), say)
