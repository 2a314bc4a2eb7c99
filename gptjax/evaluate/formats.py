r"""Task files: examples in their published formats, and the prompts made from them.

A line is a JSON object with the fields that the dataset's authors publish:

hellaswag  activity_label, ctx_a, ctx_b, endings, label
arc        question, with stem and choices in it as AI2 has them or beside it as on the Hugging Face
           hub, answerKey
lambada    text, whose last word is to be predicted
squad      SQuAD's own nested JSON (.json), 1.1 or 2.0; or a line for each question, as on the hub

Prompts are those of lm_eval, zero-shot, so that results can be compared:

hellaswag  "<activity>: <context>", then each ending; without the bracketed markup of WikiHow
arc        "Question: <question>\nAnswer:", then each choice's text
lambada    all words but the last, then the last
squad      "Title: ...\n\nBackground: ...\n\nQuestion: ...\n\nAnswer:", answered to the line's end

Errors name the file and the line.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config.validation import TASK_KINDS, task_problems
from gptjax.errors import ConfigError, DataError
from gptjax.runtime import regular_file


@dataclass(frozen=True)
class MultipleChoice:
    """A context, choices that may follow it after a space, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Cloze:
    """A context and its continuation, with the space between them."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Question:
    """A prompt and its reference answers; with none, the question has no answer."""

    prompt: str
    answers: tuple[str, ...]


Example = MultipleChoice | Cloze | Question


@dataclass(frozen=True)
class TaskFile:
    """The examples of a task file, all of one kind, or the first of its `total` examples."""

    kind: str
    path: str
    sha256: str
    examples: tuple[Example, ...]
    total: int


def read_tasks(
    entries: Sequence[str], limit: int = 0, option: str = "eval.tasks"
) -> list[TaskFile]:
    """Reads the task files of entries KIND:FILE; keeps at most `limit` examples of each, or all
    with 0.

    Every line is read and checked whatever the limit. Raises ConfigError for an entry of unknown
    kind or given twice, naming `option`; DataError for a file or a line that cannot be used.
    """
    problems = list(task_problems(entries, option))
    if problems:
        raise ConfigError(problems)
    tasks = []
    for entry in entries:
        kind, _, path = entry.partition(":")
        tasks.append(_read(kind, path, limit, option))
    return tasks


def _read(kind: str, name: str, limit: int, option: str) -> TaskFile:
    path = Path(name).expanduser()
    raw = regular_file.read(path, f"{option}={kind}:{name}")
    nested = kind == "squad" and path.suffix == ".json"
    read = _nested if nested else _lines
    examples = list(read(raw, name, _READERS[kind]))
    if not examples:
        raise DataError(f"{option}={kind}:{name}: no examples in it")
    kept = examples[:limit] if limit else examples
    return TaskFile(kind, name, hashlib.sha256(raw).hexdigest(), tuple(kept), len(examples))


class _RecordError(Exception):
    """A problem of a record, without its location."""


def _lines(raw: bytes, name: str, read: Callable[[Any], Example]) -> Iterator[Example]:
    lines = raw.split(b"\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        location = f"{name}:{number}"
        if not line.strip():
            raise DataError(f"{location}: is empty; must be a JSON object")
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{location}: is not JSON: {error}") from None
        yield _example(record, location, read)


def _nested(raw: bytes, name: str, read: Callable[[Any], Example]) -> Iterator[Example]:
    """Examples of SQuAD's own file: articles of paragraphs of questions."""
    try:
        whole = json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno}: is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: is not JSON: {error}") from None
    location = name
    try:
        for i, article in enumerate(_field(whole, "data", list)):
            location = f"{name}, data[{i}]"
            title = _field(article, "title", str)
            for j, paragraph in enumerate(_field(article, "paragraphs", list)):
                location = f"{name}, data[{i}].paragraphs[{j}]"
                context = _field(paragraph, "context", str)
                for k, entry in enumerate(_field(paragraph, "qas", list)):
                    location = f"{name}, data[{i}].paragraphs[{j}].qas[{k}]"
                    answers = [
                        _field(answer, "text", str) for answer in _field(entry, "answers", list)
                    ]
                    yield read(
                        {
                            "title": title,
                            "context": context,
                            "question": _field(entry, "question", str),
                            "answers": {"text": answers},
                        }
                    )
    except _RecordError as error:
        raise DataError(f"{location}: {error}") from None


def _example(record: Any, location: str, read: Callable[[Any], Example]) -> Example:
    try:
        return read(record)
    except _RecordError as error:
        raise DataError(f"{location}: {error}") from None


_TYPE_NAMES: dict[type, str] = {str: "text", list: "list", dict: "object"}


def _field(record: Any, name: str, kind: type) -> Any:
    """A required field of a record, of this type. Raises _RecordError."""
    if not isinstance(record, dict):
        raise _RecordError(f"is a {type(record).__name__}; must be an object with {name!r}")
    if name not in record:
        raise _RecordError(f"has no {name!r}; it has {', '.join(record) or 'nothing'}")
    if not isinstance(record[name], kind):
        raise _RecordError(f"{name}={str(record[name])[:40]!r}: must be a {_TYPE_NAMES[kind]}")
    return record[name]


def _texts(record: Any, name: str, least: int = 0) -> tuple[str, ...]:
    """A required list of at least `least` texts. Raises _RecordError."""
    values = _field(record, name, list)
    if not all(isinstance(value, str) for value in values) or len(values) < least:
        raise _RecordError(f"{name}: must be a list of {f'at least {least} ' * bool(least)}texts")
    return tuple(values)


def _hellaswag(record: Any) -> MultipleChoice:
    activity, first, second = (_field(record, k, str) for k in ("activity_label", "ctx_a", "ctx_b"))
    endings = _texts(record, "endings", 2)
    label = record.get("label")
    if not str(label).isdecimal() or not int(label) < len(endings):
        raise _RecordError(
            f"label={label!r}: must be the number of an ending, from 0 to {len(endings) - 1} (the "
            "test split has none)"
        )
    context = _without_markup(f"{activity}: {first} {second.capitalize()}")
    return MultipleChoice(context, tuple(map(_without_markup, endings)), int(label))


def _without_markup(text: str) -> str:
    """The text without WikiHow's bracketed markup, as lm_eval cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _arc(record: Any) -> MultipleChoice:
    if isinstance(record, dict) and isinstance(record.get("question"), dict):
        question = _field(record["question"], "stem", str)
        choices = _field(record["question"], "choices", list)
        texts = tuple(_field(choice, "text", str) for choice in choices)
        labels = tuple(_field(choice, "label", str) for choice in choices)
    else:
        question = _field(record, "question", str)
        choices = _field(record, "choices", dict)
        texts, labels = _texts(choices, "text"), _texts(choices, "label")
    if len(texts) != len(labels) or len(texts) < 2 or not all(texts):
        raise _RecordError("choices: must be at least two, each with a text and a label")
    key = _field(record, "answerKey", str)
    if key not in labels:
        raise _RecordError(f"answerKey={key!r}: must be one of the labels {', '.join(labels)}")
    return MultipleChoice(f"Question: {question}\nAnswer:", texts, labels.index(key))


def _lambada(record: Any) -> Cloze:
    *words, last = _field(record, "text", str).split(" ")
    if not words or not last.strip():
        raise _RecordError("text: must end with a space and the word to be predicted")
    return Cloze(" ".join(words), f" {last}")


def _squad(record: Any) -> Question:
    title, context, question = (_field(record, k, str) for k in ("title", "context", "question"))
    answers = _texts(_field(record, "answers", dict), "text")
    parts = (f"Title: {title}", f"Background: {context}", f"Question: {question}", "Answer:")
    return Question("\n\n".join(parts), answers)


_READERS: dict[str, Callable[[Any], Example]] = {
    "arc": _arc,
    "hellaswag": _hellaswag,
    "lambada": _lambada,
    "squad": _squad,
}
assert set(_READERS) == set(TASK_KINDS)
