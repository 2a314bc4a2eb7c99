"""The token store: the tokens of each split on disk, as one long array.

    STORE/manifest.json             counts, hashes, and the data and settings it was made from
    STORE/tokenizer.*               the tokenizer
    STORE/{train,valid}/zarr.json   metadata of a sharded, uncompressed zarr 3 array
    STORE/{train,valid}/c/0 ...     its files: little-endian tokens, then a shard index

Any zarr 3 library reads it. A local store is memory-mapped; a remote one (gs://) is read by
TensorStore from the same files, a few kilobytes a window (tests/bench/store.py compares).

Every document ends with EOS. It begins with the token that the tokenizer puts before a text (BOS)
or, without one, with the EOS of the document before, which a split begins with too: so the first
token of each document has a token before it to be predicted from. A split ends with the token that
would open the next document.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gptjax.errors import DataError, OutputError

FORMAT = 1
MANIFEST = "manifest.json"
FILE_TOKENS = 1 << 27  # tokens of a file (zarr shard); a reader keeps one descriptor open a file
_RANGE_TOKENS = 1 << 12  # tokens that a remote reader fetches at once (zarr chunk)


@dataclass(frozen=True)
class Split:
    """One split's counts.

    `tokens` includes the special tokens of each document; `unknown` counts <unk>. `lost_bits` are
    the bits of text that the tokens do not give back (`tokenizer.round_trip`), of validation only.
    """

    documents: int
    tokens: int
    bytes: int
    files_sha256: tuple[str, ...]
    unknown: int = 0
    lost_bits: float = 0.0


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json, which describes a store."""

    tokenizer: dict[str, Any]
    data: dict[str, Any]
    counts: dict[str, int]
    dtype: str
    splits: dict[str, Split]
    file_tokens: int = FILE_TOKENS
    format: int = FORMAT

    @property
    def eos_id(self) -> int:
        """The token that ends each document."""
        return self.tokenizer["eos_id"]

    @property
    def start_id(self) -> int:
        """The token that opens each document: BOS, or the EOS of the document before."""
        return self.tokenizer.get("start_id", self.eos_id)

    def fingerprint(self) -> str:
        """SHA-256 that identifies the tokens and their tokenizer."""
        beside = ("unknown", "lost_bits")  # what follows from the tokens and their text
        known = {
            name: {k: v for k, v in asdict(split).items() if k not in beside}
            for name, split in self.splits.items()
        }
        text = json.dumps([self.tokenizer, known], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest unsigned type for all token ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Reader:
    """Reads windows of a split's tokens. `len(reader)` is the number of tokens."""

    def __init__(self, store: str, name: str, manifest: Manifest) -> None:
        self._length, self._per_file = manifest.splits[name].tokens, manifest.file_tokens
        folder = epath.Path(store) / name
        self._remote: Any = None
        if "://" in str(folder):
            import tensorstore

            self._remote = tensorstore.open(
                {
                    "driver": "zarr3",
                    "kvstore": f"{folder}/",
                    "recheck_cached_data": "open",
                    "recheck_cached_metadata": "open",
                    "context": {"cache_pool": {"total_bytes_limit": 256 << 20}},
                },
                read=True,
            ).result()
            return
        self._files = []
        for i, first in enumerate(range(0, self._length, self._per_file)):
            count = min(self._per_file, self._length - first)
            mapped = np.memmap(folder / "c" / str(i), manifest.dtype, "r", shape=(count,))
            self._files.append(np.asarray(mapped))  # slicing a plain array is three times faster

    def __len__(self) -> int:
        return self._length

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens starts_B[i] .. starts_B[i] + length - 1, int32 [B, length]; zeros past the end."""
        out = np.zeros((len(starts), length), np.int32)
        if self._remote is not None:
            bounds = np.minimum(np.stack([starts, starts + length], 1), self._length)
            reads = [self._remote[a:b].read() for a, b in bounds]
            for row, read in zip(out, reads, strict=True):
                tokens = read.result()
                row[: len(tokens)] = tokens
            return out
        for row, start in zip(out, starts.tolist(), strict=True):
            number, offset = divmod(start, self._per_file)
            done = 0
            while done < length and number < len(self._files):
                tokens = self._files[number][offset : offset + length - done]
                row[done : done + len(tokens)] = tokens
                done, number, offset = done + len(tokens), number + 1, 0
        return out


class Writer:
    """Appends tokens to a split after its first `tokens`, and discards any later ones."""

    def __init__(
        self, folder: Path, dtype: np.dtype, tokens: int, per_file: int = FILE_TOKENS
    ) -> None:
        """Opens or creates the files. Raises DataError where they have fewer than `tokens`."""
        self._folder, self._dtype, self._per_file = folder, dtype, per_file
        self.tokens = tokens
        (folder / "c").mkdir(parents=True, exist_ok=True)
        sync(folder)
        last, offset = divmod(tokens, per_file)
        for file in (folder / "c").iterdir():
            if int(file.name) > last:
                file.unlink()
        self._file = self._path(last).open("ab")
        if self._file.tell() < offset * dtype.itemsize:
            raise DataError(
                f"{self._path(last)}: shorter than the journal says; delete the store and prepare "
                "it again"
            )
        self._file.truncate(offset * dtype.itemsize)

    def _path(self, number: int) -> Path:
        return self._folder / "c" / str(number)

    def append(self, tokens: np.ndarray) -> None:
        """Appends tokens, int [N], and begins further files where one is full."""
        tokens = tokens.astype(self._dtype, copy=False)
        while len(tokens):
            room = self._per_file - self.tokens % self._per_file
            part, tokens = tokens[:room], tokens[room:]
            self._file.write(part.tobytes())
            self.tokens += len(part)
            if self.tokens % self._per_file == 0:
                self._end_file(self._per_file)
                self._file = self._path(self.tokens // self._per_file).open("ab")

    def flush(self) -> None:
        """Syncs everything to disk, so that it survives a loss of power."""
        self._file.flush()
        sync(self._path(self.tokens // self._per_file))
        sync(self._folder / "c")

    def _end_file(self, tokens: int) -> None:
        """Pads the last range with zeros and appends the shard index: offset and size of each."""
        size, count = self._dtype.itemsize * _RANGE_TOKENS, self._per_file // _RANGE_TOKENS
        used = -(-tokens // _RANGE_TOKENS)
        self._file.truncate(used * size)
        index = np.full((count, 2), 2**64 - 1, "<u8")  # zarr's entry for an absent range
        index[:used, 0], index[:used, 1] = np.arange(used) * size, size
        self._file.write(index.tobytes())
        self._file.close()
        sync(self._file.name)

    def close(self) -> tuple[str, ...]:
        """Writes and syncs the last index and zarr.json; returns each file's SHA-256."""
        if self.tokens % self._per_file:
            self._end_file(self.tokens % self._per_file)
        else:
            self._file.close()
            self._path(self.tokens // self._per_file).unlink()
        raw = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {"chunk_shape": [_RANGE_TOKENS], "codecs": [raw], "index_codecs": [raw]}
        grid = {"name": "regular", "configuration": {"chunk_shape": [self._per_file]}}
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.tokens],
            "data_type": {2: "uint16", 4: "uint32"}[self._dtype.itemsize],
            "chunk_grid": grid,
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "fill_value": 0,
        }
        (self._folder / "zarr.json").write_text(json.dumps(metadata, indent=2))
        for path in (self._folder / "zarr.json", self._folder / "c", self._folder):
            sync(path)
        return tuple(_sha256(self._path(i)) for i in range(-(-self.tokens // self._per_file)))


def replace_file(path: Path, text: str) -> None:
    """Replaces a file atomically, and syncs it to disk."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: str | Path) -> None:
    """Syncs a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Any) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(store: str) -> Manifest:
    """The manifest of a store. Raises DataError where a file's size disagrees with it."""
    folder = epath.Path(store)
    file = folder / MANIFEST
    if not file.exists():
        raise DataError(
            f"{store}: not a token store (no {MANIFEST}); make it with `gptjax data prepare CONFIG`"
        )
    manifest = parse_manifest(file.read_bytes(), str(file))
    itemsize = np.dtype(manifest.dtype).itemsize
    index = manifest.file_tokens // _RANGE_TOKENS * 16
    for name, split in manifest.splits.items():
        for i in range(len(split.files_sha256)):
            tokens = min(manifest.file_tokens, split.tokens - i * manifest.file_tokens)
            expected = -(-tokens // _RANGE_TOKENS) * _RANGE_TOKENS * itemsize + index
            path = folder / name / "c" / str(i)
            size = path.stat().length if path.exists() else 0
            if size != expected:
                raise DataError(
                    f"{path}: {size} bytes where the manifest says {expected}; delete the store "
                    "and prepare it again"
                )
    return manifest


def parse_manifest(text: str | bytes, place: str = "a store's manifest") -> Manifest:
    """The manifest in a JSON text; errors call it `place`. Raises DataError."""
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise DataError(
                f"{place}: store format {values['format']}; this version of gptjax reads format "
                f"{FORMAT}"
            )
        values["splits"] = {
            name: Split(**{**split, "files_sha256": tuple(split["files_sha256"])})
            for name, split in values["splits"].items()
        }
        np.dtype(values["dtype"])
        return Manifest(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{place} is damaged ({error}); delete the store and prepare it again"
        ) from None


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Writes manifest.json atomically. Raises OutputError."""
    try:
        replace_file(store / MANIFEST, json.dumps(asdict(manifest), indent=2))
    except OSError as error:
        raise OutputError(f"{store}: cannot be written: {error}") from None


def verify(store: str) -> Iterator[str]:
    """Hashes every file; yields a message for each that differs from the manifest."""
    manifest = read_manifest(store)
    for name, split in manifest.splits.items():
        for i, expected in enumerate(split.files_sha256):
            path = epath.Path(store) / name / "c" / str(i)
            if _sha256(path) != expected:
                yield (
                    f"{path}: its SHA-256 differs from the manifest's; delete the store and "
                    "prepare it again"
                )
