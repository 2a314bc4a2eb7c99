"""Sources of text: files, records and the embedded corpus, as one stream of documents.

The stream's order is that of the configured sources, files in sorted order, so it is the same on
every machine and can be resumed by counting documents. Paths go through etils.epath: gs:// reads as
a local path does.
"""

import gzip
import hashlib
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from etils import epath

from gptjax.config import DataConfig
from gptjax.errors import DataError

_COMPRESSED = {".gz", ".zst"}
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A text and the key that decides its split. `ends` is false for a piece that is continued."""

    key: str
    text: str
    ends: bool = True


@dataclass
class Counts:
    """What reading met, for the manifest and the user."""

    empty: int = 0
    replaced_utf8: int = 0
    split_documents: int = 0


@dataclass(frozen=True)
class File:
    """One file of a source. `key` is its path below the source's own root."""

    path: Any
    key: str

    @property
    def kind(self) -> str:
        """The suffix that decides how it is read, compression aside."""
        suffixes = [s for s in self.path.suffixes if s not in _COMPRESSED]
        return suffixes[-1] if suffixes else ""


@dataclass(frozen=True)
class Dataset:
    """A TFDS dataset: a name, or a local folder, and a split."""

    name: str
    split: str


Source = File | Dataset


def resolve(patterns: tuple[str, ...], option: str = "data.sources") -> list[Source]:
    """The files and datasets that source patterns name, in order. Raises DataError."""
    found: list[Source] = []
    for pattern in patterns:
        if pattern == "python-library":
            found += _python_library()
        elif pattern.startswith("tfds:"):
            name, _, split = pattern.removeprefix("tfds:").partition("@")
            found.append(Dataset(name, split or "train"))
        else:
            files = _glob(pattern)
            if not files:
                raise DataError(f"{option}={pattern}: no such file; give a path or a quoted glob")
            found += files
    return found


def _python_library() -> list[File]:
    root = epath.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for suffix in ("py", "txt", "rst")
        for path in Path(root).rglob(f"*.{suffix}")
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    )
    if not files:
        raise DataError(f"data.sources=python-library: {root} holds no sources; give files instead")
    return [File(epath.Path(path), path.relative_to(root).as_posix()) for path in files]


def _glob(pattern: str) -> list[File]:
    path = epath.Path(pattern).expanduser()
    if path.is_dir():
        return _below(path, "**/*")
    if path.exists():  # also where its name could be taken for a glob
        return [File(path, path.name)]
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    if first is None:
        return []
    root = epath.Path(*parts[:first]) if first else epath.Path(".")
    return _below(root, "/".join(parts[first:])) if root.exists() else []


def _below(root: Any, pattern: str) -> list[File]:
    if "://" not in str(root):
        root = Path(root)  # epath has no **, which is costly on a remote store
    try:
        paths = sorted((p for p in root.glob(pattern) if not p.is_dir()), key=str)
    except NotImplementedError:
        raise DataError(
            f"data.sources={root}/{pattern}: a remote folder is not searched; name its files, or "
            "give a glob without **"
        ) from None
    above = len(root.parts)  # relative_to takes longer than all else that finding files does
    return [File(epath.Path(path), "/".join(path.parts[above:])) for path in paths]


def name(source: Source) -> str:
    """What a source is called, whatever folder it was found in."""
    return source.key if isinstance(source, File) else f"tfds:{source.name}@{source.split}"


def size(source: Source) -> int:
    """Bytes of text, roughly: compressed files count four times their size."""
    if isinstance(source, Dataset):
        return _builder(source).info.splits[source.split].num_bytes
    scale = 4 if source.path.suffix in _COMPRESSED | {".parquet"} else 1
    try:
        return scale * source.path.stat().length
    except OSError as error:  # a link to nowhere, say
        raise DataError(f"{source.path}: cannot be read: {error}") from None


def read(source: Source, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
    """The documents of one source. Raises DataError naming the file and the record."""
    if isinstance(source, Dataset):
        yield from _read_dataset(source, cfg, counts)
        return
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}
    try:
        yield from readers.get(source.kind, _read_text)(source, cfg, counts)
    except (OSError, EOFError, zlib.error) as error:  # EOFError: compressed, and cut
        raise DataError(f"{source.path}: cannot be read: {error}") from None


def _open(file: File) -> IO[bytes]:
    raw = file.path.open("rb")
    if file.path.suffix == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if file.path.suffix == ".zst":
        import pyarrow  # whose reader, unlike zstandard's, tells a file that was cut

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return raw


@dataclass
class _Decoder:
    """UTF-8 to text by the configured policy."""

    cfg: DataConfig
    counts: Counts
    place: str = field(default="")

    def __call__(self, raw: bytes, place: str, offset: int = 0) -> str:
        """`offset` is where in its place `raw` begins."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.cfg.bad_utf8 == "fail":
                raise DataError(
                    f"{place}: invalid UTF-8 at byte {offset + error.start}; mend it, or set "
                    "data.bad_utf8=replace"
                ) from None
            self.counts.replaced_utf8 += place != self.place
            self.place = place
            return raw.decode("utf-8", "replace")


def _read_text(file: File, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
    """One document, in pieces that end with a line where it is longer than memory likes."""
    decode = _Decoder(cfg, counts)
    place, offset = str(file.path), 0
    with _open(file) as stream:
        piece = stream.read(cfg.max_document_bytes)
        more = stream.read(cfg.max_document_bytes)
        if not more and not piece.strip():
            counts.empty += 1
            return
        counts.split_documents += bool(more)
        while more:
            cut = piece.rfind(b"\n") + 1 or _character_border(piece)
            yield Document(file.key, decode(piece[:cut], place, offset), ends=False)
            offset += cut
            piece, more = piece[cut:] + more, stream.read(cfg.max_document_bytes)
        yield Document(file.key, decode(piece, place, offset))


def _character_border(raw: bytes) -> int:
    """Where the last, perhaps incomplete, UTF-8 character begins."""
    back = next((i for i in range(1, 5) if i <= len(raw) and raw[-i] & 0xC0 != 0x80), 0)
    return len(raw) - back or len(raw)


def _read_jsonl(file: File, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
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
                raise DataError(f"{place}: is no JSON: {error}") from None
            yield from _record(record, f"{file.key}#{number}", place, cfg, counts, decode)


def _read_parquet(file: File, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    decode = _Decoder(cfg, counts)
    number = 0
    with _open(file) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            columns = table.schema_arrow.names
            wanted = [cfg.text_field] if cfg.text_field in columns else columns
            for batch in table.iter_batches(columns=wanted, batch_size=256):
                for record in _undecoded(batch).to_pylist():
                    number += 1
                    place = f"{file.path}:{number}"
                    yield from _record(record, f"{file.key}#{number}", place, cfg, counts, decode)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file.path}: is no readable Parquet file: {error}") from None


def _undecoded(batch: Any) -> Any:
    """A batch of Arrow records with bytes for text, which Parquet does not hold to UTF-8."""
    import pyarrow

    texts = (pyarrow.string(), pyarrow.large_string())
    fields = [
        pyarrow.field(f.name, pyarrow.large_binary()) if f.type in texts else f
        for f in batch.schema
    ]
    return batch.cast(pyarrow.schema(fields))


def _builder(dataset: Dataset) -> Any:
    """The TFDS builder; never downloads."""
    try:
        import tensorflow_datasets as tfds
        from google.protobuf.json_format import ParseError
    except ImportError as error:
        raise DataError(f"data.sources=tfds:{dataset.name}: needs {error.name}") from None
    try:
        folder = epath.Path(dataset.name).expanduser()
        if folder.is_dir():
            builder = tfds.builder_from_directory(folder)
        else:
            builder = tfds.builder(dataset.name, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, OSError, ValueError, ParseError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(f"data.sources=tfds:{dataset.name}: no such dataset ({first})") from None
    if dataset.split not in builder.info.splits:
        has = ", ".join(builder.info.splits) or "none on this machine; prepare it with TFDS first"
        raise DataError(f"data.sources=tfds:{dataset.name}@{dataset.split}: splits: {has}")
    return builder


def _read_dataset(dataset: Dataset, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    builder = _builder(dataset)
    config = tfds.ReadConfig(interleave_cycle_length=1)
    records = builder.as_dataset(split=dataset.split, shuffle_files=False, read_config=config)
    decode = _Decoder(cfg, counts)
    name, number = f"tfds:{dataset.name}@{dataset.split}", 0
    try:
        for number, record in enumerate(tfds.as_numpy(records)):
            place = f"{name}:{number}"
            yield from _record(record, place, place, cfg, counts, decode)
    except tf.errors.OpError as error:
        raise DataError(f"{name}: cannot be read after record {number}: {error.message}") from None


def _record(
    record: Any, key: str, place: str, cfg: DataConfig, counts: Counts, decode: _Decoder
) -> Iterator[Document]:
    """The document of one record; an empty one is counted and left out."""
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
        counts.empty += 1


def hash_share(key: str) -> float:
    """A document's place in [0, 1), by a hash of its key: what decides its split."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
