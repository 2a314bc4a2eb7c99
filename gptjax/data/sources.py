"""Data sources: files, TFDS datasets and the Python library, read as one stream of documents.

A source is anything with the methods of `Source`. The stream has the order of the configured
patterns, and of sorted paths within a pattern, so it is the same on every machine, and a position
in it is a count of documents. Paths go through etils.epath: gs:// reads as a local path does.

A further kind of source is a scheme, registered from outside the package:

    from gptjax.config.registry import DATA_SOURCES

    @DATA_SOURCES.register("sql")
    def sql(rest: str) -> list[Source]:
        "The sources that the pattern sql:REST in data.sources names."
"""

import gzip
import hashlib
import io
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from etils import epath

from gptjax.config import DataConfig
from gptjax.config.registry import DATA_SOURCES
from gptjax.errors import DataError

_COMPRESSED = {".gz", ".zst"}
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


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
    """Documents that reading skipped or changed, for the manifest and the user."""

    empty: int = 0
    replaced_utf8: int = 0
    split_documents: int = 0


class Source(Protocol):
    """A sequence of documents with a name: the interface of all data sources.

    A source is hashable, and two equal sources have the same documents.
    """

    @property
    def name(self) -> str:
        """A name that does not depend on the machine.

        Names and sizes identify the data of an unfinished store, and names choose the sources that
        the tokenizer is trained on.
        """
        ...

    def size_bytes(self) -> int:
        """Estimated bytes of text, for progress and sampling. Raises DataError."""
        ...

    def documents(self, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
        """Yields the documents, always in the same order, and counts what it skips or changes.

        Raises DataError naming the place of what cannot be read.
        """
        ...


@dataclass(frozen=True)
class TextFile:
    """A file of text, JSON lines or Parquet. `name` is its path below the pattern's root folder."""

    path: Any
    name: str

    def size_bytes(self) -> int:
        """Size of the file; four times that for a compressed one."""
        scale = 4 if self.path.suffix in _COMPRESSED | {".parquet"} else 1
        try:
            return scale * self.path.stat().length
        except OSError as error:  # for instance a dangling link
            raise DataError(f"{self.path}: cannot be read: {error}") from None

    def documents(self, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
        """The documents, by the reader of the file's suffix (compression aside)."""
        suffixes = [s for s in self.path.suffixes if s not in _COMPRESSED]
        read = _READERS.get(suffixes[-1] if suffixes else "", _read_text)
        try:
            yield from read(self, cfg, counts)
        except (OSError, EOFError, zlib.error) as error:  # EOFError: a truncated compressed file
            raise DataError(f"{self.path}: cannot be read: {error}") from None


@dataclass(frozen=True)
class TfdsDataset:
    """A split of a TFDS dataset, which is given by its name or by the folder that holds it."""

    dataset: str
    split: str

    @property
    def name(self) -> str:
        """The pattern, with its split."""
        return f"tfds:{self.dataset}@{self.split}"

    def size_bytes(self) -> int:
        """Bytes of the split, as the dataset's metadata has them."""
        return self._builder().info.splits[self.split].num_bytes

    def documents(self, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
        """One document for each record."""
        import tensorflow as tf
        import tensorflow_datasets as tfds

        builder = self._builder()
        config = tfds.ReadConfig(interleave_cycle_length=1)
        records = builder.as_dataset(split=self.split, shuffle_files=False, read_config=config)
        decode = _Decoder(cfg, counts)
        number = 0
        try:
            for number, record in enumerate(tfds.as_numpy(records)):
                place = f"{self.name}:{number}"
                yield from _record(record, place, place, decode)
        except tf.errors.OpError as error:
            raise DataError(
                f"{self.name}: cannot be read after record {number}: {error.message}"
            ) from None

    def _builder(self) -> Any:
        """The TFDS builder; never downloads."""
        option = f"data.sources=tfds:{self.dataset}"
        try:
            import tensorflow_datasets as tfds
            from google.protobuf.json_format import ParseError
        except ImportError as error:
            raise DataError(f"{option}: needs the package {error.name}; install it") from None
        try:
            folder = epath.Path(self.dataset).expanduser()
            if folder.is_dir():
                builder = tfds.builder_from_directory(folder)
            else:
                builder = tfds.builder(self.dataset, try_gcs=False)
        except (tfds.core.DatasetNotFoundError, OSError, ValueError, ParseError) as error:
            first = str(error).strip().split("\n")[0]
            raise DataError(f"{option}: no such dataset ({first})") from None
        if self.split not in builder.info.splits:
            found = ", ".join(builder.info.splits) or "none on this machine; prepare it with TFDS"
            raise DataError(f"{option}@{self.split}: no such split; available: {found}")
        return builder


@DATA_SOURCES.register("tfds")
def _tfds(rest: str) -> list[TfdsDataset]:
    """The dataset of a pattern tfds:DATASET@SPLIT; without @SPLIT, its split train."""
    dataset, _, split = rest.partition("@")
    return [TfdsDataset(dataset, split or "train")]


def resolve(patterns: Sequence[str], option: str = "data.sources") -> list[Source]:
    """The sources that patterns name, in order.

    A pattern is SCHEME:REST with a registered scheme, python-library, or a path or glob of files.
    Raises DataError naming `option`, the field or flag that holds the patterns.
    """
    found: list[Source] = []
    for pattern in patterns:
        scheme, colon, rest = pattern.partition(":")
        if colon and scheme in DATA_SOURCES.names():
            found += DATA_SOURCES[scheme](rest)
        elif pattern == "python-library":
            found += _python_library()
        elif files := _glob(pattern):
            found += files
        else:
            schemes = ", ".join(f"{name}:" for name in DATA_SOURCES.names())
            raise DataError(
                f"{option}={pattern}: no such file; give a path, a quoted glob, or a pattern that "
                f"begins with a scheme ({schemes})"
            )
    return found


def _python_library() -> list[TextFile]:
    root = epath.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for suffix in ("py", "txt", "rst")
        for path in Path(root).rglob(f"*.{suffix}")
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    )
    if not files:
        raise DataError(
            f"data.sources=python-library: {root} has no source files; give files instead"
        )
    return [TextFile(epath.Path(path), path.relative_to(root).as_posix()) for path in files]


def _glob(pattern: str) -> list[TextFile]:
    """The files of a path, a folder or a glob, sorted; none where there is no such file."""
    path = epath.Path(pattern).expanduser()
    if path.is_dir():
        return _below(path, "**/*")
    if path.exists():  # before the glob, for names that contain one of its characters
        return [TextFile(path, path.name)]
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    if first is None:
        return []
    root = epath.Path(*parts[:first]) if first else epath.Path(".")
    return _below(root, "/".join(parts[first:])) if root.exists() else []


def _below(root: Any, pattern: str) -> list[TextFile]:
    """The files of a glob below a folder, sorted by path."""
    if "://" not in str(root):
        root = Path(root)  # epath has no **, which is slow on a remote store
    try:
        paths = sorted((p for p in root.glob(pattern) if not p.is_dir()), key=str)
    except NotImplementedError:
        raise DataError(
            f"data.sources={root}/{pattern}: remote folders are not searched; name the files, or "
            "give a glob without **"
        ) from None
    above = len(root.parts)  # relative_to would take longer than all the rest of the search
    return [TextFile(epath.Path(path), "/".join(path.parts[above:])) for path in paths]


def _open(file: TextFile) -> IO[bytes]:
    raw = file.path.open("rb")
    if file.path.suffix == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if file.path.suffix == ".zst":
        import pyarrow  # whose reader, unlike zstandard's, notices a truncated file

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return raw


@dataclass
class _Decoder:
    """Decodes UTF-8, and treats invalid bytes as data.bad_utf8 says."""

    cfg: DataConfig
    counts: Counts
    last_replaced: str = ""

    def __call__(self, raw: bytes, place: str, offset: int = 0) -> str:
        """`raw` is at byte `offset` of `place`, a file or a record as errors name it."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.cfg.bad_utf8 == "fail":
                raise DataError(
                    f"{place}: invalid UTF-8 at byte {offset + error.start}; correct it, or set "
                    "data.bad_utf8=replace"
                ) from None
            self.counts.replaced_utf8 += place != self.last_replaced
            self.last_replaced = place
            return raw.decode("utf-8", "replace")


def _read_text(file: TextFile, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
    """Yields one document; in parts cut at line ends where max_document_bytes is exceeded."""
    decode = _Decoder(cfg, counts)
    place, offset = str(file.path), 0
    with _open(file) as stream:
        part = stream.read(cfg.max_document_bytes)
        more = stream.read(cfg.max_document_bytes)
        if not more and not part.strip():
            counts.empty += 1
            return
        counts.split_documents += bool(more)
        while more:
            cut = part.rfind(b"\n") + 1 or _last_character(part)
            yield Document(file.name, decode(part[:cut], place, offset), ends=False)
            offset += cut
            part, more = part[cut:] + more, stream.read(cfg.max_document_bytes)
        yield Document(file.name, decode(part, place, offset))


def _last_character(raw: bytes) -> int:
    """Offset of the last UTF-8 character, which may be incomplete; the length if that is 0."""
    back = next((i for i in range(1, 5) if i <= len(raw) and raw[-i] & 0xC0 != 0x80), 0)
    return len(raw) - back or len(raw)


def _read_jsonl(file: TextFile, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
    decode = _Decoder(cfg, counts)
    number = 0
    with _open(file) as stream:
        while line := stream.readline(cfg.max_document_bytes + 1):
            number += 1
            place = f"{file.path}:{number}"
            if len(line) > cfg.max_document_bytes:
                raise DataError(
                    f"{place}: longer than data.max_document_bytes={cfg.max_document_bytes}; "
                    "raise it, or split the record"
                )
            if not line.strip():
                continue
            try:
                record = json.loads(decode(line, place))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: invalid JSON: {error}") from None
            yield from _record(record, f"{file.name}#{number}", place, decode)


def _read_parquet(file: TextFile, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    decode = _Decoder(cfg, counts)
    number = 0
    with _open(file) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            columns = table.schema_arrow.names
            selected = [cfg.text_field] if cfg.text_field in columns else columns
            for batch in table.iter_batches(columns=selected, batch_size=256):
                for record in _strings_to_bytes(batch).to_pylist():
                    number += 1
                    place = f"{file.path}:{number}"
                    yield from _record(record, f"{file.name}#{number}", place, decode)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file.path}: not a valid Parquet file: {error}") from None


def _strings_to_bytes(batch: Any) -> Any:
    """An Arrow batch with its strings cast to bytes, since Parquet does not ensure valid UTF-8."""
    import pyarrow

    texts = (pyarrow.string(), pyarrow.large_string())
    fields = [
        pyarrow.field(f.name, pyarrow.large_binary()) if f.type in texts else f
        for f in batch.schema
    ]
    return batch.cast(pyarrow.schema(fields))


_READERS: dict[str, Callable[[TextFile, DataConfig, Counts], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _record(record: Any, key: str, place: str, decode: _Decoder) -> Iterator[Document]:
    """Yields the document of one record, or counts it where its text is empty."""
    cfg = decode.cfg
    text = record.get(cfg.text_field) if isinstance(record, dict) else None
    if isinstance(text, bytes):
        text = decode(text, place)
    if not isinstance(text, str):
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f"{place}: no text in field {cfg.text_field!r} (it has {has}); set data.text_field"
        )
    if len(text.encode("utf-8", "replace")) > cfg.max_document_bytes:
        raise DataError(
            f"{place}: longer than data.max_document_bytes={cfg.max_document_bytes}; raise it, or "
            "split the record"
        )
    if text.strip():
        yield Document(key, text)
    else:
        decode.counts.empty += 1


def hash_share(key: str) -> float:
    """Hashes a document's key to [0, 1), uniformly; below data.valid_fraction it is held out."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
