"""`gptjax verify CONFIG`: a tiny copy of a configuration is killed and resumed, and trained on
meshes of virtual devices."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax

from gptjax import config
from gptjax import tokenizer as tokenizers
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import CONFIG_FILE, Config, MeshConfig
from gptjax.config.tiny import tiny
from gptjax.data import loader, prepare_mixture
from gptjax.errors import ConfigError, NumericError
from gptjax.parallel import mesh
from gptjax.pretrain.rerun import RunAgain
from gptjax.pretrain.task import PretrainTask
from gptjax.report.run_files import RunFiles
from gptjax.runtime.progress import Progress

STEPS, MESH_STEPS = 200, 10
KILLED_AT = 30
BOUNDS = {"loss": 1e-5, "grad_norm": 1e-4}
"""Relative deviations that float32 may have on another mesh."""
MESHES = (
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, fsdp=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=2, context=4),
    MeshConfig(data=4, stage=2),
    MeshConfig(data=2, expert=4),
)
_PATIENCE_S = 600.0


def verify_config(cfg: Config, *, meshes: bool) -> None:
    """Proves the resume of a tiny copy of a configuration, or with `meshes` its losses on every
    mesh. Raises NumericError where they differ."""
    with tempfile.TemporaryDirectory(prefix="gptjax-") as folder:
        _write_text(cfg, Path(folder) / "text")
        if meshes:
            _verify_meshes(tiny(cfg, folder, MESH_STEPS), Progress())
        else:
            _verify_resume(tiny(cfg, folder, STEPS), Path(folder))


def _write_text(cfg: Config, folder: Path) -> None:
    """Documents of words that are drawn, some much longer than a row."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeiourstlnmkp", k=rng.randint(2, 8))) for _ in range(300)]
    for part in cfg.data.mixture or [""]:
        (folder / part).mkdir(parents=True)
        for number in range(60):
            text = " ".join(rng.choices(words, k=rng.choice([3, 10, 40, 150])))
            (folder / part / f"{number}.txt").write_text(f"{part} {number} {text}\n")


# --- the resume ----------------------------------------------------------------------------------


def _verify_resume(cfg: Config, folder: Path) -> None:
    """Kills a run and starts it again, beside one that is left alone."""
    cfg.check()
    last = RunFiles("", cfg).last_step
    print(f"a tiny copy: {cfg.model.layers} layers of width {cfg.model.embed}, {last} steps")
    alone, broken = replace(cfg, run=f"{cfg.run}-alone"), replace(cfg, run=f"{cfg.run}-broken")
    _end(_start(alone, folder), alone)
    killed = _kill(_start(broken, folder), broken)
    print(f"killed (SIGKILL) when step {killed} had been recorded, and started again", flush=True)
    _end(_start(broken, folder), broken)
    ends = [Checkpointer(Path(one.run) / "checkpoints") for one in (alone, broken)]
    prints = [end.meta(end.steps()[-1])["fingerprints"] for end in ends]
    losses = [
        {row["step"]: row["loss"] for row in RunFiles.open(one.run).rows if "loss" in row}
        for one in (alone, broken)
    ]
    unlike = [path for path in prints[0] if prints[0][path] != prints[1].get(path)]
    steps = [step for step in losses[0] if losses[0][step] != losses[1].get(step)]
    if unlike or steps:
        first = f"first at step {min(steps)}; " if steps else ""
        raise NumericError(
            f"the resumed run differs from the unbroken one: {len(steps)} losses, {first}"
            f"{len(unlike)} of {len(prints[0])} arrays: {', '.join(unlike[:5])}"
        )
    print(f"equal bit for bit: {len(losses[0])} losses, {len(prints[0])} arrays at step {last}")


def _start(cfg: Config, folder: Path) -> "subprocess.Popen[bytes]":
    """Starts `gptjax train` of a configuration on one CPU device."""
    file = folder / f"{Path(cfg.run).name}.json"
    file.write_text(json.dumps(config.to_dict(cfg)))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "gptjax", "train", str(file)]
    told = file.with_suffix(".log").open("ab")
    return subprocess.Popen(command, env=env, stdout=told, stderr=told, cwd=folder)


def _end(process: "subprocess.Popen[bytes]", cfg: Config) -> None:
    """Waits for a run to end. Raises ConfigError where it fails."""
    if process.wait(_PATIENCE_S):
        log = Path(cfg.run).with_suffix(".log").read_text(errors="replace").strip()
        raise ConfigError([f"the tiny copy cannot be trained: {log.splitlines()[-1]}"])


def _kill(process: "subprocess.Popen[bytes]", cfg: Config) -> int:
    """Kills a run in its middle; the last step that it had recorded."""
    ends, files = time.monotonic() + _PATIENCE_S, RunFiles(cfg.run, cfg)
    while process.poll() is None and time.monotonic() < ends:
        if (Path(cfg.run) / CONFIG_FILE).exists():
            files = RunFiles(cfg.run, cfg)
            if files.checkpoints and len(files.rows) >= KILLED_AT:
                break
        time.sleep(0.01)
    process.kill()
    process.wait()
    files = RunFiles(cfg.run, cfg)
    if not KILLED_AT <= files.step < files.last_step:
        raise ConfigError(
            [f"the tiny copy could not be killed in its middle: it was at {files.step}"]
        )
    return files.step


# --- meshes --------------------------------------------------------------------------------------


def _verify_meshes(cfg: Config, progress: Progress) -> None:
    """Trains on one device and on eight along every axis, and prints the largest deviations."""
    cfg = replace(cfg, compute=replace(cfg.compute, dtype="float32"))
    manifests = prepare_mixture.prepare_parts(cfg)
    data = loader.TrainData.open(cfg, manifests)
    tokenizer = tokenizers.load(
        Path(prepare_mixture.part_configs(cfg)[data.order.names[0]].data.store)
    )

    def trained(one: Config, devices: int) -> list[dict[str, float]]:
        with jax.set_mesh(mesh.make_mesh(one.mesh, jax.devices()[:devices])):
            task = PretrainTask(one, data, manifests)
            again = RunAgain(one.run, one, tokenizer, manifests, data, task, progress)
            return [metrics for _, _, metrics in again.steps(again.state_at(0), MESH_STEPS)]

    reference = trained(cfg, 1)
    print(f"{'mesh':32} {'loss':>9} {'grad_norm':>9}   largest deviations of {MESH_STEPS} steps")
    wrong = []
    for name, one in _on_meshes(cfg):
        if isinstance(one, str):
            print(f"{name:32} {one}", flush=True)
            continue
        found = trained(one, 8)
        worst = {
            metric: max(
                abs(b[metric] / a[metric] - 1) for a, b in zip(reference, found, strict=True)
            )
            for metric in BOUNDS
        }
        shown = " ".join(f"{worst[metric]:9.1e}" for metric in BOUNDS)
        bad = not all(worst[metric] <= bound for metric, bound in BOUNDS.items())
        print(f"{name:32} {shown}{'   beyond the bound' if bad else ''}", flush=True)
        wrong += [name] if bad else []
    if wrong:
        bounds = ", ".join(f"{metric} {bound:g}" for metric, bound in BOUNDS.items())
        raise NumericError(
            f"other results than on one device (bounds: {bounds}): {'; '.join(wrong)}"
        )


def _on_meshes(cfg: Config) -> Iterator[tuple[str, Config | str]]:
    """The configuration on each mesh, by its name, or why it cannot be trained there."""
    for sizes in MESHES:
        name = ", ".join(f"{axis} {size}" for axis, size in sizes.shape(8).items() if size > 1)
        microbatches = sizes.stage if sizes.stage > 1 else 0
        compute = replace(cfg.compute, microbatches=microbatches)
        one = replace(cfg, mesh=sizes, compute=compute)
        try:
            one.check(8)
        except ConfigError as error:
            yield name, f"cannot be: {str(error).splitlines()[-1].strip()}"
            continue
        yield name, one
