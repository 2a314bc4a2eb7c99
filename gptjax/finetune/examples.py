r"""Labelled examples, read from lines of JSON and looked through before anything else happens.

classify   {"text": "...", "label": "..."}, or with "pair", a second text
choose     {"text": "...", "choices": ["...", "..."], "label": 0}

A label of classify is a text or a whole number, one of choose the number of the right choice, from
0. Every wrong line is named by file and line. Imports numpy at most, so a wrong file costs no
import of jax.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.errors import DataError

_SHOWN = 20  # problems of a file that are told


@dataclass(frozen=True)
class Example:
    """What is read, one or several sequences of one or two texts, and the label, None if there is
    none: of classify the label itself, of choose the number of a sequence.
    """

    sequences: tuple[tuple[str, ...], ...]
    label: str | int | None
    line: int


@dataclass(frozen=True)
class Examples:
    """The examples of a file."""

    path: str
    sha256: str
    all: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.all)


class Wrong(Exception):
    """What is wrong with a line, without its place."""


def read(path: str, task: str, option: str, *, labelled: bool = True) -> Examples:
    """The examples of a file; without `labelled`, no label is looked at.

    Raises DataError for a file that cannot be read, and with every line that cannot be used.
    """
    parse = {"classify": _classify, "choose": _choose}[task]
    found, problems, raw = [], [], raw_of(path, option)
    for number, record in records(raw):
        try:
            if isinstance(record, Exception):
                raise Wrong(str(record))
            found.append(Example(*parse(record, labelled), number))
        except Wrong as error:
            problems.append(f"{path}:{number}: {error}")
    refuse(problems)
    if not found:
        raise DataError(f"{option}={path}: no examples in it")
    return Examples(path, hashlib.sha256(raw).hexdigest(), tuple(found))


def raw_of(path: str, option: str) -> bytes:
    """The contents of a file. Raises DataError."""
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"{option}={path}: cannot be read: {error.strerror}") from None


def records(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each line, or an exception that says why it has none."""
    lines = raw.split(b"\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        if not line.strip():
            yield number, Wrong("is empty; a line is an object")
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            yield number, Wrong(f"is no JSON: {error}")


def refuse(problems: Sequence[str]) -> None:
    """Raises DataError with the first problems, if there are any."""
    if problems:
        more = len(problems) - _SHOWN
        shown = [*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise DataError("\n  ".join(shown))


def text_of(record: Any, name: str) -> str:
    """A text of a record that must be there, and not be empty."""
    if not isinstance(record, dict):
        raise Wrong(f"is a {type(record).__name__}; must be an object with {name!r}")
    if name not in record:
        raise Wrong(f"has no {name!r}; it has {', '.join(record) or 'nothing'}")
    value = record[name]
    if not isinstance(value, str):
        raise Wrong(f"{name}={str(value)[:40]!r}: must be a text")
    if not value.strip():
        raise Wrong(f"{name}: is empty")
    return value


def _classify(record: Any, labelled: bool) -> tuple[tuple[tuple[str, ...], ...], str | None]:
    texts = (text_of(record, "text"),)
    if "pair" in record:
        texts += (text_of(record, "pair"),)
    if not labelled:
        return (texts,), None
    label = record.get("label")
    if "label" not in record:
        raise Wrong(f"has no 'label'; it has {', '.join(record)}")
    if isinstance(label, bool | float) or not isinstance(label, str | int) or label == "":
        raise Wrong(f"label={str(label)[:40]!r}: must be a text or a whole number, and not empty")
    return (texts,), str(label)


def _choose(record: Any, labelled: bool) -> tuple[tuple[tuple[str, ...], ...], int | None]:
    text = text_of(record, "text")
    choices = record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise Wrong("choices: must be a list of at least two texts")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise Wrong("choices: each must be a text that is not empty")
    sequences = tuple((text, choice) for choice in choices)
    if not labelled:
        return sequences, None
    label = record.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise Wrong(
            f"label={str(label)[:40]!r}: must be the number of a choice, from 0 to "
            f"{len(choices) - 1}"
        )
    return sequences, label


def labels_of(train: Examples, valid: Examples) -> tuple[str, ...]:
    """The labels of the training examples: numbers by size, otherwise as texts.

    Raises DataError where there is but one, and for validation examples with a label that was never
    seen in training.
    """
    seen = {str(one.label) for one in train.all}
    whole: Callable[[str], bool] = lambda label: label.removeprefix("-").isdecimal()
    labels = sorted(seen, key=int) if all(map(whole, seen)) else sorted(seen)
    if len(labels) < 2:
        raise DataError(f"{train.path}: every label is {labels[0]!r}, so there is nothing to learn")
    refuse(
        [
            f"{valid.path}:{one.line}: label={one.label!r} is none of the training examples'; they "
            f"have {', '.join(labels[:10])}{', ...' * (len(labels) > 10)}"
            for one in valid.all
            if one.label not in seen
        ]
    )
    return tuple(labels)
