"""`gptjax eval`: measures a model on its validation split, on given text or on task files.

Files are read and checked before the model is loaded. The results are printed as a table, or as
JSON: the values by the names of metrics, their confidence intervals, and under "repeat" all that
the numbers depend on.
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

from gptjax import config, load_model
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.fingerprint import fingerprints, sha256_of
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
from gptjax.param_tree import leaves_by_path
from gptjax.runtime import distributed
from gptjax.runtime.progress import Progress
from gptjax.tokenizer import Tokenizer
from gptjax.version import __version__

_LARGEST_BATCH = 1 << 20  # sequences


@dataclass(frozen=True)
class Options:
    """The command's options; see its help. 0 and None mean the model's own setting, or no limit."""

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
        """Raises ConfigError with every invalid value."""
        problems = [
            f"--{name}={getattr(self, name)}: must not be negative"
            for name in ("length", "stride", "limit", "batch", "seed")
            if getattr(self, name) < 0
        ]
        if self.batch > _LARGEST_BATCH:
            problems.append(f"--batch={self.batch}: must be at most {_LARGEST_BATCH}")
        if "" in self.text:
            problems.append("--text='': is empty; give a file, a folder or a pattern")
        for name in ("length", "stride", "text_field"):
            if getattr(self, name) != getattr(Options, name) and not self.text:
                problems.append(f"--{name.replace('_', '-')}: requires --text")
        if self.limit and not (self.text or self.task):
            problems.append("--limit: requires --text or --task")
        if problems:
            raise ConfigError(problems)

    def windows(self, cfg: Config) -> tuple[int, int]:
        """Length and stride, in tokens, of the sliding windows of text. Raises ConfigError."""
        length = self.length or min(cfg.train.seq_len, cfg.model.context)
        stride = self.stride or length
        if length > cfg.model.context:
            raise ConfigError(
                [f"--length={length}: must not exceed model.context={cfg.model.context}"]
            )
        if stride > length:
            raise ConfigError(
                [
                    f"--stride={stride}: must not exceed the window length of {length}, or tokens "
                    "between windows would be skipped"
                ]
            )
        return length, stride


@dataclass(frozen=True)
class Measurement:
    """A value, its confidence interval if it has one, and a description of its examples."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    over: str = ""


@dataclass(frozen=True)
class EvalInputs:
    """The task files and documents that the options name, and the SHA-256 of each file."""

    files: list[TaskFile]
    documents: Documents | None
    hashes: dict[str, str]

    @classmethod
    def read(cls, options: Options) -> "EvalInputs":
        """Reads and checks all of it. Raises what `read_tasks` and `Documents.read` raise."""
        files = read_tasks(options.task, options.limit, "--task")
        hashes = {file.path: file.sha256 for file in files}
        documents = None
        if options.text:
            cfg = DataConfig(text_field=options.text_field)
            documents = Documents.read(options.text, cfg, options.limit)
            for source in sources.resolve(tuple(options.text), "--text"):
                if isinstance(source, sources.TextFile):
                    digest = hashlib.sha256(source.path.read_bytes())
                    hashes[str(source.path)] = digest.hexdigest()
        return cls(files, documents, hashes)


def evaluate(path: str, options: Options, progress: Progress, say: Callable[[str], None]) -> None:
    """Measures a run or a Hugging Face folder, and prints the results with `say`.

    Raises ConfigError for invalid options, DataError for text and tasks that cannot be used, and
    what `load_model` raises.
    """
    options.check()
    inputs = EvalInputs.read(options)
    load_model.check_exists(path.removeprefix("hf:"))
    own_split = not (options.text or options.task)
    manifests = _manifests(path) if own_split else None

    def check(cfg: Config, tokenizer: Tokenizer | None) -> None:
        options.windows(cfg)
        if tokenizer is None:
            raise DataError(f"{path}: its source had no tokenizer, so text cannot be encoded")

    with load_model.load_model(path, dtype=options.dtype, say=progress.say, check=check) as model:
        shards = sharding.axis_size("batch")
        batch = -(-(options.batch or model.cfg.eval.batch) // shards) * shards
        cfg = replace(model.cfg, eval=replace(model.cfg.eval, batch=batch))
        if manifests is not None:
            validation = ValidationLoss(cfg, manifests, progress)
            statistics, tokens = validation.measure(model.params)
            measured = [
                Measurement(name, value)
                for name, value in validation.mixed({s.name: s.value for s in statistics}).items()
            ]
            for one in statistics:
                over = f"batches: {len(one.numerators)}"
                measured += _with_intervals([one], over, options.seed)
            measured += [
                Measurement(name, value) for name, value in validation.lost_bits_per_byte().items()
            ]
            measured.append(Measurement("valid_tokens", tokens))
        else:
            scorer = Scorer(cfg.model, cfg.compute, batch, progress)
            measured = _measure(model, inputs, options, scorer)
        repeat = _reproduction(model, inputs, options, batch)
    if options.json:
        intervals = {one.name: one.interval for one in measured if one.interval}
        values = {one.name: one.value for one in measured}
        source = {"run": path, "step": model.step}
        say(json.dumps(source | values | {"intervals": intervals, "repeat": repeat}))
    else:
        say(path if model.step is None else f"{path} at step {model.step}")
        _print_table(measured, say)


def _print_table(measured: Sequence[Measurement], say: Callable[[str], None]) -> None:
    for one in measured:
        interval = "{:.4g} to {:.4g}".format(*one.interval) if one.interval else ""
        say(f"  {one.name:24} {one.value:<10.6g} {interval:20} {one.over}".rstrip())
    if any(one.interval for one in measured):
        level, resamples = f"{bootstrap.LEVEL:.0%}", bootstrap.RESAMPLES
        say(f"  ({level} confidence intervals: bootstrap with {resamples} resamples)")


def _manifests(path: str) -> Any:
    """The manifests of the run's stores. Raises DataError for a model without validation split."""
    if load_model.is_hugging_face(path):
        raise DataError(
            f"{path}: a Hugging Face model has no validation split; give --text or --task"
        )
    cfg, _, manifests = run_dir.open_run(path)
    if manifests is None:
        raise DataError(
            f"{path}: an imported or fine-tuned model has no validation split; give --text or "
            "--task"
        )
    run_dir.check_store(cfg, manifests)
    return manifests


def _measure(
    model: LoadedModel, inputs: EvalInputs, options: Options, scorer: Scorer
) -> list[Measurement]:
    """The statistics of the text and of the tasks, with their confidence intervals."""
    assert model.tokenizer is not None
    measured: list[Measurement] = []
    if inputs.documents is not None:
        text = TextLoss(inputs.documents, model.tokenizer, scorer, *options.windows(model.cfg))
        over = _over("document", *inputs.documents.counted)
        measured += [
            *_with_intervals(text.measure(model.params), over, options.seed),
            *(Measurement(name, value) for name, value in text.lost_bits_per_byte().items()),
            Measurement("text_tokens", text.tokens),
            Measurement("text_bytes", text.bytes),
        ]
    for file, name in zip(inputs.files, task_names(inputs.files), strict=True):
        task = TaskEvaluator(file, model.tokenizer, scorer, name)
        over = _over("example", len(file.examples), file.total)
        measured += [
            *_with_intervals(task.measure(model.params), over, options.seed),
            Measurement(f"{name}_cut", task.cut),
        ]
    return measured


def _with_intervals(statistics: list[Statistic], over: str, seed: int) -> list[Measurement]:
    return [
        Measurement(one.name, one.value, one.confidence_interval(seed), over) for one in statistics
    ]


def _over(noun: str, count: int, total: int | None) -> str:
    """Describes `count` examples, the first of `total`; None for an unknown larger total."""
    examples = f"{count} {noun}{'s' * (count != 1)}"
    if total == count:
        return examples
    return f"{examples}, the first" if total is None else f"{examples}, the first of {total}"


def _reproduction(
    model: LoadedModel, inputs: EvalInputs, options: Options, batch: int
) -> dict[str, Any]:
    """All that the numbers depend on, so that the evaluation can be reproduced."""
    cfg, mesh = model.cfg, jax.sharding.get_mesh()
    settings: dict[str, Any] = {"batch": batch, "dtype": cfg.compute.dtype, "limit": options.limit}
    if inputs.documents is not None:
        length, stride = options.windows(cfg)
        settings |= {"length": length, "stride": stride, "text_field": options.text_field}
    if any(file.kind == "squad" for file in inputs.files):
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
        "files": inputs.hashes,
        "settings": settings,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "device": mesh.devices.flat[0].device_kind,
        "versions": {
            "gptjax": __version__,
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
