"""`gptjax fsck`: whether a run's files are whole: checkpoints, tokens, tokenizer, what was left."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gptjax import bucket, config
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import MeshConfig
from gptjax.data import mixture, store
from gptjax.data.mixture import Manifests
from gptjax.errors import CheckpointError, DataError, GptjaxError
from gptjax.parallel import mesh, sharding
from gptjax.param_tree import nested
from gptjax.runtime.progress import Progress


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command. Raises CheckpointError or DataError, with all that was found."""
    progress = Progress()
    cfg = config.load(args.run)
    problems: list[tuple[type[GptjaxError], str]] = []
    try:
        cfg, tokenizer, manifests = run_dir.open_run(args.run)
        print(f"tokenizer: {'none' if tokenizer is None else 'the recorded one'}")
    except GptjaxError as error:
        manifests = None
        problems.append((DataError, str(error)))
    checkpoints = Checkpointer(bucket.path_of(args.run) / run_dir.CHECKPOINTS)
    for step in checkpoints.steps():
        progress.say(f"reading checkpoint {step}")
        if why := _damage(checkpoints, step):
            problems.append((CheckpointError, f"checkpoint {step}: {why}"))
        else:
            print(f"checkpoint {step}: whole")
    for line in checkpoints.store.left():
        print(line)
    for part, manifest in [] if manifests is None else _parts(cfg, manifests):
        progress.say(f"reading {part.data.store}")
        found = list(_store_problems(part, manifest))
        problems += [(DataError, problem) for problem in found]
        if not found:
            print(f"{part.data.store}: the tokens that the run was begun with, whole")
    if problems:
        kinds = {kind for kind, _ in problems}
        worst = CheckpointError if CheckpointError in kinds else DataError
        told = "\n  ".join(problem for _, problem in problems)
        raise worst(f"{args.run}: {len(problems)} found:\n  {told}")


def _damage(checkpoints: Checkpointer, step: int) -> str:
    """Why a checkpoint cannot be used; empty if it is whole. Reads all of it."""
    try:
        meta = checkpoints.meta(step)
        with jax.set_mesh(mesh.make_mesh(MeshConfig(data=1), jax.devices()[:1])):
            whole = jax.sharding.NamedSharding(jax.sharding.get_mesh(), sharding.spec())
            leaves: Any = {
                path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype), sharding=whole)
                for path, (shape, dtype) in meta["tree"].items()
            }
            Checkpointer(checkpoints.folder, order=meta.get("layers")).restore(step, nested(leaves))
    except GptjaxError as error:
        return str(error)
    except Exception as error:  # Orbax raises many kinds for many kinds of damage
        return (str(error) or type(error).__name__).partition("\n")[0][:300]
    return ""


def _parts(
    cfg: config.Config, manifests: Manifests
) -> Iterator[tuple[config.Config, store.Manifest]]:
    """Configuration and manifest of each store that a run is trained on."""
    for name, part in mixture.part_configs(cfg).items():
        yield part, manifests.parts[name]


def _store_problems(cfg: config.Config, manifest: store.Manifest) -> Iterator[str]:
    """Problems of a store that a run is trained on."""
    try:
        run_dir.check_store(cfg, Manifests({"": manifest}))
        yield from store.verify(cfg.data.store)
    except GptjaxError as error:
        yield str(error)
