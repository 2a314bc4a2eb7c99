"""`gptjax finetune`: wrong files and values are reported before a device is touched."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptjax import config, load_model
from gptjax.cli import summary
from gptjax.config import Config
from gptjax.errors import ConfigError
from gptjax.finetune import conversations, defaults, examples
from gptjax.finetune.base_model import BaseModel, tokenizer_of


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    help_wanted = {"-h", "--help"} & set(overrides)
    missing = [f"--{name}" for name in ("task", "data", "valid") if getattr(args, name) is None]
    if missing and not help_wanted:
        args.subparser.error(f"the following arguments are required: {', '.join(missing)}")
    prog, text = f"{args.subparser.prog} {args.config}", args.subparser.format_help()
    override = lambda cfg: config.override(cfg, overrides, prog, text)
    if help_wanted:
        override(Config())
    resolved = lambda cfg: setattr(args, "resolved", cfg)
    cfg, results = fit(args.config, args.task, args.data, args.valid, override, resolved)
    from gptjax.runtime import distributed

    if distributed.first():
        summary.write(cfg, results)


def fit(
    path: str,
    task: str,
    data: str,
    valid: str,
    override: Callable[[Config], Config],
    resolved: Callable[[Config], None],
) -> tuple[Config, dict[str, float]]:
    """Fine-tunes a base in its run folder, from where it stands; the last evaluation.

    `override` changes the recipe's configuration, `resolved` is told what became of it.
    """
    base = load_model.find_base(path)
    cfg, given, rows = _read(override(defaults.begun(base, task, data, valid)), base, task)
    cfg.check()
    resolved(cfg)
    from gptjax.checkpoint import run_dir
    from gptjax.parallel import mesh
    from gptjax.runtime import distributed
    from gptjax.runtime.progress import Progress
    from gptjax.runtime.watchdog import Watchdog

    distributed.join(cfg.watch.lost, Progress().say)
    progress = Progress(shown=distributed.first())
    with Watchdog(cfg.watch) as watchdog, run_dir.claim(cfg, progress.say) as changes:
        for change in changes:
            progress.say(f"changed since the run was begun: {change}")
        import jax

        from gptjax.finetune import train

        cfg.check(jax.device_count(), jax.process_count())
        with mesh.entered_mesh(cfg):
            return cfg, train.finetune(cfg, base, given, rows, watchdog, progress)


def _read(
    cfg: Config, base: BaseModel, task: str
) -> tuple[Config, Mapping[str, Any], Mapping[str, Any]]:
    """The whole configuration, and the examples and the rows of "train" and "valid"."""
    if (cfg.finetune.base, cfg.finetune.task) != (base.path, task):
        raise ConfigError(["finetune.base, finetune.task: give them as RUN and as --task"])
    defaults.check_model(base.cfg.model, cfg.model)
    files = {"train": (cfg.finetune.data, "--data"), "valid": (cfg.finetune.valid, "--valid")}
    given: dict[str, Any]
    train: Any
    valid: Any
    if task == "answer":
        given = {
            name: conversations.read(*file, tokenizer_of(base)) for name, file in files.items()
        }
        cfg, train, valid = defaults.answered(cfg, base, given["train"], given["valid"])
    else:
        given = {name: examples.read(file, task, o) for name, (file, o) in files.items()}
        cfg, train, valid = defaults.labelled(
            cfg, tokenizer_of(base), given["train"], given["valid"]
        )
    return cfg, given, {"train": train, "valid": valid}
