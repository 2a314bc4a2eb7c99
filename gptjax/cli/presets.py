"""`gptjax presets`: the configurations that come with gptjax."""

import argparse
from collections.abc import Sequence

from gptjax import config


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Prints each preset's name and the first line of its description."""
    listed = config.list_presets()
    width = max(len(name) for name, _ in listed)
    for name, text in listed:
        print(f"{name:{width}}  {text}")
