r"""Labelled examples, read from JSON lines and checked before anything else happens.

classify   {"text": "...", "label": "..."}, or with "pair", a second text
choose     {"text": "...", "choices": ["...", "..."], "label": 0}

A label of classify is a text or a whole number; a label of choose is the index of the right choice.
Errors name the file and every wrong line. This module imports numpy at most, so a wrong file is
reported before jax is imported.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.errors import DataError
from gptjax.runtime import regular_file

_SHOWN = 20  # problems of a file that a message lists

Sequences = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Example:
    """The sequences that the model reads, each of one or two texts, and the label.

    classify has one sequence, and the label's name as `label`; choose has a sequence for each
    choice, and the index of the right one. An unlabelled example has None. `line` counts from 1.
    """

    sequences: Sequences
    label: str | int | None
    line: int


@dataclass(frozen=True)
class Examples:
    """The examples of a file, and the file's SHA-256."""

    path: str
    sha256: str
    all: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.all)


class RecordError(Exception):
    """A problem of a line, without its location."""


def read(path: str, task: str, option: str, *, labelled: bool = True) -> Examples:
    """The examples of a file that `option` names; labels are ignored unless `labelled`.

    Raises DataError for a file that cannot be read, and with every line that cannot be used.
    """
    parse = {"classify": _classify, "choose": _choose}[task]
    examples, problems, raw = [], [], read_file(path, option)
    for number, record in parse_lines(raw):
        try:
            if isinstance(record, Exception):
                raise record
            examples.append(Example(*parse(record, labelled), number))
        except RecordError as error:
            problems.append(f"{path}:{number}: {error}")
    raise_problems(problems)
    if not examples:
        raise DataError(f"{option}={path}: no examples in it")
    return Examples(path, hashlib.sha256(raw).hexdigest(), tuple(examples))


def read_file(path: str, option: str) -> bytes:
    """The contents of a file that `option` names. Raises DataError."""
    return regular_file.read(Path(path).expanduser(), f"{option}={path}")


def parse_lines(raw: bytes) -> Iterator[tuple[int, Any]]:
    """The number of each line, and its JSON value or a RecordError."""
    lines = raw.split(b"\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        if not line.strip():
            yield number, RecordError("is empty; must be a JSON object")
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            yield number, RecordError(f"is not JSON: {error}")


def raise_problems(problems: Sequence[str]) -> None:
    """Raises DataError with the first of the problems, if there are any."""
    if problems:
        more = len(problems) - _SHOWN
        shown = [*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise DataError("\n  ".join(shown))


def text_field(record: Any, name: str) -> str:
    """A required text of a record, not empty. Raises RecordError."""
    if not isinstance(record, dict):
        raise RecordError(f"is a {type(record).__name__}; must be an object with {name!r}")
    if name not in record:
        raise RecordError(f"has no {name!r}; it has {', '.join(record) or 'nothing'}")
    value = record[name]
    if not isinstance(value, str):
        raise RecordError(f"{name}={str(value)[:40]!r}: must be a text")
    if not value.strip():
        raise RecordError(f"{name}: is empty")
    return value


def _classify(record: Any, labelled: bool) -> tuple[Sequences, str | None]:
    texts: tuple[str, ...] = (text_field(record, "text"),)
    if "pair" in record:
        texts += (text_field(record, "pair"),)
    if not labelled:
        return (texts,), None
    label = record.get("label")
    if "label" not in record:
        raise RecordError(f"has no 'label'; it has {', '.join(record)}")
    if isinstance(label, bool | float) or not isinstance(label, str | int) or label == "":
        raise RecordError(
            f"label={str(label)[:40]!r}: must be a text or a whole number, and not empty"
        )
    return (texts,), str(label)


def _choose(record: Any, labelled: bool) -> tuple[Sequences, int | None]:
    text = text_field(record, "text")
    choices = record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise RecordError("choices: must be a list of at least two texts")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise RecordError("choices: each must be a text that is not empty")
    sequences = tuple((text, choice) for choice in choices)
    if not labelled:
        return sequences, None
    label = record.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise RecordError(
            f"label={str(label)[:40]!r}: must be the index of a choice, from 0 to "
            f"{len(choices) - 1}"
        )
    return sequences, label


def labels_of(train: Examples, valid: Examples) -> tuple[str, ...]:
    """The labels of the training examples, sorted as numbers if all are whole numbers.

    Raises DataError if there is only one, and for validation examples whose label does not occur in
    training.
    """
    known = {str(one.label) for one in train.all}
    whole: Callable[[str], bool] = lambda label: label.removeprefix("-").isdecimal()
    labels = sorted(known, key=int) if all(map(whole, known)) else sorted(known)
    if len(labels) < 2:
        raise DataError(f"{train.path}: every label is {labels[0]!r}; give at least two labels")
    raise_problems(
        [
            f"{valid.path}:{one.line}: label={one.label!r}: not in the training examples, whose "
            f"labels are {', '.join(labels[:10])}{', ...' * (len(labels) > 10)}"
            for one in valid.all
            if one.label not in known
        ]
    )
    return tuple(labels)
