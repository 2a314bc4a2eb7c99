"""A plan in words and figures, and as JSON."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.model import flops
from gptjax.parallel.mesh import FSDP
from gptjax.plan import aot as compiling
from gptjax.plan import collectives, roofline
from gptjax.plan.estimate import Plan
from gptjax.plan.machines import GIB

BAR = 40  # characters of a device's whole memory


def lines(plan: Plan, price: float) -> Iterator[str]:
    """The plan for a terminal. `price` is of a chip-hour, in the user's currency; 0: none."""
    cfg, machine, device = plan.cfg, plan.machine, plan.machine.device
    parameters = flops.parameters(cfg.model)
    active = "" if parameters.active == parameters.total else f", {parameters.active:,} active"
    yield f"{cfg.run}: {parameters.total:,} parameters{active}"
    yield (
        f"on {machine.name}: {machine.devices} devices {device.kind}, {machine.chips} chips, "
        f"{machine.processes} processes. All that follows is predicted; nothing was measured."
    )
    yield "mesh      " + mesh(plan)
    yield f"attention {', '.join(dict.fromkeys(plan.attention))}"
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _step(plan, price)
    yield ""
    yield from _traffic(plan.sent)
    yield ""
    yield from _tensors(plan)


def mesh(plan: Plan) -> str:
    """The mesh in words, with the rings that fsdp runs through."""
    sizes = plan.sizes
    rings = [sizes[axis] for axis in FSDP if sizes[axis] > 1]
    around = f" (rings of {' x '.join(map(str, rings))})" if len(rings) > 1 else ""
    stages, through = "", collectives.passes(plan.cfg)
    if sizes["stage"] > 1:
        rounds = plan.cfg.compute.rounds
        stages = f"stage {sizes['stage']} ({rounds} rounds, {through.parts} microbatches), "
    return (
        f"data {sizes['data']}, {stages}fsdp {math.prod(rings)}{around}, "
        f"expert {sizes['expert']}, context {sizes['context']}, tensor {sizes['tensor']}; "
        f"accumulation {plan.cfg.train.accumulation}, remat {plan.cfg.compute.remat}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    room = plan.machine.device.memory
    spare = room - plan.total
    verdict = (
        f"fits, {spare / GIB:.1f} to spare" if plan.fits else f"too much by {-spare / GIB:.1f}"
    )
    yield f"memory    {plan.total / GIB:.2f} of {room / GIB:.2f} GiB a device: {verdict}"
    for name, size in plan.held.items():
        if size:
            bar = (
                "#" * min(2 * BAR, max(1, round(BAR * size / room)))
                if size > room / BAR / 4
                else ""
            )
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
        f"budget    {cfg.train.tokens:,} tokens in {plan.days:.1f} days, "
        f"{plan.chip_hours:,.0f} chip-hours{cost}"
    )


def _traffic(sent: Sequence[collectives.Collective]) -> Iterator[str]:
    yield f"{'sent in a step':15} {'over':22} {'in layers':>10} {'outside':>8} {'GB a device':>12}"
    inside = collectives.by_axes([one for one in sent if one.where == "layers"])
    outside = collectives.by_axes([one for one in sent if one.where != "layers"])
    for key in sorted(set(inside) | set(outside)):
        (within, wire), (without, more) = inside.get(key, (0, 0)), outside.get(key, (0, 0))
        over, gigabytes = ", ".join(key[1]), (wire + more) / 1e9
        yield f"{key[0]:15} {over:22} {within:10.0f} {without:8.0f} {gigabytes:12.3f}"


def _tensors(plan: Plan) -> Iterator[str]:
    yield f"{'tensor':36} {'shape':>28} {'on one device':>24} {'MiB':>10}"
    for tensor in plan.state:
        if tensor.group == "parameters" and tensor.shape:
            shape, piece = (
                "x".join(map(str, sizes)) for sizes in (tensor.shape, tensor.piece(plan.sizes))
            )
            size = tensor.bytes(plan.sizes) / 2**20
            yield f"{tensor.path.removeprefix('params/'):36} {shape:>28} {piece:>24} {size:10.2f}"


def compiled(plan: Plan, found: compiling.Compiled) -> Iterator[str]:
    """XLA's own account of the step beside the plan's."""
    yield f"compiled  by the TPU's compiler in {found.seconds:.0f} s"
    if found.out_of_memory:
        yield f"  {out_of_memory(plan, found)}"
        return
    ratio = plan.total / found.peak
    yield (
        f"  memory: {found.peak / GIB:.2f} GiB of {plan.machine.device.memory / GIB:.2f}; "
        f"predicted {plan.total / GIB:.2f}, ratio {ratio:.3f}"
    )
    yield from _beside(plan.sent, found.collectives)
    wire = sum(one.wire for one in found.collectives)
    guess = sum(one.wire for one in plan.sent)
    beside = sum(one.wire for one in found.collectives if one.hidden)
    if wire:
        yield (
            f"  all: {wire / 1e9:.3f} GB, predicted {guess / 1e9:.3f}, ratio {guess / wire:.3f}; "
            f"{beside / wire:.0%} of it runs beside arithmetic"
        )
    for warning in found.warnings:
        yield f"  warning: {warning}"


def _beside(
    sent: Sequence[collectives.Collective], found: Sequence[collectives.Collective]
) -> Iterator[str]:
    """Collectives as predicted and as found, by kind and axes: counts in layers and outside, GB."""
    within = lambda ones: collectives.by_axes([one for one in ones if one.where == "layers"])
    guess, seen = collectives.by_axes(sent), collectives.by_axes(found)
    inside, counted_inside = within(found), within(sent)
    yield (
        f"  {'':15} {'over':30} {'in layers':>9} {'outside':>8} {'predicted':>13} "
        f"{'GB':>10} {'predicted':>10}"
    )
    for key in sorted(set(guess) | set(seen)):
        (count, wire), (counted, expected) = seen.get(key, (0, 0)), guess.get(key, (0, 0))
        layers, layers_guess = inside.get(key, (0, 0))[0], counted_inside.get(key, (0, 0))[0]
        if max(wire, expected) >= 1e6:
            both = f"{layers_guess:.0f} + {counted - layers_guess:.0f}"
            yield (
                f"  {key[0]:15} {', '.join(key[1]):30} {layers:9.0f} {count - layers:8.0f} "
                f"{both:>13} {wire / 1e9:10.3f} {expected / 1e9:10.3f}"
            )


def out_of_memory(plan: Plan, found: compiling.Compiled) -> str:
    """In a sentence, what it wanted and the cheapest ways to fit."""
    assert found.out_of_memory
    wanted = compiling.wanted(found.out_of_memory)
    room = plan.machine.device.memory / GIB
    much = f"{wanted:.1f}" if wanted else "more"
    return (
        f"does not fit: XLA wants {much} GiB of temporaries beside the state, and a device has "
        f"{room:.2f} in all; {ways_to_fit(plan)}"
    )


def ways_to_fit(plan: Plan) -> str:
    """Up to three changes that the plan says would fit, cheapest in time first."""
    from gptjax.plan import search

    ways = search.remedies(plan)
    if not ways:
        return "no change of remat, accumulation or mesh fits: use more devices"
    told = (
        f"{' '.join(w.overrides)} ({w.plan.total / GIB:.1f} GiB, "
        f"{w.plan.times.expected / plan.times.expected - 1:+.0%} time)"
        for w in ways
    )
    return "cheapest ways to fit: " + "; or ".join(told)


def front(choices: Sequence[Any]) -> Iterator[str]:
    """The Pareto front of a search, with what to paste."""
    yield "fastest first, each with less memory than those before it (predicted):"
    for one in choices:
        plan = one.plan
        yield (
            f"  {plan.times.expected:8.3g} s  {plan.total / GIB:7.2f} GiB  MFU {plan.mfu:6.1%}  "
            + " ".join(one.overrides)
        )


def compiled_dict(found: compiling.Compiled) -> dict[str, Any]:
    """What the compiler said, as JSON values."""
    return {
        "seconds": found.seconds,
        "peak_bytes": found.peak,
        "argument_bytes": found.arguments,
        "out_of_memory": found.out_of_memory,
        "warnings": found.warnings,
        "collectives": [
            {"kind": kind, "axes": list(axes), "count": count, "wire_bytes": wire}
            for (kind, axes), (count, wire) in sorted(
                collectives.by_axes(found.collectives).items()
            )
        ],
    }


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
        "memory_bytes": dict(plan.held),
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
        "collectives": [
            {"kind": kind, "axes": list(axes), "count": count, "wire_bytes": wire}
            for (kind, axes), (count, wire) in sorted(collectives.by_axes(plan.sent).items())
        ],
    }
