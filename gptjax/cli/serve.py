"""`gptjax serve`: a model over HTTP."""

import argparse
from collections.abc import Sequence
from dataclasses import fields

from gptjax.runtime.progress import Progress
from gptjax.serve import Options, serve


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    serve(args.run, options, Progress().say)
