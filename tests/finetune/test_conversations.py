"""Conversations: tokens and loss masks, errors of wrong lines, and packing."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from gptjax.config import TokenizerConfig
from gptjax.errors import DataError
from gptjax.finetune import conversations, packing, sft
from gptjax.finetune.conversations import Conversation, Conversations
from gptjax.parallel import arrays
from gptjax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, train_huggingface

BYTES = ByteTokenizer()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer_of(template: str, texts: str = "a few words", vocab_size: int = 260):
    cfg = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=vocab_size)
    files = train_huggingface([texts] * 3, cfg).files()
    known = json.loads(files.get("tokenizer_config.json", b"{}"))
    beside = {"tokenizer_config.json": json.dumps(known | {"chat_template": template}).encode()}
    return HuggingFaceTokenizer(files | beside)


@pytest.fixture(scope="module")
def chat_tokenizer():
    return chat_tokenizer_of(TEMPLATE)


def trained_text(one: Conversation, tokenizer) -> str:
    """The text of the tokens that the loss counts."""
    return tokenizer.decode([i for i, on in zip(one.ids, one.loss_mask, strict=True) if on])


def test_loss_mask_covers_the_answer_and_eos(write) -> None:
    lines = [{"prompt": "q:", "answer": "yes"}, {"prompt": "q:\n", "answer": "no"}]
    one, two = conversations.read(str(write("a.jsonl", lines)), "--data", BYTES).all
    assert BYTES.decode(one.ids) == "q: yes"
    assert trained_text(one, BYTES) == " yes"
    assert one.ids[-1] == BYTES.eos_id
    assert one.loss_mask[-1]
    assert BYTES.decode(two.ids) == "q:\nno"
    assert one.answers == ("yes",)


def test_loss_mask_covers_the_assistants_messages(write, chat_tokenizer) -> None:
    said = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    messages = [{"role": role, "content": text} for role, text in said]
    file = write("a.jsonl", [{"messages": messages}])
    (one,) = conversations.read(str(file), "--data", chat_tokenizer).all
    assert chat_tokenizer.decode(one.ids) == "<user>hi<assistant>yes<user>so<assistant>no"
    assert trained_text(one, chat_tokenizer) == "yesno"
    assert chat_tokenizer.decode(one.prompt) == "<user>hi<assistant>yes<user>so<assistant>"
    assert one.ids.count(chat_tokenizer.eos_id) == 4
    assert one.answers == ("no",)


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_conversation_is_tokenized_whole_and_masked_by_characters(write) -> None:
    """Turns may share a token: it belongs to the answer that it has characters of."""
    template = TEMPLATE.replace("<{{ m.role }}>", " he").replace("<assistant>", " he")
    tokenizer = chat_tokenizer_of(template, " hello there" * 9, 266)
    said = [("user", "re"), ("assistant", "llo there")]
    messages = [{"role": role, "content": text} for role, text in said]
    (one,) = conversations.read(
        str(write("a.jsonl", [{"messages": messages}])), "--data", tokenizer
    ).all
    eos = tokenizer.named_tokens["eos_token"]
    assert one.ids == tokenizer.markup(f" here{eos} hello there{eos}")
    assert one.prompt == tokenizer.markup(f" here{eos} he")
    assert one.ids != [*one.prompt, *tokenizer.markup(f"llo there{eos}")]
    assert trained_text(one, tokenizer) == " hello there"


def test_a_template_may_mark_the_answers_itself(write) -> None:
    tokenizer = chat_tokenizer_of(MARKED)
    said = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    messages = [{"role": role, "content": text} for role, text in said]
    read = conversations.read(str(write("a.jsonl", [{"messages": messages}])), "--data", tokenizer)
    (one,) = read.all
    assert tokenizer.decode(one.ids) == "<user>hi<assistant>yes<user>so<assistant>no"
    assert trained_text(one, tokenizer) == "yesno"
    assert tokenizer.decode(one.prompt) == "<user>hi<assistant>yes<user>so<assistant>"
    assert read.without_end == 0


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ("{% if tools is not none %}tools{% endif %}", ""),
        ("{% if documents is not none %}documents{% endif %}", ""),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ {'é': 1} | tojson }}", '{"é": 1}'),
        ("{{ {'é': 1} | tojson(ensure_ascii=True) }}", '{"\\u00e9": 1}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}", '{"a":2,"b":1}'),
        ("{% for i in (1, 2) %}{{ i }}{% break %}{% endfor %}", "1"),
    ],
)
def test_a_template_finds_what_transformers_defines(write, head, text) -> None:
    tokenizer = chat_tokenizer_of(head + TEMPLATE)
    messages = [{"role": "assistant", "content": "a"}]
    (one,) = conversations.read(
        str(write("a.jsonl", [{"messages": messages}])), "--data", tokenizer
    ).all
    assert tokenizer.decode(one.ids) == f"{text}<assistant>a"


def test_answers_that_no_token_ends_are_counted(write) -> None:
    tokenizer = chat_tokenizer_of(TEMPLATE.replace("{{ eos_token }}", "\n"))
    messages = [{"role": "assistant", "content": "a"}]
    lines = [{"messages": messages}] * 2 + [{"prompt": "a", "answer": "b"}]
    assert conversations.read(str(write("a.jsonl", lines)), "--data", tokenizer).without_end == 2


def test_a_prompt_is_not_ended_by_what_the_tokenizer_adds_behind(write) -> None:
    from tokenizers import Tokenizer, processors

    files = chat_tokenizer_of(TEMPLATE).files()
    library = Tokenizer.from_buffer(files["tokenizer.json"])
    eos = "<|endoftext|>"
    library.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, library.token_to_id(eos))]
    )
    tokenizer = HuggingFaceTokenizer(files | {"tokenizer.json": library.to_str().encode()})
    assert tokenizer.prompt("a few") == tokenizer.encode("a few")
    line = {"prompt": "a few", "answer": "words"}
    (one,) = conversations.read(str(write("a.jsonl", [line])), "--data", tokenizer).all
    assert trained_text(one, tokenizer) == " words"
    assert one.ids.count(tokenizer.eos_id) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "answer": " "}, "answer: is empty"),
        ({"answer": "a"}, "has no 'prompt'"),
        ("{", "is not JSON"),
        ({"messages": []}, "messages: must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages: the last must be"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "content: is empty"),
    ],
)
def test_wrong_line_is_reported_with_file_and_line(
    write, chat_tokenizer, line, message: str
) -> None:
    file = write("wrong.jsonl", [{"prompt": "a", "answer": "b"}, line])
    with pytest.raises(DataError) as caught:
        conversations.read(str(file), "--data", chat_tokenizer)
    assert str(caught.value).startswith(f"{file}:2: {message}")


def test_chat_template_runs_in_a_sandbox(write, chat_tokenizer) -> None:
    files = chat_tokenizer.files()
    evil = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": evil}
    tokenizer = HuggingFaceTokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()})
    file = write("a.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}])
    with pytest.raises(DataError, match=r"a.jsonl:1: messages: rejected by the chat template"):
        conversations.read(str(file), "--data", tokenizer)


def test_squad_file_has_all_reference_answers(tmp_path) -> None:
    asked = [
        {"question": "Who?", "answers": [{"text": "Ann"}, {"text": "she"}]},
        {"question": "Why?", "answers": []},
    ]
    article = {"title": "T", "paragraphs": [{"context": "Ann was.", "qas": asked}]}
    (tmp_path / "squad.json").write_text(json.dumps({"data": [article]}))
    one, two = conversations.read(str(tmp_path / "squad.json"), "--data", BYTES).all
    assert BYTES.decode(one.ids).endswith("Question: Who?\n\nAnswer: Ann")
    assert one.answers == ("Ann", "she")
    assert trained_text(two, BYTES) == " unanswerable"
    assert two.answers == ("",)


def conversation(prompt: int, answer: int, first: int = 1) -> Conversation:
    ids = list(range(first, first + prompt + answer))
    return Conversation(ids, [False] * prompt + [True] * answer, ids[:prompt], ("",), "f.jsonl:3")


def test_long_prompt_is_truncated_and_long_answer_is_an_error() -> None:
    rows = packing.pack(Conversations("f.jsonl", "", (conversation(9, 3),)), 6, 0)
    assert rows.cut == 1
    assert rows.tokens_RT.tolist() == [[6, 7, 8, 9, 10, 11]]
    assert rows.targets_RT.tolist() == [[7, 8, 9, 10, 11, 12]]
    assert rows.counts_RT.tolist() == [[0, 0, 0, 1, 1, 1]]
    with pytest.raises(DataError, match=r"f.jsonl:3: the answer has 7 tokens"):
        packing.pack(Conversations("f.jsonl", "", (conversation(1, 7),)), 6, 0)


@pytest.mark.usefixtures("quick_compile")
def test_packed_conversations_have_the_same_loss_as_alone(
    tiny_config, random_params, on_mesh
) -> None:
    cfg = replace(tiny_config(), data=replace(tiny_config().data, documents="mask"))
    each = [
        conversation(3, 4, 10),
        conversation(5, 2, 40),
        conversation(2, 9, 70),
        conversation(4, 4, 90),
    ]
    packed = packing.pack(Conversations("", "", tuple(each)), 16, 0)
    alone = [packing.pack(Conversations("", "", (one,)), 16, 0) for one in each]
    assert len(packed) == 2
    batches = [packed.take(np.arange(2)), *(one.take(np.arange(1)) for one in alone)]
    filled = [
        {k: np.concatenate([v, np.zeros((8 - len(v), 16), np.int32)]) for k, v in batch.items()}
        for batch in batches
    ]
    for mesh in ((1,), (2, 2, 2)):
        with on_mesh(*mesh):
            params = random_params(cfg.model)
            loss = jax.jit(lambda p, b: sft.answer_loss(p, cfg, b)[1])
            sums = [loss(params, arrays.global_batch(one, 8)) for one in filled]
        whole, *parts = [(float(one["loss"]), float(one["targets"])) for one in sums]
        assert whole[1] == 19
        np.testing.assert_allclose(whole, np.sum(parts, 0), rtol=1e-5)
