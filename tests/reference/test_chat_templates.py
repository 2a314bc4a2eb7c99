"""Conversations by a chat template: text, ids and masks are those of `transformers`."""

import json

import pytest

from gptjax import tokenizer as tokenizers
from gptjax.config import TokenizerConfig
from gptjax.finetune import conversations

pytestmark = pytest.mark.slow

TURNS = (
    "{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {
    "turns": TURNS,
    "words": TURNS.replace("<|", "").replace("|>", ":"),
    "trimmed": TURNS.replace("m.content", "m.content | trim"),
    "tools": "{% if tools is not none %}{{ tools | tojson }}{% endif %}" + TURNS,
    "documents": "{% if documents is defined %}{{ documents is none }}{% endif %}" + TURNS,
    "date": "{{ strftime_now('%Y') }}" + TURNS,
    "tojson": "{{ {'b': 'é', 'a': '<'} | tojson(sort_keys=True, indent=1) }}" + TURNS,
    "break": "{% for i in range(9) %}{{ i }}{% break %}{% endfor %}" + TURNS,
    "marked": MARKED,
}
SAID = [
    [("user", "Name a colour"), ("assistant", " The answer is blue")],
    [
        ("system", "Be brief.\n"),
        ("user", "สวัสดี 🙂"),
        ("assistant", "ค่ะ 🙂🙂"),
        ("user", "  spaces  "),
        ("assistant", "\n\nnew lines\n"),
    ],
]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_ids_and_masks_equal_those_of_transformers(tmp_path, name, bos) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    texts = ["Name a colour user: assistant: The answer is blue\n  spaces สวัสดี ค่ะ 🙂"] * 9
    cfg = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=290)
    files = tokenizers.train(texts, cfg).files()
    library = Tokenizer.from_buffer(files["tokenizer.json"])
    library.add_special_tokens(["<|user|>", "<|assistant|>", "<|system|>"])
    eos = "<|endoftext|>"
    if bos:
        library.post_processor = processors.TemplateProcessing(
            single=f"{eos} $A", special_tokens=[(eos, library.token_to_id(eos))]
        )
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, eos_token=eos)
    theirs.chat_template = TEMPLATES[name]
    theirs.save_pretrained(tmp_path)
    messages = [[{"role": r, "content": c} for r, c in said] for said in SAID]
    file = tmp_path / "messages.jsonl"
    file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages))
    ours = tokenizers.load(tmp_path)
    for given, one in zip(messages, conversations.read(str(file), "--data", ours).all, strict=True):
        want = theirs.apply_chat_template(
            given, return_dict=True, return_assistant_tokens_mask=name == "marked"
        )
        assert one.ids == want["input_ids"]
        prompt = theirs.apply_chat_template(
            given[:-1], add_generation_prompt=True, return_dict=True
        )
        assert one.prompt == prompt["input_ids"]
        if name == "marked":
            assert list(map(int, one.loss_mask)) == want["assistant_masks"]
