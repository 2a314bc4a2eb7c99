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


@pytest.fixture(scope="module")
def chat_tokenizer():
    cfg = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=260)
    files = train_huggingface(["a few words"] * 3, cfg).files()
    known = json.loads(files.get("tokenizer_config.json", b"{}"))
    beside = {"tokenizer_config.json": json.dumps(known | {"chat_template": TEMPLATE}).encode()}
    return HuggingFaceTokenizer(files | beside)


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


def test_packing_is_best_fit_decreasing() -> None:
    assert packing.best_fit_decreasing([3, 7, 5, 3, 2], 10) == [[1, 0], [2, 3, 4]]
    assert packing.best_fit_decreasing([4, 4, 4], 4) == [[0], [1], [2]]
    # the least room that holds it, not the first row with room
    assert packing.best_fit_decreasing([6, 8, 2, 4], 10) == [[1, 2], [0, 3]]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, 200).tolist()
    rows = packing.best_fit_decreasing(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 1.1 * sum(lengths) / 64


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
