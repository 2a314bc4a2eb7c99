"""How long a step takes: arithmetic, memory traffic and links, each at what the hardware allows.

Two step times. `bound` is what this step cannot beat: the longest of the three at the published
peaks. `expected` takes the share of the arithmetic peak that large products have been seen to reach
on the device, and adds what does not overlap: the optimizer's pass over its state, and collectives
that the compiler cannot hide. Both are predictions; neither was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gptjax.config import Config
from gptjax.model import flops as counts
from gptjax.parallel import mesh, sharding
from gptjax.plan.collectives import EXCHANGE, GATHER, SCATTER, SHIFT, SUM, Collective, passes
from gptjax.plan.machines import Machine

# Share of the bfloat16 peak that a whole train step's products reached, recomputation counted, in
# the best runs that the MaxText team published: on v5e 0.89 (its 32B, 66.9 % MFU with a forward
# pass recomputed), on v5p 0.86 (1024B, 64.8 %), v6e 0.57 (Llama 3.1 405B, 42.8 %), v4 0.76 (22B,
# 56.7 %), v7x 0.73 (405B, 54.7 %; that its blocks are recomputed is an assumption). On GPUs 0.6,
# from torchtitan's 33 to 39 % of an H100 for 8B: the least certain of them.
REACHED: Mapping[str, float] = {"v4": 0.76, "v5e": 0.89, "v5p": 0.86, "v6e": 0.57, "v7x": 0.73}


def reached(machine: Machine) -> float:
    """Share of the peak that large products are expected to reach; see REACHED."""
    return REACHED.get(machine.generation, 0.6)


# Collectives that run beside arithmetic in the compiled step (LOG.md): on a v5e gathers; where
# there is a SparseCore to hand them to, all but exchanges. On GPUs all are taken to, on a v4 none.
_ALL = (GATHER, SCATTER, SUM, EXCHANGE, SHIFT)
_HIDDEN: Mapping[str, tuple[str, ...]] = {"v4": (), "v5e": (GATHER,)} | dict.fromkeys(
    ("v5p", "v6e", "v7x"), (GATHER, SCATTER, SUM, SHIFT)
)


@dataclass(frozen=True)
class Link:
    """What a mesh axis runs over: a ring, a line, a node's switch, or the network.

    bandwidth: bytes/s that a device can send along it. rings: dimensions of the torus that it runs
    through.
    """

    kind: str
    bandwidth: float
    rings: int = 1


@dataclass(frozen=True)
class Times:
    """Seconds of a step."""

    arithmetic: float
    memory: float
    links: Mapping[str, float]
    update: float
    exposed: float
    bound: float
    expected: float
    bottleneck: str


def links(machine: Machine, arranged: np.ndarray) -> dict[str, Link]:
    """What each mesh axis runs over; `arranged` are the devices by their places along AXES."""
    found = {}
    for number, axis in enumerate(mesh.AXES):
        index: list[Any] = [0] * arranged.ndim
        index[number] = slice(None)
        found[axis] = _link(machine, list(arranged[tuple(index)]))
    return found


def _link(machine: Machine, line: list[Any]) -> Link:
    device = machine.device
    group = "slice_index" if device.rings else "process_index"
    if len({getattr(place, group) for place in line}) > 1:
        return Link("network", device.network)
    if not device.rings:
        return Link("switch", device.link)
    coords = np.array([place.coords for place in line])
    moving = [i for i in range(coords.shape[1]) if len(set(coords[:, i])) > 1]
    whole = all(
        len(set(coords[:, i])) == machine.shape[i] and machine.shape[i] % device.wraps == 0
        for i in moving
    )
    dimensions = max(1, len(moving))
    bandwidth = device.link * dimensions * (2 if whole else 1)
    return Link("ring" if whole else "line", bandwidth, dimensions)


def as_compiled(one: Collective, over: Mapping[str, Link]) -> Collective:
    """What XLA makes of a collective: along several rings at once a scatter, and along three a
    gather, too, is a sum of whole arrays (LOG.md).
    """
    rings = max(over[axis].rings for axis in one.axes)
    if (one.kind == SCATTER and rings > 1) or (one.kind == GATHER and rings > 2):
        return replace(one, kind=SUM)
    return one


def flops(cfg: Config) -> dict[str, float]:
    """Floating-point operations of one optimizer step by part, all devices together.

    "model" parts are those of `counts.flops_per_token`; "recomputed" is what remat does again.
    """
    m, tokens = cfg.model, cfg.train.batch_tokens
    projections = m.embed * m.head * (2 * m.heads + 2 * m.kv)
    matrices = 3 if m.activation == "swiglu" else 2
    mlp = matrices * m.embed * m.hidden
    if moe := m.moe.experts and m.moe:
        mlp = matrices * m.embed * m.expert_hidden * (moe.top_k + moe.shared)
        mlp += m.embed * moe.experts
    total = counts.flops_per_token(m, cfg.train.seq_len) * tokens
    parts = {
        "attention's projections": 6.0 * m.layers * projections * tokens,
        "experts" if m.moe.experts else "feed-forward": 6.0 * m.layers * mlp * tokens,
        "output layer": 6.0 * m.vocab_size * m.embed * tokens,
    }
    scores = total - sum(parts.values())
    parts["attention's scores"] = scores
    again = scores / 12 * 2  # the kernel's backward pass makes the scores once more
    if cfg.compute.remat != "none":
        again += scores / 3
    if cfg.compute.remat == "block":  # but for the last product, whose result nobody needs
        last = m.embed * m.hidden if not m.moe.experts else 0
        again += 2.0 * m.layers * (projections + mlp - last) * tokens
    parts["recomputed"] = again
    if idle := passes(cfg).idle:
        layers = sum(parts.values()) - parts["output layer"]
        parts["idle stages"] = layers * idle / (1 - idle)
    return parts


def memory_bytes(cfg: Config, sizes: Mapping[str, int], parameters: float) -> tuple[float, float]:
    """Bytes that one device moves to and from its memory: (in the passes, in the update).

    `parameters` are those of one device. Passes: each product reads its operands and writes its
    result, forward, recomputed and twice backward. Update: float32 state, read and written.
    """
    m = cfg.model
    width = 2 if cfg.compute.dtype == "bfloat16" else 4
    groups = 1
    for axis in sharding.mesh_axes("tokens"):
        groups *= sizes[axis]
    tokens = cfg.train.batch_tokens / groups
    matrices = 3 if m.activation == "swiglu" else 2
    hidden = m.hidden if not m.moe.experts else m.expert_hidden * (m.moe.top_k + m.moe.shared)
    row = (
        6 * m.embed + (2 * m.head * (m.heads + m.kv) * 2 + matrices * 2 * hidden) / sizes["tensor"]
    )
    passes = {"none": 3, "dots": 3.3, "block": 4}[cfg.compute.remat]
    mine = m.moe.experts / sizes["expert"] if m.moe.experts else 1
    mlp = matrices * m.embed * (m.expert_hidden if m.moe.experts else m.hidden) * mine
    weights = (m.embed * m.head * (2 * m.heads + 2 * m.kv) + mlp) / sizes["tensor"]
    layers = m.layers * passes * width * (tokens * row + weights * cfg.train.accumulation)
    table = m.table * m.embed / sizes["tensor"]
    moments = {"adamw": 2, "lion": 1, "muon": 2, "adafactor": 0}[cfg.optim.name]
    update = parameters * 4 * (3 + 2 * moments + (2 if cfg.train.ema_decay else 0))
    return layers + table * (3 * width + 8) * cfg.train.accumulation, update


def times(
    cfg: Config,
    machine: Machine,
    sizes: Mapping[str, int],
    over: Mapping[str, Link],
    sent: Sequence[Collective],
    parameters: float,
) -> Times:
    """Seconds of a step by what takes them; see the module."""
    device = machine.device
    peak = device.tflops * 1e12 * (1 if cfg.compute.dtype == "bfloat16" else 0.5)
    arithmetic = sum(flops(cfg).values()) / (machine.devices * peak)
    passes, update = memory_bytes(cfg, sizes, parameters)
    wires: dict[str, float] = {}
    exposed = 0.0
    for one in sent:
        seconds = {axis: one.wire / over[axis].bandwidth for axis in one.axes}
        axis = max(seconds, key=seconds.__getitem__)
        wires[axis] = wires.get(axis, 0.0) + seconds[axis]
        overlaps = one.hidden and one.kind in _HIDDEN.get(machine.generation, _ALL)
        if not overlaps or over[axis].kind == "network":
            exposed += seconds[axis]
    memory, update_seconds = passes / device.hbm, update / device.hbm
    hidden = sum(wires.values()) - exposed
    bottlenecks = {"arithmetic": arithmetic / reached(machine), "memory": memory, "links": hidden}
    bottleneck = max(bottlenecks, key=bottlenecks.__getitem__)
    return Times(
        arithmetic=arithmetic,
        memory=memory,
        links=wires,
        update=update_seconds,
        exposed=exposed,
        bound=max(arithmetic, memory + update_seconds, *wires.values(), 0.0),
        expected=bottlenecks[bottleneck] + update_seconds + exposed,
        bottleneck=bottleneck,
    )
