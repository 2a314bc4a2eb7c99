"""A profile of training steps: the largest gaps between kernels, by the names around them."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from rows import Rows
from workloads import emptied, train, workload

from gptjax.config import LogConfig
from gptjax.parallel.mesh import entered_mesh
from gptjax.training.callbacks import Profile

FIRST, STEPS = 6, 3


def events(folder: Path) -> list[dict[str, Any]]:
    """The complete events of the busiest line of the trace: a GPU's stream of kernels."""
    (file,) = folder.rglob("*.trace.json.gz")
    everything = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    processes = {
        event["pid"]: event["args"]["name"]
        for event in everything
        if event.get("name") == "process_name"
    }
    lines: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in everything:
        if event.get("ph") == "X":
            lines[event["pid"], event["tid"]].append(event)
    of_devices = {at: line for at, line in lines.items() if "GPU" in processes.get(at[0], "")}
    busy = lambda line: sum(event["dur"] for event in line)
    return sorted(max((of_devices or lines).values(), key=busy), key=lambda event: event["ts"])


def gaps(line: list[dict[str, Any]]) -> list[tuple[float, str, str]]:
    """Microseconds without an event, and the names of those before and after; longest first."""
    found, end, before = [], line[0]["ts"], line[0]["name"]
    for event in line:
        if event["ts"] > end:
            found.append((event["ts"] - end, before, event["name"]))
        if event["ts"] + event["dur"] >= end:
            end, before = event["ts"] + event["dur"], event["name"]
    return sorted(found, reverse=True)


def run(rows: Rows, *, toy: bool, folder: Path) -> None:
    cfg = workload("gpt2", toy=toy)
    traced = emptied(folder / "trace")
    profile = Profile(LogConfig(profile_start=FIRST, profile_steps=STEPS), traced)
    with entered_mesh(cfg):
        train(cfg, FIRST + STEPS + 1, folder / "unused", more=(profile,))
    line = events(traced)
    length = line[-1]["ts"] + line[-1]["dur"] - line[0]["ts"]
    idle = gaps(line)
    rows.add("idle time of the busiest stream", 100 * sum(g[0] for g in idle) / length, "%")
    for microseconds, before, after in idle[:3]:
        rows.add(f"gap {before[:22]} > {after[:22]}", microseconds, "us")
    busy: dict[str, float] = defaultdict(float)
    for event in line:
        busy[event["name"]] += event["dur"]
    for name in sorted(busy, key=lambda name: -busy[name])[:8]:
        rows.add(f"time in {name[:40]}", 100 * busy[name] / length, "%")
