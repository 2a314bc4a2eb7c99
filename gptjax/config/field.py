"""Configuration fields: defaults that carry their resume class.

The resume class says what a changed value means to a run that is resumed; `resume_changes` in
config/resume.py applies it.
"""

import dataclasses
from typing import Any


def _field(resume: str, default: Any) -> Any:
    """A dataclass field of a resume class; a section's class is the factory of its default."""
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"resume": resume})
    return dataclasses.field(default=default, metadata={"resume": resume})


def identity(default: Any) -> Any:
    """A field that defines the run: a resume with another value is refused."""
    return _field("identity", default)


def schedule(default: Any) -> Any:
    """A field that may change at a resume and then changes the training: reported."""
    return _field("schedule", default)


def stage(default: Any) -> Any:
    """A field of a stage of training: it may change at a resume while the stage is to come."""
    return _field("stage", default)


def free(default: Any) -> Any:
    """A field that may change at a resume without changing the mathematics."""
    return _field("free", default)
