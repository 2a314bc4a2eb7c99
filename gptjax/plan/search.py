"""Search over meshes, remat policies and accumulations: the Pareto front of step time and memory.

Exhaustive: every combination that divides is planned, in some milliseconds each once the state's
shapes are known. A context axis is tried where each part of a sequence has at least 4096 tokens.
Pipelines are not tried: they save communication over slow links, and here links are always fast.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from gptjax.config import Config, TrainConfig, phases
from gptjax.config.stage_validation import ramp_on
from gptjax.config.validation import divisors
from gptjax.errors import ConfigError
from gptjax.plan import memory
from gptjax.plan.collectives import RINGS
from gptjax.plan.estimate import Plan, plan
from gptjax.plan.machines import Machine

REMAT: tuple[Literal["none", "dots", "block"], ...] = ("none", "dots", "block")


@dataclass(frozen=True)
class Choice:
    """A plan with the command-line overrides that give it."""

    plan: Plan
    overrides: tuple[str, ...]


def pareto_front(cfg: Config, machine: Machine) -> list[Choice]:
    """The choices that fit, fastest first, each with less memory than all before it.

    Raises ConfigError where nothing fits.
    """
    cfg, fixed = _without_stages(cfg)
    growing, cfg = cfg.train, phases.grown(cfg)
    state = memory.tensors(cfg)
    found = [one for one in _all(cfg, machine, state, fixed) if one.plan.fits]
    if not found:
        raise ConfigError(
            [
                f"--search: no mesh, remat policy and accumulation of {cfg.run} fits "
                f"{machine.name}; use more devices, or a smaller train.batch_tokens"
            ]
        )
    found.sort(key=lambda one: (one.plan.times.expected, one.plan.total))
    best: list[Choice] = []
    for one in found:
        if not best or one.plan.total < 0.95 * best[-1].plan.total:
            best.append(replace(one, overrides=one.overrides + _growth(growing, one.plan)))
    return best


def _growth(growing: TrainConfig, planned: Plan) -> tuple[str, ...]:
    """The overrides of a growing batch whose sizes the mesh of a plan divides."""
    unit = phases.rows_unit(planned.cfg, planned.sizes) * growing.seq_len
    sizes = (growing.batch_start_tokens, growing.batch_increment_tokens)
    if not growing.batch_ramp_tokens or not any(size % unit for size in sizes):
        return ()
    return (ramp_on(growing, unit),)


def remedies(planned: Plan, most: int = 3) -> list[Choice]:
    """Changes that would fit where a plan does not, cheapest in time first.

    The best of remat alone, of accumulation alone, of the mesh alone, and of several together.
    """
    found: dict[str, Choice] = {}
    cfg, fixed = _without_stages(phases.grown(planned.cfg))
    state = memory.tensors(cfg) if fixed else planned.state
    for one in _all(cfg, planned.machine, state, fixed):
        changed = _changed(planned.cfg, one.plan.cfg)
        key = next(iter(changed)) if len(changed) == 1 else "several"
        better = one.plan.fits and one.plan.total < 0.95 * planned.total
        if better and (
            key not in found or one.plan.times.expected < found[key].plan.times.expected
        ):
            found[key] = one
    return sorted(found.values(), key=lambda one: one.plan.times.expected)[:most]


def _without_stages(cfg: Config) -> tuple[Config, list[str]]:
    """The configuration without a pipeline, and the overrides that give it."""
    if cfg.mesh.stage == 1:
        return cfg, []
    compute = replace(cfg.compute, rounds=1, microbatches=0)
    fixed = ["--mesh.stage 1", "--compute.rounds 1", "--compute.microbatches 0"]
    return replace(cfg, mesh=replace(cfg.mesh, stage=1), compute=compute), fixed


def _changed(old: Config, new: Config) -> set[str]:
    """The names of what differs: "mesh", "remat", "accumulation"."""
    pairs = {
        "mesh": (old.mesh, new.mesh),
        "remat": (old.compute.remat, new.compute.remat),
        "accumulation": (old.train.accumulation, new.train.accumulation),
    }
    return {name for name, (a, b) in pairs.items() if a != b}


def _all(
    cfg: Config, machine: Machine, state: list[memory.Tensor], fixed: list[str]
) -> Iterator[Choice]:
    """Every choice whose sizes divide; `fixed` are overrides that all have in common."""
    for shape in _shapes(cfg, machine):
        axes = ("data", "fsdp", "expert", "context", "tensor")
        named: dict[str, Any] = dict(zip(axes, shape, strict=True))
        sequences = cfg.train.batch // (named["data"] * named["fsdp"] * named["expert"])
        mesh = replace(cfg.mesh, **named)
        for accumulation, remat in itertools.product(divisors(sequences), REMAT):
            one = replace(
                cfg,
                mesh=mesh,
                compute=replace(cfg.compute, remat=remat),
                train=replace(cfg.train, accumulation=accumulation),
            )
            overrides = [f"--mesh.{axis} {size}" for axis, size in named.items()] + fixed
            overrides += [f"--compute.remat {remat}", f"--train.accumulation {accumulation}"]
            try:
                choice = Choice(plan(one, machine, state), tuple(overrides))
            except ConfigError:
                break  # these sizes do not divide, whatever the rest
            yield choice
            if not choice.plan.fits and _gathers_keys(choice.plan):
                one = replace(one, compute=replace(one.compute, attention="ring"))
                yield Choice(plan(one, machine, state), (*overrides, "--compute.attention ring"))


def _gathers_keys(planned: Plan) -> bool:
    """Whether a ring would need less memory: it sends more than twice the bytes that gathered keys
    are, and is XLA's arithmetic, so it is for what does not fit otherwise.
    """
    chosen_freely = planned.cfg.compute.attention == "auto"
    return chosen_freely and planned.sizes["context"] > 1 and not RINGS & set(planned.attention)


def _shapes(cfg: Config, machine: Machine) -> Iterator[tuple[int, int, int, int, int]]:
    """(data, fsdp, expert, context, tensor) that use all devices and divide the batch."""
    n, m = machine.devices, cfg.model
    experts = divisors(m.moe.experts) if m.moe.experts else [1]
    # A context axis is for sequences that are too long for a device.
    contexts = [c for c in divisors(n) if c == 1 or cfg.train.seq_len // c >= 4096]
    for tensor, expert, context in itertools.product(divisors(n), experts, contexts):
        rest, left = divmod(n, tensor * expert * context)
        if left or m.kv % tensor or tensor > machine.per_slice:
            continue
        for fsdp in divisors(rest):
            data = rest // fsdp
            if data % machine.data_multiple == 0 and cfg.train.batch % (data * fsdp * expert) == 0:
                yield data, fsdp, expert, context, tensor
