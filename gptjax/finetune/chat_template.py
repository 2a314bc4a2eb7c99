"""Chat templates: Jinja templates of a tokenizer, rendered as in `transformers`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from gptjax.errors import DataError
from gptjax.finetune.examples import RecordError
from gptjax.tokenizer import HuggingFaceTokenizer, Tokenizer

_BEGIN, _END = "\ue000", "\ue001"  # marks around an answer: characters for private use


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in a sandbox, with the names, filters and tags that `transformers` defines.

    A template may mark the answers itself, by {% generation %} and {% endgeneration %}.
    """

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
        except ImportError:
            raise DataError("messages need jinja2: pip install 'gptjax[chat]'") from None
        try:
            template = _environment().from_string(tokenizer.chat_template)
        except TemplateError as error:
            raise DataError(f"chat_template: {error}") from None
        return cls(template, tokenizer.named_tokens)

    def render(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        """The text of messages; with `prompt`, also the beginning of the assistant's next one."""
        return self._marked(messages, prompt=prompt).replace(_BEGIN, "").replace(_END, "")

    def answer_spans(
        self, messages: Sequence[Any], answers: Sequence[int]
    ) -> list[tuple[int, int]]:
        """The first character of each answer in the text of all messages, and the one behind it.

        `answers` are the numbers of the assistant's messages. Where the template marks none, an
        answer is what follows the text that asks for it. Raises RecordError where that text changes
        with the answer.
        """
        marked = self._marked(messages)
        if _BEGIN in marked:
            return _marked_spans(marked)
        whole, spans = marked, []
        for i in answers:
            before = self.render(messages[:i], prompt=True)
            after = self.render(messages[: i + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise RecordError("messages: the chat template changes the text before an answer")
            spans.append((len(before), len(after)))
        return spans

    def _marked(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self.template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **self.tokens,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RecordError(f"messages: rejected by the chat template: {error}") from None


def _marked_spans(marked: str) -> list[tuple[int, int]]:
    """The places of marked text in the text without the marks."""
    spans, length = [], 0
    for number, part in enumerate(marked.split(_BEGIN)):
        if number:
            answer, _, part = part.partition(_END)
            spans.append((length, length + len(answer)))
            length += len(answer)
        length += len(part)
    return spans


def _environment() -> Any:
    """The sandbox in which templates are rendered."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around an answer: keeps its text, between two marks."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 wants it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            mark = lambda text: nodes.Output([nodes.TemplateData(text)]).set_lineno(line)
            return [mark(_BEGIN), *body, mark(_END)]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # jinja2's own tojson escapes characters for HTML.
    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment
