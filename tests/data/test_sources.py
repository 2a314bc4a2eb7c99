"""Data sources: equal documents from every format, in a fixed order; errors name their place."""

import codecs
import gzip
import json
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.config.registry import DATA_SOURCES
from gptjax.data import sources
from gptjax.data.sources import Counts, Document
from gptjax.errors import DataError

TEXTS = ["first\n", "second 語 🙂\n\tindented", "a\r\nb\x00c", "  spaces kept  ", "\ufeffmarked"]
READ = [text.replace("\0", "\ufffd") for text in TEXTS]


def documents(pattern: Path | str, counts: Counts | None = None, **fields) -> list[Document]:
    cfg = replace(DataConfig(), **fields)
    counts = Counts() if counts is None else counts
    found = sources.resolve((str(pattern),))
    return [document for source in found for document in source.documents(cfg, counts)]


def texts(pattern: Path | str, counts: Counts | None = None, **fields) -> list[str]:
    return [document.text for document in documents(pattern, counts, **fields)]


def refused(pattern: Path | str, **fields) -> str:
    """The error about an unusable source; asks for the size first, as `prepare` does."""

    def use() -> None:
        for source in sources.resolve((str(pattern),)):
            source.size_bytes()
        documents(pattern, **fields)

    with pytest.raises(DataError) as caught:
        use()
    return str(caught.value)


def jsonl(items: list, field: str = "text") -> bytes:
    return "".join(json.dumps({"n": 1, field: item}) + "\n" for item in items).encode()


def zst(raw: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zst}


def parquet(file: Path, items: list, field: str = "text", kind: str = "string", **options) -> Path:
    column = pyarrow.array(items, kind)
    table = pyarrow.table({"n": list(range(len(items))), field: column})
    pyarrow.parquet.write_table(table, file, **options)
    return file


# --- patterns --------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/a.txt", "sub/d.md", "z [1].txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {name}")
    return tmp_path


def keys(pattern: str) -> list[str]:
    return [source.name for source in sources.resolve((pattern,))]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("a.txt", ["a.txt"]),
        ("*.txt", ["a.txt", "b.txt", "z [1].txt"]),
        ("z [1].txt", ["z [1].txt"]),
        ("sub/*.md", ["d.md"]),
        ("sub/**/*.txt", ["c.txt", "deep/a.txt"]),
        ("s?b/[cd].*", ["sub/c.txt", "sub/d.md"]),
        ("sub", ["c.txt", "d.md", "deep/a.txt"]),
        ("", ["a.txt", "b.txt", "sub/c.txt", "sub/d.md", "sub/deep/a.txt", "z [1].txt"]),
    ],
)
def test_files_folders_and_globs_resolve_to_sorted_files(
    tree, monkeypatch, pattern, wanted
) -> None:
    assert keys(f"{tree}/{pattern}") == wanted
    monkeypatch.chdir(tree)
    assert keys(pattern or ".") == wanted  # a key is the path below the source's own root


@pytest.mark.parametrize("name", ["[ab].txt", "?.txt", "*.txt", "[ab]*"])
def test_existing_path_takes_precedence_over_a_glob(tree, name) -> None:
    assert len(keys(f"{tree}/{name}")) > 1
    (tree / name).write_text("this one")
    assert keys(f"{tree}/{name}") == [name]
    (tree / name).unlink()
    (tree / name).mkdir()
    (tree / name / "within.txt").write_text("this one")
    assert keys(f"{tree}/{name}") == ["within.txt"]


def test_documents_come_in_the_order_of_the_patterns(tree: Path) -> None:
    found = sources.resolve((f"{tree}/b.txt", f"{tree}/sub", f"{tree}/a.txt"))
    read = [d.key for source in found for d in source.documents(DataConfig(), Counts())]
    assert read == ["b.txt", "c.txt", "d.md", "deep/a.txt", "a.txt"]


@pytest.mark.parametrize("pattern", ["absent.txt", "*.absent", "absent/*.txt", "sub/absent"])
@pytest.mark.parametrize("option", ["data.sources", "data.valid_sources"])
def test_pattern_without_a_file_is_reported_with_its_option(tree, pattern, option) -> None:
    with pytest.raises(DataError) as caught:
        sources.resolve((f"{tree}/a.txt", f"{tree}/{pattern}"), option)
    assert str(caught.value).startswith(f"{option}={tree}/{pattern}: no such file")


def test_remote_folder_is_refused() -> None:
    with pytest.raises(DataError, match=r"gs://bucket/texts/\*\*/\*: remote folders"):
        sources._below(epath.Path("gs://bucket/texts"), "**/*", Counts())


@dataclass(frozen=True)
class Lines:
    """A source outside gptjax: the words of its pattern, one document each."""

    words: str

    @property
    def name(self) -> str:
        return f"words:{self.words}"

    def size_bytes(self) -> int:
        return len(self.words)

    def documents(self, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
        for number, word in enumerate(self.words.split()):
            yield Document(f"{self.name}:{number}", word)


def test_registered_scheme_resolves_to_the_sources_of_its_factory(tree, monkeypatch) -> None:
    monkeypatch.setattr(DATA_SOURCES, "_items", dict(DATA_SOURCES._items))
    with pytest.raises(DataError, match=r"data\.sources=words:a b: no such file.*scheme \(tfds:"):
        sources.resolve(("words:a b",))

    @DATA_SOURCES.register("words")
    def words(rest: str) -> list[Lines]:
        return [Lines(part) for part in rest.split(",")]

    found = sources.resolve((f"{tree}/a.txt", "words:one two,three", "tfds:tiny@odd"))
    assert [source.name for source in found] == [
        "a.txt",
        "words:one two",
        "words:three",
        "tfds:tiny@odd",
    ]
    assert texts("words:one two,three") == ["one", "two", "three"]


def test_file_named_like_a_scheme_needs_no_colon(tree: Path, monkeypatch) -> None:
    (tree / "tfds").write_text("a file")
    monkeypatch.chdir(tree)
    assert texts("tfds") == ["a file"]


def test_dangling_link_is_reported(tree: Path) -> None:
    link = tree / "sub" / "link.txt"
    link.symlink_to(tree / "absent")
    assert refused(tree / "sub").startswith(f"{link}: cannot be read: ")
    with pytest.raises(DataError, match=f"{link}: cannot be read: "):
        documents(tree / "sub")


def test_python_library_leaves_out_its_tests() -> None:
    found = keys("python-library")
    assert {"os.py", "json/decoder.py"} <= set(found)
    folders = {part for key in found for part in key.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})
    assert len(found) > 300
    (first,) = sources.resolve((f"{sysconfig.get_paths()['stdlib']}/os.py",))
    (same,) = (s for s in sources.resolve(("python-library",)) if s.name == "os.py")
    assert same == first


def test_compressed_files_count_four_times_their_size(tmp_path: Path) -> None:
    for suffix in ("", ".gz", ".zst"):
        (tmp_path / f"a.txt{suffix}").write_bytes(b"x" * 100)
    parquet(tmp_path / "b.parquet", ["a"])
    plain, *compressed, table = (s.size_bytes() for s in sources.resolve((str(tmp_path),)))
    assert plain == 100
    assert compressed == [400, 400]
    assert table == 4 * (tmp_path / "b.parquet").stat().st_size


# --- the same documents from every format ------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    for number, text in enumerate(TEXTS):
        file = tmp_path / f"{number}.txt{suffix}"
        file.write_bytes(COMPRESS[suffix](text.encode()))
    read = [text.removeprefix("\ufeff") for text in READ]  # in a file, it marks the encoding
    wanted = [Document(f"{n}.txt{suffix}", text) for n, text in enumerate(read)]
    assert documents(tmp_path) == wanted


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "ndjson"])
def test_json_line_is_one_document(tmp_path: Path, kind: str, suffix: str) -> None:
    name = f"records.{kind}{suffix}"
    raw = jsonl(TEXTS[:2]) + b"\n  \n" + jsonl(TEXTS[2:]).rstrip(b"\n")
    (tmp_path / name).write_bytes(COMPRESS[suffix](raw))
    lines = [1, 2, 5, 6, 7]
    wanted = [Document(f"{name}#{n}", text) for n, text in zip(lines, READ, strict=True)]
    assert documents(tmp_path / name) == wanted


@pytest.mark.parametrize("kind", ["string", "large_string", "binary"])
def test_parquet_row_is_one_document(tmp_path: Path, kind: str) -> None:
    items = TEXTS * 100  # more than are read at a time, in several groups of rows
    file = parquet(tmp_path / "t.parquet", items, kind=kind, row_group_size=77)
    wanted = [Document(f"t.parquet#{n}", text) for n, text in enumerate(READ * 100, 1)]
    assert documents(file) == wanted


def test_text_field_selects_the_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, "body"))
    parquet(tmp_path / "b.parquet", TEXTS, "body")
    assert texts(tmp_path, text_field="body") == 2 * READ


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_file_of_several_members_is_read_to_its_end(tmp_path, suffix: str) -> None:
    parts = [os.urandom(30).hex() * 10 + "\n" for _ in range(40)]
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(b"".join(COMPRESS[suffix](part.encode()) for part in parts))
    assert texts(file) == ["".join(parts)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_empty_documents_are_counted_and_skipped(tmp_path: Path, suffix: str) -> None:
    counts = Counts()
    blank = ["", " \n", "\n"]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](jsonl([*blank, "x"])))
    (tmp_path / f"b.txt{suffix}").write_bytes(COMPRESS[suffix](b" \n\t\n"))
    (tmp_path / f"c.txt{suffix}").write_bytes(b"")
    parquet(tmp_path / "d.parquet", [*blank, "y"])
    (tmp_path / "e.jsonl").write_bytes(b"")
    assert texts(tmp_path, counts) == ["x", "y"]
    assert counts == Counts(empty=8)


# --- long text files -------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.text(st.sampled_from("ab é語🙂\r\t"), max_size=12), min_size=1, max_size=12),
    limit=st.integers(4, 40),
)
@example(lines=["    ", "    ", "    ", "text"], limit=5)  # blank as far as the first piece goes
@example(lines=["🙂🙂🙂"], limit=4)
def test_long_text_file_is_split_at_line_ends_without_loss(lines, limit: int) -> None:
    text = "\n".join(lines)
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.txt")
        file.write_bytes(text.encode())
        pieces = documents(file, counts, max_document_bytes=limit)
    size = len(text.encode())
    if not pieces:
        assert not text.strip()
        return
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (len(pieces) > 1) == (size > limit) == (counts.split_documents == 1)
    assert all(len(piece.text.encode()) <= 2 * limit for piece in pieces)
    assert counts.replaced_utf8 == 0
    for piece in pieces[:-1]:
        assert piece.text.endswith("\n") or "\n" not in piece.text  # no line end was passed by


def test_lines_shorter_than_the_limit_are_not_split(tmp_path: Path) -> None:
    lines = [f"line {number}\n" for number in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    pieces = texts(tmp_path / "a.txt", max_document_bytes=64)
    assert len(pieces) > 5
    assert [line for piece in pieces for line in piece.splitlines(keepends=True)] == lines


# --- invalid UTF-8 ---------------------------------------------------------------------------

LATIN = "caf\xe9 au lait".encode("latin-1")


def invalid(tmp_path: Path, kind: str) -> tuple[Path, list[str], str]:
    """A file with invalid UTF-8, its documents, and where the first defect is."""
    replaced = LATIN.decode("utf-8", "replace")
    file = tmp_path / f"file.{kind}"
    if kind == "txt":
        file.write_bytes(b"fine\n" + LATIN)
        return file, ["fine\n" + replaced], f"{file}: invalid UTF-8 at byte 8"
    if kind == "jsonl":
        file.write_bytes(jsonl(["fine"]) + b'{"text": "' + LATIN + b'"}\n')
        return file, ["fine", replaced], f"{file}:2: invalid UTF-8 at byte 13"
    raw = pyarrow.array([b"fine", LATIN], "binary")
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    return file, ["fine", replaced], f"{file}:2: invalid UTF-8 at byte 3"


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_invalid_utf8_is_replaced_and_counted_by_document(tmp_path: Path, kind: str) -> None:
    file, wanted, _ = invalid(tmp_path, kind)
    counts = Counts()
    assert texts(file, counts) == wanted
    assert counts == Counts(replaced_utf8=1)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_invalid_utf8_is_refused_with_its_place_under_bad_utf8_fail(tmp_path, kind: str) -> None:
    file, _, place = invalid(tmp_path, kind)
    message = refused(file, bad_utf8="fail")
    assert message.startswith(place)
    assert "data.bad_utf8=replace" in message


def test_invalid_utf8_in_a_split_file_has_its_file_offset_and_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"0123456\n" * 5 + b"\xff bad\n" + b"0123456\n" * 5 + b"\xff bad\n")
    message = refused(file, bad_utf8="fail", max_document_bytes=16)
    assert message.startswith(f"{file}: invalid UTF-8 at byte 40;")
    counts = Counts()
    assert len(texts(file, counts, max_document_bytes=16)) > 3
    assert counts == Counts(replaced_utf8=1, split_documents=1)


def test_lone_surrogate_in_json_is_read(tmp_path: Path) -> None:
    """JSON may spell it; the tokenizer replaces it."""
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d here"}\n')
    assert texts(tmp_path / "a.jsonl") == ["half \ud83d here"]


# --- records that cannot be used -------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (b'{"text": "cut', "invalid JSON"),
        (b"not json at all", "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (codecs.BOM_UTF8 + b'{"text": "x"}', "invalid JSON"),
        (b'{"body": "x", "id": 1}', "no text in field 'text' (it has body, id)"),
        (b'{"text": 7}', "its field 'text' is 7 and no text"),
        (b'{"text": null}', "its field 'text' is null and no text"),
        (b'["text"]', "no text in field 'text' (it has list)"),
        (b"3", "no text in field 'text' (it has int)"),
    ],
)
def test_json_line_without_text_is_reported(tmp_path: Path, line: bytes, wanted: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_bytes(jsonl(["fine", "fine"]) + line + b"\n" + jsonl(["fine"]))
    message = refused(file)
    assert message.startswith(f"{file}:3: {wanted}")
    if "no text" in wanted:
        assert ("data.text_field" in message) == ("no text in field" in wanted)
        counts = Counts()
        assert texts(file, counts, bad_records="skip") == ["fine"] * 3
        assert counts == Counts(bad_records=1)


@pytest.mark.parametrize(("items", "field"), [(TEXTS, "body"), (["fine", None], "text")])
def test_parquet_row_without_text_is_reported(tmp_path: Path, items: list, field: str) -> None:
    file = parquet(tmp_path / "t.parquet", items, field)
    message = refused(file)
    place = f"{file}:1" if field == "body" else f"{file}:2"
    wanted = (
        "no text in field 'text' (it has n, body)"
        if field == "body"
        else "its field 'text' is null"
    )
    assert message.startswith(f"{place}: {wanted}")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_record_longer_than_the_limit_is_refused(tmp_path: Path, kind: str) -> None:
    items = ["short", "é" * 150, "short"]
    file = tmp_path / f"records.{kind}"
    if kind == "jsonl":
        file.write_bytes(jsonl(items))
    else:
        parquet(file, items)
    message = refused(file, max_document_bytes=299)
    assert message.startswith(f"{file}:2: longer than data.max_document_bytes=299")
    assert texts(file, max_document_bytes=1000) == items


# --- broken files ----------------------------------------------------------------------------


def flipped(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :]


BREAK: dict[str, Callable[[bytes], bytes]] = {
    "cut in the middle": lambda raw: raw[: len(raw) // 2],
    "cut by one byte": lambda raw: raw[:-1],
    "damaged at the start": lambda raw: flipped(raw, 0),
    "damaged in the middle": lambda raw: flipped(raw, len(raw) // 2),
    "of another kind": lambda raw: b"plain text, whatever the name says\n" * 20,
}


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        (f"{kind}.{compression}", broken)
        for kind in ("txt", "jsonl")
        for compression in ("gz", "zst")
        for broken in BREAK
        if (compression, broken) != ("zst", "damaged in the middle")  # few have a checksum
    ],
)
def test_broken_compressed_file_is_reported(tmp_path: Path, kind: str, broken: str) -> None:
    file = tmp_path / f"records.{kind}"
    raw = COMPRESS[file.suffix](jsonl([os.urandom(40).hex() for _ in range(500)]))
    file.write_bytes(BREAK[broken](raw))
    assert refused(file).startswith(f"{file}")


@pytest.mark.parametrize("broken", ["cut in the middle", "cut by one byte", "of another kind"])
def test_broken_parquet_file_is_reported(tmp_path: Path, broken: str) -> None:
    file = parquet(tmp_path / "t.parquet", [os.urandom(40).hex() for _ in range(500)])
    file.write_bytes(BREAK[broken](file.read_bytes()))
    assert refused(file).startswith(f"{file}: not a valid Parquet file")


def test_flipped_bit_in_a_parquet_file_raises_only_data_errors(tmp_path: Path) -> None:
    file = parquet(tmp_path / "t.parquet", [os.urandom(20).hex() for _ in range(100)])
    raw = file.read_bytes()
    said = []
    for bit in np.random.default_rng(0).choice(len(raw) * 8, 300, replace=False):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            documents(file)
        except DataError as error:
            said.append(str(error))
    assert len(said) > 30
    assert all(message.startswith(str(file)) for message in said)


# --- TFDS ------------------------------------------------------------------------------------

RECORDS = [f"document {n}\n" for n in range(12)]


def tfds_dataset(folder: Path, file_format: str) -> Path:
    """The folder of a TFDS dataset: 12 documents to train on, and a split with odd ones."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def split(items: list[bytes]) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices({"text": items, "label": list(range(len(items)))})

    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny",
        version="1.0.0",
        data_dir=folder,
        features=tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "label": tfds.features.Scalar(tf.int32)}
        ),
        split_datasets={
            "train": split([text.encode() for text in RECORDS]),
            "odd": split([b"fine", b" \n", LATIN]),
        },
        disable_shuffling=True,
        file_format=file_format,
    )
    return Path(builder.data_path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> SimpleNamespace:
    """A TFDS dataset made here, in the default format."""
    return SimpleNamespace(folder=tfds_dataset(tmp_path_factory.mktemp("tfds"), "tfrecord"))


@pytest.mark.slow
def test_a_tfds_dataset_in_array_records_is_read_too(tmp_path: Path) -> None:
    name = f"tfds:{tfds_dataset(tmp_path, 'array_record')}"
    assert texts(name) == RECORDS
    counts = Counts()
    assert texts(f"{name}@odd", counts) == ["fine", "caf\ufffd au lait"]
    assert counts == Counts(empty=1, replaced_utf8=1)


@pytest.mark.slow
def test_tfds_folder_gives_its_records_in_order(dataset) -> None:
    name = f"tfds:{dataset.folder}"
    (source,) = sources.resolve((name,))
    assert source.size_bytes() > sum(map(len, RECORDS))
    wanted = [Document(f"{name}@train:{n}", text) for n, text in enumerate(RECORDS)]
    assert documents(name) == documents(f"{name}@train") == wanted


@pytest.mark.slow
def test_tfds_records_follow_the_same_rules_as_files(dataset) -> None:
    name = f"tfds:{dataset.folder}@odd"
    counts = Counts()
    assert texts(name, counts) == ["fine", "caf\ufffd au lait"]
    assert counts == Counts(empty=1, replaced_utf8=1)
    assert refused(name, bad_utf8="fail").startswith(f"{name}:2: invalid UTF-8 at byte 3")
    assert refused(name, max_document_bytes=4).startswith(f"{name}:2: longer than")
    assert refused(name, text_field="label").startswith(f"{name}:0: its field 'label' is")
    message = refused(name, text_field="body")
    assert message.startswith(f"{name}:0: no text in field 'body'")
    assert "label" in message


@pytest.mark.slow
def test_unknown_tfds_dataset_or_split_is_reported(dataset, tmp_path: Path) -> None:
    assert refused(f"tfds:{dataset.folder}@valid").endswith(
        "@valid: no such split; available: train, odd"
    )
    for name in (str(tmp_path), str(tmp_path / "absent"), "no_such_dataset"):
        assert refused(f"tfds:{name}").startswith(f"data.sources=tfds:{name}: no such dataset")


@pytest.mark.slow
@pytest.mark.parametrize("broken", [name for name in BREAK if name != "damaged at the start"])
def test_broken_tfds_file_is_reported_with_the_last_good_record(dataset, tmp_path, broken) -> None:
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for file in dataset.folder.iterdir():
        raw = file.read_bytes()
        train = "train" in file.name
        (folder / file.name).write_bytes(BREAK[broken](raw) if train else raw)
    assert refused(f"tfds:{folder}").startswith(f"tfds:{folder}@train: cannot be read after record")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_broken_tfds_metadata_is_reported(dataset, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for path in dataset.folder.iterdir():
        raw = path.read_bytes()
        (folder / path.name).write_bytes(raw[: len(raw) // 3] if path.name == file else raw)
    assert refused(f"tfds:{folder}").startswith(f"data.sources=tfds:{folder}: no such dataset")


def test_the_running_python_s_library_has_files_with_sizes() -> None:
    files = sources.resolve(("python-library",), counts=Counts())
    assert len(files) > 100
    assert sum(file.size_bytes() for file in files) > 1_000_000
