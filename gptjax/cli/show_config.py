"""`gptjax config`: the resolved configuration, its origins, and the size of its model."""

import argparse
import json
import os
from collections.abc import Sequence

from gptjax import config
from gptjax.cli.arguments import resolve


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    cfg = resolve(args, overrides)
    if args.json:
        print(json.dumps(config.to_dict(cfg), indent=2))
        return
    if args.count:
        _print_counts(cfg)
        return
    origins = config.provenance(cfg, args.config, overrides)
    for name, value in config.flatten(cfg).items():
        print(f"{name:28} {value!r:32} {origins[name]}")
    if cfg.stages or cfg.train.batch_ramp_tokens:
        _print_stages(cfg)


def _print_stages(cfg: config.Config) -> None:
    """The plan of the stages, with the epochs of what has been prepared."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # a few numbers, for which no accelerator is taken
    cfg.check()
    from gptjax.data import loader, mixture
    from gptjax.training import stage_table

    print()
    if not loader.is_prepared(cfg):
        print("\n".join(stage_table.lines(cfg)))
        return
    order = loader.TrainData.open(cfg, mixture.read_manifests(cfg)).order
    limited = mixture.limited(cfg, order, print)
    print("\n".join(stage_table.lines(limited, order.epochs_at)))


def _print_counts(cfg: config.Config) -> None:
    from gptjax.model.flops import ModelCost

    cost = ModelCost(cfg.model)
    parameters = cost.parameters
    for name, number in parameters.parts.items():
        print(f"{name:28} {number:>20,}")
    print(f"{'total':28} {parameters.total:>20,}")
    print(f"{'active':28} {parameters.active:>20,}  of one token")
    flops = cost.flops_per_token(cfg.train.seq_len)
    print(
        f"{'training FLOPs':28} {flops:>20,.0f}  a token, in sequences of {cfg.train.seq_len} "
        "(forward: a third)"
    )
