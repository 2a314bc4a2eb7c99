"""Chat templates: Jinja templates of a tokenizer, rendered as in `transformers`."""

import importlib.util
from collections.abc import Sequence
from typing import Any, Self

from gptjax.errors import DataError
from gptjax.finetune.examples import RecordError
from gptjax.finetune.template_process import BEGIN, END, Request, TemplateError, TemplateProcess
from gptjax.tokenizer import HuggingFaceTokenizer, Tokenizer


class ChatTemplate:
    """A chat template in a sandbox, with the names, filters and tags that `transformers` defines.

    A template may mark the answers itself, by {% generation %} and {% endgeneration %}. It has 10 s
    and 2 GiB for a conversation.
    """

    def __init__(self, template: str, tokens: dict[str, str]) -> None:
        """Raises DataError where the template cannot be parsed."""
        try:
            self._process = TemplateProcess(template, tokens)
        except TemplateError as error:
            raise DataError(f"chat_template: {error}") from None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """The tokenizer's template, None if it has none.

        Raises DataError if jinja2 is not installed or cannot parse the template.
        """
        if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.chat_template is None:
            return None
        if importlib.util.find_spec("jinja2") is None:
            raise DataError("messages need jinja2: pip install 'gptjax[chat]'")
        return cls(tokenizer.chat_template, tokenizer.named_tokens)

    def render(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        """The text of messages; with `prompt`, also the beginning of the assistant's next one."""
        return _plain(self._marked([(messages, prompt)])[0])

    def answer_spans(
        self, messages: Sequence[Any], answers: Sequence[int]
    ) -> list[tuple[int, int]]:
        """The first character of each answer in the text of all messages, and the one behind it.

        `answers` are the numbers of the assistant's messages. Where the template marks none, an
        answer is what follows the text that asks for it. Raises RecordError where that text changes
        with the answer.
        """
        parts = [one for i in answers for one in ((messages[:i], True), (messages[: i + 1], False))]
        marked, *rest = self._marked([(messages, False), *parts])
        if not marked:
            raise RecordError("messages: the chat template gives no text")
        if BEGIN in marked:
            return _marked_spans(marked)
        spans = []
        for before, after in zip(map(_plain, rest[::2]), map(_plain, rest[1::2]), strict=True):
            if not (marked.startswith(after) and after.startswith(before)):
                raise RecordError("messages: the chat template changes the text before an answer")
            spans.append((len(before), len(after)))
        return spans

    def _marked(self, requests: list[Request]) -> list[str]:
        try:
            return self._process.render(requests)
        except TemplateError as error:
            raise RecordError(f"messages: rejected by the chat template: {error}") from None


def _plain(marked: str) -> str:
    return marked.replace(BEGIN, "").replace(END, "")


def _marked_spans(marked: str) -> list[tuple[int, int]]:
    """The places of marked text in the text without the marks."""
    spans, length = [], 0
    for number, part in enumerate(marked.split(BEGIN)):
        if number:
            answer, _, part = part.partition(END)
            spans.append((length, length + len(answer)))
            length += len(answer)
        length += len(part)
    return spans
