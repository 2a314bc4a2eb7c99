"""`gptjax inspect`: a run's model, its checkpoints, and its conversion certificate."""

import argparse
from collections.abc import Sequence
from typing import Any

from gptjax import config


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    from gptjax import bucket
    from gptjax.checkpoint import run_dir
    from gptjax.checkpoint.checkpointer import Checkpointer
    from gptjax.model.flops import ModelCost

    cfg = config.load(args.run)
    steps = Checkpointer(bucket.path_of(args.run) / run_dir.CHECKPOINTS).steps()
    parameters = ModelCost(cfg.model).parameters
    print(f"{args.run}: {parameters.total:,} parameters, {parameters.active:,} active")
    print(f"checkpoints: {', '.join(map(str, steps)) or 'none'}")
    if start := run_dir.start_of(args.run):
        print(f"started from {start['base']} (parameters {start['parameters_sha256'][:12]})")
    if source := run_dir.source_of(args.run):
        print(f"imported from {source['folder']}")
    if certificate := run_dir.certificate_of(args.run):
        print_certificate(certificate)


def print_certificate(certificate: dict[str, Any], indent: str = "") -> None:
    """Prints a conversion certificate, nested entries indented."""
    for name, value in certificate.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            print_certificate(value, f"{indent}  ")
        else:
            print(f"{indent}{name}: {value if not isinstance(value, float) else f'{value:.3g}'}")
