"""`gptjax plan`: the arithmetic, the search, the HTML page, and compilation, in this order."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from gptjax.cli.arguments import resolve
from gptjax.config import Config, MeshConfig, phases
from gptjax.errors import ConfigError
from gptjax.plan import aot, checkpoints, estimate, html, report, search
from gptjax.plan.estimate import Plan
from gptjax.plan.machines import Machine, parse
from gptjax.report import page
from gptjax.runtime.hardware import GIB

COMPILED = 2  # number of the search's best choices that --compile compiles


@dataclass(frozen=True)
class Options:
    """The options of the command line, by name."""

    machine: str | None = None
    compile: bool = False
    sampling: bool = False
    search: bool = False
    html: str | None = None
    json: bool = False
    price: float = 0.0
    storage: float = 0.0
    failures: float = 0.0


def run(cfg: Config, options: Options, tell: Callable[[str], None]) -> None:
    """Plans a run and tells the result, line by line.

    Raises ConfigError where there can be no plan, OutputError where the page cannot be written.
    """
    machine = _machine(cfg, options)
    for name in ("price", "storage", "failures"):
        if not 0 <= (value := getattr(options, name)) < float("inf"):
            raise ConfigError([f"--{name}={value:g}: must be a number, not negative"])
    if options.failures and not options.storage:
        raise ConfigError([f"--failures={options.failures:g}: requires --storage"])
    if options.compile or options.sampling:
        aot.devices(machine)  # raises now if there is no compiler
    if not cfg.stages:
        _run(cfg, machine, options, tell, "")
        if cfg.train.batch_ramp_tokens and not options.json:
            tell(
                f"\nplanned with the whole batch, to which it grows over the first "
                f"{cfg.train.batch_ramp_tokens:,} tokens"
            )
        return
    _run_stages(_with_mesh(cfg, machine), machine, options, tell)


def _run_stages(
    cfg: Config, machine: Machine, options: Options, tell: Callable[[str], None]
) -> None:
    """Plans each stage of a run. Raises ConfigError where a search finds nothing for a stage."""
    if not options.search:
        estimate.check(cfg, machine)
    sizes, found, problems = cfg.mesh.shape(machine.devices), {}, []
    for stage in cfg.stages:
        page = f"{Path(options.html).with_suffix('')}-{stage}.html" if options.html else None
        if not options.json:
            tell(f"--- stage {stage}")
        try:
            alone, mine = phases.of_stage(cfg, stage, sizes), replace(options, html=page)
            found[stage] = _run(alone, machine, mine, tell, stage)
        except ConfigError as error:
            problems += [f"stages.{stage}: {problem}" for problem in error.problems]
        if not options.json:
            tell("")
    if not options.json:
        for line in _of_stages(found):
            tell(line)
    if problems:
        raise ConfigError(problems)


def _of_stages(plans: Mapping[str, Plan]) -> Iterator[str]:
    """The stages in a line each, with what does not fit."""
    for stage, plan in plans.items():
        limit = plan.machine.device.memory
        fits = (
            "fits" if plan.fits else f"does not fit, {(plan.total - limit) / GIB:.1f} GiB too much"
        )
        yield (
            f"stage {stage}: {plan.total / GIB:.1f} of {limit / GIB:.1f} GiB, {fits}; "
            f"{plan.tokens_per_second:,.0f} tokens/s, {report.duration(plan.days)}"
        )
    yield f"all stages: {report.duration(sum(plan.days for plan in plans.values()))}"


def _run(
    cfg: Config, machine: Machine, options: Options, tell: Callable[[str], None], stage: str
) -> Plan:
    """Plans a run, or a stage of it, and tells the result; returns the plan."""
    choices = search.pareto_front(cfg, machine) if options.search else []
    plan = choices[0].plan if choices else estimate.plan(_with_mesh(cfg, machine), machine)
    if options.html:
        page.write_html(options.html, html.render(plan, choices, options.price))
    if options.json:
        named = {"stage": stage} if stage else {}
        tell(json.dumps(named | _as_dict(plan, choices, options)))
        return plan
    for line in report.lines(plan, options.price, _saving(plan, options)):
        tell(line)
    if not choices and plan.cfg.mesh != cfg.mesh and not _has_mesh(cfg):
        tell(
            f"\nno mesh was given: planned with --mesh.data {plan.cfg.mesh.data} --mesh.fsdp "
            f"{plan.cfg.mesh.fsdp}; give these to train, too"
        )
    if not plan.fits:
        tell(f"\n{report.ways_to_fit(plan)}")
    if choices:
        tell("")
        for line in report.pareto_front(choices):
            tell(line)
    _compile(plan, choices, options, tell)
    return plan


def _machine(cfg: Config, options: Options) -> Machine:
    """The machine of --machine, or of the configuration."""
    name = options.machine or cfg.mesh.machine
    if not name:
        raise ConfigError(
            ["--machine: not given; name a machine, such as v5e:16x16, 2xv5p:8x8x8 or h100:64"]
        )
    return parse(name)


def _has_mesh(cfg: Config) -> bool:
    """Whether the configuration gives any mesh size."""
    return replace(cfg.mesh, machine="") != MeshConfig()


def _with_mesh(cfg: Config, machine: Machine) -> Config:
    """The configuration; where it gives no mesh, all devices along fsdp, and slices along data."""
    if _has_mesh(cfg):
        return cfg
    data = machine.data_multiple
    return replace(cfg, mesh=replace(cfg.mesh, data=data, fsdp=machine.devices // data))


def _to_compile(plan: Plan, choices: list[search.Choice]) -> list[Plan]:
    """The plans that --compile compiles: the plan, or the best choices of a search."""
    return [choice.plan for choice in choices[:COMPILED]] or [plan]


def _as_dict(plan: Plan, choices: list[search.Choice], options: Options) -> dict[str, object]:
    """The plan, the search and the compiled programs, as JSON values."""
    result = report.as_dict(plan, options.price) | {"checkpoint": asdict(_saving(plan, options))}
    if choices:
        result["front"] = [
            {
                "overrides": list(one.overrides),
                "step_seconds": one.plan.times.expected,
                "memory_total_bytes": one.plan.total,
                "mfu": one.plan.mfu,
            }
            for one in choices
        ]
    if options.compile:
        found = [
            report.compiled_dict(aot.train_step(one.cfg, one.machine))
            for one in _to_compile(plan, choices)
        ]
        result["compiled"] = found if choices else found[0]
    if options.sampling:
        programs = aot.sampling(plan.cfg, plan.machine)
        result["sampling"] = {name: report.compiled_dict(found) for name, found in programs}
    return result


def _saving(plan: Plan, options: Options) -> checkpoints.Saving:
    return checkpoints.saving(plan, options.storage * 1e9, options.failures)


def _compile(
    plan: Plan,
    choices: list[search.Choice],
    options: Options,
    tell: Callable[[str], None],
) -> None:
    """Compiles the programs that the options ask for, and tells their memory and communication."""
    if options.compile:
        for one in _to_compile(plan, choices):
            tell(f"\n{report.mesh(one)}")
            for line in report.compiled(one, aot.train_step(one.cfg, one.machine)):
                tell(line)
    if options.sampling:
        tell("")
        for name, found in aot.sampling(plan.cfg, plan.machine):
            used = f"{found.peak / GIB:.2f} GiB a device" if found.peak else "out of memory"
            used += "" if found.fits(plan.machine.device.memory) else ": does not fit"
            sent = sum(one.wire_bytes for one in found.collectives)
            took = f"compiled in {found.seconds:.0f} s"
            tell(f"{name:28} {used}, {sent / 1e6:,.1f} MB sent a pass, {took}")


def run_command(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    cfg = resolve(args, overrides)
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    run(cfg, options, print)
