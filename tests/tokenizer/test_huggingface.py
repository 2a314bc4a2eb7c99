"""Hugging Face tokenizers: the library's own encodings, special tokens, prompts and files."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from gptjax import tokenizer as tokenizers
from gptjax.config import Config, ModelConfig, TokenizerConfig
from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    huggingface,
    train_huggingface,
)

WORDS = ["ra", "tor", "in", "de", "lu", "mes", "po", "cha", "bi", "sen", "Value"]
CORPUS = [
    "def value(index):\n        return self.index[value]\n\n    # naïve café “quoted”, it's 1234\n"
    * 20,
    "для каждого слова 日本語の文章です שלום עולם مرحبا بالعالم\r\n\tend\r\n" * 20,
    " ".join(a + b + c for a in WORDS for b in WORDS for c in WORDS),
]
AWKWARD = [
    "",
    " ",
    "return value",
    " value[index]\n\n\n    return\n",
    "🙂 👩‍👩‍👧‍👦 🇩🇪",
    "a\0b\0\0c",
    "mixed для 日本語 text שלום عالم",
    "\u202bRTL שלום\u202c",
    "e\u0301 é \u0958 ﬁ Å",
    " " * 300 + "x" + " " * 33,
    "one\r\ntwo\rthree\n\r\n",
    "\t \x85\u2028\u3000\ufeff",
    "\u2581 \u2581\u2581x",
    "lone \ud800 and \udcff",
    "<|endoftext|> </s> <s> [SEP] [EOS] <0x41> <unk> [UNK]",
    "it's WE'LL 12345678 x==y!=z...",
    "w" * 500,
]


def trained(kind: str) -> Tokenizer:
    """One tokenizer of each scheme in its usual configuration; EOS has id 1."""
    special = ["<unk>", "</s>", "<s>"]
    space = pre_tokenizers.Metaspace()
    if kind == "byte-level BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=special, show_progress=False
        )
    elif kind == "SentencePiece unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer, made.decoder = space, decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:  # as Llama 2 has it: bytes for unknown characters, no pre-tokenizer
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.pre_tokenizer = space
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, show_progress=False, limit_alphabet=50
        )
    made.train_from_iterator(CORPUS, trainer)
    if kind == "SentencePiece BPE":
        raw = json.loads(made.to_str())
        raw["added_tokens"] = raw["added_tokens"][:3]
        raw["pre_tokenizer"] = None
        made = Tokenizer.from_str(json.dumps(raw))
        prepend = normalizers.Prepend("\u2581")
        made.normalizer = normalizers.Sequence([prepend, normalizers.Replace(" ", "\u2581")])
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    return made


KINDS = ("byte-level BPE", "WordPiece", "SentencePiece unigram", "SentencePiece BPE")


@pytest.fixture(scope="module", params=KINDS)
def library(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(request.param)


def files(library: Tokenizer, **beside: Any) -> dict[str, bytes]:
    """Files by name, from contents by stem; by default tokenizer_config.json declares the EOS."""
    beside = beside or {"tokenizer_config": {"eos_token": "</s>"}}
    texts = {f"{name}.json": json.dumps(value).encode() for name, value in beside.items()}
    return {**texts, "tokenizer.json": library.to_str().encode()}


def plain(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


# --- encodings -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", AWKWARD)
def test_encode_and_decode_agree_with_the_library(library: Tokenizer, text: str) -> None:
    tokenizer = HuggingFaceTokenizer(files(library))
    text = text.replace("</s>", "").replace("<s>", "").replace("<unk>", "")
    wanted = library.encode(plain(text), add_special_tokens=False).ids
    assert tokenizer.encode(text) == wanted
    assert tokenizer.decode(wanted) == library.decode(wanted)
    assert tokenizer.encode_documents([text, ""], [True, False]).tolist() == [*wanted, 1]


def test_special_tokens_are_parsed_in_prompts_and_not_in_documents(library) -> None:
    tokenizer = HuggingFaceTokenizer(files(library))
    text = "value </s> return<s></s>index"
    ids = tokenizer.encode(text)
    assert ids
    assert not {1, 2} & set(ids)
    assert tokenizer.encode_documents([text], [True]).tolist() == [*ids, 1]
    assert tokenizer.prompt(text) == library.encode(text).ids
    assert tokenizer.prompt(text).count(1) == 2


def test_long_text_encoded_in_parts_equals_whole(library: Tokenizer, monkeypatch) -> None:
    tokenizer = HuggingFaceTokenizer(files(library))
    text = "".join(map(plain, AWKWARD)) + "".join(CORPUS)
    whole = tokenizer.encode(text)
    given = []
    once = HuggingFaceTokenizer._encode_plain
    monkeypatch.setattr(
        HuggingFaceTokenizer, "_encode_plain", lambda s, t: given.append(t) or once(s, t)
    )
    monkeypatch.setattr(huggingface, "_CHUNK", 50)
    assert tokenizer.encode_documents([text], [False]).tolist() == whole
    assert "".join(given) == text
    in_parts = isinstance(library.pre_tokenizer, pre_tokenizers.Metaspace | None.__class__)
    assert (len(given) == 1) == in_parts


@pytest.fixture(scope="module")
def byte_bpe() -> HuggingFaceTokenizer:
    cfg = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=300)
    return train_huggingface(CORPUS, cfg)


ANY = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text()), max_size=5).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=ANY)
@example(text="".join(AWKWARD))
def test_byte_level_bpe_round_trips_any_text(byte_bpe: HuggingFaceTokenizer, text: str) -> None:
    ids = byte_bpe.encode(text)
    assert byte_bpe.decode(ids) == plain(text)
    assert byte_bpe.eos_id not in ids
    assert max(ids, default=0) < byte_bpe.vocab_size


def test_padding_and_truncation_settings_are_ignored() -> None:
    library = trained("byte-level BPE")
    wanted = library.encode("return value index").ids
    library.enable_truncation(2)
    library.enable_padding(length=64)
    assert len(library.encode("return value index").ids) == 64
    tokenizer = HuggingFaceTokenizer(files(library))
    assert tokenizer.encode("return value index") == tokenizer.prompt("return value index")
    assert tokenizer.encode("return value index") == wanted


def test_special_tokens_and_ids_beyond_the_vocabulary_have_no_text(library: Tokenizer) -> None:
    tokenizer = HuggingFaceTokenizer(files(library))
    ids = tokenizer.encode("return value")
    around = [1, *ids, 2, 1, tokenizer.vocab_size, tokenizer.vocab_size + 50]
    assert tokenizer.decode(around) == tokenizer.decode(ids) == "return value"


# --- special tokens --------------------------------------------------------------------------

EOS = {"content": "</s>", "lstrip": False, "normalized": False, "special": True}
DECLARED = {
    "a string": ({"tokenizer_config": {"eos_token": "</s>", "bos_token": "<s>"}}, 2, (1,)),
    "an object": ({"tokenizer_config": {"eos_token": EOS, "bos_token": None}}, None, (1,)),
    "the map": ({"special_tokens_map": {"eos_token": EOS, "bos_token": "<s>"}}, 2, (1,)),
    "the config before the map": (
        {"special_tokens_map": {"eos_token": "<s>"}, "tokenizer_config": {"eos_token": "</s>"}},
        None,
        (1,),
    ),
    "an id": ({"config": {"eos_token_id": 1, "bos_token_id": 2, "model_type": "llama"}}, 2, (1,)),
    "several ids": ({"generation_config": {"eos_token_id": [1, 5, 2]}}, None, (1, 5, 2)),
    "a name and several ids": (
        {
            "tokenizer_config": {"eos_token": "<s>"},
            "generation_config": {"eos_token_id": [1, 2]},
            "config": {"eos_token_id": 7},
        },
        None,
        (2, 1, 7),
    ),
}


def written(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", DECLARED)
def test_special_tokens_come_from_the_declaring_files(name: str, tmp_path: Path) -> None:
    beside, bos, stop = DECLARED[name]
    folder = written(tmp_path / "model", files(trained("byte-level BPE"), **beside))
    for loaded in (
        tokenizers.load(folder),
        tokenizers.make(TokenizerConfig(kind="huggingface", path=str(folder)), []),
        tokenizers.make(
            TokenizerConfig(kind="huggingface", path=str(folder / "tokenizer.json")), []
        ),
    ):
        assert (loaded.bos_id, loaded.eos_id, loaded.stop_ids) == (bos, stop[0], stop)

    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.json").write_text('{"run": "runs/a"}')  # a run's own
    loaded.save(copy)
    again = tokenizers.load(copy)
    assert (again.bos_id, again.stop_ids) == (bos, stop)
    assert again.fingerprint == loaded.fingerprint
    assert (copy / "config.json").read_text() == '{"run": "runs/a"}'
    for name in set(beside) - {"config"} | {"tokenizer"}:
        file = f"{name}.json"
        assert (copy / file).read_bytes() == (folder / file).read_bytes()


def test_declared_token_is_special_even_if_tokenizer_json_lacks_the_flag() -> None:
    library = trained("byte-level BPE")
    library.add_tokens(["<stop>", "<more>"])
    config = {"eos_token": "<stop>", "additional_special_tokens": ["<more>"]}
    tokenizer = HuggingFaceTokenizer(files(library, tokenizer_config=config))
    other = HuggingFaceTokenizer(files(library))
    eos, more = library.token_to_id("<stop>"), library.token_to_id("<more>")
    assert tokenizer.eos_id == eos
    assert tokenizer.vocab_size == more + 1
    assert {eos, more} <= set(other.encode("a<stop>b<more>"))
    assert not {eos, more} & set(tokenizer.encode("a<stop>b<more>"))
    assert tokenizer.prompt("<stop>") == [eos]
    assert tokenizer.decode([more, *tokenizer.encode("a"), eos]) == "a"


def test_vocab_size_is_above_the_highest_id() -> None:
    raw = json.loads(trained("byte-level BPE").to_str())
    raw["model"]["vocab"]["far"] = 999
    contents = files(trained("byte-level BPE")) | {"tokenizer.json": json.dumps(raw).encode()}
    assert HuggingFaceTokenizer(contents).vocab_size == 1000


# --- prompts ---------------------------------------------------------------------------------


def with_bos_template() -> Tokenizer:
    """A tokenizer whose template adds BOS, as in Llama 3."""
    library = trained("byte-level BPE")
    library.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 2)]
            ),
        ]
    )
    return library


@pytest.mark.parametrize("add_bos", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize(
    ("template", "config", "before", "empty"),
    [
        (False, {}, [], [1]),
        (False, {"bos_token": "<s>"}, [], [2]),
        (True, {"bos_token": "<s>"}, [2], [2]),
        (True, {}, [2], [2]),
    ],
)
def test_prompt_follows_the_template(
    template: bool, config: dict, before: list[int], empty: list[int], add_bos: dict
) -> None:
    library = with_bos_template() if template else trained("byte-level BPE")
    contents = files(library, tokenizer_config={"eos_token": "</s>", **config, **add_bos})
    tokenizer = HuggingFaceTokenizer(contents)
    ids = tokenizer.encode("return value")
    assert tokenizer.prompt("return value") == [*before, *ids]
    assert tokenizer.prompt("") == empty
    assert tokenizer.encode_documents(["return value"], [True]).tolist() == [*ids, 1]


def test_prompt_of_other_tokenizers_begins_with_bos_or_eos() -> None:
    raw = tokenizers.ByteTokenizer()
    assert raw.prompt("a") == [256, 97]
    assert (raw.bos_id, raw.stop_ids) == (None, (256,))
    own = tokenizers.train_sentencepiece(CORPUS, TokenizerConfig(vocab_size=330))
    assert own.prompt("value") == [own.eos_id, *own.encode("value")]
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(own.serialized())
    last = len(proto.pieces) - 1
    proto.trainer_spec.bos_id, proto.trainer_spec.bos_piece = last, proto.pieces[last].piece
    proto.pieces[last].type = proto.pieces[own.eos_id].type
    llama = SentencePieceTokenizer(proto.SerializeToString())
    assert llama.bos_id == last
    assert llama.prompt("value") == [last, *llama.encode("value")]


# --- files and errors ------------------------------------------------------------------------


def test_fingerprint_covers_exactly_what_changes_behaviour() -> None:
    library = trained("byte-level BPE")
    config = {"eos_token": "</s>", "bos_token": "<s>"}

    def fingerprint(library: Tokenizer = library, **beside: Any) -> str:
        return HuggingFaceTokenizer(files(library, **beside)).fingerprint

    same = fingerprint(tokenizer_config=config)
    assert fingerprint(tokenizer_config={**config, "chat_template": "x"}) == same
    assert fingerprint(special_tokens_map=config) == same
    others = [
        fingerprint(tokenizer_config={**config, "eos_token": "<s>"}),
        fingerprint(tokenizer_config={**config, "bos_token": None}),
        fingerprint(tokenizer_config=config, generation_config={"eos_token_id": [1, 2]}),
        fingerprint(tokenizer_config={**config, "additional_special_tokens": ["a"]}),
        fingerprint(with_bos_template(), tokenizer_config=config),
    ]
    assert len({same, *others}) == 6


def failing(**beside: Any) -> dict[str, bytes]:
    return files(trained("byte-level BPE"), **beside)


DAMAGED = {
    "no EOS": (failing(tokenizer_config={"bos_token": "<s>"}), r"no end-of-.*eos_token in"),
    "ids too high": (
        failing(generation_config={"eos_token_id": [9998, 9999]}),
        r"generation_config\.json: eos_token_id=9999 is no token, and is left out",
    ),
    "another id than it would have": (
        failing(tokenizer_config={"eos_token": "</s>"}, added_tokens={"<|im_start|>": 9999}),
        "'<|im_start|>' is declared with the id 9999".replace("|", r"\|"),
    ),
    "a declaration of no token": (
        failing(tokenizer_config={"added_tokens_decoder": {"300": "x"}}),
        "the tokens beside tokenizer.json cannot be read",
    ),
    "an id that is none": (failing(generation_config={"eos_token_id": "</s>"}), "eos_token_id="),
    "no JSON": (
        failing() | {"tokenizer_config.json": b"{"},
        r"tokenizer_config\.json: invalid JSON",
    ),
    "no object": (failing() | {"tokenizer_config.json": b"[]"}, "not a JSON object"),
    "an empty file": (failing() | {"tokenizer.json": b""}, r"tokenizer\.json is damaged"),
    "half a file": (
        failing() | {"tokenizer.json": failing()["tokenizer.json"][:1000]},
        r"tokenizer\.json is damaged",
    ),
    "no tokenizer": (failing() | {"tokenizer.json": b"{}"}, r"tokenizer\.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_unusable_files_are_reported_with_their_path(name: str, tmp_path: Path) -> None:
    contents, message = DAMAGED[name]
    folder = written(tmp_path, contents)
    with pytest.raises(DataError, match=message) as caught:
        tokenizers.load(folder)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    with pytest.raises(DataError, match=message) as caught:
        tokenizers.make(TokenizerConfig(kind="huggingface", path=str(folder)), [])
    assert str(caught.value).startswith(f"tokenizer.path={tmp_path}: ")


def test_eos_that_plain_text_encodes_to_is_refused() -> None:
    library = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken("</s>", special=True)])
    with pytest.raises(DataError, match="the text '</s>' in a document would end it"):
        HuggingFaceTokenizer(files(library))


@pytest.mark.parametrize("path", ["absent", ""])
def test_folder_without_tokenizer_json_is_reported(tmp_path: Path, path: str) -> None:
    cfg = TokenizerConfig(kind="huggingface", path=str(tmp_path / path))
    with pytest.raises(DataError, match=r"no such file, and no folder with tokenizer\.json"):
        tokenizers.make(cfg, [])


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["byte_bpe", "wordpiece"])
def test_training_has_the_requested_size_and_is_reproducible(algorithm, tmp_path) -> None:
    cfg = TokenizerConfig(kind="huggingface", algorithm=algorithm, vocab_size=340)
    tokenizer = tokenizers.make(cfg, CORPUS)
    assert tokenizer.vocab_size == 340
    assert tokenizer.piece(tokenizer.eos_id) in ("<|endoftext|>", "[EOS]")
    assert len(tokenizer.encode("desenlu torlumes")) <= 6
    assert tokenizers.make(cfg, iter(CORPUS)).fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path)
    assert tokenizers.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_wordpiece_splits_like_bert_and_keeps_case() -> None:
    cfg = TokenizerConfig(kind="huggingface", algorithm="wordpiece", vocab_size=290)
    tokenizer = train_huggingface(CORPUS, cfg)
    pieces = [tokenizer.piece(i) for i in tokenizer.encode("Value  value\0(sendin)\n 🙂")]
    assert pieces == ["Value", "value", "(", "sen", "##d", "##in", ")", "[UNK]"]
    assert tokenizer.decode(tokenizer.encode("Value  inde")) == "Value inde"


@pytest.mark.parametrize("algorithm", ["byte_bpe", "wordpiece"])
def test_vocabulary_too_large_for_the_text_is_reported(algorithm: str) -> None:
    cfg = TokenizerConfig(kind="huggingface", algorithm=algorithm)
    for texts in (["too little text"], []):
        with pytest.raises(DataError, match=r"tokenizer\.vocab_size=4096.*more text, or lower it"):
            train_huggingface(texts, cfg)


def problems(**fields: Any) -> list[str]:
    cfg = Config(model=ModelConfig(vocab_size=50304), tokenizer=TokenizerConfig(**fields))
    try:
        cfg.check()
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "byte_bpe", "wordpiece"])
@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "bytes"])
def test_algorithm_must_match_the_kind(kind: str, algorithm: str) -> None:
    fits = kind == "bytes" or (kind == "huggingface") == (algorithm in ("byte_bpe", "wordpiece"))
    found = problems(kind=kind, algorithm=algorithm)
    assert (not found) == fits
    if not fits:
        assert found[0].startswith(
            f"tokenizer.algorithm={algorithm}: not available with tokenizer.kind="
        )
    assert problems(kind=kind, algorithm=algorithm, path="a.json") == []


def test_byte_level_bpe_needs_at_least_257_tokens() -> None:
    (problem,) = problems(kind="huggingface", algorithm="byte_bpe", vocab_size=256)
    assert "at least 257" in problem
    assert problems(kind="huggingface", algorithm="byte_bpe", vocab_size=257) == []
    cfg = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=257)
    tokenizer = train_huggingface([], cfg)
    assert tokenizer.decode(tokenizer.encode("é🙂")) == "é🙂"
