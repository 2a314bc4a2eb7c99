"""Files of documents: what a file holds is decided by its first bytes, then by its name.

Compression (gzip, xz, bzip2, Zstandard) and archives (tar, zip) are opened in any nesting. What
comes out is a table (Parquet, Arrow, CSV), JSON lines, or text; what is none of these is refused by
name, since bytes of another format would be trained on as if they were text.
"""

import codecs
import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

from gptjax.config import DataConfig
from gptjax.data import formats
from gptjax.errors import DataError

_NESTING = 4  # compression and archives within each other


@dataclass(frozen=True)
class Document:
    """A text and its key, whose hash decides the split.

    `ends` is False for a part of a long document whose next part follows.
    """

    key: str
    text: str
    ends: bool = True


@dataclass
class Counts:
    """Documents and files that reading skipped or changed, for the manifest and the user."""

    empty: int = 0
    replaced_utf8: int = 0
    split_documents: int = 0
    bad_records: int = 0
    in_validation: int = 0
    hidden_files: int = 0
    repeated_files: int = 0


@dataclass(frozen=True)
class TextFile:
    """A file of documents. `name` is its path below the pattern's root folder."""

    path: Any
    name: str

    def size_bytes(self) -> int:
        """Size of the file; four times that for a compressed one."""
        suffix = self.path.suffix.lower()
        scale = 4 if suffix in formats.COMPRESSED | {".parquet", ".zip"} else 1
        try:
            return scale * int(self.path.stat().st_size)
        except OSError as error:  # for instance a dangling link
            raise DataError(f"{self.path}: cannot be read: {error}") from None

    def documents(self, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
        """The documents. Raises DataError naming the place of what cannot be read."""
        try:
            with self.path.open("rb") as raw:
                stream = formats.buffered(raw.read, raw)
                part = _Part(stream, str(self.path), self.name, self.name.lower(), cfg, counts)
                yield from part.documents()
        except formats.BROKEN as error:
            raise DataError(f"{self.path}: cannot be read: {error}") from None


@dataclass(frozen=True)
class _Part:
    """A file, or what an archive or a compressed file holds, with the names that errors and keys
    have; `suffixes` is the name that is left to tell the format by, in lower case."""

    stream: io.BufferedReader
    place: str
    key: str
    suffixes: str
    cfg: DataConfig
    counts: Counts
    nesting: int = 0

    def documents(self) -> Iterator[Document]:
        """The documents of whatever format this has."""
        if self.nesting > _NESTING:
            raise DataError(f"{self.place}: more than {_NESTING} archives within each other")
        head = self.stream.peek(formats.HEAD)[: formats.HEAD]
        if not head and not self._is_named((".parquet", ".arrow", ".zip")):
            return self._text(head)
        for compression in formats.COMPRESSIONS:
            if head.startswith(compression.magic) or self._is_named(compression.suffixes):
                if not head.startswith(compression.magic):
                    raise DataError(f"{self.place}: is named as {compression.name} and is not")
                return self._unpacked(compression)
        if head[257:262] == b"ustar" or self._is_named((".tar",)):
            return self._members_of_tar()
        if head.startswith(b"PK\x03\x04") or self._is_named((".zip",)):
            return self._members_of_zip()
        if head.startswith(b"PAR1") or self._is_named((".parquet",)):
            return _read_parquet(self)
        if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or self._is_named((".arrow",)):
            return _read_arrow(self, head.startswith(b"ARROW1"))
        return self._text(head)

    def _is_named(self, suffixes: tuple[str, ...]) -> bool:
        return self.suffixes.endswith(suffixes)

    def _unpacked(self, compression: formats.Compression) -> Iterator[Document]:
        inner = formats.buffered(compression.open(self.stream).read)
        suffix = next((s for s in compression.suffixes if self.suffixes.endswith(s)), "")
        name = self.suffixes.removesuffix(suffix) + (".tar" if suffix.startswith(".t") else "")
        yield from replace(self, stream=inner, suffixes=name, nesting=self.nesting + 1).documents()

    def _member(self, name: str, stream: IO[bytes]) -> Iterator[Document]:
        """The documents of an archive's file; a hidden one is counted and left out."""
        if any(part.startswith(".") and part != "." for part in name.split("/")):
            self.counts.hidden_files += 1
            return
        yield from replace(
            self,
            stream=formats.buffered(stream.read),
            place=f"{self.place}/{name}",
            key=f"{self.key}/{name}",
            suffixes=name.lower(),
            nesting=self.nesting + 1,
        ).documents()

    def _members_of_tar(self) -> Iterator[Document]:
        with tarfile.open(fileobj=self.stream, mode="r|") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None:
                    yield from self._member(member.name, stream)

    def _members_of_zip(self) -> Iterator[Document]:
        if not self._is_named((".zip",)):
            raise DataError(
                f"{self.place}: is a zip archive that is not named .zip, as documents of office "
                "programs and packages are; extract its text, or rename it to train on its files"
            )
        with zipfile.ZipFile(formats.seekable(self.stream)) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    with archive.open(member) as stream:
                        yield from self._member(member.filename, stream)

    def _text(self, head: bytes) -> Iterator[Document]:
        """Text or JSON lines or CSV, as UTF-8 without a mark of its encoding."""
        stream, skipped = self.stream, 0
        if encoding := next((e for bom, e in formats.ENCODINGS if head.startswith(bom)), ""):
            stream = formats.buffered(formats.as_utf8(stream, encoding))
            head = stream.peek(formats.HEAD)[: formats.HEAD]
        elif head.startswith(codecs.BOM_UTF8):
            skipped = len(stream.read(len(codecs.BOM_UTF8)))
        if why := formats.not_text(head):
            raise DataError(
                f"{self.place}: {why}; convert it to text or JSON lines, or leave it out"
            )
        part = replace(self, stream=stream)
        if self._is_named((".jsonl", ".ndjson")):
            return _read_jsonl(part)
        if self._is_named((".json",)):
            return _read_json_array(part) if head.lstrip()[:1] == b"[" else _read_jsonl(part)
        if self._is_named((".csv", ".tsv")):
            return _read_csv(part, "\t" if self._is_named((".tsv",)) else ",")
        return _read_text(part, skipped)


@dataclass
class Decoder:
    """Decodes UTF-8, and treats invalid bytes, and NULs, as data.bad_utf8 says."""

    cfg: DataConfig
    counts: Counts
    last_replaced: str = ""

    def __call__(self, raw: bytes, place: str, offset: int = 0) -> str:
        """`raw` is at byte `offset` of `place`, a file or a record as errors name it."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self._found(f"invalid UTF-8 at byte {offset + error.start}", place)
            text = raw.decode("utf-8", "replace")
        return self.without_nuls(text, place)

    def without_nuls(self, text: str, place: str) -> str:
        """The text with U+FFFD in place of NULs."""
        if "\0" not in text:
            return text
        self._found("a NUL", place)
        return text.replace("\0", "\ufffd")

    def _found(self, what: str, place: str) -> None:
        if self.cfg.bad_utf8 == "fail":
            raise DataError(f"{place}: {what}; correct it, or set data.bad_utf8=replace")
        self.counts.replaced_utf8 += place != self.last_replaced
        self.last_replaced = place


def _read_text(part: _Part, offset: int) -> Iterator[Document]:
    """Yields one document; in parts cut at line ends where max_document_bytes is exceeded."""
    cfg: DataConfig = part.cfg
    decode, stream, limit = Decoder(cfg, part.counts), part.stream, cfg.max_document_bytes
    text = stream.read(limit)
    more = stream.read(limit)
    if not more and not text.strip():
        part.counts.empty += 1
        return
    part.counts.split_documents += bool(more)
    while more:
        cut = text.rfind(b"\n") + 1 or _last_character(text)
        yield Document(part.key, decode(text[:cut], part.place, offset), ends=False)
        offset += cut
        text, more = text[cut:] + more, stream.read(limit)
    yield Document(part.key, decode(text, part.place, offset))


def _last_character(raw: bytes) -> int:
    """Offset of the last UTF-8 character, which may be incomplete; the length if that is 0."""
    back = next((i for i in range(1, 5) if i <= len(raw) and raw[-i] & 0xC0 != 0x80), 0)
    return len(raw) - back or len(raw)


def _read_jsonl(part: _Part) -> Iterator[Document]:
    decode = Decoder(part.cfg, part.counts)
    cfg: DataConfig = part.cfg
    limit, number = cfg.max_document_bytes, 0
    while line := part.stream.readline(limit + 1):
        number += 1
        place = f"{part.place}:{number}"
        if len(line) > limit:
            raise DataError(
                f"{place}: longer than data.max_document_bytes={limit}; raise it, or split the "
                "record"
            )
        if not line.strip():
            continue
        try:
            value = json.loads(decode(line, place))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: invalid JSON: {error}") from None
        yield from record(value, f"{part.key}#{number}", place, decode)


def _read_json_array(part: _Part) -> Iterator[Document]:
    """The records of a file that is one JSON array, which is read into memory whole."""
    decode = Decoder(part.cfg, part.counts)
    try:
        values = json.loads(decode(part.stream.read(), part.place))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{part.place}: invalid JSON: {error}") from None
    for number, value in enumerate(values, 1):
        yield from record(value, f"{part.key}#{number}", f"{part.place}:{number}", decode)


def _read_csv(part: _Part, delimiter: str) -> Iterator[Document]:
    """The rows of a table whose first line names the columns."""
    decode = Decoder(part.cfg, part.counts)
    csv.field_size_limit(part.cfg.max_document_bytes)
    lines = io.TextIOWrapper(part.stream, "utf-8", errors="surrogateescape", newline="")
    rows = csv.DictReader(lines, delimiter=delimiter)
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            value: Any = row
            if isinstance(text := row.get(part.cfg.text_field), str):
                value = {part.cfg.text_field: text.encode("utf-8", "surrogateescape")}
            yield from record(value, f"{part.key}#{number}", f"{part.place}:{number}", decode)
    except csv.Error as error:
        raise DataError(f"{part.place}:{number + 1}: not valid CSV: {error}") from None


def _read_parquet(part: _Part) -> Iterator[Document]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(formats.seekable(part.stream))
        columns = table.schema_arrow.names
        selected = [part.cfg.text_field] if part.cfg.text_field in columns else columns
        yield from _rows(part, table.iter_batches(columns=selected, batch_size=256))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{part.place}: not a valid Parquet file: {error}") from None


def _read_arrow(part: _Part, seekable: bool) -> Iterator[Document]:
    """The rows of an Arrow file, in the format for files or for streams."""
    import pyarrow

    try:
        if seekable:
            table = pyarrow.ipc.open_file(formats.seekable(part.stream))
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(part.stream))
        yield from _rows(part, batches)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{part.place}: not a valid Arrow file: {error}") from None


def _rows(part: _Part, batches: Iterator[Any]) -> Iterator[Document]:
    """The documents of a table's rows."""
    decode = Decoder(part.cfg, part.counts)
    number = 0
    for batch in batches:
        names = batch.schema.names
        if part.cfg.text_field in names:
            names = [part.cfg.text_field]
        columns = {name: _strings_to_bytes(batch.column(name)).to_pylist() for name in names}
        for row in zip(*columns.values(), strict=True):
            number += 1
            value = dict(zip(columns, row, strict=True))
            yield from record(value, f"{part.key}#{number}", f"{part.place}:{number}", decode)


def _strings_to_bytes(column: Any) -> Any:
    """A column with its strings as bytes, since tables do not ensure valid UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.type == pyarrow.string_view():
        column = column.cast(pyarrow.binary_view())
    elif column.type in (pyarrow.string(), pyarrow.large_string()):
        column = column.cast(pyarrow.large_binary())
    return column


def record(value: Any, key: str, place: str, decode: Decoder) -> Iterator[Document]:
    """Yields the document of one record, or counts it where its text is empty.

    Raises DataError for a record without text, unless data.bad_records=skip.
    """
    cfg: DataConfig = decode.cfg
    text = value.get(cfg.text_field) if isinstance(value, dict) else None
    if isinstance(text, bytes):
        text = decode(text, place)
    elif isinstance(text, str):
        text = decode.without_nuls(text, place)
    if not isinstance(text, str):
        if cfg.bad_records == "skip":
            decode.counts.bad_records += 1
            return
        raise DataError(f"{place}: {_without_text(value, cfg.text_field)}")
    if len(text.encode("utf-8", "replace")) > cfg.max_document_bytes:
        raise DataError(
            f"{place}: longer than data.max_document_bytes={cfg.max_document_bytes}; raise it, or "
            "split the record"
        )
    if text.strip():
        yield Document(key, text)
    else:
        decode.counts.empty += 1


def _without_text(value: Any, field: str) -> str:
    """The error about a record that has no text."""
    if isinstance(value, dict) and field in value:
        shown = json.dumps(value[field], default=str)[:40]
        return (
            f"its field {field!r} is {shown} and no text; correct the record, or set "
            "data.bad_records=skip"
        )
    has = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
    return (
        f"no text in field {field!r} (it has {has}); set data.text_field, or "
        "data.bad_records=skip if only some records lack it"
    )
