"""`gptjax sample`: prompts from the command line, from a file, or typed interactively.

The lines of a prompt file are JSON objects: "prompt", a text or token ids, and any fields of
`SamplingParams`. Each result is a line of the output, {"line": number in the prompt file, from 0,
"sample", "text", "finish", …}, written as soon as it is complete. A second run resumes: it skips
lines whose results are all there. The random stream of a line depends on its number and seed alone,
so a resumed output equals an uninterrupted one.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from gptjax.config.limits import unusable
from gptjax.errors import ConfigError, DataError, OutputError
from gptjax.runtime import regular_file
from gptjax.runtime.progress import Progress
from gptjax.sample import BeamSearchParams, Completion, Sampler, SamplingParams
from gptjax.sample.sampling_params import MOST_SLOTS, trailing_space_note

PLAIN = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "samples", "seed", "logprobs"),
)
"""Fields of `SamplingParams` that are single numbers."""


def to_json(completion: Completion, sampler: Sampler) -> dict[str, Any]:
    """A result as a JSON object, with tokens if log-probabilities were requested."""
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
    """Prints results, as prompt and continuation or as JSON lines."""
    for one in done:
        if as_json:
            index = {"prompt": one.prompt, "sample": one.sample}
            print(json.dumps(index | to_json(one, sampler), ensure_ascii=False))
            continue
        if many:
            score = "" if one.score is None else f", score {one.score:.4f}"
            print(f"--- sample {one.sample}{score}")
        print(f"{prompts[one.prompt]}{one.text}")
        for token in one.tokens:
            if token.logprob is not None:
                others = "  ".join(f"{sampler.piece(i)!r} {p:.3f}" for i, p in token.top)
                print(f"  {sampler.piece(token.id)!r:20} {token.logprob:8.3f}   {others}")


def converse(sampler: Sampler, settings: SamplingParams) -> None:
    """Reads prompts until the input ends; streams each continuation token by token."""
    print("one prompt per line; Ctrl-C ends a continuation, Ctrl-D quits", file=sys.stderr)
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
    """A prompt file and its output file.

    Both are read and validated at construction, before a model is loaded. Raises DataError for
    invalid lines and for an output of other prompts, OutputError if the output cannot be written.
    """

    def __init__(self, source: str, target: str, settings: SamplingParams) -> None:
        self._source, self._target = Path(source), Path(target)
        self._lines = dict(_requests(self._source, settings))
        if self._target.exists() and self._target.samefile(self._source):
            raise OutputError(f"{target}: is the prompt file; give another --output")
        self._done = _results(self._target)
        for line, digest in self._done.values():
            if line not in self._lines or digest != _digest(*self._lines[line]):
                raise DataError(
                    f"{target}: has results of line {line + 1} with a prompt or settings that "
                    f"differ from {source}; give another --output"
                )

    def fill(self, sampler: Sampler, progress: Progress) -> None:
        """Samples the remaining lines, and appends their results.

        Raises DataError with every line whose prompt is invalid for the model.
        """
        requests, problems = [], []
        for line, (prompt, settings) in self._lines.items():
            missing = [s for s in range(settings.samples) if (line, s) not in self._done]
            if not missing:
                continue
            try:
                requests.append(sampler.request(prompt, settings, line))
            except ConfigError as error:
                problems.append(f"{self._source}, line {line + 1}: {error}")
        if problems:
            raise DataError("\n  ".join(problems))
        total = sum(request.settings.samples for request in requests)
        known = len(self._lines) - len(requests)
        progress.say(f"{known} of {len(self._lines)} lines are done; {total} results to sample")
        waiting: dict[int, list[Completion]] = {}
        try:
            with (
                self._target.open("a", encoding="utf-8") as out,
                progress.bar("sample", total, unit="result") as bar,
            ):
                for count, one in enumerate(sampler.complete(requests), 1):
                    waiting.setdefault(one.prompt, []).append(one)
                    if len(waiting[one.prompt]) == self._lines[one.prompt][1].samples:
                        out.write(self._results_of(waiting.pop(one.prompt), sampler))
                        out.flush()
                    bar.update(count)
        except OSError as error:
            raise OutputError(f"{self._target}: cannot be written: {error}") from None

    def _results_of(self, done: list[Completion], sampler: Sampler) -> str:
        """The results of a line that the output does not have yet."""
        lines = []
        for one in sorted(done, key=lambda completion: completion.sample):
            if (one.prompt, one.sample) not in self._done:
                digest = _digest(*self._lines[one.prompt])
                index = {"line": one.prompt, "sample": one.sample, "request": digest}
                lines.append(json.dumps(index | to_json(one, sampler), ensure_ascii=False) + "\n")
        return "".join(lines)


def _digest(prompt: str | list[int], settings: SamplingParams) -> str:
    """A digest of a prompt and its settings, without the number of samples."""
    whole = json.dumps([prompt, {k: v for k, v in vars(settings).items() if k != "samples"}])
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


def _requests(
    source: Path, settings: SamplingParams
) -> Iterator[tuple[int, tuple[str | list[int], SamplingParams]]]:
    """Number, prompt and settings of each line. Raises DataError with all invalid lines."""
    names = {field.name for field in fields(SamplingParams)}
    problems = []
    for number, line in _objects(source):
        place = f"{source}, line {number + 1}"
        prompt = line.pop("prompt", None)
        ids = isinstance(prompt, list) and all(type(i) is int for i in prompt)
        if isinstance(prompt, str) and (why := unusable(prompt.replace("\0", ""))):
            problems.append(f"{place}: prompt: {why}")
            continue
        if not isinstance(prompt, str) and not ids:
            problems.append(f'{place}: requires "prompt", a text or a list of token ids')
            continue
        if unknown := sorted(set(line) - names):
            problems.append(
                f"{place}: {unknown[0]!r}: unknown setting; known: {', '.join(sorted(names))}"
            )
            continue
        try:
            given = settings_from(line)
            one = replace(settings, **given)
            one.check()
        except ConfigError as error:
            problems.append(f"{place}: {error}")
            continue
        yield number, (prompt, one)
    if problems:
        raise DataError("\n  ".join(problems))


def settings_from(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams` from JSON values. Raises ConfigError for invalid types."""
    kinds: dict[str, Any] = {field.name: field.default for field in fields(SamplingParams)}
    made: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        default = kinds[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "logit_bias" and isinstance(value, dict):
            try:
                made[name] = tuple((int(token), float(bias)) for token, bias in value.items())
                continue
            except (TypeError, ValueError, OverflowError):
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
    **dict.fromkeys(("max_tokens", "top_k", "samples", "seed"), "must be an integer"),
    "logprobs": "must be an integer or null",
}


def _objects(source: Path, contents: bytes | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number, from 0, and the object of each line that is not blank."""
    try:
        raw = regular_file.read(source, str(source)) if contents is None else contents
        text = raw.decode("utf-8")
    except ValueError as error:
        raise DataError(f"{source}: cannot be read: {error}") from None
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}, line {number + 1}: is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{source}, line {number + 1}: must be an object")
        yield number, value


def _results(target: Path) -> dict[tuple[int, int], tuple[int, str]]:
    """Line and request digest of each result, by line and sample.

    An incomplete last line is removed. Raises DataError for a file that has other contents, which
    stays as it is.
    """
    try:
        if not target.exists():
            target.touch()  # fails before a model is loaded
            target.unlink()
            return {}
        whole = target.read_bytes()
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error}") from None
    foreign = DataError(f"{target}: contains lines that are not results; give another --output")
    end = whole.rfind(b"\n") + 1
    found = {}
    for _, value in _objects(target, whole[:end]):
        line, sample, digest = (value.get(name) for name in ("line", "sample", "request"))
        if type(line) is not int or type(sample) is not int or not isinstance(digest, str):
            raise foreign
        found[line, sample] = line, digest
    if end < len(whole):
        if not found and not whole.startswith(b'{"line": '):
            raise foreign
        os.truncate(target, end)
    return found


def _refuse_unused(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that the chosen mode does not use."""
    drawing = (
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "logit_bias", "ban", "stop", "seed"),
    )
    unused = {
        "--beams": (args.beams, (*drawing, "logprobs", "rows")),
        "--file": (args.file, ("json",)),
        "--interactive": (args.interactive, ("json", "logprobs", "samples", "rows")),
        "--bench": (
            args.bench,
            (*drawing, "logprobs", "samples", "max_tokens", "json", "rows", "beams"),
        ),
        "without --beams": (not args.beams, ("length_penalty", "early_stopping")),
    }
    problems = [
        f"--{name.replace('_', '-')}: has no effect {mode if ' ' in mode else f'with {mode}'}"
        for mode, (on, names) in unused.items()
        for name in names
        if on and getattr(args, name) != args.subparser.get_default(name)
    ]
    if problems:
        raise ConfigError(problems)


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Runs the command."""
    settings = SamplingParams(
        logit_bias=tuple(args.logit_bias),
        banned=tuple(args.ban),
        stop=tuple(args.stop),
        **{name: getattr(args, name) for name in PLAIN},
    )
    settings.check()
    _refuse_unused(args)
    beams = None
    if args.beams:
        early: bool | Literal["never"] = args.early_stopping == "true"
        if args.early_stopping == "never":
            early = "never"
        beams = BeamSearchParams(
            args.beams, args.length_penalty, early, args.samples, args.max_tokens
        )
        beams.check()
    if bool(args.file) != bool(args.output):
        raise ConfigError(["--file and --output: give both, or neither"])
    if beams is not None and (args.file or args.interactive):
        raise ConfigError([f"--beams={args.beams}: goes with --prompt only"])
    if not 1 <= args.rows <= MOST_SLOTS:
        raise ConfigError([f"--rows={args.rows}: must be at least 1 and at most {MOST_SLOTS}"])
    file = File(args.file, args.output, settings) if args.file else None
    from gptjax import load_model

    prompts, precompile = args.prompt or [""], None
    if beams is None and not (args.file or args.interactive or args.bench):
        precompile = lambda sampler: sampler.precompile(prompts, settings)
    say = Progress().say
    with load_model.load_model(args.run, dtype=args.dtype, say=say, precompile=precompile) as model:
        if args.bench:
            from gptjax.cli import benchmark

            benchmark.report(model, print)
            return
        if model.tokenizer is None and file is None:
            raise DataError(f"{args.run}: its source had no tokenizer, so it cannot read a prompt")
        sampler = model.sampler(slots=args.rows, consume=True)
        if model.tokenizer is not None and (note := trailing_space_note(prompts, model.tokenizer)):
            say(note)
        if file is not None:
            file.fill(sampler, Progress())
        elif args.interactive:
            converse(sampler, settings)
        else:
            done = (
                sampler.generate(prompts, settings)
                if beams is None
                else sampler.beam(prompts, beams)
            )
            show(done, prompts, sampler, as_json=args.json, many=args.samples > 1)
