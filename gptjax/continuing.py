"""What `gptjax sample` does with a sampler: prompts, a file of them, a conversation.

A file's lines are objects: "prompt", a text or token ids, and any of the settings. Each result is a
line of the output, {"line": of the file, from 0, "sample", "text", "finish", …}, written as soon as
it is there. Started again, it leaves out the lines whose results are all there. The draws of a line
depend on its number and its seed, so a continued file has the results of an undisturbed one.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gptjax.errors import ConfigError, DataError, OutputError
from gptjax.progress import Progress
from gptjax.sample import Completion, Sampler, Settings

PLAIN = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "samples", "seed", "logprobs"),
)
"""Settings that are one number."""


def to_json(completion: Completion, sampler: Sampler) -> dict[str, Any]:
    """A result as an object; tokens only where their log-probabilities were asked for."""
    result: dict[str, Any] = {"text": completion.text, "finish": completion.finish}
    if sampler.tokenizer is None:
        result["ids"] = completion.ids
    if completion.score is not None:
        result["score"] = completion.score
    if any(token.logprob is not None for token in completion.tokens):
        piece = sampler.piece
        result["tokens"] = [
            {
                "id": token.id,
                "piece": piece(token.id),
                "logprob": token.logprob,
                "top": [{"id": i, "piece": piece(i), "logprob": p} for i, p in token.top],
            }
            for token in completion.tokens
        ]
    return result


def show(
    done: Sequence[Completion],
    prompts: Sequence[str],
    sampler: Sampler,
    *,
    as_json: bool,
    many: bool,
) -> None:
    """Prints results: prompt and continuation, or JSON lines."""
    for one in done:
        if as_json:
            place = {"prompt": one.prompt, "sample": one.sample}
            print(json.dumps(place | to_json(one, sampler), ensure_ascii=False))
            continue
        if many:
            score = "" if one.score is None else f", score {one.score:.4f}"
            print(f"--- sample {one.sample}{score}")
        print(f"{prompts[one.prompt]}{one.text}")
        for token in one.tokens:
            if token.logprob is not None:
                others = "  ".join(f"{sampler.piece(i)!r} {p:.3f}" for i, p in token.top)
                print(f"  {sampler.piece(token.id)!r:20} {token.logprob:8.3f}   {others}")


def converse(sampler: Sampler, settings: Settings) -> None:
    """Asks for prompts until the input ends; streams each continuation token by token."""
    print("a prompt a line; Ctrl-C ends a continuation, Ctrl-D ends this", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return
        try:
            for text, _ in sampler.stream(prompt, settings):
                print(text, end="", flush=True)
        except ConfigError as error:
            print(f"gptjax: {error}", end="", file=sys.stderr)
        except KeyboardInterrupt:
            pass
        print()


class File:
    """A file of prompts and the file of their results.

    Reads and checks both at once, before a model is opened. Raises DataError for lines that cannot
    be used, OutputError where results cannot be written.
    """

    def __init__(self, source: str, target: str, settings: Settings) -> None:
        self._target = Path(target)
        self._lines = list(_requests(Path(source), settings))
        have = _results(self._target)
        self._left = [
            (number, prompt, one)
            for number, (prompt, one) in enumerate(self._lines)
            if have[number] < one.samples
        ]

    def fill(self, sampler: Sampler, progress: Progress) -> None:
        """Serves the lines that are left, and appends their results."""
        requests = [sampler.request(prompt, one, line) for line, prompt, one in self._left]
        total = sum(request.settings.samples for request in requests)
        known = len(self._lines) - len(requests)
        progress.say(f"{known} of {len(self._lines)} lines are done; {total} results to make")
        if not requests:
            return
        waiting: dict[int, list[Completion]] = {}
        try:
            with (
                self._target.open("a", encoding="utf-8") as out,
                progress.bar("sample", total, unit="result") as bar,
            ):
                for count, one in enumerate(sampler.complete(requests), 1):
                    samples = waiting.setdefault(one.prompt, [])
                    samples.append(one)
                    if len(samples) == self._lines[one.prompt][1].samples:
                        # All samples of a line at once: a line is there, or it is not.
                        for each in sorted(waiting.pop(one.prompt), key=lambda c: c.sample):
                            place = {"line": each.prompt, "sample": each.sample}
                            result = place | to_json(each, sampler)
                            out.write(json.dumps(result, ensure_ascii=False) + "\n")
                        out.flush()
                    bar.update(count)
        except OSError as error:
            raise OutputError(f"{self._target}: cannot be written: {error}") from None


def _requests(source: Path, settings: Settings) -> Iterator[tuple[str | list[int], Settings]]:
    """Prompt and settings of each line. Raises DataError with every line that has a mistake."""
    names = {field.name for field in fields(Settings)}
    problems = []
    for number, line in _objects(source):
        place = f"{source}, line {number + 1}"
        prompt = line.pop("prompt", None)
        ids = isinstance(prompt, list) and all(type(i) is int for i in prompt)
        if not isinstance(prompt, str) and not ids:
            problems.append(f'{place}: needs "prompt", a text or a list of token ids')
            continue
        if unknown := sorted(set(line) - names):
            problems.append(
                f"{place}: {unknown[0]!r} is no setting; known: {', '.join(sorted(names))}"
            )
            continue
        try:
            given = settings_from(line)
            one = replace(settings, **given)
            one.check()
        except ConfigError as error:
            problems.append(f"{place}: {error}")
            continue
        yield prompt, one
    if problems:
        raise DataError("\n  ".join(problems))


def settings_from(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Settings` from JSON values. Raises ConfigError for one of another type."""
    kinds: dict[str, Any] = {field.name: field.default for field in fields(Settings)}
    made, problems = {}, []
    for name, value in values.items():
        default = kinds[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "logit_bias" and isinstance(value, dict):
            try:
                made[name] = tuple((int(token), float(bias)) for token, bias in value.items())
                continue
            except (TypeError, ValueError):
                pass
        elif name == "stop" and isinstance(value, str):
            made[name] = (value,)
            continue
        elif name in ("stop", "banned") and isinstance(value, list):
            kind = str if name == "stop" else int
            if all(type(one) is kind for one in value):
                made[name] = tuple(value)
                continue
        elif (
            (isinstance(default, float) and number)
            or (type(value) is int and name in PLAIN)
            or (name == "logprobs" and value is None)
        ):
            made[name] = value
            continue
        problems.append(f"{name}={value!r}: {_KINDS.get(name, 'must be a number')}")
    if problems:
        raise ConfigError(problems)
    return made


_KINDS = {
    "logit_bias": "must be an object of token ids and numbers",
    "stop": "must be a text or a list of texts",
    "banned": "must be a list of token ids",
    **dict.fromkeys(("max_tokens", "top_k", "samples", "seed"), "must be a whole number"),
    "logprobs": "must be a whole number or null",
}


def _objects(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of each line, and its number from 0."""
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be read: {error}") from None
    for number, line in enumerate(text.splitlines()):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}, line {number + 1}: is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{source}, line {number + 1}: must be an object")
        yield number, value


def _results(target: Path) -> Counter[int]:
    """Results that each line has already. A last line that was cut off is taken away."""
    try:
        if not target.exists():
            target.touch()
        whole = target.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            os.truncate(target, end)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error}") from None
    found: Counter[int] = Counter()
    for _, value in _objects(target):
        if type(value.get("line")) is not int:
            raise DataError(f"{target}: holds lines that are no results; give another --output")
        found[value["line"]] += 1
    return found
