"""Conversations for supervised fine-tuning, tokenized: from JSON lines or SQuAD's own files.

{"prompt": "...", "answer": "..."}              joined by a space unless there is one already
{"messages": [{"role": "...", "content": "..."}, ...]}    by the tokenizer's chat template
FILE.json                                       SQuAD 1.1 or 2.0, with the prompts of `gptjax eval`

The loss is on the answer and the token that ends it; in messages, on those of the assistant. Errors
name the file and every wrong line.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from gptjax.errors import DataError
from gptjax.evaluate.formats import Question, read_tasks
from gptjax.evaluate.scoring import encode_pair
from gptjax.finetune.chat_template import ChatTemplate
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
    without_end: int = 0
    """Conversations in whose answers the loss counts no token that ends a text."""

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
    ends = set(tokenizer.stop_ids)
    trained = ((i for i, on in zip(c.ids, c.loss_mask, strict=True) if on) for c in conversations)
    without_end = sum(ends.isdisjoint(ids) for ids in trained)
    return Conversations(path, hashlib.sha256(raw).hexdigest(), tuple(conversations), without_end)


def _from_pair(
    tokenizer: Tokenizer, prompt: str, answer: str, references: tuple[str, ...], location: str
) -> Conversation:
    space = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    prompt_ids, answer_ids = encode_pair(tokenizer, prompt, space + answer)
    answer_ids = [*answer_ids, tokenizer.eos_id]
    loss_mask = [False] * len(prompt_ids) + [True] * len(answer_ids)
    return Conversation([*prompt_ids, *answer_ids], loss_mask, prompt_ids, references, location)


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
    spans = template.answer_spans(messages, answers)
    whole = template.render(messages)
    ids, places = tokenizer.markup_spans(whole)
    loss_mask = [any(a < end and start < b for start, end in spans) for a, b in places]
    prompt = tokenizer.markup(template.render(messages[: answers[-1]], prompt=True))
    return Conversation(ids, loss_mask, prompt, (messages[-1]["content"],), location)


def longest(given: Conversations) -> int:
    """The most tokens that the model reads of a conversation: all but its last."""
    return max(len(one.ids) - 1 for one in given.all)
