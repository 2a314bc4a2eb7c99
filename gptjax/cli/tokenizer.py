"""`gptjax tokenizer`: train a tokenizer, and show the tokens of a text."""

import argparse
import pathlib
from collections.abc import Sequence

from gptjax import config
from gptjax.config.limits import unknown_scheme
from gptjax.errors import ConfigError
from gptjax.runtime.progress import Progress


def train(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    kind = next(kind for kind, names in config.ALGORITHMS.items() if args.algorithm in names)
    cfg = config.Config(
        model=config.ModelConfig(vocab_size=max(args.vocab_size, 1)),
        tokenizer=config.TokenizerConfig(
            kind=kind,
            algorithm=args.algorithm,
            vocab_size=args.vocab_size,
            sample_bytes=args.sample_bytes,
        ),
        data=config.DataConfig(
            sources=tuple(args.source or ["python-library"]),
            text_field=args.text_field,
            valid_fraction=args.valid_fraction,
        ),
    )
    cfg.check()
    from gptjax.data import prepare, train_tokenizer

    with prepare.shown(Progress()) as tell:
        report = train_tokenizer.train(cfg, pathlib.Path(args.folder), tell)
    print(f"{args.folder}: {args.algorithm}, {report}")


def show(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    from gptjax import bucket
    from gptjax import tokenizer as tokenizers

    if why := unknown_scheme(args.folder):
        raise ConfigError([f"{args.folder}: {why}"])
    tokenizer = tokenizers.load(bucket.path_of(args.folder))
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    named = ", ".join(
        f"{name} {token} {tokenizer.piece(token)!r}"
        for name, token in special.items()
        if token is not None
    )
    print(f"{tokenizer.kind}, {tokenizer.vocab_size:,} pieces, {named}")
    for token in tokenizer.encode(args.text):
        print(f"{token:8} {tokenizer.piece(token)!r}")
