"""Conversations for supervised fine-tuning, tokenized: from JSON lines or SQuAD's own files.

{"prompt": "...", "answer": "..."}              joined by a space unless there is one already
{"messages": [{"role": "...", "content": "..."}, ...]}    by the tokenizer's chat template
FILE.json                                       SQuAD 1.1 or 2.0, with the prompts of `gptjax eval`

The loss is on the answer and the token that ends it; in messages, on those of the assistant. Errors
name the file and every wrong line.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from gptjax.errors import DataError
from gptjax.evaluate.formats import Question, read_tasks
from gptjax.evaluate.scoring import encode_pair
from gptjax.finetune.examples import (
    RecordError,
    parse_lines,
    raise_problems,
    read_file,
    text_field,
)
from gptjax.tokenizer import HuggingFaceTokenizer, Tokenizer

ASSISTANT = "assistant"
UNANSWERABLE = "unanswerable"
"""The trained answer to a question that has none."""


@dataclass(frozen=True)
class Conversation:
    """A tokenized conversation.

    `loss_mask` is true for the tokens that the loss counts; `prompt` has the ids before the last
    answer, and `answers` its references. `location` is the file and line.
    """

    ids: list[int]
    loss_mask: list[bool]
    prompt: list[int]
    answers: tuple[str, ...]
    location: str


@dataclass(frozen=True)
class Conversations:
    """The conversations of a file, and the file's SHA-256."""

    path: str
    sha256: str
    all: tuple[Conversation, ...]

    def __len__(self) -> int:
        return len(self.all)


def read(path: str, option: str, tokenizer: Tokenizer) -> Conversations:
    """The conversations of a file that `option` names.

    Raises DataError with every line that cannot be used.
    """
    raw = read_file(path, option)
    conversations, problems = [], []
    if path.endswith(".json"):
        (file,) = read_tasks([f"squad:{path}"], option=option)
        for number, question in enumerate(file.examples):
            assert isinstance(question, Question)
            references = question.answers or ("",)
            answer, location = references[0] or UNANSWERABLE, f"{path}, question {number}"
            conversations.append(
                _from_pair(tokenizer, question.prompt, answer, references, location)
            )
    else:
        template = ChatTemplate.of(tokenizer)
        for number, record in parse_lines(raw):
            location = f"{path}:{number}"
            try:
                if isinstance(record, Exception):
                    raise record
                if isinstance(record, dict) and "messages" in record:
                    one = _from_messages(tokenizer, template, record["messages"], location)
                else:
                    prompt, answer = text_field(record, "prompt"), text_field(record, "answer")
                    one = _from_pair(tokenizer, prompt, answer, (answer,), location)
                conversations.append(one)
            except RecordError as error:
                problems.append(f"{location}: {error}")
    raise_problems(problems)
    if not conversations:
        raise DataError(f"{option}={path}: no examples in it")
    return Conversations(path, hashlib.sha256(raw).hexdigest(), tuple(conversations))


def _from_pair(
    tokenizer: Tokenizer, prompt: str, answer: str, references: tuple[str, ...], location: str
) -> Conversation:
    space = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    prompt_ids, answer_ids = encode_pair(tokenizer, prompt, space + answer)
    answer_ids = [*answer_ids, tokenizer.eos_id]
    loss_mask = [False] * len(prompt_ids) + [True] * len(answer_ids)
    return Conversation([*prompt_ids, *answer_ids], loss_mask, prompt_ids, references, location)


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, rendered as in `transformers`: in a sandbox, with trimmed blocks."""

    template: Any
    tokens: dict[str, str]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """The tokenizer's template, None if it has none.

        Raises DataError if jinja2 is not installed or cannot parse the template.
        """
        if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.chat_template is None:
            return None
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise DataError("messages need jinja2: pip install 'gptjax[chat]'") from None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        # jinja2's own tojson escapes characters for HTML.
        to_json = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = raise_exception
        environment.filters["tojson"] = to_json
        try:
            template = environment.from_string(tokenizer.chat_template)
        except TemplateError as error:
            raise DataError(f"chat_template: {error}") from None
        return cls(template, tokenizer.named_tokens)

    def render(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        """The text of messages; with `prompt`, also the beginning of the assistant's next one."""
        from jinja2 import TemplateError

        try:
            return self.template.render(
                messages=messages, add_generation_prompt=prompt, **self.tokens
            )
        except TemplateError as error:
            raise RecordError(f"messages: rejected by the chat template: {error}") from None


def _from_messages(
    tokenizer: Tokenizer, template: ChatTemplate | None, messages: Any, location: str
) -> Conversation:
    if template is None:
        raise RecordError("messages: the tokenizer has no chat_template; give prompt and answer")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    if not isinstance(messages, list) or not messages:
        raise RecordError("messages: must be a list of objects with role and content")
    for message in messages:
        text_field(message, "role")
        text_field(message, "content")
    answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not answers or answers[-1] != len(messages) - 1:
        raise RecordError(f"messages: the last must be of role={ASSISTANT!r}, which is trained on")
    rendered = ""
    ids: list[int] = []
    loss_mask: list[bool] = []
    prompt: list[int] = []
    for i in answers:
        before = template.render(messages[:i], prompt=True)
        after = template.render(messages[: i + 1])
        if not (before.startswith(rendered) and after.startswith(before)):
            raise RecordError("messages: the chat template changes the text before an answer")
        ids += (new := tokenizer.markup(before[len(rendered) :]))
        loss_mask += [False] * len(new)
        prompt = list(ids)
        ids += (new := tokenizer.markup(after[len(before) :]))
        loss_mask += [True] * len(new)
        rendered = after
    return Conversation(ids, loss_mask, prompt, (messages[-1]["content"],), location)


def longest(given: Conversations) -> int:
    """The most tokens that the model reads of a conversation: all but its last."""
    return max(len(one.ids) - 1 for one in given.all)
