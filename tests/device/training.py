"""A model's training: memory by the plan, by XLA and by the allocator; tokens/s and MFU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rows import Rows
from workloads import train, workload

from gptjax.config import Config
from gptjax.model.flops import ModelCost
from gptjax.parallel.mesh import entered_mesh
from gptjax.plan import estimate, machines
from gptjax.runtime import hardware
from gptjax.training import objective

GIB = 2**30
STEPS = 22


def planned(cfg: Config) -> tuple[float, float]:
    """Bytes that the plan allows for this device, and the MFU that it expects.

    An unknown device, or a CPU, is planned as an H100.
    """
    device = hardware.find(jax.devices()[0].device_kind) or machines.DEVICES["h100"]
    cfg = replace(cfg, compute=replace(cfg.compute, attention="auto"))
    plan = estimate.plan(cfg, machines.parse(f"{device.name}:1"))
    return plan.total, plan.mfu


def memory_stats() -> dict[str, Any]:
    """The allocator's figures; empty where it has none, as on CPUs."""
    return jax.devices()[0].memory_stats() or {}


def run(rows: Rows, which: str, *, toy: bool, folder: Path) -> None:
    cfg = workload(which, toy=toy)
    with entered_mesh(cfg):
        rows.add("attention", ", ".join(objective.attention_backends(cfg)))
        _, clock, step = train(cfg, 5 if toy else STEPS, folder / "unused")
        rows.add("memory: XLA", step.memory_analysis().peak_memory_in_bytes / GIB, "GiB")
        if peak := memory_stats().get("peak_bytes_in_use"):
            rows.add("memory: allocator", peak / GIB, "GiB")
        total, mfu = planned(cfg)
        rows.add("memory: planned", total / GIB, "GiB")
        rows.add("step", clock.median() * 1000, "ms")
        rate = cfg.train.batch_tokens / clock.median()
        rows.add("speed", rate, "tokens/s")
        device = hardware.find(jax.devices()[0].device_kind)
        if device is not None:
            flops = ModelCost(cfg.model).flops_per_token(cfg.train.seq_len)
            rows.add("MFU", 100 * rate * flops / (device.tflops * 1e12), "%")
        rows.add("MFU: planned", 100 * mfu, "%")
        rows.add("loss of the last step", clock.losses[-1], ok=clock.losses[-1] < 20)
