"""The plan of a run on a machine, from arithmetic alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from gptjax.config import Config
from gptjax.errors import ConfigError
from gptjax.model import decoder
from gptjax.model.attention import backends
from gptjax.model.flops import ModelCost
from gptjax.parallel.mesh import AXES, abstract_mesh, arrange
from gptjax.plan import memory, roofline
from gptjax.plan.collectives import Collective, step_collectives, step_shape
from gptjax.plan.machines import Machine, abstract_devices


@dataclass(frozen=True)
class Plan:
    """A training run on a machine, as predicted. Bytes are of one device, seconds of a step.

    sizes: of the mesh by axis. state: the tensors that training keeps. memory_use: bytes by
    category at the step's peak. links: of each mesh axis. flops: of a step by part, all devices.
    mfu: of the model's own operations at the expected time. attention: the backends of a period.
    """

    cfg: Config
    machine: Machine
    sizes: Mapping[str, int]
    state: list[memory.Tensor]
    memory_use: Mapping[str, float]
    collectives: list[Collective]
    links: Mapping[str, roofline.Link]
    flops: Mapping[str, float]
    times: roofline.Times
    mfu: float
    attention: tuple[str, ...]

    @property
    def total(self) -> float:
        """Bytes of memory at the step's peak."""
        return sum(self.memory_use.values())

    @property
    def fits(self) -> bool:
        """Whether they are within the device's memory."""
        return self.total <= self.machine.device.memory

    @property
    def tokens_per_second(self) -> float:
        """At the expected step time."""
        return self.cfg.train.batch_tokens / self.times.expected

    @property
    def days(self) -> float:
        """Time for the whole budget at the expected step time, evaluation and checkpoints aside."""
        return self.cfg.train.tokens / self.tokens_per_second / 86400

    @property
    def chip_hours(self) -> float:
        """Chip-hours of the whole budget."""
        return self.days * 24 * self.machine.chips


def plan(cfg: Config, machine: Machine, state: list[memory.Tensor] | None = None) -> Plan:
    """The plan of a configuration on a machine; `state` are its tensors, if they are known.

    Raises ConfigError with every size that an axis does not divide, and where attention would need
    the scores of whole sequences, for which there are no formulae here.
    """
    cfg = check(cfg, machine)
    attention = _attention(cfg, machine)
    state = memory.tensors(cfg) if state is None else state
    devices = arrange(cfg.mesh, abstract_devices(machine))
    sizes = dict(zip(AXES, devices.shape, strict=True))
    device = machine.device
    use = memory.memory_use(cfg, sizes, state, attention, device)
    shape = step_shape(cfg, sizes, attention, device)
    if workspace := memory.cudnn_workspace(shape, device):
        use["cuDNN's workspace"] = workspace
    links = roofline.links(machine, devices)
    collectives = [
        roofline.as_compiled(one, links) for one in step_collectives(cfg, sizes, attention, device)
    ]
    times = roofline.times(
        cfg, machine, sizes, links, collectives, use["parameters"] / 4, attention
    )
    needed = ModelCost(cfg.model).flops_per_token(cfg.train.seq_len) * cfg.train.batch_tokens
    peak = machine.devices * device.peak(cfg.compute.dtype)
    return Plan(
        cfg=cfg,
        machine=machine,
        sizes=sizes,
        state=state,
        memory_use=use,
        collectives=collectives,
        links=links,
        flops=roofline.flops(cfg, attention),
        times=times,
        mfu=needed / (times.expected * peak),
        attention=attention,
    )


def check(cfg: Config, machine: Machine) -> Config:
    """The configuration as it would run there, checked; the evaluation's batch is rounded up.

    Raises ConfigError.
    """
    shape: dict[str, Any] = cfg.mesh.shape(machine.devices)
    groups = shape["data"] * shape["stage"] * shape["fsdp"] * shape["expert"]
    batch = -(-cfg.eval.batch // groups) * groups
    cfg = replace(cfg, mesh=replace(cfg.mesh, **shape), eval=replace(cfg.eval, batch=batch))
    cfg.check(machine.devices, machine.processes)
    return cfg


def _attention(cfg: Config, machine: Machine) -> tuple[str, ...]:
    """The attention backends that training would use there. Raises ConfigError."""
    target, wanted = machine.device.target, cfg.compute.attention
    with jax.sharding.use_abstract_mesh(abstract_mesh(context=cfg.mesh.context)):
        calls = decoder.attention_calls(
            cfg.model,
            cfg.compute,
            cfg.train.seq_len,
            segments=cfg.data.documents == "mask",
            training=True,
        )
    chosen = [backends.choose(wanted, *call, target) for call in calls]
    if "reference" in chosen:
        need, sizes = calls[chosen.index("reference")]
        refusals = backends.refusals(need, sizes, target)
        why = "; ".join(f"{name} {reason}" for name, reason in refusals.items())
        if wanted == "reference":
            why = "choose auto" + (f" where it has another ({why})" if why else "")
        else:
            why = f"of the others, {why}"
        raise ConfigError(
            [
                f"compute.attention={wanted}: on {machine.name} that is the reference attention, "
                f"which keeps every score and is not planned for; {why}"
            ]
        )
    return tuple(chosen)
