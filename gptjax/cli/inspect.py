"""`gptjax inspect`: how far a run is, its model, its checkpoints, where it comes from.

Reads files alone, and imports JAX only where no checkpoint says how large the model is.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.checkpoint.listing import CERTIFICATE, SOURCE, START, read_json
from gptjax.report.run_files import RunFiles
from gptjax.runtime import goodput

_SHOWN = ("loss", "valid_loss", "valid_bits_per_byte")


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    files = RunFiles.open(args.run)
    total, active = _parameters(files)
    print(f"{args.run}: {total:,} parameters, {active:,} active")
    for line in state(files):
        print(line)
    print(f"checkpoints: {', '.join(map(str, files.checkpoints)) or 'none'}")
    if (size := files.size()) is not None:
        print(f"size: {size / 1e6:,.1f} MB")
    if start := read_json(files.folder / START):
        print(f"started from {start['base']} (parameters {start['parameters_sha256'][:12]})")
    if source := read_json(files.folder / SOURCE):
        print(f"imported from {source['folder']}")
    if certificate := read_json(files.folder / CERTIFICATE):
        print_certificate(certificate)


def state(files: RunFiles) -> Iterator[str]:
    """How far a run is: steps, tokens, its newest figures, and what its time was spent on."""
    if not (files.rows or files.sessions):
        return
    yield f"step {files.step:,} of {files.last_step:,}, {files.tokens:,} tokens"
    newest = files.newest(training=True) | files.newest(training=False)
    if shown := [f"{n} {newest[n][1]:.4f} (step {newest[n][0]:,})" for n in _SHOWN if n in newest]:
        yield ", ".join(shown)
    if spent := files.goodput:
        count = len(files.sessions)
        sessions = "one session" if count == 1 else f"{count} sessions"
        yield f"{sum(spent.values()):,.0f} s in {sessions}, goodput {goodput.share(spent):.1%}"
        yield from (f"  {line}" for line in goodput.lines(spent))


def _parameters(files: RunFiles) -> tuple[int, int]:
    if known := files.parameters():
        return known
    from gptjax.model.flops import ModelCost

    parameters = ModelCost(files.cfg.model).parameters
    return parameters.total, parameters.active


def print_certificate(certificate: dict[str, Any], indent: str = "") -> None:
    """Prints a conversion certificate, nested entries indented."""
    for name, value in certificate.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            print_certificate(value, f"{indent}  ")
        else:
            print(f"{indent}{name}: {value if not isinstance(value, float) else f'{value:.3g}'}")
