"""Roofline model of a step's time: arithmetic, memory traffic and links at the hardware's limits.

Two step times. `bound` is a lower bound: the longest of the three at the published peaks.
`expected` takes the share of the arithmetic peak that large products have been seen to reach on the
device, and adds the times that do not overlap: the optimizer's pass over its state, and collectives
that the compiler cannot hide. Both are predictions; neither was measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gptjax.config import Config
from gptjax.config.registry import OPTIMIZERS
from gptjax.model.flops import ModelCost
from gptjax.parallel import mesh, sharding
from gptjax.plan.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    REDUCE_SCATTER,
    Collective,
    pipeline_schedule,
)
from gptjax.plan.machines import Machine
from gptjax.plan.memory import KEPT_BY_DOTS
from gptjax.runtime.hardware import Device

# Share of the bfloat16 peak that a whole train step's products reached, recomputation counted, in
# the best runs that the MaxText team published: on v5e 0.89 (its 32B, 66.9 % MFU with a forward
# pass recomputed), on v5p 0.86 (1024B, 64.8 %), v6e 0.57 (Llama 3.1 405B, 42.8 %), v4 0.76 (22B,
# 56.7 %), v7x 0.73 (405B, 54.7 %; that its blocks are recomputed is an assumption). On GPUs 0.6,
# from torchtitan's 33 to 39 % of an H100 for 8B: the least certain of them.
REACHED: Mapping[str, float] = {"v4": 0.76, "v5e": 0.89, "v5p": 0.86, "v6e": 0.57, "v7x": 0.73}


def reached(machine: Machine) -> float:
    """Share of the peak that large products are expected to reach; see REACHED."""
    return REACHED.get(machine.device.name, 0.6)


def overlapped_kinds(device: Device) -> tuple[str, ...]:
    """Collectives that run beside arithmetic in the compiled step (docs/lab_log.md).

    Those that the SparseCore can take where there is one, gathers on a v5e, none on a v4; on GPUs
    all are assumed to.
    """
    if device.sparse_core:
        return ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, PERMUTE
    if device.platform == "tpu":
        return (ALL_GATHER,) if device.name == "v5e" else ()
    return ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, ALL_TO_ALL, PERMUTE


def _overlaps(one: Collective, device: Device) -> bool:
    """Whether a collective runs beside arithmetic; on a v5e those permutes that scatter gradients
    do, which do not go round a ring of the torus (docs/lab_log.md).
    """
    if one.kind == PERMUTE and device.ring_tokens:
        return one.axes == mesh.FSDP[:1]
    return one.overlapped and one.kind in overlapped_kinds(device)


def _seconds(one: Collective, link: "Link") -> float:
    """Seconds of a collective along a mesh axis; permutes go one way round a ring, others both."""
    ways = 2 if one.kind == PERMUTE and link.kind == "ring" else 1
    return one.wire_bytes / link.bandwidth * ways


@dataclass(frozen=True)
class Link:
    """The connection along a mesh axis: a ring, a line, a node's switch, or the network.

    bandwidth: bytes/s that a device can send along it. dims: dimensions of the torus that it spans.
    """

    kind: str
    bandwidth: float
    dims: int = 1


@dataclass(frozen=True)
class Times:
    """Seconds of a step.

    arithmetic, memory: at the published peaks. links: of the collectives, by mesh axis. update: the
    optimizer's pass over its state. exposed: collectives that do not overlap with arithmetic.
    bound, expected: of the whole step. bottleneck: arithmetic, memory or links.
    """

    arithmetic: float
    memory: float
    links: Mapping[str, float]
    update: float
    exposed: float
    bound: float
    expected: float
    bottleneck: str


def links(machine: Machine, devices: np.ndarray) -> dict[str, Link]:
    """The link along each mesh axis; `devices` are arranged along AXES."""
    found = {}
    for number, axis in enumerate(mesh.AXES):
        index: list[Any] = [0] * devices.ndim
        index[number] = slice(None)
        found[axis] = _link(machine, list(devices[tuple(index)]))
    return found


def _link(machine: Machine, line: list[Any]) -> Link:
    """The link along the devices of one line of the mesh."""
    device = machine.device
    group = "slice_index" if device.torus_dims else "process_index"
    if len({getattr(one, group) for one in line}) > 1:
        return Link("network", device.network_bandwidth)
    if not device.torus_dims:
        return Link("switch", device.link_bandwidth)
    coords = np.array([one.coords for one in line])
    moving = [i for i in range(coords.shape[1]) if len(set(coords[:, i])) > 1]
    ring = all(
        len(set(coords[:, i])) == machine.shape[i] and machine.shape[i] % device.wrap_multiple == 0
        for i in moving
    )
    dims = max(1, len(moving))
    bandwidth = device.link_bandwidth * dims * (2 if ring else 1)
    return Link("ring" if ring else "line", bandwidth, dims)


def as_compiled(one: Collective, over: Mapping[str, Link]) -> Collective:
    """The collective that XLA makes of one: on several dimensions of the torus at once, it compiles
    a reduce-scatter, and on three an all-gather, too, to an all-reduce of whole arrays
    (docs/lab_log.md).
    """
    dims = max(over[axis].dims for axis in one.axes)
    if (one.kind == REDUCE_SCATTER and dims > 1) or (one.kind == ALL_GATHER and dims > 2):
        return replace(one, kind=ALL_REDUCE)
    return one


def flops(cfg: Config, attention: Sequence[str] = ("splash",)) -> dict[str, float]:
    """Floating-point operations of one optimizer step by part, all devices together.

    The model's own parts, as in `ModelCost.flops_by_part`; "recomputed" by remat and by the kernels
    of the `attention` backends; "idle stages" of a pipeline's bubble, which compute for nothing.
    """
    m, tokens, remat = cfg.model, cfg.train.batch_tokens, cfg.compute.remat
    cost = ModelCost(m)
    parts = {
        name: operations * tokens
        for name, operations in cost.flops_by_part(cfg.train.seq_len).items()
    }
    scores = parts["attention's scores"]
    recomputed = scores / 12 * 2  # the kernel's backward pass makes the scores once more
    if remat == "block" or (remat == "dots" and not KEPT_BY_DOTS & set(attention)):
        recomputed += scores / 3
    if remat == "block":  # but for a feed-forward's last product, whose result nobody needs
        forward = sum(
            weight.active
            for weight in cost.weights
            if (weight.part, weight.name) != ("feed-forward", "down")
        )
        recomputed += 2.0 * m.layers * forward * tokens
    parts["recomputed"] = recomputed
    if bubble := pipeline_schedule(cfg).bubble:
        layers = sum(parts.values()) - parts["output layer"]
        parts["idle stages"] = layers * bubble / (1 - bubble)
    return parts


def memory_bytes(cfg: Config, sizes: Mapping[str, int], parameters: float) -> tuple[float, float]:
    """Bytes that one device moves to and from its memory: (in the passes, in the update).

    `parameters` are those of one device. Passes: each product reads its operands and writes its
    result, forward, recomputed and twice backward. Update: float32 state, read and written.
    """
    m, steps, tensor = cfg.model, cfg.train.accumulation, sizes["tensor"]
    itemsize = 2 if cfg.compute.dtype == "bfloat16" else 4
    cost = ModelCost(m)
    tokens = cfg.train.batch_tokens / math.prod(sizes[a] for a in sharding.mesh_axes("tokens"))
    a = cost.activations
    products = 2 * (a.qkv + a.queries) + 2 * (a.projections + 1) * a.hidden
    token = 6 * a.embed + products / tensor
    experts = cost.weight_size("experts") / sizes["expert"]
    weights = cost.weight_size("attention", "feed-forward") + experts
    passes = {"none": 3, "dots": 3.3, "block": 4}[cfg.compute.remat]
    layers = m.layers * passes * itemsize * (tokens * token + weights / tensor * steps)
    table = m.table * m.embed / tensor
    state = 3 + 2 * OPTIMIZERS[cfg.optim.name].moments + (2 if cfg.train.ema_decay else 0)
    return layers + table * (3 * itemsize + 8) * steps, parameters * 4 * state


def times(
    cfg: Config,
    machine: Machine,
    sizes: Mapping[str, int],
    links: Mapping[str, Link],
    collectives: Sequence[Collective],
    parameters: float,
    attention: Sequence[str] = ("splash",),
) -> Times:
    """Seconds of a step; see the module. `links` are by mesh axis, `parameters` of one device."""
    device = machine.device
    peak = device.peak(cfg.compute.dtype)
    arithmetic = sum(flops(cfg, attention).values()) / (machine.devices * peak)
    passes, update = memory_bytes(cfg, sizes, parameters)
    on_links: dict[str, float] = {}
    exposed = 0.0
    for one in collectives:
        seconds = {axis: _seconds(one, links[axis]) for axis in one.axes}
        axis = max(seconds, key=seconds.__getitem__)
        on_links[axis] = on_links.get(axis, 0.0) + seconds[axis]
        if not _overlaps(one, device) or links[axis].kind == "network":
            exposed += seconds[axis]
    memory, update_seconds = passes / device.hbm_bandwidth, update / device.hbm_bandwidth
    overlapped = sum(on_links.values()) - exposed
    bottlenecks = {
        "arithmetic": arithmetic / reached(machine),
        "memory": memory,
        "links": overlapped,
    }
    bottleneck = max(bottlenecks, key=bottlenecks.__getitem__)
    return Times(
        arithmetic=arithmetic,
        memory=memory,
        links=on_links,
        update=update_seconds,
        exposed=exposed,
        bound=max(arithmetic, memory + update_seconds, *on_links.values(), 0.0),
        expected=bottlenecks[bottleneck] + update_seconds + exposed,
        bottleneck=bottleneck,
    )
