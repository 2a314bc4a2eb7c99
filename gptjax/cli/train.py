"""`gptjax train`: pre-training, from text to a trained run."""

import argparse
from collections.abc import Sequence

from gptjax.cli import summary
from gptjax.cli.arguments import resolve


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    cfg = resolve(args, overrides)
    from gptjax.pretrain.train import train
    from gptjax.runtime import distributed

    results = train(cfg)
    if distributed.first():
        summary.write(cfg, results)
