"""What `gptjax plan` does, in its order: the arithmetic, the search, the compiler, the page."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from gptjax.cli.arguments import resolve
from gptjax.config import Config, MeshConfig
from gptjax.errors import ConfigError, OutputError
from gptjax.plan import aot, estimate, report, search
from gptjax.plan import html as page
from gptjax.plan.estimate import Plan
from gptjax.plan.hardware import GIB, Machine, parse

CONFIRMED = 2  # of the search's best, how many the compiler looks at


@dataclass(frozen=True)
class Options:
    """The command's options, under their names there."""

    machine: str | None = None
    compile: bool = False
    sampling: bool = False
    search: bool = False
    html: str | None = None
    json: bool = False
    price: float = 0.0


def run(cfg: Config, options: Options, tell: Callable[[str], None]) -> None:
    """Tells the plan. Raises ConfigError for what cannot be, OutputError for a page not written."""
    machine = _machine(cfg, options)
    if not 0 <= options.price < float("inf"):
        raise ConfigError([f"--price={options.price:g}: must be a number, not negative"])
    if options.compile or options.sampling:
        aot.devices(machine)  # says now if there is no compiler
    choices = search.front(cfg, machine) if options.search else []
    planned = choices[0].plan if choices else estimate.plan(_filled(cfg, machine), machine)
    if options.html:
        try:
            Path(options.html).write_text(
                page.render(planned, choices, options.price), encoding="utf-8"
            )
        except OSError as error:
            raise OutputError(f"--html={options.html}: cannot be written: {error}") from None
    if options.json:
        tell(json.dumps(_as_dict(planned, choices, options)))
        return
    for line in report.lines(planned, options.price):
        tell(line)
    if (
        not choices
        and planned.cfg.mesh != cfg.mesh
        and replace(cfg.mesh, machine="") == MeshConfig()
    ):
        tell(
            f"\nno mesh was given: planned with --mesh.data {planned.cfg.mesh.data} --mesh.fsdp "
            f"{planned.cfg.mesh.fsdp}; give these to train, too"
        )
    if not planned.fits:
        tell(f"\n{report.ways_to_fit(planned)}")
    if choices:
        tell("")
        for line in report.front(choices):
            tell(line)
    _confirm(planned, choices, options, tell)


def _machine(cfg: Config, options: Options) -> Machine:
    name = options.machine or cfg.mesh.machine
    if not name:
        raise ConfigError(
            ["--machine: say what to plan for, such as v5e:16x16, 2xv5p:8x8x8 or h100:64"]
        )
    return parse(name)


def _filled(cfg: Config, machine: Machine) -> Config:
    """The configuration; where it says nothing of its mesh, all devices along fsdp."""
    if replace(cfg.mesh, machine="") == MeshConfig():
        parts = machine.devices // machine.islands
        return replace(cfg, mesh=replace(cfg.mesh, data=machine.islands, fsdp=parts))
    return cfg


def _as_dict(planned: Plan, choices: list[search.Choice], options: Options) -> dict[str, object]:
    result = report.as_dict(planned, options.price)
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
        confirmed = [choice.plan for choice in choices[:CONFIRMED]] or [planned]
        found = [report.compiled_dict(aot.train_step(p.cfg, p.machine)) for p in confirmed]
        result["compiled"] = found if choices else found[0]
    if options.sampling:
        programs = aot.sampling(planned.cfg, planned.machine)
        result["sampling"] = {name: report.compiled_dict(found) for name, found in programs}
    return result


def _confirm(
    planned: Plan,
    choices: list[search.Choice],
    options: Options,
    tell: Callable[[str], None],
) -> None:
    """What the compiler says of the plan, or of the best that were searched."""
    if options.compile:
        for one in [choice.plan for choice in choices[:CONFIRMED]] or [planned]:
            tell(f"\n{report.mesh(one)}")
            for line in report.compiled(one, aot.train_step(one.cfg, one.machine)):
                tell(line)
    if options.sampling:
        tell("")
        for name, found in aot.sampling(planned.cfg, planned.machine):
            used = "does not fit" if found.out_of_memory else f"{found.peak / GIB:.2f} GiB a device"
            wire = sum(one.wire for one in found.collectives)
            took = f"compiled in {found.seconds:.0f} s"
            tell(f"{name:28} {used}, {wire / 1e6:,.1f} MB sent a pass, {took}")


def run_command(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs the command."""
    cfg = resolve(args, overrides)
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    run(cfg, options, print)
