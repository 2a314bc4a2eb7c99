"""Changes to the configuration of a run that is resumed: refused or reported."""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.config import phases
from gptjax.config.loading import flatten
from gptjax.config.phases import Phase
from gptjax.config.schema import Config
from gptjax.errors import MismatchError


def resume_classes(cls: Any = Config, prefix: str = "") -> dict[str, str]:
    """The resume class of each field (identity, schedule, stage or free) by dotted name.

    Where a name of the user's is part of the dotted name, * stands for it.
    """
    classes: dict[str, str] = {}
    for f in dataclasses.fields(cls):
        inner = typing.get_type_hints(cls)[f.name]
        if dataclasses.is_dataclass(inner):
            classes |= resume_classes(inner, f"{prefix}{f.name}.")
        elif typing.get_origin(inner) is Mapping:
            of_each, name = typing.get_args(inner)[1], f"{prefix}{f.name}.*"
            deeper = dataclasses.is_dataclass(of_each)
            classes |= (
                resume_classes(of_each, f"{name}.") if deeper else {name: f.metadata["resume"]}
            )
        else:
            classes[prefix + f.name] = f.metadata["resume"]
    return classes


def resume_changes(saved: Config, given: Config, step: int = 0) -> list[str]:
    """The changes from `saved`, a run's configuration, to `given`: one line each.

    `step` is the number of steps that the run has done. Raises MismatchError with all changes of
    identity fields, since these would be another run, and of stages that are over or under way.
    """
    classes, old, new = resume_classes(), flatten(saved), flatten(given)
    changed = [name for name in old | new if old.get(name) != new.get(name) and name != "run"]
    refused = [
        f"{name}: {old.get(name)!r} in the run, {new.get(name)!r} given"
        for name in changed
        if classes[_generic(name)] == "identity"
    ]
    refused = refused or list(_stage_changes(saved, given, step))
    if refused:
        raise MismatchError(
            f"{given.run} contains another run; use its values, or give another --run", refused
        )
    told = [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r} ({classes[_generic(name)]})"
        for name in changed
    ]
    before, now = list(saved.stages), list(given.stages)
    if sorted(before) == sorted(now) and before != now:
        told.append(f"stages: {', '.join(before)} -> {', '.join(now)} (stage)")
    return told


def _generic(name: str) -> str:
    """A dotted name with * for names of the user's."""
    name = re.sub(r"^(data\.mixture|stages)\.[^.]+", r"\1.*", name)
    return re.sub(r"\.weights\.[^.]+$", ".weights.*", name)


def _stage_changes(saved: Config, given: Config, step: int) -> Iterator[str]:
    """Changes of stages that have begun within `step` steps: of their batches, of what their data
    are, and where they end; the end of the one that is under way may move."""
    if not saved.stages and not given.stages:
        return
    old, new = phases.phases(saved), phases.phases(given)
    borders = sorted({phase.first for phase in (*old, *new) if phase.first < step})
    for first in borders:
        one, other = (phases.phase_at(found, first) for found in (old, new))
        if one.stage != other.stage and one.stage and other.stage:
            yield f"stages.{one.stage}: was under way at step {first}, and is not as it is given"
        for name, before, now in zip(
            ("batch_tokens", "seq_len", "weights", "rope"),
            _content(saved, one),
            _content(given, other),
            strict=True,
        ):
            if before != now:
                stage = f"stages.{one.stage or other.stage}"
                yield f"{stage}.{name}: {before} at step {first} in the run, {now} given"
    ended = {phase.stage: phase.last for phase in old if phase.stage and phase.last <= step}
    for stage, last in ended.items():
        if any(phase.stage == stage and phase.last > last for phase in old):
            continue  # a smaller batch of a stage that goes on
        ends = [phase.last for phase in new if phase.stage == stage]
        if stage in given.stages and (
            saved.stages[stage] != given.stages[stage] or ends[-1:] != [last]
        ):
            yield f"stages.{stage}: is over since step {last}, and cannot change"


def _content(cfg: Config, phase: Phase) -> tuple[Any, ...]:
    """What a phase trains on."""
    rope = dataclasses.asdict(phases.model_of(cfg, phase.stage).rope)
    return phase.batch_tokens, phase.seq_len, dict(phases.weights_of(cfg, phase.stage)), rope
