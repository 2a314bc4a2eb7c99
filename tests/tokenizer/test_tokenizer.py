"""Tokenizers: any text round-trips, documents end with EOS, fingerprints differ by vocabulary."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from gptjax import tokenizer as tokenizers
from gptjax.config import TokenizerConfig
from gptjax.errors import DataError
from gptjax.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, sentencepiece

ALGORITHMS = ("bpe", "unigram")


def corpus() -> list[str]:
    """Code-like text with indentation, blank lines, tabs, CRLF and a few other scripts."""
    draw = np.random.default_rng(0)
    syllables = ["ra", "tor", "in", "de", "lu", "mes", "po", "cha", "bi", "sen"]
    words = ["".join(draw.choice(syllables, draw.integers(1, 5))) for _ in range(400)]
    words += ["return", "value", "index"] * 20
    lines = [
        " " * 4 * int(draw.integers(4)) + " ".join(draw.choice(words, draw.integers(1, 9)))
        for _ in range(2000)
    ]
    odd = [
        "\tдля каждого слова",
        "日本語の文章です",
        "naïve café – “quoted”",
        "line\r\nother\r\n",
        "",
    ]
    return ["\n".join(lines[i : i + 50]) for i in range(0, 2000, 50)] + odd


@pytest.fixture(scope="module")
def trained() -> dict[str, SentencePieceTokenizer]:
    return {
        algorithm: tokenizers.train_sentencepiece(
            corpus(), TokenizerConfig(algorithm=algorithm, vocab_size=380)
        )
        for algorithm in ALGORITHMS
    }


@pytest.fixture(scope="module")
def kinds(trained) -> dict[str, Tokenizer]:
    return {"bytes": ByteTokenizer(), **trained}


KINDS = pytest.mark.parametrize("kind", ["bytes", *ALGORITHMS])

SPACES = (" ", "  ", "\n", "\r\n", "\t", "\0", "\u2581", "\u2581\u2581", "\u2028", "\x85", "\x1f")
SCRIPTS = ("🙂", "é", "e\u0301", "語", "\ufeff", "\ufffd", "\u200d")
LOOK_ALIKES = ("</s>", "<unk>", "<0x41>", "<s>", "return", " value")
PIECES = st.sampled_from(SPACES + SCRIPTS + LOOK_ALIKES)
CLEAN = st.text(st.characters(exclude_categories=["Cs"]))
TEXTS = st.one_of(CLEAN, st.lists(st.one_of(PIECES, CLEAN), max_size=12).map("".join))


@KINDS
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text=" \n  \n\n   x  ")
@example(text="a\0b\u2581c\r\nd 🙂")
def test_any_text_round_trips(kinds: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.array(ids, np.uint32)) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.eos_id not in ids


@KINDS
@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.tuples(TEXTS, st.booleans()), max_size=4))
def test_documents_are_encoded_independently_with_eos_at_their_ends(kinds, kind, pieces) -> None:
    tokenizer = kinds[kind]
    flat = tokenizer.encode_documents([text for text, _ in pieces], [end for _, end in pieces])
    assert flat.dtype == np.uint32
    wanted = [i for text, end in pieces for i in tokenizer.encode(text) + [tokenizer.eos_id] * end]
    assert flat.tolist() == wanted


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_long_text_encoded_in_units_equals_whole(trained, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(sentencepiece, "_SLICE", 100)
    monkeypatch.setattr(sentencepiece, "_CACHE_SIZE", 50)
    monkeypatch.setattr(sentencepiece, "_CACHED_LENGTH", 6)
    text = "\n".join(corpus()) * 2
    ids = trained[kind].encode_documents([text], [False])
    assert ids.tolist() == trained[kind].encode(text)


@pytest.mark.parametrize(
    ("algorithm", "piece", "cut"),
    [
        ("bpe", "", ["value", "(", "n", ")", "  z", "\n", " 1"]),
        ("bpe", "e(", ["value(n)", "  z", "\n", " 1"]),
        ("bpe", "e ", ["value(n)  z", "\n", " 1"]),
        ("bpe", "e\n", None),
        ("unigram", "", ["value(n)  z", "\n", " 1"]),
    ],
)
def test_text_is_cut_into_the_finest_units_that_no_piece_crosses(
    trained, algorithm, piece, cut
) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained[algorithm].serialized())
    if piece:
        proto.pieces.add(piece=piece, score=1.0)
    tokenizer = SentencePieceTokenizer(proto.SerializeToString())
    assert (tokenizer._units and tokenizer._units.findall("value(n)  z\n 1")) == cut
    text = "value return value(return value\n" + "\n".join(corpus()[-9:])
    ids = tokenizer.encode(text)
    if piece and cut:  # a newline joins no piece
        assert tokenizer.vocab_size - 1 in ids
    assert tokenizer.encode_documents([text], [False]).tolist() == ids


@KINDS
@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udce9t\udce9\n", "🙂\ud83d"])
def test_lone_surrogate_becomes_a_question_mark(kinds, kind: str, text: str) -> None:
    tokenizer = kinds[kind]
    plain = text.encode("utf-8", "replace").decode()
    assert tokenizer.decode(tokenizer.encode(text)) == plain
    assert tokenizer.encode_documents([text], [True]).tolist() == [
        *tokenizer.encode(plain),
        tokenizer.eos_id,
    ]


@KINDS
def test_special_tokens_and_ids_beyond_the_vocabulary_have_no_text(kinds, kind: str) -> None:
    tokenizer = kinds[kind]
    ids = [tokenizer.eos_id, *tokenizer.encode("value"), tokenizer.eos_id]
    padded = [*ids, tokenizer.vocab_size, tokenizer.vocab_size + 50]  # rows the model has to spare
    assert tokenizer.decode(ids) == tokenizer.decode(padded) == "value"


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_incomplete_character_decodes_to_a_replacement_character(kinds, kind: str) -> None:
    for tokenizer in (kinds["bytes"], kinds[kind]):
        ids = tokenizer.encode("🙂")
        assert len(ids) == 4
        assert "\ufffd" in tokenizer.decode(ids[:3])


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_training_learns_words_and_indentation_at_the_requested_size(kinds, kind) -> None:
    tokenizer = kinds[kind]
    assert tokenizer.vocab_size == 380
    text = "        return value\n"
    assert len(tokenizer.encode(text)) < len(text) / 3
    assert tokenizer.encode("\n\n") == 2 * tokenizer.encode("\n")


def test_training_is_reproducible(trained) -> None:
    again = tokenizers.train_sentencepiece(corpus(), TokenizerConfig(vocab_size=380))
    assert again.fingerprint == trained["bpe"].fingerprint


def test_long_lines_are_used_in_training() -> None:
    line = " ".join(corpus()).replace("\n", " ") * 2  # far longer than the trainer's sentences
    tokenizer = tokenizers.train_sentencepiece([line], TokenizerConfig(vocab_size=380))
    assert len(tokenizer.encode("return value index")) <= 6


# --- fingerprint and files -------------------------------------------------------------------


def changed(tokenizer: SentencePieceTokenizer, change) -> SentencePieceTokenizer:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.serialized())
    change(proto)
    return SentencePieceTokenizer(proto.SerializeToString())


def test_fingerprint_changes_if_two_pieces_are_swapped(trained) -> None:
    def swap(proto) -> None:
        a, b = proto.pieces[-1], proto.pieces[-2]
        a.piece, b.piece = b.piece, a.piece

    original = trained["bpe"]
    swapped = changed(original, swap)
    assert swapped.vocab_size == original.vocab_size
    assert swapped.fingerprint != original.fingerprint


def test_fingerprints_of_different_tokenizers_differ(kinds) -> None:
    assert len({tokenizer.fingerprint for tokenizer in kinds.values()}) == 3
    assert ByteTokenizer().fingerprint == kinds["bytes"].fingerprint


@KINDS
def test_saved_tokenizer_is_loaded_again(kinds, kind: str, tmp_path: Path) -> None:
    tokenizer = kinds[kind]
    tokenizer.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    loaded = tokenizers.load(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert loaded.encode("a value\n") == tokenizer.encode("a value\n")


def test_make_gives_the_configured_kind(trained, tmp_path: Path) -> None:
    assert isinstance(tokenizers.make(TokenizerConfig(kind="bytes"), []), ByteTokenizer)
    file = tmp_path / "other.model"
    file.write_bytes(trained["unigram"].serialized())
    loaded = tokenizers.make(TokenizerConfig(path=str(file)), [])
    assert loaded.fingerprint == trained["unigram"].fingerprint


# --- models from elsewhere -------------------------------------------------------------------


def foreign(**options) -> SentencePieceTokenizer:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **{"vocab_size": 380, "byte_fallback": True, "hard_vocab_limit": False, **options},
    )
    return SentencePieceTokenizer(model.getvalue())


EXACT = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}


@pytest.mark.parametrize(
    "options",
    [
        {},  # Llama's way: a dummy prefix, spaces folded
        {**EXACT, "user_defined_symbols": ["\n"]},
        {**EXACT, "user_defined_symbols": ["\n", "\n\n"]},
        {**EXACT, "user_defined_symbols": ["\n", "\n    "]},
        {**EXACT, "user_defined_symbols": ["\n"], "treat_whitespace_as_suffix": True},
    ],
)
def test_loaded_models_encode_documents_independently(options: dict) -> None:
    tokenizer = foreign(**options)
    texts = ["return value\n\n    index\n", "\n\n", "", " self\n"]
    wanted = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert tokenizer.encode_documents(texts, [True] * 4).tolist() == wanted


def test_model_without_eos_is_refused() -> None:
    with pytest.raises(DataError, match="no end-of-sentence token"):
        foreign(eos_id=-1)


@pytest.mark.parametrize("contents", [b"", b"no model at all\n", b"\x00" * 100])
def test_invalid_model_file_is_reported(tmp_path: Path, contents: bytes) -> None:
    file = tmp_path / "text.model"
    file.write_bytes(contents)
    with pytest.raises(DataError, match="not a SentencePiece model") as caught:
        tokenizers.make(TokenizerConfig(path=str(file)), [])
    assert str(file) in str(caught.value)


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.path=.*absent\.model: no such file"):
        tokenizers.make(TokenizerConfig(path=str(tmp_path / "absent.model")), [])


def test_folder_without_a_tokenizer_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: no tokenizer found"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("texts", [["too little text"], []])
def test_vocabulary_too_large_for_the_text_is_reported(algorithm, texts) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=4096.*more text, or lower it"):
        tokenizers.train_sentencepiece(texts, TokenizerConfig(algorithm=algorithm))
