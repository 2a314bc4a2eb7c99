"""What a file holds is told by its bytes: every container gives the same documents, or an error."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import formats, sources
from gptjax.data.files import Counts
from gptjax.errors import DataError

TEXTS = ["first\n", "second 語 🙂\n\tindented", 'a "quoted", one', "  spaces kept  "]
LINES = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in TEXTS).encode()


def tar(raw: bytes, name: str = "part.jsonl", mode: str = "w") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(raw)
        archive.addfile(member, io.BytesIO(raw))
    return sink.getvalue()


def zipped(raw: bytes, name: str = "part.jsonl") -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, raw)
    return sink.getvalue()


def table(write: Callable[[pyarrow.Table, io.BytesIO], None], column=None) -> bytes:
    sink = io.BytesIO()
    write(pyarrow.table({"url": ["u"] * 4, "text": column or pyarrow.array(TEXTS)}), sink)
    return sink.getvalue()


def arrow(new: Callable) -> Callable[[pyarrow.Table, io.BytesIO], None]:
    def write(rows: pyarrow.Table, sink: io.BytesIO) -> None:
        with new(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=3)

    return write


def csv(delimiter: str) -> bytes:
    import csv

    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=delimiter)
    writer.writerows([["url", "text"], *(["u", text] for text in TEXTS)])
    return sink.getvalue().encode()


CONTAINERS = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "c4-train.00000-of-01024.json.gz": gzip.compress(LINES),
    "a.jsonl.GZ": gzip.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.zst": formats.zstd.compress(LINES),
    "a.jsonl.zstd": formats.zstd.compress(LINES),
    "misnamed.jsonl": lzma.compress(LINES),
    "a.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "marked.jsonl": b"\xef\xbb\xbf" + LINES,
    "utf16.jsonl": LINES.decode().encode("utf-16"),
    "a.tar": tar(LINES),
    "a.tar.gz": gzip.compress(tar(LINES)),
    "a.tgz": gzip.compress(tar(LINES)),
    "a.tar.zst": formats.zstd.compress(tar(gzip.compress(LINES), "part.jsonl.gz")),
    "a.zip": zipped(LINES),
    "nested.tar.gz": gzip.compress(tar(zipped(LINES), "in.zip")),
    "a.csv": csv(","),
    "a.tsv.gz": gzip.compress(csv("\t")),
    "a.parquet": table(lambda t, f: pyarrow.parquet.write_table(t, f)),
    "a.parquet.gz": gzip.compress(table(lambda t, f: pyarrow.parquet.write_table(t, f))),
    "no_suffix": table(lambda t, f: pyarrow.parquet.write_table(t, f)),
    "file.arrow": table(arrow(pyarrow.ipc.new_file)),
    "stream.arrow": table(arrow(pyarrow.ipc.new_stream)),
    "dictionary.parquet": table(
        lambda t, f: pyarrow.parquet.write_table(t, f), pyarrow.array(TEXTS).dictionary_encode()
    ),
    "view.arrow": table(
        arrow(pyarrow.ipc.new_file), pyarrow.array(TEXTS).cast(pyarrow.string_view())
    ),
}


def read(pattern: Path | str, counts: Counts | None = None, **fields) -> list[str]:
    counts = Counts() if counts is None else counts
    cfg = replace(DataConfig(), **fields)
    found = sources.resolve((str(pattern),), counts=counts)
    return [d.text for source in found for d in source.documents(cfg, counts)]


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_has_the_same_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTAINERS[name])
    counts = Counts()
    assert read(tmp_path / name, counts) == TEXTS
    assert counts == Counts()


@pytest.mark.parametrize("name", [n for n in CONTAINERS if n.endswith(("z", "t", "zst", "p"))])
def test_a_container_cut_in_the_middle_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTAINERS[name][: len(CONTAINERS[name]) // 2])
    with pytest.raises(DataError, match=name):
        read(tmp_path)


def test_a_window_of_two_gigabytes_is_read(tmp_path: Path) -> None:
    options = {formats.zstd.CompressionParameter.window_log: 31}
    # The size of the text is not in a stream's header, so the window is as large as was asked for.
    compressor = formats.zstd.ZstdCompressor(options=options)
    raw = compressor.compress(LINES) + compressor.flush()
    with pytest.raises(formats.zstd.ZstdError):
        formats.zstd.decompress(raw)
    (tmp_path / "a.jsonl.zst").write_bytes(raw)
    assert read(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize(
    ("name", "raw", "why"),
    [
        ("a.bin", bytes(range(256)) * 20, "is no text by its first bytes"),
        ("unmarked.txt", ("plain words\n" * 9).encode("utf-16-le"), "as UTF-16 without its mark"),
        ("unmarked.jsonl", LINES.decode().encode("utf-16-be"), "as UTF-16 without its mark"),
        ("paper.txt", b"%PDF-1.7\n" + b"words " * 99, "is PDF"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + b"words " * 99, "is 7-Zip"),
        ("a.docx", zipped(b"<w>words</w>", "word/document.xml"), "zip archive that is not named"),
        ("a.txt.gz", b"words " * 99, "is named as gzip and is not"),
        ("a.jsonl.zst", LINES, "is named as Zstandard and is not"),
        ("a.parquet", LINES, "not a valid Parquet file"),
        ("a.tar", LINES, "cannot be read"),
        ("a.zip", LINES, "cannot be read"),
        ("image.tar.gz", gzip.compress(tar(bytes(range(256)) * 20, "x.raw")), "/x.raw: is no text"),
        ("a.json", b'{"id": 1}\n', "no text in field 'text'"),
        ("a.csv", b"id,body\n1,words\n", "no text in field 'text'"),
    ],
)
@pytest.mark.parametrize("bad_utf8", ["replace", "fail"])
def test_another_format_is_refused_by_name(tmp_path, name, raw, why, bad_utf8) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read(tmp_path, bad_utf8=bad_utf8)
    assert str(caught.value).startswith(f"{tmp_path / name}")
    assert why in str(caught.value)


def test_archives_within_archives_end(tmp_path: Path) -> None:
    raw = LINES
    for _ in range(9):
        raw = gzip.compress(raw)
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match="more than 4 archives within each other"):
        read(tmp_path)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
        str.strip
    ),
    encoding=st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "utf-16-be"]),
)
def test_text_in_a_marked_encoding_is_decoded(tmp_path_factory, text: str, encoding: str) -> None:
    file = tmp_path_factory.mktemp("marked") / "a.txt"
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    file.write_bytes(mark + text.encode(encoding))
    counts = Counts()
    # Control characters may be refused, never changed.
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        try:
            assert read(file, counts) == [text]
        except DataError:
            return
    else:
        assert read(file, counts) == [text]
    assert counts == Counts()


@pytest.mark.parametrize("end", [b"\x41", b"\x00\xd8", b"\x00\xd8\x41\x00"])
def test_invalid_utf16_is_replaced_and_counted_or_refused(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "a.txt").write_bytes("caf\xe9 ".encode("utf-16") + end)
    counts = Counts()
    (text,) = read(tmp_path, counts)
    assert text.startswith("caf\xe9 \ufffd")
    assert counts == Counts(replaced_utf8=1)
    with pytest.raises(DataError, match="invalid UTF-8"):
        read(tmp_path, bad_utf8="fail")


LATIN = "caf\xe9 au lait".encode("latin-1")


@pytest.mark.parametrize("kind", ["dictionary", "view"])
def test_invalid_utf8_in_a_column_of_another_layout_is_replaced(tmp_path, kind: str) -> None:
    raw = pyarrow.array([b"fine", LATIN, b"fine"], "binary").buffers()
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast("string_view")
    with (tmp_path / "a.arrow").open("wb") as sink:
        arrow(pyarrow.ipc.new_file)(pyarrow.table({"text": column}), sink)
    counts = Counts()
    assert read(tmp_path, counts) == ["fine", "caf\ufffd au lait", "fine"]
    assert counts == Counts(replaced_utf8=1)


def test_a_format_is_told_from_a_stream_that_gives_a_few_bytes_at_a_time() -> None:
    raw = io.BytesIO(tar(LINES))
    stream = formats.buffered(lambda size: raw.read(min(size, 7)))
    assert stream.peek(formats.HEAD)[257:262] == b"ustar"


def test_a_nul_in_a_text_is_treated_as_invalid_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"words\0words " * 2)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one\\u0000two"}\n')
    counts = Counts()
    assert read(tmp_path, counts) == ["words\ufffdwords " * 2, "one\ufffdtwo"]
    assert counts == Counts(replaced_utf8=2)
    with pytest.raises(DataError, match=r"a\.txt: a NUL"):
        read(tmp_path, bad_utf8="fail")


# --- folders ---------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("data/a.txt", "data/here/b.txt", "other/deep/c.txt", "data/.git/d", "data/.DS"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "data/linked").symlink_to("../other")
    (tmp_path / "other/round").symlink_to("../data")
    (tmp_path / "data/again.txt").symlink_to("a.txt")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "wanted", "hidden", "repeated"),
    [
        ("data", {"a.txt", "b.txt", "c.txt"}, 2, 1),
        ("data/**/*.txt", {"a.txt", "b.txt", "c.txt"}, 0, 1),
        ("data/**", {"a.txt", "b.txt", "c.txt"}, 2, 1),
        ("data/*/*.txt", {"b.txt"}, 0, 0),
        ("data/*/*/*.txt", {"a.txt", "c.txt"}, 0, 1),
        ("data/linked", {"a.txt", "b.txt", "c.txt"}, 2, 1),
        ("data/.git/*", {"d"}, 0, 0),
        ("data/.DS", {".DS"}, 0, 0),
    ],
)
def test_links_are_followed_once_and_hidden_files_left_out(
    tree: Path, pattern: str, wanted: set[str], hidden: int, repeated: int
) -> None:
    counts = Counts()
    found = sources.resolve((f"{tree}/{pattern}",), counts=counts)
    assert {os.path.basename(os.path.realpath(source.path)) for source in found} == wanted
    assert len(found) == len(wanted)
    assert (counts.hidden_files, counts.repeated_files) == (hidden, repeated)


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt"])
def test_files_are_sorted_by_their_whole_path(tmp_path: Path, pattern: str) -> None:
    """Another order would be another stream of documents, and so another store."""
    for name in ("a/x.txt", "a-b/x.txt", "a.b/x.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    assert read(f"{tmp_path}/{pattern}") == ["a-b/x.txt", "a.b/x.txt", "a/x.txt"]


def test_a_file_of_several_patterns_is_read_once(tree: Path) -> None:
    counts = Counts()
    patterns = (f"{tree}/data/here", f"{tree}/data/**/*.txt", f"{tree}/data/a.txt")
    found = sources.resolve(patterns, counts=counts)
    assert found[0].name == "b.txt"
    assert (len(found), counts.repeated_files) == (3, 3)


def test_a_members_name_tells_whether_it_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(b"words", "./.git/config"))
    counts = Counts()
    assert read(tmp_path, counts) == []
    assert counts == Counts(hidden_files=1)


def test_the_command_of_zstd_is_understood(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(LINES * 500)
    command = ["zstd", "-q", "--long=31", "--ultra", "-22", str(file)]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        pytest.skip("no zstd command")
    assert read(f"{file}.zst") == TEXTS * 500
