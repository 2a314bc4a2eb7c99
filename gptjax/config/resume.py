"""Changes to the configuration of a run that is resumed: refused or reported."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

from gptjax.config.loading import flatten
from gptjax.config.schema import Config
from gptjax.errors import MismatchError


def resume_classes(cls: Any = Config, prefix: str = "") -> dict[str, str]:
    """The resume class of each field (identity, schedule or free) by dotted name.

    Where a name of the user's is part of the dotted name, * stands for it.
    """
    classes: dict[str, str] = {}
    for f in dataclasses.fields(cls):
        inner = typing.get_type_hints(cls)[f.name]
        if dataclasses.is_dataclass(inner):
            classes |= resume_classes(inner, f"{prefix}{f.name}.")
        elif typing.get_origin(inner) is Mapping:
            classes |= resume_classes(typing.get_args(inner)[1], f"{prefix}{f.name}.*.")
        else:
            classes[prefix + f.name] = f.metadata["resume"]
    return classes


def resume_changes(saved: Config, given: Config) -> list[str]:
    """The changes from `saved`, a run's configuration, to `given`: one line each.

    Raises MismatchError with all changes of identity fields, since these would be another run.
    """
    classes, old, new = resume_classes(), flatten(saved), flatten(given)
    class_of = lambda name: classes[re.sub(r"^(data\.mixture)\.[^.]+", r"\1.*", name)]
    changed = [name for name in old | new if old.get(name) != new.get(name) and name != "run"]
    refused = [
        f"{name}: {old.get(name)!r} in the run, {new.get(name)!r} given"
        for name in changed
        if class_of(name) == "identity"
    ]
    if refused:
        raise MismatchError(
            f"{given.run} contains another run; use its values, or give another --run", refused
        )
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r} ({class_of(name)})" for name in changed
    ]
