"""What tokens do not give back is never counted as less than the information in it."""

import json
import math
import random
from dataclasses import asdict

import pytest

from gptjax import tokenizer as tokenizers
from gptjax.config import Config, DataConfig, ModelConfig, TokenizerConfig
from gptjax.data import prepare, store
from gptjax.tokenizer.round_trip import correction_bits

LETTERS = "αβγδεζηθικλμνξοπ"  # sixteen: four bits each


def texts(seed: int, length: int, draw_one) -> str:
    draw = random.Random(seed)
    return "".join(draw_one(draw) for _ in range(length))


@pytest.mark.parametrize("length", [1, 5, 70, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("draw_one", "lose", "bits"),
    [
        (lambda d: d.choice(LETTERS), lambda t: "", 4),
        (lambda d: d.choice(LETTERS), lambda t: " ⁇ " * len(t), 4),
        (lambda d: d.choice("aA"), str.lower, 1),
        (lambda d: d.choice(["word ", "word\n"]), lambda t: t.replace("\n", " "), 1),
        (lambda d: d.choice(["ab", "a b"]), lambda t: t.replace(" ", ""), 1),
        (lambda d: d.choice(["no", "n o", "n  o", "n\to"]), lambda t: " ".join(t.split()), 1),
    ],
    ids=["nothing", "unknown", "case", "newlines", "spaces", "runs of spaces"],
)
def test_correction_takes_at_least_the_bits_that_were_lost(draw_one, lose, bits, length) -> None:
    lost = [
        correction_bits(text, lose(text))
        for text in (texts(s, length, draw_one) for s in range(20))
    ]
    assert sum(lost) / 20 >= bits * length


@pytest.mark.parametrize("text", ["", "a", "def f():\n    return 0\n" * 100, LETTERS * 300])
def test_equal_texts_need_no_correction(text) -> None:
    assert correction_bits(text, text) == 0
    assert correction_bits(text + "x", text) >= 8
    assert 0 < correction_bits(text, text + "x") <= 2 * math.log2(len(text) + 1) + 16


def words(tmp_path) -> TokenizerConfig:
    """A tokenizer of whole words, that lower-cases, and has <unk> for all but four."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = ["</s>", "<unk>", "alpha", "bravo", "delta", "hotel"]
    model = models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    library = Tokenizer(model)
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return TokenizerConfig(kind="huggingface", path=str(tmp_path))


def test_a_store_counts_unknown_tokens_and_what_is_lost(tmp_path) -> None:
    (tmp_path / "train.txt").write_text("alpha Bravo kappa")
    (tmp_path / "valid.txt").write_text("Alpha\nkappa lemon")
    said: list[str] = []
    cfg = Config(
        model=ModelConfig(vocab_size=8),
        tokenizer=words(tmp_path),
        data=DataConfig(
            sources=(str(tmp_path / "train.txt"),),
            valid_sources=(str(tmp_path / "valid.txt"),),
            store=str(tmp_path / "store"),
            workers=1,
        ),
    )
    manifest = prepare.prepare(cfg, say=said.append)
    assert [split.unknown for split in manifest.splits.values()] == [1, 2]
    assert manifest.splits["train"].lost_bits == 0.0
    decoded = tokenizers.load(tmp_path / "store").decode([2, 1, 1])
    assert (
        manifest.splits["valid"].lost_bits
        == correction_bits("Alpha\nkappa lemon", decoded)
        > 8 * 13
    )
    assert said == [
        "30.00% of the tokens are <unk>, of which no text comes back",
        "the tokens do not give back all of the text: bits per byte include "
        f"{manifest.splits['valid'].lost_bits / 17:.4f} for what is lost",
    ]
    known = asdict(manifest)
    for split in known["splits"].values():  # a manifest of before these counts
        del split["unknown"], split["lost_bits"]
    assert store.parse_manifest(json.dumps(known), "it").fingerprint() == manifest.fingerprint()
