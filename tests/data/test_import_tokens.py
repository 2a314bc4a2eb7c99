"""Files of tokens that other trainers write, byte by byte as their formats say, into a store."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import Config, DataConfig, MixturePart, TokenizerConfig, TrainConfig
from gptjax.data import import_tokens, loader, prepare, prepare_mixture, store, token_files
from gptjax.data.store import Manifest
from gptjax.errors import DataError, MismatchError, OutputError
from gptjax.tokenizer import ByteTokenizer

EOS = ByteTokenizer.eos_id
DOCUMENTS = [list(f"document {number}".encode()) for number in range(40)]
STREAM = [token for document in DOCUMENTS for token in (*document, EOS)]


def imported(folder: Path, paths: list[Path], valid: list[Path] = (), **options) -> Manifest:
    tokenizer = options.pop("tokenizer", ByteTokenizer())
    find = lambda given: token_files.find(list(map(str, given)), tokenizer.vocab_size, **options)
    return import_tokens.import_tokens(folder, tokenizer, find(paths), find(valid), 0.2)


def tokens_of(folder: Path, split: str) -> list[int]:
    manifest = store.read_manifest(str(folder))
    reader = store.Reader(str(folder), split, manifest)
    return reader.windows(np.array([0]), len(reader))[0].tolist()


def raw(file: Path, tokens: list[int], kind: str = "<u2") -> Path:
    file.write_bytes(b"".join(struct.pack(f"<{'H' if kind == '<u2' else 'I'}", t) for t in tokens))
    return file


def llmc(file: Path, tokens: list[int], magic: int = 20240520, version: int = 1) -> Path:
    letter = "H" if magic == 20240520 else "I"
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    file.write_bytes(header + struct.pack(f"<{len(tokens)}{letter}", *tokens))
    return file


def megatron(file: Path, documents: list[list[list[int]]], code: int = 8) -> Path:
    """Documents of sequences of tokens."""
    letter = {1: "B", 8: "H", 4: "i", 5: "q"}[code]
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    width = struct.calcsize(letter)
    offsets = [width * sum(lengths[:i]) for i in range(len(lengths))]
    firsts = [0, *np.cumsum([len(document) for document in documents]).tolist()]
    flat = [token for sequence in sequences for token in sequence]
    file.with_suffix(".bin").write_bytes(struct.pack(f"<{len(flat)}{letter}", *flat))
    file.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(sequences))
        + struct.pack("<Q", len(firsts))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(offsets)}q", *offsets)
        + struct.pack(f"<{len(firsts)}q", *firsts)
    )
    return file.with_suffix(".bin")


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    return raw(tmp_path / "val.bin", [*b"held out", EOS])


WRITTEN = {
    "nanoGPT": lambda folder: raw(folder / "train.bin", STREAM),
    "llm.c, EOS before each document": lambda folder: llmc(
        folder / "train.bin", [EOS, *STREAM[:-1]]
    ),
    "OLMo": lambda folder: raw(folder / "part-0.npy", STREAM),
    "Megatron with EOD": lambda folder: megatron(
        folder / "text", [[[*document, EOS]] for document in DOCUMENTS]
    ),
    "Megatron without": lambda folder: megatron(folder / "text", [[d] for d in DOCUMENTS], 4),
    "Megatron by sentence": lambda folder: megatron(
        folder / "text", [[d[:4], d[4:]] for d in DOCUMENTS], 5
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_each_format_gives_the_same_store(tmp_path: Path, valid: Path, name: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    file = WRITTEN[name](folder)
    manifest = imported(tmp_path / "store", [file], [valid])
    assert tokens_of(tmp_path / "store", "train") == [EOS, *STREAM]
    assert tokens_of(tmp_path / "store", "valid") == [EOS, *b"held out", EOS]
    assert manifest.splits["train"].documents == len(DOCUMENTS)
    assert manifest.splits["valid"].bytes == len("held out")
    assert list(store.verify(str(tmp_path / "store"))) == []
    assert not list(tmp_path.glob(".*partial"))


def test_numpy_files_of_any_whole_type_and_shards_in_the_order_of_their_names(
    tmp_path: Path, valid: Path
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    third = len(STREAM) // 3  # documents go on from one shard to the next
    np.save(folder / "a_0.npy", np.array(STREAM[:third], np.int64))
    llmc(folder / "a_1.bin", STREAM[third : 2 * third])
    np.save(folder / "a_2.npy", np.array(STREAM[2 * third :], np.uint32))
    imported(tmp_path / "store", [folder], [valid])
    assert tokens_of(tmp_path / "store", "train") == [EOS, *STREAM]


@pytest.mark.parametrize("chunk", [7, 64, 1 << 24])
def test_held_out_documents_are_whole_and_the_same_whatever_the_format(
    tmp_path: Path, monkeypatch, chunk: int
) -> None:
    monkeypatch.setattr(token_files, "CHUNK", chunk)
    again = [*STREAM, *STREAM]  # equal documents are on the same side
    sides = []
    for number, file in enumerate(
        [raw(tmp_path / "a.bin", again), megatron(tmp_path / "b", [[d] for d in DOCUMENTS * 2])]
    ):
        manifest = imported(tmp_path / f"store{number}", [file])
        found = {}
        for split in ("train", "valid"):
            tokens = bytes(
                t if t != EOS else 10 for t in tokens_of(tmp_path / f"store{number}", split)
            )
            found[split] = tokens.decode().split("\n")[1:-1]
            assert manifest.splits[split].documents == len(found[split])
        assert not set(found["train"]) & set(found["valid"])
        assert sorted(found["train"] + found["valid"]) == sorted(
            bytes(document).decode() for document in DOCUMENTS * 2
        )
        assert 2 <= len(found["valid"]) <= 40
        sides.append(found)
    assert sides[0] == sides[1]


class WithBos(ByteTokenizer):
    """Bytes, of which 1 begins a text."""

    bos_id = 1


def test_documents_that_begin_with_bos_keep_it_and_get_the_eos_they_lack(
    tmp_path: Path, valid: Path
) -> None:
    file = raw(tmp_path / "train.bin", [1, 65, 66, EOS, 1, 67, 1, 68, EOS])
    manifest = imported(tmp_path / "store", [file], [valid], tokenizer=WithBos())
    assert manifest.start_id == 1
    assert tokens_of(tmp_path / "store", "train") == [1, 65, 66, EOS, 1, 67, EOS, 1, 68, EOS, 1]


@pytest.mark.parametrize("chunk", [3, 1 << 24])
def test_documents_that_only_begin_with_bos_can_be_held_out(
    tmp_path: Path, monkeypatch, chunk: int
) -> None:
    monkeypatch.setattr(token_files, "CHUNK", chunk)
    file = raw(tmp_path / "train.bin", [t for document in DOCUMENTS for t in (1, *document)])
    manifest = imported(tmp_path / "store", [file], tokenizer=WithBos())
    found = []
    for split in ("train", "valid"):
        tokens = tokens_of(tmp_path / "store", split)
        assert tokens[0] == tokens[-1] == 1
        text = bytes(10 if t == EOS else t for t in tokens if t != 1).decode()
        found += text.split("\n")[:-1]
        assert manifest.splits[split].documents == text.count("\n")
    assert sorted(found) == sorted(bytes(document).decode() for document in DOCUMENTS)


def test_bytes_of_megatrons_files_take_an_eos_that_no_byte_is(tmp_path: Path, valid: Path) -> None:
    file = megatron(tmp_path / "text", [[d] for d in DOCUMENTS], 1)
    imported(tmp_path / "store", [file], [valid])
    assert tokens_of(tmp_path / "store", "train") == [EOS, *STREAM]


# --- what is refused -------------------------------------------------------------------------


def broken_index(folder: Path) -> Path:
    file = megatron(folder / "text", [[d] for d in DOCUMENTS])
    with file.open("ab") as stream:
        stream.write(b"\0\0")
    return file


def cut_header(folder: Path) -> Path:
    file = llmc(folder / "cut.bin", STREAM)
    file.write_bytes(file.read_bytes()[:-2])
    return file


REFUSED = {
    "an id beyond": (lambda f: raw(f / "x.bin", [*STREAM, 300]), "has the token 300, and the"),
    "the other type": (
        lambda f: raw(f / "x.bin", STREAM, "<u4"),
        "every other token is 0, as in uint32; give --dtype uint32",
    ),
    "half a token": (lambda f: (f / "x.bin").write_bytes(b"abc") and f / "x.bin", "3 bytes are no"),
    "a cut file": (cut_header, "its header says"),
    "a version": (lambda f: llmc(f / "x.bin", STREAM, version=2), "has version 2 of llm.c's"),
    "another vocabulary": (lambda f: llmc(f / "x.bin", STREAM), "stands for a vocabulary of 50257"),
    "another index": (broken_index, "its sequences are not those of"),
    "no file": (lambda f: f / "none.bin", "no such file"),
    "an empty folder": (lambda f: f, "has no .bin or .npy file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_named_and_nothing_is_left(
    tmp_path: Path, name: str, monkeypatch
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write, wanted = REFUSED[name]
    if name == "another vocabulary":
        monkeypatch.setitem(token_files._LLMC, 20240520, (1, "<u2", 50257))
    with pytest.raises(DataError, match=wanted):
        imported(tmp_path / "store", [write(folder)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files"]


@pytest.fixture(autouse=True)
def _vocabulary_of_bytes(monkeypatch) -> None:
    """llm.c's header stands for GPT-2's vocabulary; these tests write bytes."""
    monkeypatch.setitem(token_files._LLMC, 20240520, (1, "<u2", ByteTokenizer.vocab_size))


def test_a_file_without_documents_needs_validation_text(tmp_path: Path, valid: Path) -> None:
    file = raw(tmp_path / "train.bin", list(b"to be or not to be"))
    with pytest.raises(DataError, match="none for validation: give --valid FILE"):
        imported(tmp_path / "store", [file])
    imported(tmp_path / "store", [file], [valid])
    assert tokens_of(tmp_path / "store", "train") == [EOS, *b"to be or not to be", EOS]
    with pytest.raises(OutputError, match="exists already; give a new folder"):
        imported(tmp_path / "store", [file], [valid])


# --- training on it --------------------------------------------------------------------------


def test_an_imported_store_is_trained_on_alone_and_in_a_mixture(
    tmp_path: Path, valid: Path
) -> None:
    imported(tmp_path / "store", [raw(tmp_path / "train.bin", STREAM)], [valid])
    cfg = Config(
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(store=str(tmp_path / "store")),
        train=TrainConfig(seq_len=8, batch_tokens=64),
    )
    manifests = prepare_mixture.prepare_parts(cfg)
    data = loader.TrainData.open(cfg, manifests)
    _, ids = data.order.places(0)
    assert data.read(range(1))[0][0, 0].tolist() == [EOS, *STREAM][ids[0] * 8 : ids[0] * 8 + 9]
    part = MixturePart(store=cfg.data.store)
    mixed = replace(cfg, data=DataConfig(store=str(tmp_path / "mix"), mixture={"a": part}))
    assert prepare_mixture.prepare_parts(mixed).parts["a"] == manifests.parts[""]
    for field in ("sources", "valid_sources"):
        given = replace(cfg, data=replace(cfg.data, **{field: ("texts",)}))
        with pytest.raises(MismatchError, match=f"data.{field}=.*would not be read"):
            prepare.prepare(given)
    other = tmp_path / "tokenizer.json"
    other.write_text("{}")
    with pytest.raises(MismatchError, match="is another tokenizer than the store's"):
        prepare.prepare(
            replace(cfg, tokenizer=TokenizerConfig(kind="huggingface", path=str(other)))
        )


def test_the_command_says_what_was_imported(tmp_path: Path, valid: Path, command_line) -> None:
    file = raw(tmp_path / "train.bin", STREAM)
    words = ["data", "import", file, "--valid", valid, "--tokenizer", "bytes"]
    code, out, err = command_line(*words, "--store", tmp_path / "store")
    assert code == 0, err
    assert json.loads(out.splitlines()[0])["store"] == str(tmp_path / "store")
    assert f"{file}: raw, {len(STREAM)} tokens of u2" in out
    assert "train: 40 documents" in out
    assert "they begin: 'document 0document 1" in out
    code, _, err = command_line(*words, "--store", tmp_path / "store")
    assert code == 73
    assert "exists already" in err
    code, out, _ = command_line(
        *("data", "import", tmp_path, "--valid", valid, "--tokenizer", "bytes"),
        *("--store", tmp_path / "whole"),
    )
    assert code == 0
    assert "1 of the files are those of --valid: not trained on" in out
    assert tokens_of(tmp_path / "whole", "train") == [EOS, *STREAM]
    code, _, err = command_line(*words, "--store", "az://bucket/store")
    assert code == 2
    assert "--store=az://bucket/store: gptjax reads local files, gs:// and s3://, no az" in err
    code, _, err = command_line(*words, "--store", tmp_path / "other", "--valid-fraction", "1")
    assert code == 2
    assert "--valid-fraction=1.0: must be above 0 and below 1" in err
