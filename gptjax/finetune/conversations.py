"""Prompts and answers: lines of JSON, conversations, and SQuAD's own files.

{"prompt": "...", "answer": "..."}              joined by a space where neither has one there
{"messages": [{"role": "...", "content": "..."}, ...]}    by the tokenizer's chat template
FILE.json                                       SQuAD 1.1 or 2.0, prompts as `gptjax eval` has them

What is learnt is the answer and the token that ends it, of a conversation what the assistant says.
Every wrong line is named by file and line.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.errors import DataError
from gptjax.evaluate.formats import Question, read_tasks
from gptjax.evaluate.scoring import encode_pair
from gptjax.finetune.examples import Wrong, raw_of, records, refuse, text_of
from gptjax.tokenizer import HuggingFaceTokenizer, Tokenizer

ASSISTANT = "assistant"
UNANSWERABLE = "unanswerable"
"""What is learnt for a question that has no answer."""


@dataclass(frozen=True)
class Conversation:
    """Token ids, which of them are learnt, the last answer's prompt, and what is right there."""

    ids: list[int]
    learnt: list[bool]
    prompt: list[int]
    answers: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Conversations:
    """Those of a file."""

    path: str
    sha256: str
    all: tuple[Conversation, ...]

    def __len__(self) -> int:
        return len(self.all)


def read(path: str, option: str, tokenizer: Tokenizer) -> Conversations:
    """The exchanges of a file. Raises DataError with every line that cannot be used."""
    raw = raw_of(path, option)
    found, problems = [], []
    if path.endswith(".json"):
        (file,) = read_tasks([f"squad:{path}"], option=option)
        for number, one in enumerate(file.examples):
            assert isinstance(one, Question)
            right = one.answers or ("",)
            told = right[0] or UNANSWERABLE
            found.append(_pair(tokenizer, one.prompt, told, right, f"{path}, question {number}"))
    else:
        template = Template.of(tokenizer)
        for number, record in records(raw):
            place = f"{path}:{number}"
            try:
                if isinstance(record, Exception):
                    raise Wrong(str(record))
                if isinstance(record, dict) and "messages" in record:
                    found.append(_conversation(tokenizer, template, record["messages"], place))
                else:
                    prompt, answer = text_of(record, "prompt"), text_of(record, "answer")
                    found.append(_pair(tokenizer, prompt, answer, (answer,), place))
            except Wrong as error:
                problems.append(f"{place}: {error}")
    refuse(problems)
    if not found:
        raise DataError(f"{option}={path}: no examples in it")
    return Conversations(path, hashlib.sha256(raw).hexdigest(), tuple(found))


def _pair(
    tokenizer: Tokenizer, prompt: str, answer: str, right: tuple[str, ...], place: str
) -> Conversation:
    space = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    known, given = encode_pair(tokenizer, prompt, space + answer)
    given = [*given, tokenizer.eos_id]
    learnt = [False] * len(known) + [True] * len(given)
    return Conversation([*known, *given], learnt, known, right, place)


@dataclass(frozen=True)
class Template:
    """A chat template, rendered as `transformers` does it: in a sandbox, blocks trimmed."""

    template: Any
    tokens: dict[str, str]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Template | None":
        """The tokenizer's, if any. Raises DataError where jinja2 is missing, or refuses it."""
        if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.chat_template is None:
            return None
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise DataError("conversations need jinja2: pip install jinja2") from None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def refused(message: str) -> None:
            raise TemplateError(message)

        plain = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = refused
        environment.filters["tojson"] = plain  # jinja2's own escapes what HTML would take for tags
        try:
            template = environment.from_string(tokenizer.chat_template)
        except TemplateError as error:
            raise DataError(f"chat_template: {error}") from None
        return cls(template, tokenizer.named_tokens)

    def render(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        """The text of messages, with `prompt` up to where the assistant is to speak."""
        from jinja2 import TemplateError

        try:
            return self.template.render(
                messages=messages, add_generation_prompt=prompt, **self.tokens
            )
        except TemplateError as error:
            raise Wrong(f"messages: the chat template refuses them: {error}") from None


def _conversation(
    tokenizer: Tokenizer, template: Template | None, messages: Any, place: str
) -> Conversation:
    if template is None:
        raise Wrong("messages: the tokenizer has no chat_template; give prompt and answer")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    if not isinstance(messages, list) or not messages:
        raise Wrong("messages: must be a list of objects with role and content")
    for message in messages:
        text_of(message, "role")
        text_of(message, "content")
    spoken = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not spoken or spoken[-1] != len(messages) - 1:
        raise Wrong(f"messages: the last must be the {ASSISTANT}'s, which is what is learnt")
    done, ids, learnt, prompt = "", [], [], []
    for i in spoken:
        before = template.render(messages[:i], prompt=True)
        after = template.render(messages[: i + 1])
        if not (before.startswith(done) and after.startswith(before)):
            raise Wrong("messages: the chat template changes what came before an answer")
        for text, learns in ((before[len(done) :], False), (after[len(before) :], True)):
            new = tokenizer.markup(text)
            ids, learnt = ids + new, learnt + [learns] * len(new)
            prompt = prompt if learns else list(ids)
        done = after
    return Conversation(ids, learnt, prompt, (messages[-1]["content"],), place)


def longest(given: Conversations) -> int:
    """Tokens of the longest exchange that the model reads: all but the last."""
    return max(len(one.ids) - 1 for one in given.all)
