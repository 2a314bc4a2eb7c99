"""`gptjax data`: prepare, verify, show and benchmark training data."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from gptjax import config
from gptjax.cli.arguments import resolve
from gptjax.errors import ConfigError, DataError
from gptjax.runtime.progress import Progress

_LAST_STEP = 10**12
_LONGEST_BENCH = 86400


def manifest_of(cfg: config.Config, progress: Progress) -> Any:
    """The manifest of the configured store, which is made now if it is not there."""
    from gptjax.data import prepare

    with prepare.shown(progress) as tell:
        return prepare.prepare(cfg, tell, progress.say)


def prepare(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    cfg, progress, rates = resolve(args, overrides), Progress(), []
    from gptjax.data import prepare
    from gptjax.runtime import preemption

    what = "the text was prepared; what is done is kept, and the same command goes on"
    with preemption.preemptible(what), prepare.shown(progress) as tell:
        manifest = prepare.prepare(cfg, tell, progress.say, lambda *done: rates.append(done))
    print(json.dumps({"store": cfg.data.store, "tokenizer": manifest.tokenizer}))
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens"
        )
    print(", ".join(f"{name} {count}" for name, count in manifest.counts.items()))
    for size, seconds in rates:  # none where the store was found made
        print(
            f"{size / 1e6:.1f} MB of text tokenized in {seconds:.1f} s "
            f"({size / 1e6 / seconds:.1f} MB/s)"
        )


def verify(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    from gptjax.data import provenance, store

    cfg = resolve(args, overrides)
    problems = list(store.verify(cfg.data.store))
    if "://" not in cfg.data.store:
        problems += [f"the text has changed: {change}" for change in provenance.changes(cfg)]
    if problems:
        raise DataError("\n  ".join(problems))
    print(f"{cfg.data.store}: every chunk is what the manifest says")


def show(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    from etils import epath

    from gptjax import tokenizer as tokenizers
    from gptjax.data import loader, store

    cfg = resolve(args, overrides)
    if not 1 <= args.step <= _LAST_STEP:
        raise ConfigError([f"--step={args.step}: steps are counted from 1, up to {_LAST_STEP}"])
    data = loader.TrainData.open(cfg, store.read_manifest(cfg.data.store))
    tokenizer = tokenizers.load(epath.Path(cfg.data.store))
    for window, tokens in zip(data.ids(args.step - 1), data.read(args.step - 1), strict=True):
        print(f"window {window}: {tokenizer.decode(tokens.tolist())!r}")


def bench(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    from gptjax.data import loader

    cfg = resolve(args, overrides)
    if not 0 < args.seconds <= _LONGEST_BENCH:
        problem = f"--seconds={args.seconds}: must be above 0, and at most {_LONGEST_BENCH}"
        raise ConfigError([problem])
    rates = loader.bench(cfg, manifest_of(cfg, Progress()), args.seconds)
    print(
        f"{cfg.train.batch} x {cfg.train.seq_len} tokens a batch: median {rates[1] / 1e6:.1f} "
        f"million tokens/s through tf.data (from {rates[0] / 1e6:.1f} to {rates[2] / 1e6:.1f})"
    )
