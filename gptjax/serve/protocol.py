"""OpenAI's completions API as data: the fields of a request body, and the objects of a response.

No field is silently ignored: one that is unknown or not supported is named in an error. A null is
the same as a missing field.
"""

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from gptjax.errors import ConfigError, GptjaxError
from gptjax.sample import Request, Sampler, SamplingParams, check
from gptjax.sample.sampling_params import trailing_space_note
from gptjax.serve.token_text import TokenText
from gptjax.serve.worker import BIASES
from gptjax.tokenizer import Tokenizer

STOPS = 4
"""Most stop texts of a request."""
MAX_TOKENS = 16
"""Default of the request field max_tokens."""

_LONGEST_MESSAGE = 1000
_NUMBERS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_WHOLE = ("max_tokens", "n", "seed", "logprobs", "top_k", "best_of")
_FLAGS = ("stream", "echo")
_OTHER = ("model", "prompt", "stop", "logit_bias", "stream_options")
FIELDS = (*_OTHER, *_NUMBERS, *_WHOLE, *_FLAGS)
"""Known fields. `echo` and `best_of` are accepted only with the values of what is done anyway."""


class Refusal(GptjaxError):
    """An HTTP error response: a status, a message, and OpenAI's param and code."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]}…"
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def to_json(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Call:
    """A parsed request body."""

    prompts: list[str | list[int]]
    settings: SamplingParams
    stream: bool
    usage: bool
    """Whether a stream ends with the token usage."""

    def warnings(self, tokenizer: Tokenizer | None) -> list[str]:
        """What a client should know of the prompts, such as of a space at their ends."""
        texts = [prompt for prompt in self.prompts if isinstance(prompt, str)]
        note = trailing_space_note(texts, tokenizer) if tokenizer is not None and texts else ""
        return [note] if note else []

    def requests(self, sampler: Sampler, capacity: int) -> list[Request]:
        """A validated request for each prompt, tokenized. Raises Refusal."""
        settings = self.settings
        try:
            ids = [sampler.ids(prompt) for prompt in self.prompts]
            check(sampler.model, ids, settings, sampler.vocab_size)
            requests = [sampler.request(prompt, settings, i) for i, prompt in enumerate(ids)]
        except ConfigError as error:
            first = error.problems[0].partition(":")[0].partition("=")[0].split(" ")[0]
            message = "; ".join(error.problems)
            raise Refusal(message, param=first if first in FIELDS else None) from None
        longest = max(map(len, ids))
        if longest >= capacity:
            message = f"a prompt has {longest} tokens, which leave no space in this server's"
            raise Refusal(f"prompt: {message} {capacity} tokens", param="prompt")
        if longest + settings.max_tokens > capacity:
            raise Refusal(
                f"max_tokens={settings.max_tokens}: with a prompt of {longest} tokens, more than "
                f"this server's {capacity}; at most {capacity - longest} fit",
                param="max_tokens",
            )
        return requests


def parse(body: bytes, *, model: str, most: int) -> Call:
    """Parses a JSON body. `model` is the served model's name, `most` the most continuations.

    Raises Refusal for unknown or unsupported fields and invalid values.
    """
    values = {name: value for name, value in _object(body).items() if value is not None}
    if unknown := sorted(set(values) - set(FIELDS)):
        known = ", ".join(sorted(FIELDS))
        raise Refusal(f"{', '.join(unknown)}: unknown field; known: {known}", param=unknown[0])
    if values.get("model", model) != model:
        raise Refusal(
            f"model={_short(values['model'])}: not found; this server has {model}",
            status=404,
            param="model",
            code="model_not_found",
        )
    for name in values:
        _check_type(name, values[name])
    n = values.pop("n", 1)
    prompts = _prompts(values.pop("prompt", None))
    if len(prompts) > most:
        message = f"prompt: {len(prompts)} prompts are more than the {most} that a request may have"
        raise Refusal(message, param="prompt")
    if not 1 <= n * len(prompts) <= most:
        _refuse("n", n, f"with {len(prompts)} prompts it must be from 1 to {most // len(prompts)}")
    if values.get("echo"):
        _refuse("echo", True, "is not supported; prepend the prompt to the text yourself")
    if values.get("best_of", n) != n:
        _refuse("best_of", values["best_of"], f"is not supported; leave it out, or set it to n={n}")
    stream = values.get("stream", False)
    options = values.get("stream_options")
    if options is not None and not stream:
        _refuse("stream_options", options, "requires stream=true")
    settings = SamplingParams(
        logit_bias=_biases(values.get("logit_bias", {})),
        stop=_stops(values.get("stop", [])),
        samples=n,
        seed=values.get("seed", secrets.randbits(32)),
        max_tokens=values.get("max_tokens", MAX_TOKENS),
        logprobs=values.get("logprobs"),
        top_k=values.get("top_k", 0),
        **{name: values[name] for name in _NUMBERS if name in values},
    )
    return Call(prompts, settings, stream, bool((options or {}).get("include_usage", False)))


def _object(body: bytes) -> dict[str, Any]:
    def reject(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(body, parse_constant=reject)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal('the body must be a JSON object, such as {"prompt": "Once"}')
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _refuse(name: str, value: Any, why: str) -> NoReturn:
    raise Refusal(f"{name}={_short(value)}: {why}", param=name)


def _check_type(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in _NUMBERS and not number:
        _refuse(name, value, "must be a number")
    if name in _WHOLE and type(value) is not int:
        _refuse(name, value, "must be an integer")
    if name in _FLAGS and not isinstance(value, bool):
        _refuse(name, value, "must be true or false")
    if name == "stream_options" and not (
        isinstance(value, dict)
        and set(value) <= {"include_usage"}
        and isinstance(value.get("include_usage", False), bool)
    ):
        _refuse(
            name, value, 'must be an object with "include_usage", true or false, and nothing else'
        )


def _prompts(value: Any) -> list[str | list[int]]:
    """A list of prompts from any of the four forms: a text, token ids, or a list of either."""
    is_ids = lambda x: isinstance(x, list) and all(type(i) is int for i in x)
    if value is None:
        raise Refusal("prompt: is required: a text, token ids, or a list of either", param="prompt")
    if isinstance(value, str) or (is_ids(value) and value):
        return [value]
    texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if value and (texts or (isinstance(value, list) and all(map(is_ids, value)))):
        return value
    _refuse("prompt", value, "must be a text, token ids, or a list of either, and not empty")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        _refuse("stop", value, "must be a text or a list of texts")
    if len(stops) > STOPS:
        _refuse("stop", value, f"has {len(stops)} texts; at most {STOPS} may be given")
    return tuple(stops)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    wrong = 'must be an object of token ids and numbers, such as {"50256": -100}'
    if not isinstance(value, dict):
        _refuse("logit_bias", value, wrong)
    if len(value) > BIASES:
        _refuse("logit_bias", value, f"has {len(value)} tokens; at most {BIASES} may be given")
    biases: dict[int, float] = {}
    for token, bias in value.items():
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not (token.isascii() and token.isdigit() and len(token) < 10 and number):
            _refuse("logit_bias", value, wrong)
        if int(token) in biases:
            _refuse("logit_bias", value, f"names token {int(token)} twice")
        biases[int(token)] = bias
    return tuple(biases.items())


class ResponseBuilder:
    """Builds the objects of the response to one call; each has the `warnings`, if there are any."""

    def __init__(
        self, model: str, seed: int, created: int, *, token_ids: bool, warnings: list[str]
    ) -> None:
        self._common = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": created,
            "model": model,
            "seed": seed,
            **({"warnings": warnings} if warnings else {}),
        }
        self._token_ids = token_ids

    def choice(
        self,
        index: int,
        text: str,
        ids: list[int],
        tokens: Sequence[TokenText] | None,
        finish: str | None,
    ) -> dict[str, Any]:
        """A choice, or a chunk of one; with token ids if the model has no tokenizer."""
        logprobs = None if tokens is None else logprobs_of(tokens)
        choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
        return choice | {"token_ids": ids} if self._token_ids else choice

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        """A completion object with these choices, and the usage if given."""
        usages = {} if usage is None else {"usage": usage}
        return {**self._common, "choices": choices, **usages}


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """OpenAI's usage object, from the numbers of prompt and completion tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def logprobs_of(tokens: Sequence[TokenText]) -> dict[str, Any]:
    """OpenAI's logprobs object."""
    return {
        "tokens": [one.token for one in tokens],
        "token_logprobs": [_finite(one.logprob) for one in tokens],
        "top_logprobs": [
            {token: _finite(p) for token, p in one.top.items()} or None for one in tokens
        ],
        "text_offset": [one.start for one in tokens],
    }


def _finite(logprob: float) -> float | None:
    """A log-probability for JSON: None for NaN, and at least -9999, also for banned tokens."""
    return None if math.isnan(logprob) else max(logprob, -9999.0)
