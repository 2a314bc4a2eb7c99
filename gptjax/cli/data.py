"""`gptjax data`: prepare, verify, show and benchmark training data."""

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptjax import config
from gptjax.cli.arguments import resolve
from gptjax.config import phases
from gptjax.config.limits import unknown_scheme
from gptjax.errors import ConfigError, DataError, OutputError
from gptjax.runtime.progress import Progress

_LAST_STEP = 10**12
_LONGEST_BENCH = 86400


def manifests_of(cfg: config.Config, progress: Progress) -> Any:
    """The manifests of the configured stores, which are made now if they are not there."""
    from gptjax.data import prepare, prepare_mixture

    with prepare.shown(progress) as tell:
        return prepare_mixture.prepare_parts(cfg, tell, progress.say)


def prepare(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    cfg, progress, rates = resolve(args, overrides), Progress(), []
    from gptjax.data import mixture, prepare, prepare_mixture
    from gptjax.runtime import preemption

    what = "the text was prepared; what is done is kept, and the same command goes on"
    with preemption.preemptible(what), prepare.shown(progress) as tell:
        clock = lambda *done: rates.append(done)
        manifests = prepare_mixture.prepare_parts(cfg, tell, progress.say, clock)
    for part, c in mixture.part_configs(cfg).items():
        manifest = manifests.parts[part]
        named = {"part": part} if part else {}
        print(json.dumps({**named, "store": c.data.store, "tokenizer": manifest.tokenizer}))
        for name, split in manifest.splits.items():
            print(
                f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, "
                f"{split.tokens:,} tokens"
            )
        print(", ".join(f"{name} {count}" for name, count in manifest.counts.items()))
    for size, seconds in rates:  # none where the store was found made
        print(
            f"{size / 1e6:.1f} MB of text tokenized in {seconds:.1f} s "
            f"({size / 1e6 / seconds:.1f} MB/s)"
        )


def import_files(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    import time

    from gptjax import tokenizer as tokenizers
    from gptjax.data import import_tokens, prepare, token_files

    if not 0 < args.valid_fraction < 1:
        problem = f"--valid-fraction={args.valid_fraction}: must be above 0 and below 1"
        raise ConfigError([problem])
    if why := unknown_scheme(args.store):
        raise ConfigError([f"--store={args.store}: {why}"])
    tokenizer = tokenizers.make(tokenizers.config_of(args.tokenizer), ())
    found, valid = (
        token_files.find(paths, tokenizer.vocab_size, args.dtype)
        for paths in (args.files, args.valid or [])
    )
    held_out = {file.path.resolve() for file in valid}
    files = [file for file in found if file.path.resolve() not in held_out]
    if not files:
        raise DataError("all of the files are those of --valid; nothing is left to train on")
    if len(files) < len(found):
        print(f"{len(found) - len(files)} of the files are those of --valid: not trained on")
    began = time.monotonic()
    progress = Progress()
    with prepare.shown(progress) as tell, _new_folder(args.store, tell, progress) as folder:
        manifest = import_tokens.import_tokens(
            folder, tokenizer, files, valid, args.valid_fraction, tell
        )
    took = time.monotonic() - began
    print(json.dumps({"store": args.store, "tokenizer": manifest.tokenizer}))
    for file in [*files, *valid]:
        print(f"{file.path}: {file.format}, {file.count:,} tokens of {file.dtype[1:]}")
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens")
    tokens = sum(file.count for file in [*files, *valid])
    print(f"{tokens:,} tokens in {took:.1f} s ({tokens / 1e6 / took:.0f} million tokens/s)")
    head = tokenizer.decode(files[0].tokens()[:32].tolist())
    print(f"they begin: {head!r}\nto train on them: gptjax train CONFIG --data.store {args.store}")


@contextlib.contextmanager
def _new_folder(place: str, tell: Any, progress: Progress) -> Iterator[Path]:
    """Where a store is written that is to lie at a place, which may be in a bucket."""
    from gptjax import bucket
    from gptjax.data import prepare_remote

    if not bucket.remote(place):
        yield Path(place).absolute()
        return
    cache = config.DataConfig().cache
    with prepare_remote.made_here(place, cache, tell, progress.say, "--store") as folder:
        if folder is None:
            raise OutputError(f"--store={place}: exists already; give a new folder")
        shutil.rmtree(folder)  # of an import whose copying failed, perhaps
        yield folder


def verify(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    from gptjax.data import mixture, provenance, store

    for cfg in mixture.part_configs(resolve(args, overrides)).values():
        problems = list(store.verify(cfg.data.store))
        if "://" not in cfg.data.store:
            problems += [f"the text has changed: {change}" for change in provenance.changes(cfg)]
        if problems:
            raise DataError("\n  ".join(problems))
        print(f"{cfg.data.store}: every chunk is what the manifest says")


def show(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    from gptjax import bucket
    from gptjax import tokenizer as tokenizers
    from gptjax.data import loader, mixture
    from gptjax.training import left_out

    cfg = resolve(args, overrides)
    if not 1 <= args.step <= _LAST_STEP:
        raise ConfigError([f"--step={args.step}: steps are counted from 1, up to {_LAST_STEP}"])
    manifests = mixture.read_manifests(cfg)
    data = loader.TrainData.open(cfg, manifests)
    stores = [part.data.store for part in mixture.part_configs(cfg).values()]
    tokenizer = tokenizers.load(bucket.path_of(stores[0]))
    last = data.order.steps
    if last is not None and args.step > last:
        raise ConfigError([f"--step={args.step}: the mixture has text for {last} steps"])
    seq_len = phases.phase_at(data.phases, args.step - 1).seq_len
    parts, windows = data.order.places(args.step - 1)
    batches, targets = data.read(range(args.step - 1, args.step))
    places = {} if data.packings else data.documents_at(args.step - 1, manifests.start_id)
    if args.step in left_out.LeftOut(cfg.run, cfg.train.leave_out):
        print(f"step {args.step} is left out: this is not trained on")
    for part, window, tokens, count in zip(parts, windows, batches[0], targets[0], strict=True):
        name, own = data.order.names[part], tokens[: count + 1]
        if data.packings:
            documents = data.packings[seq_len][part].row(window)[2]
            what = f"row {window}: documents {', '.join(map(str, documents.tolist()))}"
            what += f", {seq_len - count} tokens of padding" if count < seq_len else ""
        else:
            document, place = places[part, window]
            begins = int((tokens[1:-1] == manifests.start_id).sum())
            what = f"window {window}: document {document} from its token {place}"
            what += f" and {begins} more" if begins else ""
        prefix = f"part {name}, " if name else ""
        print(f"{prefix}{what}: {tokenizer.decode(own.tolist())!r}")


def bench(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    from gptjax.data import loader

    cfg = resolve(args, overrides)
    if not 0 < args.seconds <= _LONGEST_BENCH:
        problem = f"--seconds={args.seconds}: must be above 0, and at most {_LONGEST_BENCH}"
        raise ConfigError([problem])
    rates = loader.bench(cfg, manifests_of(cfg, Progress()), args.seconds)
    last = phases.phases(cfg)[-1]
    print(
        f"{last.batch} x {last.seq_len} tokens a batch: median {rates[1] / 1e6:.1f} "
        f"million tokens/s through tf.data (from {rates[0] / 1e6:.1f} to {rates[2] / 1e6:.1f})"
    )
