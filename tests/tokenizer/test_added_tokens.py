"""Tokens that are declared beside tokenizer.json: the ids, texts and ends of AutoTokenizer."""

import json
from pathlib import Path

import pytest

from gptjax import tokenizer as tokenizers
from gptjax.config import TokenizerConfig
from gptjax.tokenizer import HuggingFaceTokenizer, train_huggingface

SIZE = 270
TURNS = ("<|im_start|>", "<|im_end|>")


def token(content: str, **flags: bool) -> dict[str, object]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": True, **plain, **flags}


DECLARED: dict[str, dict[str, dict[str, object]]] = {
    "by id, EOS among them": {
        "tokenizer_config": {
            "added_tokens_decoder": {"270": token(TURNS[0]), "271": token(TURNS[1])},
            "eos_token": TURNS[1],
        }
    },
    "by id, in another order": {
        "tokenizer_config": {
            "added_tokens_decoder": {"271": token(TURNS[0]), "270": token(TURNS[1])},
            "eos_token": "<|endoftext|>",
        }
    },
    "added_tokens.json": {
        "tokenizer_config": {"eos_token": "<|endoftext|>"},
        "added_tokens": {TURNS[0]: 270, TURNS[1]: 271},
    },
    "additional special tokens": {
        "tokenizer_config": {"eos_token": "<|endoftext|>", "additional_special_tokens": TURNS}
    },
    "an EOS that is new": {
        "tokenizer_config": {"eos_token": "<|end|>", "additional_special_tokens": TURNS}
    },
    "by role, by id and additional": {
        "tokenizer_config": {
            "added_tokens_decoder": {"270": token(TURNS[1]), "271": token(TURNS[0])},
            "additional_special_tokens": ["<|more|>"],
            "pad_token": "<|pad|>",
            "eos_token": "<|endoftext|>",
        }
    },
    "padding alone": {"tokenizer_config": {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}},
    "special_tokens_map.json": {
        "special_tokens_map": {"eos_token": "<|end|>", "additional_special_tokens": TURNS},
        "tokenizer_config": {},
    },
}
TEXTS = ["a few words", "<|im_start|>user a<|im_end|>", "<|end|> <|pad|><|more|>b <|endoftext|>"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cfg = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=SIZE)
    contents = train_huggingface(["a few words of some user"] * 9, cfg).files()
    (tmp_path / "tokenizer.json").write_bytes(contents["tokenizer.json"])
    return tmp_path


def loaded(folder: Path, name: str) -> HuggingFaceTokenizer:
    for file, values in DECLARED[name].items():
        (folder / f"{file}.json").write_text(json.dumps(values))
    tokenizer = tokenizers.load(folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def test_declared_tokens_are_parsed_drawn_and_kept(folder, tmp_path) -> None:
    tokenizer = loaded(folder, "by id, EOS among them")
    assert (tokenizer.vocab_size, tokenizer.stop_ids) == (SIZE + 2, (SIZE + 1,))
    ids = tokenizer.prompt("<|im_start|>a<|im_end|>")
    assert ids == [SIZE, *tokenizer.encode("a"), SIZE + 1]
    assert tokenizer.decode(ids) == "a"
    assert SIZE not in tokenizer.encode("<|im_start|>")  # in a document it is plain text
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    again = tokenizers.load(copy)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.prompt("<|im_start|>a<|im_end|>") == ids


def test_a_token_for_padding_alone_needs_no_row_of_the_model(folder) -> None:
    tokenizer = loaded(folder, "padding alone")
    assert tokenizer.vocab_size == SIZE
    plain = folder / "plain"
    plain.mkdir()
    (plain / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (plain / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert tokenizers.load(plain).fingerprint == tokenizer.fingerprint


def test_an_end_that_is_no_token_is_told_and_another_is_taken(folder) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [50256, 3]}')
    tokenizer = loaded(folder, "added_tokens.json")
    assert tokenizer.stop_ids == (0, 3)
    assert list(tokenizer.notes) == [
        "generation_config.json: eos_token_id=50256 is no token, and is left out"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", DECLARED)
def test_ids_and_texts_are_those_of_autotokenizer(folder, name) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = loaded(folder, name), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size in (len(theirs), theirs.pad_token_id)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.prompt(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
