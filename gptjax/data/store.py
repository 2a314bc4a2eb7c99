"""The token store: the tokens of each split on disk, as one long array.

    STORE/manifest.json             counts, hashes, and the data and settings it was made from
    STORE/tokenizer.*               the tokenizer
    STORE/{train,valid}/zarr.json   metadata of a sharded, uncompressed zarr 3 array
    STORE/{train,valid}/c/0 ...     its files: little-endian tokens, then a shard index
    STORE/{train,valid}/crc32       a little-endian CRC-32 of each 4096 tokens

Any zarr 3 library reads it. A local store is memory-mapped; a remote one (gs://, s3://) is read by
TensorStore from the same files, a few kilobytes a window (tests/bench/store.py compares), until
they have been copied to this machine (store_cache.py). Tokens are compared with their checksum when
they are first read, and every id with the vocabulary.

Every document ends with EOS. It begins with the token that the tokenizer puts before a text (BOS)
or, without one, with the EOS of the document before, which a split begins with too: so the first
token of each document has a token before it to be predicted from. A split ends with the token that
would open the next document.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import bucket
from gptjax.data.store_cache import File, StoreCache
from gptjax.data.store_remote import RemoteTokens
from gptjax.errors import DataError, OutputError

FORMAT = 1
MANIFEST = "manifest.json"
FILE_TOKENS = 1 << 27  # tokens of a file (zarr shard); a reader keeps one descriptor open a file
CHECKSUMS = "crc32"
_RANGE_TOKENS = 1 << 12  # tokens that a remote reader fetches at once (zarr chunk)
_SAMPLED = 64  # ranges that are checked when a local store is opened
_AGAIN = "delete the store and prepare it again"


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
    checksums_sha256: str = ""


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
    def vocab_size(self) -> int:
        """The number of the tokenizer's ids."""
        return self.tokenizer["vocab_size"]

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
        # What follows from the tokens and their text.
        beside = ("unknown", "lost_bits", "checksums_sha256")
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

    def __init__(
        self, store: str, name: str, manifest: Manifest, cache: str = "", cache_gb: float = 0.0
    ) -> None:
        """Opens the files, and checks some of a local store. Raises DataError for damage.

        A remote store's files are copied to the folder `cache` from the first read on.
        """
        split = manifest.splits[name]
        self._length, self._per_file = split.tokens, manifest.file_tokens
        self.vocab_size = manifest.vocab_size
        self._folder = folder = bucket.path_of(store) / name
        self._dtype = np.dtype(manifest.dtype)
        ranges = -(-self._length // _RANGE_TOKENS)
        self._checksums = _read_checksums(folder, split, ranges)
        self._checked = np.full(ranges, self._checksums is None)
        self._files: list[Any] = []
        self._remote: RemoteTokens | None = None
        if bucket.remote(folder):
            self._remote = RemoteTokens(str(folder))
            place, files = str(folder), _files_of(manifest, name)
            self._cache = StoreCache(cache, cache_gb, place, files, manifest.dtype)
            self._cache.open(trusted=self._checksums is not None)
            self._files, self._seen = self._cache.files, dict[int, Any]()
            return
        for i, first in enumerate(range(0, self._length, self._per_file)):
            count = min(self._per_file, self._length - first)
            mapped = np.memmap(folder / "c" / str(i), manifest.dtype, "r", shape=(count,))
            self._files.append(np.asarray(mapped))  # slicing a plain array is three times faster
        sampled = np.random.default_rng(0).integers(0, max(ranges, 1), _SAMPLED)
        for number in sampled[: self._length].tolist():
            self._check(number, *self._local(number * _RANGE_TOKENS, _RANGE_TOKENS))

    def __len__(self) -> int:
        return self._length

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens starts_B[i] .. starts_B[i] + length - 1, int32 [B, length]; zeros past the end.

        Raises DataError for tokens that are damaged, or not of the vocabulary.
        """
        out = np.zeros((len(starts), length), np.int32)
        self.read_into(out, starts)
        if out.size and out.max() >= self.vocab_size:
            row, place = np.argwhere(out >= self.vocab_size)[0].tolist()
            raise DataError(
                f"{self._folder}: token {starts[row] + place} has the id {out[row, place]}, and "
                f"the vocabulary {self.vocab_size} ids; {_AGAIN}"
            )
        return out

    def read_into(self, out: Iterable[np.ndarray], starts: np.ndarray) -> None:
        """As `windows`, into rows of zeros of any lengths, int32; does not look at the ids."""
        rows = zip(out, starts.tolist(), strict=True)
        if self._remote is not None:
            self._cache.begin()
            left = [(row, start) for row, start in rows if not self._read_copy(row, start)]
            self._read_remote(self._remote, left)
        else:
            for row, start in rows:
                self._read_local(row, start)

    def documents_at(self, places: Sequence[int], start_id: int) -> list[tuple[int, int]]:
        """The number of the document that each token is in, from 0 on, and its place within it.

        Reads all tokens before the last of them once, since a store has no index of documents.
        """
        found, end, step = {}, max(places, default=-1) + 1, 1 << 22
        before, last = 0, 0
        for first in range(0, end, step):
            length = min(step, end - first)
            tokens = self.windows(np.array([first]), length)[0]
            begins = first + np.flatnonzero(tokens == start_id)
            for place in {place for place in places if first <= place < first + length}:
                count = int(np.searchsorted(begins, place, side="right"))
                found[place] = (
                    before + count - 1,
                    place - (int(begins[count - 1]) if count else last),
                )
            before, last = before + len(begins), int(begins[-1]) if len(begins) else last
        return [found[place] for place in places]

    def _local(self, start: int, length: int) -> Iterator[np.ndarray]:
        """The parts of a range of tokens, one of each file."""
        number, offset = divmod(start, self._per_file)
        while length > 0 and number < len(self._files):
            part = self._files[number][offset : offset + length]
            yield part
            length, number, offset = length - len(part), number + 1, 0

    def _check_local(self, start: int, length: int) -> None:
        """Checks the ranges that a window is in, but those that were checked before."""
        first, last = start // _RANGE_TOKENS, -(-(start + length) // _RANGE_TOKENS)
        if not self._checked[first:last].all():
            for number in range(first, min(last, len(self._checked))):
                self._check(number, *self._local(number * _RANGE_TOKENS, _RANGE_TOKENS))

    def _read_local(self, row: np.ndarray, start: int) -> None:
        """Checks a window in mapped files, and reads it."""
        self._check_local(start, len(row))
        done = 0
        for part in self._local(start, len(row)):
            row[done : done + len(part)] = part
            done += len(part)

    def _read_copy(self, row: np.ndarray, start: int) -> bool:
        """As `_read_local`, where there are copies of all its files; whether there are."""
        last = -(-(start + len(row)) // self._per_file)
        numbers = range(start // self._per_file, min(last, len(self._files)))
        for number in numbers:
            file, before = self._files[number], self._seen.get(number)
            if file is None:
                return False
            if file is not before:  # what was right in the bucket is not known to be right here
                self._seen[number], ranges = file, self._per_file // _RANGE_TOKENS
                self._checked[number * ranges :][:ranges] = self._checksums is None
        try:
            self._read_local(row, start)
        except DataError:  # a damaged copy
            self._cache.drop(numbers)
            return False
        return True

    def _read_remote(self, remote: RemoteTokens, rows: Sequence[tuple[np.ndarray, int]]) -> None:
        """Reads whole ranges, which are fetched whole anyway, and checks them."""
        spans = []
        for row, start in rows:
            last = min(-(-(start + len(row)) // _RANGE_TOKENS) * _RANGE_TOKENS, self._length)
            spans.append((min(start // _RANGE_TOKENS * _RANGE_TOKENS, last), last))
        for (row, start), tokens in zip(rows, remote.read(spans), strict=True):
            first = start // _RANGE_TOKENS
            for i in range(0, len(tokens), _RANGE_TOKENS):
                self._check(first + i // _RANGE_TOKENS, tokens[i : i + _RANGE_TOKENS])
            part = tokens[start - first * _RANGE_TOKENS :][: len(row)]
            row[: len(part)] = part

    def _check(self, number: int, *parts: np.ndarray) -> None:
        """Compares the tokens of a range with their checksum, if they were not before."""
        if self._checked[number]:
            return
        assert self._checksums is not None
        if _crc32(*parts) != self._checksums[number]:
            first = number * _RANGE_TOKENS
            raise DataError(
                f"{self._folder}: tokens {first} to {first + _RANGE_TOKENS - 1} differ from their "
                f"checksum; {_AGAIN}"
            )
        self._checked[number] = True


def _files_of(manifest: Manifest, name: str) -> list[File]:
    """What a split's files are to be."""
    split, itemsize = manifest.splits[name], np.dtype(manifest.dtype).itemsize
    index = manifest.file_tokens // _RANGE_TOKENS * 16
    files = []
    for i, sha256 in enumerate(split.files_sha256):
        tokens = min(manifest.file_tokens, split.tokens - i * manifest.file_tokens)
        size = -(-tokens // _RANGE_TOKENS) * _RANGE_TOKENS * itemsize + index
        files.append(File(sha256, tokens, size))
    return files


def _read_checksums(folder: Any, split: Split, ranges: int) -> np.ndarray | None:
    """The checksums of a split's ranges; None for a store of before there were any."""
    if not split.checksums_sha256:
        return None
    file = folder / CHECKSUMS
    contents = file.read_bytes() if file.exists() else b""
    if hashlib.sha256(contents).hexdigest() != split.checksums_sha256:
        raise DataError(f"{file}: is damaged or missing; {_AGAIN}")
    return np.frombuffer(contents, "<u4", ranges)


def _crc32(*parts: np.ndarray) -> int:
    """The CRC-32 of tokens as they are on disk."""
    value = 0
    for part in parts:
        value = zlib.crc32(np.ascontiguousarray(part), value)
    return value


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

    def close(self) -> tuple[tuple[str, ...], str]:
        """Writes and syncs the last index, the checksums and zarr.json.

        Returns the SHA-256 of each file of tokens, and of the checksums.
        """
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
        hashes, checksums = [], []
        for i, first in enumerate(range(0, self.tokens, self._per_file)):
            count = min(self._per_file, self.tokens - first)
            sha256, found = _hashes(self._path(i), self._dtype, count)
            hashes.append(sha256)
            checksums += found
        contents = np.array(checksums, "<u4").tobytes()
        (self._folder / CHECKSUMS).write_bytes(contents)
        names = ("zarr.json", CHECKSUMS, "c", ".")
        for path in (self._folder / name for name in names):
            sync(path)
        return tuple(hashes), hashlib.sha256(contents).hexdigest()


def _hashes(file: Path, dtype: np.dtype, tokens: int) -> tuple[str, list[int]]:
    """A file's SHA-256, and the checksum of each range of its tokens."""
    digest, checksums, left = hashlib.sha256(), [], tokens * dtype.itemsize
    size = _RANGE_TOKENS * dtype.itemsize
    with file.open("rb") as stream:
        while block := stream.read(256 * size):
            digest.update(block)
            own = memoryview(block)[:left]
            left -= len(own)
            checksums += [zlib.crc32(own[i : i + size]) for i in range(0, len(own), size)]
    return digest.hexdigest(), checksums


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
    folder = bucket.path_of(store)
    file = folder / MANIFEST
    if not file.exists():
        raise DataError(
            f"{store}: not a token store (no {MANIFEST}); make it with `gptjax data prepare CONFIG`"
        )
    manifest = parse_manifest(file.read_bytes(), str(file))
    for name in manifest.splits:
        for i, (_, _, expected) in enumerate(_files_of(manifest, name)):
            path = folder / name / "c" / str(i)
            there = path.exists()
            if there and bucket.remote(path):
                continue  # its checksums tell, as it is read
            size = path.stat().st_size if there else 0
            if size != expected:
                raise DataError(
                    f"{path}: {size} bytes where the manifest says {expected}; {_AGAIN}"
                )
    return manifest


def parse_manifest(text: str | bytes, place: str, remedy: str = _AGAIN) -> Manifest:
    """The manifest in a JSON text; errors call it `place`, and say the remedy. Raises DataError."""
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
        known = values["tokenizer"]
        if not 0 <= known["eos_id"] < known["vocab_size"]:
            raise ValueError(f"eos_id {known['eos_id']} of {known['vocab_size']}")
        return Manifest(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{place} is damaged ({str(error)[:200]}); {remedy}") from None


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Writes manifest.json atomically. Raises OutputError."""
    try:
        replace_file(store / MANIFEST, json.dumps(asdict(manifest), indent=2))
    except OSError as error:
        raise OutputError(f"{store}: cannot be written: {error}") from None


def verify(store: str) -> Iterator[str]:
    """Hashes every file, and looks at every id; yields a message for each that is wrong."""
    manifest = read_manifest(store)
    for name, split in manifest.splits.items():
        try:
            _read_checksums(bucket.path_of(store) / name, split, 0)
        except DataError as error:
            yield str(error)
        for i, expected in enumerate(split.files_sha256):
            path = bucket.path_of(store) / name / "c" / str(i)
            if _sha256(path) != expected:
                yield f"{path}: its SHA-256 differs from the manifest's; {_AGAIN}"
            elif wrong := _ids_outside(path, manifest, split.tokens - i * manifest.file_tokens):
                yield f"{path}: {wrong} ids are beyond the vocabulary; {_AGAIN}"


def _ids_outside(path: Any, manifest: Manifest, tokens: int) -> int:
    """The number of a file's ids that the vocabulary does not have; `tokens` from it on."""
    found, left = 0, min(tokens, manifest.file_tokens)
    dtype = np.dtype(manifest.dtype)
    with path.open("rb") as stream:
        while left and (block := stream.read(min(left, 1 << 22) * dtype.itemsize)):
            ids = np.frombuffer(block, dtype)
            found += int((ids >= manifest.vocab_size).sum())
            left -= len(ids)
    return found
