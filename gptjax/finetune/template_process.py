"""A process that renders chat templates, under limits of time and memory.

A template is a program of whoever made the tokenizer: it may loop for ever or build gigabytes.
This file imports neither jax nor the rest of gptjax, so that the process starts at once.
"""

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any

BEGIN, END = "\ue000", "\ue001"  # marks around an answer: characters for private use

_SECONDS = 10.0  # for the texts of one conversation
_START_SECONDS = 60.0
_MEMORY = 2 << 30  # bytes of address space
_LONGEST = 16 << 20  # characters of a text

Request = tuple[Sequence[Any], bool]
"""Messages, and whether the beginning of the assistant's next one follows them."""


class TemplateError(Exception):
    """A template that cannot be used, or that rejects messages."""


class TemplateProcess:
    """Renders one template in a process of its own, which ends with this one."""

    def __init__(self, template: str, tokens: Mapping[str, str]) -> None:
        """Raises TemplateError where the template cannot be parsed."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, template, dict(tokens)), daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer(_START_SECONDS)

    def render(self, requests: Sequence[Request]) -> list[str]:
        """The text of each request, answers between marks where the template marks them."""
        if self._connection.closed:
            raise TemplateError("it was ended at another conversation")
        self._connection.send(list(requests))
        return self._answer(_SECONDS)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _answer(self, seconds: float) -> list[str]:
        if not self._connection.poll(seconds):
            self.close()
            raise TemplateError(f"it took longer than {seconds:.0f} s")
        try:
            texts, problem = self._connection.recv()
        except EOFError:
            self.close()
            raise TemplateError(
                "its process ended, as for want of memory; a script that calls gptjax needs "
                "`if __name__ == '__main__':` around it"
            ) from None
        if problem:
            raise TemplateError(problem)
        return texts


def _serve(connection: Connection, source: str, tokens: dict[str, str]) -> None:
    """Parses the template, and answers requests until there are no more."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    except (ImportError, OSError, ValueError):
        pass  # no such limit here: that of time remains
    template: Any = None

    def answer(requests: Sequence[Request]) -> tuple[list[str], str]:
        nonlocal template
        try:
            if template is None:
                template = _environment().from_string(source)
            return [_render(template, tokens, *one) for one in requests], ""
        except MemoryError:
            return [], "it needs more memory than a chat template may have"
        except Exception as error:  # of any kind: it runs the template's program
            return [], (str(error) or type(error).__name__)[:300]

    connection.send(answer([]))
    while True:
        try:
            requests = connection.recv()
        except EOFError:
            return
        connection.send(answer(requests))


def _render(template: Any, tokens: dict[str, str], messages: Sequence[Any], prompt: bool) -> str:
    text = template.render(
        messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **tokens
    )
    if len(text) > _LONGEST:
        raise ValueError(f"its text is longer than {_LONGEST >> 20} million characters")
    text.encode()  # refuses half of a surrogate pair
    return text


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
            return [mark(BEGIN), *body, mark(END)]

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
