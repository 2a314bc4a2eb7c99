"""What it costs to plan, compile and restore as the model and the machine grow.

    python tests/bench/cost.py devices      # Llama 3 8B on 4 to 1,024 TPUs v5p
    python tests/bench/cost.py models       # 124M to 405B on 256 of them
    python tests/bench/cost.py layers       # 16 to 128 layers of Llama 3 8B's shape
    python tests/bench/cost.py virtual      # the debug preset on 1 to 1,024 virtual devices
    python tests/bench/cost.py restore      # checkpoints of 0.1 to 4 GB onto 1 to 64 of them

Each row is a process of its own, without a compilation cache: the seconds of `gptjax plan`'s
arithmetic, of tracing, lowering to StableHLO and compiling the train step (JAX's own events), and
the most memory that the process took on the host.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

EVENTS = {
    "jaxpr_trace_duration": "trace",
    "jaxpr_to_mlir_module_duration": "lower",
    "backend_compile_duration": "compile",
}
SLICES = {4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8", 1024: "8x8x16"}
MODELS = {  # preset: overrides of the mesh, which the others have along fsdp alone
    "gpt2:small": {},
    "llama:llama32_1b": {},
    "llama:llama3_8b": {},
    "llama:llama3_70b": {},
    "llama:llama31_405b": {"fsdp": 64, "tensor": 4},
}
GIB = 2**30
Row = dict[str, Any]


def rows_of(table: str) -> list[Row]:
    """What each row's process is asked for."""
    if table == "devices":
        return [{"preset": "llama:llama3_8b", "devices": n} for n in SLICES]
    if table == "models":
        return [{"preset": name, "devices": 256, "mesh": mesh} for name, mesh in MODELS.items()]
    if table == "layers":
        sizes = (16, 32, 64, 128)
        return [{"preset": "llama:llama3_8b", "devices": 64, "layers": n} for n in sizes]
    if table == "virtual":
        return [{"virtual": n} for n in (1, 8, 64, 256, 1024)]
    return [{"width": w, "onto": n} for w in (256, 1024, 1600) for n in (1, 8, 64)]


def measure(row: Row) -> Row:
    """One row, in this process."""
    times: Counter[str] = Counter()

    def listen(event: str, seconds: float, **_: Any) -> None:
        if name := EVENTS.get(event.rsplit("/", 1)[1]):
            times[name] += seconds

    import jax

    jax.monitoring.register_event_duration_secs_listener(listen)
    found = (_virtual if "virtual" in row else _restore if "onto" in row else _planned)(row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**found, **{name: times[name] for name in EVENTS.values()}, "host GiB": peak}


def _planned(row: Row) -> Row:
    """Llama or GPT-2 on a slice of TPUs, a sequence at a time for each device of the batch."""
    from gptjax.config import MeshConfig, on_machine
    from gptjax.plan import aot, estimate, machines

    devices = row["devices"]
    mesh = MeshConfig(data=1, **(row.get("mesh") or {"fsdp": devices}))
    cfg = on_machine(f"v5p:{SLICES[devices]}", row["preset"], mesh)
    length = min(8192, cfg.model.context)
    train = {
        "batch_tokens": length * mesh.fsdp,
        "batch_start_tokens": 0,
        "batch_increment_tokens": 0,
    }
    cfg = replace(
        cfg,
        stages={},
        model=replace(cfg.model, layers=row.get("layers", cfg.model.layers)),
        train=replace(cfg.train, accumulation=1, seq_len=length, **train),
    )
    machine = machines.parse(cfg.mesh.machine)
    began = time.monotonic()
    plan = estimate.plan(cfg, machine)
    planned = time.monotonic() - began
    found = aot.train_step(cfg, machine)
    return {
        "model": row["preset"].split(":")[1],
        "layers": cfg.model.layers,
        "devices": devices,
        "plan": planned,
        "GiB by XLA": found.peak / GIB,
        "planned": plan.total / GIB,
    }


def _virtual(row: Row) -> Row:
    """The debug preset on virtual devices of this machine: its state and its step compiled."""
    import jax

    from gptjax.config import MeshConfig, loading
    from gptjax.model import decoder
    from gptjax.parallel import mesh as meshes
    from gptjax.parallel import sharding
    from gptjax.training import objective, step

    devices = row["virtual"]
    sizes = MeshConfig(fsdp=min(8, devices), data=devices // min(8, devices))
    cfg = replace(loading.load("configs/debug.py"), mesh=sizes)
    cfg = replace(cfg, train=replace(cfg.train, batch_tokens=64 * max(16, devices)))
    create = lambda: step.create_state(cfg, lambda key: decoder.init(cfg.model, key))
    with jax.set_mesh(meshes.make_mesh(cfg.mesh, jax.devices())):
        jax.jit(create).lower().compile()
        batch = objective.abstract_batch(cfg)
        loss_fn = objective.training_loss(cfg, eos_id=0)
        step.compile_step(cfg, loss_fn, sharding.abstract(create), batch)
    return {"devices": devices}


def _restore(row: Row) -> Row:
    """A checkpoint of parameters and moments, saved by one device and restored onto several."""
    import jax

    from gptjax.checkpoint.checkpointer import Checkpointer
    from gptjax.config import CheckpointConfig, Config, MeshConfig, ModelConfig
    from gptjax.model import decoder
    from gptjax.parallel import mesh as meshes
    from gptjax.parallel import sharding
    from gptjax.training import step

    model = ModelConfig(vocab_size=8192, context=256, layers=8, embed=row["width"], heads=4)
    cfg = Config(model=model)
    create = lambda: step.create_state(cfg, lambda key: decoder.init(cfg.model, key))
    with tempfile.TemporaryDirectory() as folder:
        with jax.set_mesh(meshes.make_mesh(MeshConfig(), jax.devices()[:1])):
            state = jax.jit(create)()
            with Checkpointer(Path(folder), CheckpointConfig(), say=_say) as checkpointer:
                checkpointer.save(0, state)
        size = sum(a.nbytes for a in jax.tree.leaves(state)) / 1e9
        del state
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        mesh = meshes.make_mesh(MeshConfig(fsdp=row["onto"]), jax.devices()[: row["onto"]])
        with (
            jax.set_mesh(mesh),
            Checkpointer(Path(folder), CheckpointConfig(), say=_say) as checkpointer,
        ):
            abstract = sharding.abstract(create)
            began = time.monotonic()
            jax.block_until_ready(checkpointer.restore(0, abstract))
            took = time.monotonic() - began
    return {
        "GB": size,
        "onto": row["onto"],
        "restore": took,
        "s/GB": took / size,
        "saved GiB": base,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _print(rows: list[Row]) -> None:
    shown = lambda value: f"{value:.2f}" if isinstance(value, float) else str(value)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(shown, row.values())) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=("devices", "models", "layers", "virtual", "restore"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(json.loads(args.row))))
        return
    found = []
    for row in rows_of(args.table):
        count = row.get("virtual", row.get("onto", 1))
        flags = f"--xla_force_host_platform_device_count={count}"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, __file__, args.table, "--row", json.dumps(row)]
        out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
        print(found[-1], file=sys.stderr)
    _print(found)


if __name__ == "__main__":
    main()
