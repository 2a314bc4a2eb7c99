"""A plan as text for a terminal, and as JSON."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.model.flops import ModelCost
from gptjax.parallel.mesh import FSDP
from gptjax.plan import cudnn_library, roofline, search
from gptjax.plan.aot import Compiled, requested_gib
from gptjax.plan.checkpoints import DAY, Saving
from gptjax.plan.collectives import Collective, by_axes, pipeline_schedule
from gptjax.plan.estimate import Plan
from gptjax.plan.search import Choice
from gptjax.runtime.hardware import GIB

BAR = 40  # characters that stand for a device's whole memory


def duration(days: float) -> str:
    """Days in the largest unit of which there is at least one."""
    for unit, size in (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0)):
        if days * size >= 1:
            return f"{days * size:.1f} {unit}"
    return f"{days * 86400:.1f} seconds"


def lines(plan: Plan, price: float, saving: Saving) -> Iterator[str]:
    """The plan, line by line. `price` is that of a chip-hour, in the user's currency; 0: none."""
    cfg, machine, device = plan.cfg, plan.machine, plan.machine.device
    parameters = ModelCost(cfg.model).parameters
    active = "" if parameters.active == parameters.total else f", {parameters.active:,} active"
    yield f"{cfg.run}: {parameters.total:,} parameters{active}"
    yield (
        f"on {machine.name}: {machine.devices} devices {device.product}, {machine.chips} chips, "
        f"{machine.processes} process{'es' * (machine.processes > 1)}. "
        "All that follows is predicted; nothing was measured."
    )
    yield "mesh      " + mesh(plan)
    yield f"attention {', '.join(dict.fromkeys(plan.attention))}"
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _step(plan, price)
    yield from _checkpoints(plan, saving)
    yield ""
    yield from _communication(plan.collectives)
    yield ""
    yield from _tensors(plan)


def mesh(plan: Plan) -> str:
    """The mesh in a line, with the dimensions of the torus that fsdp spans."""
    sizes = plan.sizes
    rings = [sizes[axis] for axis in FSDP if sizes[axis] > 1]
    around = f" (rings of {' x '.join(map(str, rings))})" if len(rings) > 1 else ""
    stages = ""
    if sizes["stage"] > 1:
        rounds = plan.cfg.compute.rounds
        microbatches = pipeline_schedule(plan.cfg).microbatches
        stages = f"stage {sizes['stage']} ({rounds} rounds, {microbatches} microbatches), "
    return (
        f"data {sizes['data']}, {stages}fsdp {math.prod(rings)}{around}, "
        f"expert {sizes['expert']}, context {sizes['context']}, tensor {sizes['tensor']}; "
        f"accumulation {plan.cfg.train.accumulation}, remat {plan.cfg.compute.remat}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    limit = plan.machine.device.memory
    free = (limit - plan.total) / GIB
    verdict = f"fits, {free:.1f} to spare" if plan.fits else f"does not fit, {-free:.1f} too much"
    yield f"memory    {plan.total / GIB:.2f} of {limit / GIB:.2f} GiB a device: {verdict}"
    for name, size in plan.memory_use.items():
        if size:
            length = min(2 * BAR, max(1, round(BAR * size / limit)))
            bar = "#" * length if size > limit / BAR / 4 else ""
            yield f"  {name:18} {size / GIB:8.2f}  {bar}"


def _step(plan: Plan, price: float) -> Iterator[str]:
    cfg, times, machine = plan.cfg, plan.times, plan.machine
    rate = plan.tokens_per_second
    yield (
        f"step      {cfg.train.batch_tokens:,} tokens in {times.expected:.3g} s, "
        f"{rate:,.0f} tokens/s ({rate / machine.chips:,.0f} a chip), MFU {plan.mfu:.1%}; "
        f"at the published peaks it would be {times.bound:.3g} s"
    )
    yield f"  arithmetic at the peak   {times.arithmetic:8.3g} s"
    for name, operations in plan.flops.items():
        share = operations / sum(plan.flops.values())
        yield f"    {name:24} {operations:10.3g} FLOPs {share:6.1%}"
    yield f"  memory traffic           {times.memory:8.3g} s, the update {times.update:.2g} s more"
    for axis, seconds in times.links.items():
        link = plan.links[axis]
        over = f"{axis} over a {link.kind}"
        yield f"  {over:24} {seconds:8.3g} s at {link.bandwidth / 1e9:.0f} GB/s"
    yield f"  bound by {times.bottleneck}; {times.exposed:.2g} s of collectives do not overlap"
    cost = f", {plan.chip_hours * price:,.0f} at {price:g} a chip-hour" if price else ""
    yield (
        f"budget    {cfg.train.tokens:,} tokens in {duration(plan.days)}, "
        f"{plan.chip_hours:,.0f} chip-hours{cost}"
    )


def _checkpoints(plan: Plan, saving: Saving) -> Iterator[str]:
    processes = plan.machine.processes
    each = f", {saving.total / processes / 1e9:,.2f} from each process" if processes > 1 else ""
    written = f", {duration(saving.seconds / DAY)} to write" if saving.seconds else ""
    yield f"checkpoint {saving.total / 1e9:,.2f} GB{each}{written}"
    if saving.interval:
        steps = max(1, round(saving.interval / plan.times.expected))
        yield (
            f"  --checkpoint.every {steps} ({duration(saving.interval / DAY)}) loses the least "
            f"time, {saving.lost:.1%} of it, if steps wait for all of a save; they wait only for "
            "its copy to host memory"
        )


def _communication(found: Sequence[Collective]) -> Iterator[str]:
    yield f"{'communication':15} {'over':22} {'in layers':>10} {'outside':>8} {'GB a device':>12}"
    layers = by_axes(_in_layers(found))
    for key, (count, wire_bytes) in sorted(by_axes(found).items()):
        over, in_layers = ", ".join(key[1]), layers.get(key, (0, 0))[0]
        yield (
            f"{key[0]:15} {over:22} {in_layers:10.0f} {count - in_layers:8.0f} "
            f"{wire_bytes / 1e9:12.3f}"
        )


def _tensors(plan: Plan) -> Iterator[str]:
    yield f"{'tensor':36} {'shape':>28} {'on one device':>24} {'MiB':>10}"
    for tensor in plan.state:
        if tensor.group == "parameters" and tensor.shape:
            shape = "x".join(map(str, tensor.shape))
            shard = "x".join(map(str, tensor.shard_shape(plan.sizes)))
            size = tensor.bytes(plan.sizes) / 2**20
            yield f"{tensor.path.removeprefix('params/'):36} {shape:>28} {shard:>24} {size:10.2f}"


def compiled(plan: Plan, found: Compiled) -> Iterator[str]:
    """The compiled step's memory and communication beside the plan's."""
    compilers = {"tpu": "the TPU's compiler", "gpu": "XLA's compiler for GPUs"}
    device = plan.machine.device
    yield f"compiled  by {compilers[device.platform]} in {found.seconds:.0f} s"
    if found.out_of_memory:
        yield f"  {out_of_memory(plan, found)}"
        return
    ratio = plan.total / found.peak
    yield (
        f"  memory: {found.peak / GIB:.2f} GiB of {device.memory / GIB:.2f}; "
        f"predicted {plan.total / GIB:.2f}, ratio {ratio:.3f}"
    )
    if found.workspace:
        yield (
            f"  {found.workspace / GIB:.2f} GiB of both are cuDNN's workspace, by formula: "
            f"{cudnn_library.why_not()}"
        )
    elif "__cudnn$fmha" in found.text:
        yield f"  with the graphs and workspaces of cuDNN {cudnn_library.version()}"
    if not found.fits(device.memory):
        yield f"  does not fit; {ways_to_fit(plan)}"
    yield from _comparison(plan.collectives, found.collectives)
    total = sum(one.wire_bytes for one in found.collectives)
    predicted = sum(one.wire_bytes for one in plan.collectives)
    overlapped = sum(one.wire_bytes for one in found.collectives if one.overlapped)
    if total:
        yield (
            f"  all: {total / 1e9:.3f} GB, predicted {predicted / 1e9:.3f}, ratio "
            f"{predicted / total:.3f}; {overlapped / total:.0%} of it overlaps with arithmetic"
        )
    for warning in found.warnings:
        yield f"  warning: {warning}"


def _comparison(predicted: Sequence[Collective], found: Sequence[Collective]) -> Iterator[str]:
    """Collectives as predicted and as found, by kind and axes: counts in layers and outside, GB."""
    yield (
        f"  {'':15} {'over':30} {'in layers':>9} {'outside':>8} {'predicted':>13} "
        f"{'GB':>10} {'predicted':>10}"
    )
    all_found, all_predicted = by_axes(found), by_axes(predicted)
    layers_found, layers_predicted = by_axes(_in_layers(found)), by_axes(_in_layers(predicted))
    none = (0.0, 0.0)
    for key in sorted(set(all_found) | set(all_predicted)):
        count, size = all_found.get(key, none)
        count_predicted, size_predicted = all_predicted.get(key, none)
        inside = layers_found.get(key, none)[0]
        inside_predicted = layers_predicted.get(key, none)[0]
        if max(size, size_predicted) >= 1e6:
            both = f"{inside_predicted:.0f} + {count_predicted - inside_predicted:.0f}"
            yield (
                f"  {key[0]:15} {', '.join(key[1]):30} {inside:9.0f} {count - inside:8.0f} "
                f"{both:>13} {size / 1e9:10.3f} {size_predicted / 1e9:10.3f}"
            )


def _in_layers(collectives: Sequence[Collective]) -> list[Collective]:
    return [one for one in collectives if one.where == "layers"]


def out_of_memory(plan: Plan, found: Compiled) -> str:
    """The memory that XLA asked for, and the cheapest changes that fit."""
    assert found.out_of_memory
    requested = requested_gib(found.out_of_memory)
    limit = plan.machine.device.memory / GIB
    much = f"{requested:.1f}" if requested else "more"
    return (
        f"does not fit: XLA needs {much} GiB of temporaries beside the state, and a device has "
        f"{limit:.2f} in all; {ways_to_fit(plan)}"
    )


def ways_to_fit(plan: Plan) -> str:
    """Up to three changes that would fit by the plan, cheapest in time first."""
    ways = search.remedies(plan)
    if not ways:
        return "no change of remat, accumulation or mesh fits: use more devices"
    changes = (
        f"{' '.join(way.overrides)} ({way.plan.total / GIB:.1f} GiB, "
        f"{way.plan.times.expected / plan.times.expected - 1:+.0%} time)"
        for way in ways
    )
    return "cheapest ways to fit: " + "; or ".join(changes)


def pareto_front(choices: Sequence[Choice]) -> Iterator[str]:
    """The Pareto front of a search, with the overrides to paste."""
    yield "fastest first, each with less memory than those before it (predicted):"
    for one in choices:
        plan = one.plan
        yield (
            f"  {plan.times.expected:8.3g} s  {plan.total / GIB:7.2f} GiB  MFU {plan.mfu:6.1%}  "
            + " ".join(one.overrides)
        )


def compiled_dict(found: Compiled) -> dict[str, Any]:
    """A compiled program's memory and communication, as JSON values."""
    return {
        "seconds": found.seconds,
        "peak_bytes": found.peak,
        "workspace_bytes": found.workspace,
        "argument_bytes": found.arguments,
        "out_of_memory": found.out_of_memory,
        "warnings": found.warnings,
        "overlapped_wire_bytes": sum(c.wire_bytes for c in found.collectives if c.overlapped),
        "collectives": _collectives_dicts(found.collectives),
    }


def _collectives_dicts(collectives: Sequence[Collective]) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "axes": list(axes), "count": count, "wire_bytes": wire_bytes}
        for (kind, axes), (count, wire_bytes) in sorted(by_axes(collectives).items())
    ]


def as_dict(plan: Plan, price: float) -> dict[str, Any]:
    """Everything that the plan predicts, as JSON values."""
    times = plan.times
    return {
        "prediction": True,
        "run": plan.cfg.run,
        "machine": plan.machine.name,
        "devices": plan.machine.devices,
        "mesh": dict(plan.sizes),
        "attention": list(plan.attention),
        "fits": plan.fits,
        "memory_bytes": dict(plan.memory_use),
        "memory_total_bytes": plan.total,
        "memory_limit_bytes": plan.machine.device.memory,
        "flops": dict(plan.flops),
        "step_seconds": times.expected,
        "step_seconds_at_least": times.bound,
        "arithmetic_seconds": times.arithmetic,
        "memory_seconds": times.memory,
        "link_seconds": dict(times.links),
        "update_seconds": times.update,
        "exposed_seconds": times.exposed,
        "bottleneck": times.bottleneck,
        "reached_share_of_peak": roofline.reached(plan.machine),
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
        "days": plan.days,
        "chip_hours": plan.chip_hours,
        "cost": plan.chip_hours * price if price else None,
        "collectives": _collectives_dicts(plan.collectives),
    }
