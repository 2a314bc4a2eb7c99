"""`gptjax verify`: of a run, a part of it again; of a configuration, its resume and its meshes."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from gptjax.config import CONFIG_FILE
from gptjax.errors import ConfigError


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command. Raises NumericError where something differs."""
    if "://" in args.config or (Path(args.config) / CONFIG_FILE).is_file():
        if overrides or args.meshes:
            given = " ".join(overrides) or "--meshes"
            raise ConfigError([f"{given}: goes with a CONFIG, and {args.config} is a run"])
        from gptjax.pretrain.verify_run import verify_run

        verify_run(args.config, args.first, args.steps)
        return
    if args.first is not None or args.steps is not None:
        raise ConfigError(["--from, --steps: go with a run, and this is a CONFIG"])
    os.environ["JAX_PLATFORMS"] = "cpu"
    if args.meshes:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
    from gptjax.cli.arguments import resolve
    from gptjax.pretrain.verify_config import verify_config

    verify_config(resolve(args, overrides), meshes=args.meshes)
