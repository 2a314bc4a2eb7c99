"""A chat template is a stranger's program: it is stopped in time, and told in a sentence."""

import json
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gptjax.errors import DataError
from gptjax.finetune import template_process
from gptjax.finetune.chat_template import ChatTemplate
from gptjax.finetune.examples import RecordError
from gptjax.tokenizer import HuggingFaceTokenizer

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "a long text": "{{ 'x' * 10**10 }}",
    "a padded text": "{{ 'x'.ljust(10**10) }}",
    "a formatted text": "{{ '%10000000000d' % 1 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "many texts": "{% for i in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "division by zero": "{{ 1 / 0 }}",
    "half a character": "\\ud800",
    "its own error": "{{ raise_exception('no such role') }}",
    "an unknown name": "{{ messages.x.y }}",
}
UNPARSABLE = {
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "open": "{% for i in messages %}",
    "many braces": "{{" * 5000,
    "a large power": "{{ 10**(10**8) }}",  # computed while it is parsed
}


def tokenizer(template: str) -> HuggingFaceTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", *alphabet])}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["<eos>"])
    text = json.dumps(template).replace("\\\\ud800", "\\ud800")
    config = f'{{"eos_token": "<eos>", "chat_template": {text}}}'
    return HuggingFaceTokenizer(
        {
            "tokenizer.json": library.to_str().encode(),
            "tokenizer_config.json": config.encode(),
        }
    )


OFTEN = ("nested loops", "a long text", "recursion", "an unknown name", "deep", "open")


def some(names):
    return [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some(HOSTILE))
def test_a_template_without_end_or_measure_is_stopped(name, monkeypatch) -> None:
    monkeypatch.setattr(template_process, "_SECONDS", 2.0)
    template = ChatTemplate.of(tokenizer(HOSTILE[name]))
    began = time.monotonic()
    with pytest.raises(RecordError, match=r"messages: rejected by the chat template: .{5,}"):
        template.answer_spans(MESSAGES, [1])
    assert time.monotonic() - began < 10
    with pytest.raises(RecordError):  # and again, whether its process has ended or not
        template.render(MESSAGES)


def test_a_template_that_gives_no_text_is_told() -> None:
    with pytest.raises(RecordError, match="gives no text"):
        ChatTemplate.of(tokenizer("{# nothing #}")).answer_spans(MESSAGES, [1])


@pytest.mark.parametrize("name", some(UNPARSABLE))
def test_a_template_that_cannot_be_parsed_is_told(name, monkeypatch) -> None:
    monkeypatch.setattr(template_process, "_START_SECONDS", 4.0)
    with pytest.raises(DataError, match="chat_template: "):
        ChatTemplate.of(tokenizer(UNPARSABLE[name]))
