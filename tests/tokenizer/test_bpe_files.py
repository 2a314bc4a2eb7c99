"""Byte-level BPE from GPT-2's and tiktoken's files: the ids of the original."""

import base64
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from gptjax import tokenizer as tokenizers
from gptjax.config import TokenizerConfig
from gptjax.errors import DataError
from gptjax.tokenizer import HuggingFaceTokenizer, bpe_files, train_huggingface
from gptjax.tokenizer.to_huggingface import byte_letters

TEXTS = [
    "def value(index):\n        return self.index[value]\n\n    # naïve café “quoted”, it's 1234\n"
    * 20,
    "для каждого слова 日本語の文章です שלום عולם\r\n\tend we'll, WE'LL  12345\r\n" * 20,
]
END = "<|endoftext|>"


def alphabet() -> list[str]:
    """Characters that patterns and byte-level BPE could treat in different ways."""
    strange = [0x85, 0xA0, 0x1680, 0x180E, 0x2000, 0x2028, 0x2029, 0x202F, 0x3000, 0x200B, 0xFEFF]
    strange += [0x1F600, 0x1F1E6, 0x4E2D, 0xAC00, 0x661, 0x966, 0x2160, 0xBD, 0x301, 0xE33, 0x1D7D8]
    return [chr(c) for c in [*range(0x250), *range(0x370, 0x400), *strange]]


def hostile_texts(count: int) -> list[str]:
    rng = random.Random(0)
    parts = ["a", "aa", " ", "  ", "\n", "'s", "'S", "don't", "DON'T", "1234", "12", "\r\n", "\t"]
    parts += ["é", "日本", "ſ", "'ſ", "\u212a", " x", END, "aaaa"]
    letters = alphabet()
    return [
        *("".join(rng.choices(letters, k=rng.randrange(1, 60))) for _ in range(count)),
        *("".join(rng.choices(parts, k=rng.randrange(1, 20))) for _ in range(count)),
        *TEXTS,
    ]


@pytest.fixture(scope="module")
def trained() -> HuggingFaceTokenizer:
    settings = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=380)
    return train_huggingface(TEXTS, settings)


def ranks_of(tokenizer: HuggingFaceTokenizer) -> dict[bytes, int]:
    """The pieces of a trained tokenizer in their order, without its special token."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocab = json.loads(tokenizer.files()["tokenizer.json"])["model"]["vocab"]
    pieces = sorted((i, piece) for piece, i in vocab.items() if piece != END)
    return {
        bytes(byte_of[letter] for letter in piece): rank for rank, (_, piece) in enumerate(pieces)
    }


def rank_file(file: Path, ranks: Mapping[bytes, int]) -> Path:
    lines = (base64.b64encode(piece) + b" %d" % rank for piece, rank in ranks.items())
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def make(path: Path) -> tokenizers.Tokenizer:
    assert tokenizers.config_of(str(path)).kind == "huggingface"
    return tokenizers.make(TokenizerConfig(kind="huggingface", path=str(path)), ())


# --- vocabulary and merges -------------------------------------------------------------------


@pytest.mark.parametrize("names", bpe_files.PAIRS)
def test_gpt2s_files_give_the_ids_of_the_tokenizer_they_were_made_of(
    trained, tmp_path: Path, names
) -> None:
    model = json.loads(trained.files()["tokenizer.json"])["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (tmp_path / names[0]).write_text(json.dumps(model["vocab"]))
    (tmp_path / names[1]).write_text("\n".join(["#version: 0.2", *merges, ""]))
    for path in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        read = make(path)
        assert (read.eos_id, read.vocab_size) == (trained.eos_id, trained.vocab_size)
        for text in hostile_texts(300):
            assert read.encode(text) == trained.encode(text)
            assert read.decode(read.encode(text)) == trained.decode(trained.encode(text))
    again = tmp_path / "again"
    again.mkdir()
    read.save(again)
    assert tokenizers.load(again).fingerprint == read.fingerprint


def test_files_beside_them_are_heeded(trained, tmp_path: Path) -> None:
    model = json.loads(trained.files()["tokenizer.json"])["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert make(tmp_path).bos_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": END}))
    assert make(tmp_path).bos_id == make(tmp_path).eos_id == trained.eos_id


# --- ranks -----------------------------------------------------------------------------------


def merged(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """tiktoken's rule: a word that is a piece is it; otherwise the neighbours that give the piece
    of the lowest rank are merged, the first of them first."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks.get(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]  # noqa: B905, RUF007
        known = [(rank, i) for rank, i in pairs if rank is not None]
        if not known:
            return [ranks[part] for part in parts]
        i = min(known)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_ranks_are_merged_by_tiktokens_rule(tmp_path: Path, monkeypatch) -> None:
    rng = random.Random(1)
    pieces = [bytes([byte]) for byte in range(256)]
    for _ in range(150):  # made of any two, so that most pieces can be cut in several ways
        a, b = rng.choice(pieces[97:101] + pieces[256:]), rng.choice(pieces[97:101] + pieces[256:])
        if a + b not in pieces and len(a + b) < 9:
            pieces.append(a + b)
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    encoding = bpe_files.Encoding(None, {END: len(ranks)})
    monkeypatch.setattr(bpe_files, "_encodings", lambda: {len(ranks): encoding})
    read = make(rank_file(tmp_path / "some.tiktoken", ranks))
    assert read.eos_id == len(ranks)
    words = ["".join(rng.choices("abcd", k=rng.randrange(1, 25))) for _ in range(3000)]
    assert [read.encode(word) for word in words] == [merged(w.encode(), ranks) for w in words]


def test_a_word_that_is_a_piece_is_that_piece_though_no_merges_lead_to_it(
    tmp_path: Path, monkeypatch
) -> None:
    pieces = [bytes([byte]) for byte in range(256)] + [b"bc", b"ab", b"cd", b"abcd"]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    encoding = bpe_files.Encoding(None, {END: len(ranks)})
    monkeypatch.setattr(bpe_files, "_encodings", lambda: {len(ranks): encoding})
    read = make(rank_file(tmp_path / "some.tiktoken", ranks))
    assert read.encode("abcd") == [ranks[b"abcd"]] == merged(b"abcd", ranks)
    assert read.encode("xabcd") == merged(b"xabcd", ranks)
    assert len(read.encode("xabcd")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_rank_files_give_the_ids_of_tiktoken(trained, tmp_path, monkeypatch, pattern) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = ranks_of(trained)
    split = {"gpt2": None, "cl100k": bpe_files._CL100K_SPLIT}[pattern]
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding(
        "own",
        pat_str=split or gpt2,
        mergeable_ranks=ranks,
        special_tokens={END: len(ranks)},
    )
    encoding = bpe_files.Encoding(split, {END: len(ranks)})
    monkeypatch.setattr(bpe_files, "_encodings", lambda: {len(ranks): encoding})
    ours = make(rank_file(tmp_path / "own.tiktoken", ranks))
    for text in hostile_texts(10_000):
        assert ours.encode(text) == theirs.encode_ordinary(text), text
        assert ours.decode(ours.encode(text)) == text


def many_ranks(count: int) -> dict[bytes, int]:
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [bytes([a, b]) for a in range(256) for b in range(256)][: count - 256]
    pieces += [bytes([a, b, c]) for a in range(9) for b in range(256) for c in range(256)]
    return {piece: rank for rank, piece in enumerate(pieces[:count])}


@pytest.mark.parametrize(
    ("count", "size", "eos_id", "bos_id"),
    [
        (50_256, 50_257, 50_256, None),
        pytest.param(100_256, 100_277, 100_257, None, marks=pytest.mark.slow),
        pytest.param(128_000, 128_256, 128_001, 128_000, marks=pytest.mark.slow),
    ],
)
def test_the_number_of_ranks_tells_a_published_vocabulary(
    tmp_path: Path, count, size, eos_id, bos_id
) -> None:
    file = rank_file(tmp_path / "tokenizer.model", many_ranks(count))
    read = make(tmp_path)
    assert (read.vocab_size, read.eos_id, read.bos_id) == (size, eos_id, bos_id)
    if count == 128_000:
        named = {128_006: "<|start_header_id|>", 128_009: "<|eot_id|>"}
        named |= {
            128_002: "<|reserved_special_token_0|>",
            128_255: "<|reserved_special_token_247|>",
        }
        assert {i: read.piece(i) for i in named} == named
    with pytest.raises(DataError, match=r"is a rank file .*; give --tokenizer.kind huggingface"):
        tokenizers.make(TokenizerConfig(kind="sentencepiece", path=str(file)), ())


@pytest.mark.parametrize(
    ("contents", "wanted"),
    [
        (b"YQ== 0\nYg== 2\n", "its ranks are not 0 to 1, each once"),
        (b"YQ== 0\nYg==\n", ":2: is no piece in base64 and its rank"),
        (b"YQ== 0\nYg== 1\n", "has 2 ranks, and how text is split is known for vocabularies of"),
    ],
)
def test_a_rank_file_that_cannot_be_used_is_named(tmp_path: Path, contents, wanted: str) -> None:
    file = tmp_path / "bad.tiktoken"
    file.write_bytes(contents)
    with pytest.raises(DataError, match=f"tokenizer.path={file}: .*{wanted}"):
        make(file)


@pytest.mark.parametrize(
    ("vocab", "merges", "wanted"),
    [
        ("{", "", "vocab.json: is damaged"),
        ('{"a": 0}', "", r"vocab.json: has no <\|endoftext\|>"),
        ('{"a": 0, "<|endoftext|>": 1}', "a b", "its merges are not those of"),
    ],
)
def test_merges_that_cannot_be_used_are_named(tmp_path: Path, vocab, merges, wanted) -> None:
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    with pytest.raises(DataError, match=wanted):
        make(tmp_path)
