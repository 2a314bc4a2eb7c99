"""The token store: the tokens of a split, on disk, as one long array.

    STORE/manifest.json             what is in it, and from what it was made
    STORE/tokenizer.model           the tokenizer that made it
    STORE/{train,valid}/zarr.json   a zarr 3 array with uncompressed chunks,
    STORE/{train,valid}/c/0 ...     so that each chunk file is the raw tokens, little-endian

Any zarr 3 library reads it. A local store is memory-mapped; a remote one (gs://) is read by
TensorStore from the same files. Every document ends with EOS, and a split begins with one, so each
token of a document is predicted from something.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gptjax.errors import DataError, OutputError

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK_TOKENS = 1 << 24


@dataclass(frozen=True)
class Split:
    """One split's counts. `tokens` includes the EOS of each document and the leading one."""

    documents: int
    tokens: int
    bytes: int
    chunks_sha256: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a store holds: the whole of manifest.json."""

    tokenizer: dict[str, Any]
    data: dict[str, Any]
    counts: dict[str, int]
    dtype: str
    splits: dict[str, Split]
    chunk_tokens: int = CHUNK_TOKENS
    format: int = FORMAT

    def fingerprint(self) -> str:
        """SHA-256 of the tokens and their tokenizer."""
        known = {name: asdict(split) for name, split in self.splits.items()}
        text = json.dumps([self.tokenizer, known], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest unsigned type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Reader:
    """Windows of a split's tokens. `len(reader)` is the number of tokens."""

    def __init__(self, store: Any, name: str, manifest: Manifest) -> None:
        self._length = manifest.splits[name].tokens
        self._chunk = manifest.chunk_tokens
        folder = epath.Path(store) / name
        self._local = "://" not in str(folder)
        if self._local:
            files = [folder / "c" / str(i) for i in range(-(-self._length // self._chunk))]
            self._chunks = [np.memmap(file, manifest.dtype, "r") for file in files]
        else:
            import tensorstore

            spec = {"driver": "zarr3", "kvstore": str(folder)}
            self._array = tensorstore.open(spec, read=True).result()

    def __len__(self) -> int:
        return self._length

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [starts[i], starts[i] + length) of each row, int32; past the end, zeros."""
        out = np.zeros((len(starts), length), np.int32)
        if not self._local:
            ends = np.minimum(starts + length, self._length)
            reads = [self._array[a:b].read() for a, b in zip(starts, ends, strict=True)]
            for row, read in zip(out, reads, strict=True):
                tokens = read.result()
                row[: len(tokens)] = tokens
            return out
        for row, start in zip(out, starts, strict=True):
            chunk, offset = divmod(int(start), self._chunk)
            tokens = self._chunks[chunk][offset : offset + length]
            row[: len(tokens)] = tokens
            if len(tokens) < length and chunk + 1 < len(self._chunks):
                rest = self._chunks[chunk + 1][: length - len(tokens)]
                row[len(tokens) : len(tokens) + len(rest)] = rest
        return out


class Writer:
    """Appends tokens to a split. What follows the last `flush` is undone by opening at `tokens`."""

    def __init__(self, folder: Path, dtype: np.dtype, tokens: int, chunk: int = CHUNK_TOKENS):
        self._chunks, self._dtype, self._chunk = folder / "c", dtype, chunk
        self.tokens = tokens
        self._chunks.mkdir(parents=True, exist_ok=True)
        last, offset = divmod(tokens, chunk)
        for file in self._chunks.iterdir():
            if int(file.name) > last:
                file.unlink()
        self._file = open(self._chunks / str(last), "ab")  # noqa: SIM115
        self._file.truncate(offset * dtype.itemsize)

    def append(self, tokens: np.ndarray) -> None:
        """Adds tokens at the end, going on to the next chunk file where one is full."""
        tokens = tokens.astype(self._dtype, copy=False)
        while len(tokens):
            room = self._chunk - self.tokens % self._chunk
            part, tokens = tokens[:room], tokens[room:]
            self._file.write(part.tobytes())
            self.tokens += len(part)
            if self.tokens % self._chunk == 0:
                self._file.close()
                self._file = open(self._chunks / str(self.tokens // self._chunk), "ab")  # noqa: SIM115

    def flush(self) -> None:
        """Hands everything to the operating system."""
        self._file.flush()

    def close(self) -> tuple[str, ...]:
        """Writes zarr.json, fills the last chunk up with zeros, and returns each chunk's SHA-256."""
        used = self.tokens % self._chunk
        if used:
            self._file.truncate(self._chunk * self._dtype.itemsize)
        self._file.close()
        count = -(-self.tokens // self._chunk)
        for file in self._chunks.iterdir():
            if int(file.name) >= count:
                file.unlink()
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.tokens],
            "data_type": {2: "uint16", 4: "uint32"}[self._dtype.itemsize],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self._chunk]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": 0,
        }
        (self._chunks.parent / "zarr.json").write_text(json.dumps(metadata, indent=2))
        return tuple(_sha256(self._chunks / str(i)) for i in range(count))


def _sha256(path: Any) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(store: str) -> Manifest:
    """The manifest of a store whose files have the sizes that it says. Raises DataError."""
    folder = epath.Path(store)
    file = folder / MANIFEST
    if not file.exists():
        raise DataError(f"{store}: is no token store; make it with `gptjax data prepare CONFIG`")
    manifest = parse_manifest(file.read_text())
    wanted = manifest.chunk_tokens * np.dtype(manifest.dtype).itemsize
    for name, split in manifest.splits.items():
        for i in range(len(split.chunks_sha256)):
            chunk = folder / name / "c" / str(i)
            size = chunk.stat().length if chunk.exists() else 0
            if size != wanted:
                raise DataError(
                    f"{chunk}: {size} bytes, the manifest says {wanted}; prepare the store anew"
                )
    return manifest


def parse_manifest(text: str) -> Manifest:
    """The manifest in a JSON text. Raises DataError."""
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise DataError(f"store format {values['format']}: this gptjax reads {FORMAT}")
        values["splits"] = {
            name: Split(**{**split, "chunks_sha256": tuple(split["chunks_sha256"])})
            for name, split in values["splits"].items()
        }
        return Manifest(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"a store's manifest is damaged ({error}); prepare the store anew"
        ) from None


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Writes manifest.json whole or not at all."""
    partial = store / f".{MANIFEST}.partial"
    try:
        partial.write_text(json.dumps(asdict(manifest), indent=2))
        partial.replace(store / MANIFEST)
    except OSError as error:
        raise OutputError(f"{store}: cannot be written: {error}") from None


def verify(store: str) -> Iterator[str]:
    """Hashes every chunk; yields a line for each that is not what the manifest says."""
    manifest = read_manifest(store)
    for name, split in manifest.splits.items():
        for i, wanted in enumerate(split.chunks_sha256):
            chunk = epath.Path(store) / name / "c" / str(i)
            if _sha256(chunk) != wanted:
                yield f"{chunk}: its SHA-256 is not the manifest's; prepare the store anew"
