"""The same bits: two runs and a resume, with and without compute.deterministic, and its price."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rows import Rows
from workloads import changed, emptied, train, workload

from gptjax.config import Config
from gptjax.parallel.mesh import entered_mesh

STEPS, SAVED = 12, 6


def unlike(one: Any, other: Any) -> int:
    """How many arrays of two states differ in any bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum(not np.array_equal(a, b) for a, b in pairs)


def three_runs(cfg: Config, folder: Path) -> tuple[int, int, float]:
    """Arrays that differ between two runs, and after a resume from half of one; a step's time."""
    states = []
    for name in ("first", "second"):
        state, clock, _ = train(cfg, STEPS, emptied(folder / name) / "checkpoints", save=SAVED)
        states.append(jax.device_get(state))
    shutil.copytree(folder / "first", emptied(folder / "resumed"))
    checkpoints = folder / "resumed" / "checkpoints"
    shutil.rmtree(checkpoints / str(STEPS))
    state, resumed_clock, _ = train(cfg, STEPS, checkpoints, save=SAVED)
    assert len(resumed_clock.losses) == STEPS - SAVED, "the run was not resumed"
    resumed = jax.device_get(state)
    return unlike(states[0], states[1]), unlike(states[0], resumed), clock.median()


def run(rows: Rows, *, toy: bool, folder: Path) -> None:
    cfg = workload("gpt2", toy=toy)
    if not toy:  # small enough to be saved in a second
        cfg = changed(cfg, model={"layers": 6}, train={"batch_tokens": 16 * 1024})
    cfg = changed(cfg, checkpoint={"every": SAVED, "keep": 4, "keep_every": 0})
    seconds = {}
    for deterministic in (False, True):
        cfg = changed(cfg, compute={"deterministic": deterministic})
        with entered_mesh(cfg):
            again, resumed, seconds[deterministic] = three_runs(cfg, folder / "bits")
        name = "deterministic" if deterministic else "as it comes"
        bound = 0 if deterministic else None
        rows.add(f"{name}: arrays unlike in a second run", again, bound=bound)
        rows.add(f"{name}: arrays unlike after a resume", resumed, bound=bound)
        rows.add(f"{name}: step", seconds[deterministic] * 1000, "ms")
    rows.add("price of deterministic", seconds[True] / seconds[False], "times")
    shutil.rmtree(folder / "bits")
