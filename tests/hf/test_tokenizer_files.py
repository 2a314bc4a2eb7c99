"""A tokenizer in a Hugging Face folder has the ids and texts of the run's, whatever its kind."""

import importlib.util
import io
import json

import pytest

from gptjax import tokenizer as tokenizers
from gptjax.config import TokenizerConfig
from gptjax.hf import tokenizer_files
from gptjax.tokenizer import ByteTokenizer, SentencePieceTokenizer

TEXT = "\n".join(
    f"def value_{i}(index):\n    return   index * {i * 37}  # дом, 日本, naïve café\n\n"
    for i in range(300)
)
EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LOADED = {  # as other trainers make them
    "a dummy prefix": EXACT | {"byte_fallback": True},
    "symbols": EXACT
    | {"byte_fallback": True, "add_dummy_prefix": False, "user_defined_symbols": ["\n", "\n\n"]},
    "no byte fallback": EXACT | {"character_coverage": 0.98},
}
TRAINED = {
    "bpe": "sentencepiece",
    "unigram": "sentencepiece",
    "byte_bpe": "huggingface",
    "wordpiece": "huggingface",
}
KINDS = ["bytes", *TRAINED, *LOADED]


@pytest.fixture(scope="module")
def tokenizer(request):
    kind = request.param
    if kind == "bytes":
        made = ByteTokenizer()
    elif kind in TRAINED:
        made = tokenizers.train(
            [TEXT], TokenizerConfig(TRAINED[kind], algorithm=kind, vocab_size=400)
        )
    else:
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.splitlines()),
            model_writer=model,
            model_type="bpe",
            vocab_size=380,
            minloglevel=2,
            **LOADED[kind],
        )
        made = SentencePieceTokenizer(model.getvalue())
    made.start_id = made.default_start_id
    return made


@pytest.fixture(params=["tokenizers", pytest.param("transformers", marks=pytest.mark.slow)])
def library(request, monkeypatch):
    """The library that loads the folder."""
    if request.param == "transformers":
        pytest.importorskip("transformers")
    else:
        find = importlib.util.find_spec
        hidden = lambda name, *rest: None if name == "transformers" else find(name, *rest)
        monkeypatch.setattr(importlib.util, "find_spec", hidden)
    return request.param


@pytest.mark.parametrize(
    "tokenizer",
    [
        kind if kind in ("bytes", "bpe") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
    indirect=True,
)
def test_an_exported_tokenizer_is_the_run_s(tokenizer, library, tmp_path):
    tokenizer_files.write_tokenizer(tmp_path, tokenizer, 64)
    compared = tokenizer_files.compare_tokenizer(tmp_path, tokenizer)
    print(compared)
    assert compared["with"].startswith(library)
    assert compared["texts"] > 2000
    assert compared["tokens"] >= tokenizer.vocab_size - 2
    assert compared["differ"] == 0, compared

    again = tokenizers.load(tmp_path)
    assert again.kind == "huggingface"
    assert again.stop_ids == tokenizer.stop_ids
    assert again.prompt("a b") == tokenizer.prompt("a b")


@pytest.mark.parametrize("tokenizer", ["byte_bpe"], indirect=True)
def test_a_start_that_is_the_tokenizer_s_own_changes_no_file(tokenizer, tmp_path):
    tokenizer_files.write_tokenizer(tmp_path / "..", tokenizer, 64)
    own = tokenizers.load((tmp_path / "..").resolve())
    own.start_id = own.default_start_id
    tokenizer_files.write_tokenizer(tmp_path, own, 64)
    assert (tmp_path / "tokenizer.json").read_bytes() == own.serialized().partition(b"\0")[0]


def merges_reversed(made):
    made["model"]["merges"].reverse()


def rename_piece(made):
    vocab = made["model"]["vocab"]
    pair = [piece for piece in vocab if piece.isalpha() and len(piece) == 1][:2]
    vocab[pair[0]], vocab[pair[1]] = vocab[pair[1]], vocab[pair[0]]


def no_start(made):
    made["post_processor"] = None


def spaces_lost(made):
    made["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}


@pytest.mark.parametrize("tokenizer", ["bpe"], indirect=True)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        pytest.param(merges_reversed, "ids", marks=pytest.mark.slow),
        (rename_piece, "ids"),
        pytest.param(no_start, "ids of a prompt", marks=pytest.mark.slow),
        pytest.param(spaces_lost, "ids", marks=pytest.mark.slow),
    ],
)
def test_another_tokenizer_is_found(tokenizer, tmp_path, change, what):
    tokenizer_files.write_tokenizer(tmp_path, tokenizer, 64)
    file = tmp_path / "tokenizer.json"
    made = json.loads(file.read_text())
    change(made)
    file.write_text(json.dumps(made))
    compared = tokenizer_files.compare_tokenizer(tmp_path, tokenizer)
    assert compared["differ"] > 0
    first = compared[what]
    assert first["run"] != first["folder"]
    assert first["run"] == (tokenizer.prompt if "prompt" in what else tokenizer.encode)(first["of"])


@pytest.mark.parametrize("tokenizer", ["unigram"], indirect=True)
def test_scores_of_a_trained_unigram_model_have_exact_sums(tokenizer):
    scores = [piece.score * 64 for piece in sentencepiece_pieces(tokenizer)]
    assert all(score == round(score) for score in scores)
    assert len(set(scores)) > 50


def sentencepiece_pieces(tokenizer):
    from gptjax.tokenizer.sentencepiece import parse_model

    return parse_model(tokenizer.serialized()).pieces
