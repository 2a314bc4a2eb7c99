"""Files of tokens that other trainers write, read as one stream for the token store.

| format | file | documents |
|---|---|---|
| raw | nanoGPT's .bin, OLMo's .npy: tokens alone | as the stream has EOS |
| npy | a .npy with NumPy's header, of one dimension | as the stream has EOS |
| llm.c | .bin with a header of 256 int32 (llm.c, modded-nanogpt) | as the stream has EOS |
| megatron | .bin with an .idx beside it | as the index says |

A file's format is told by its first bytes, and by an .idx beside it.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import DataError

CHUNK = 1 << 24  # tokens that are read at once
_LLMC_HEADER = 256 * 4
_LLMC = {20240520: (1, "<u2", 50257), 20240801: (7, "<u4", 128256)}
"""llm.c's magic numbers: version, type, and the size of the vocabulary that they stand for."""
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "<u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens. `offset` is where its `count` tokens of type `dtype` begin.

    `documents` are the places in tokens where its documents end, where the format has them;
    `vocab_size` is that of the tokenizer that the format implies, if it does.
    """

    path: Path
    format: str
    dtype: str
    offset: int
    count: int
    documents: np.ndarray | None = None
    vocab_size: int | None = None

    def tokens(self) -> np.ndarray:
        """All tokens, mapped from the file."""
        if not self.count:
            return np.zeros(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.count,))

    def chunks(self, eos_id: int) -> Iterator[np.ndarray]:
        """The tokens in order, with EOS after each document where the format has documents."""
        tokens, ends = self.tokens(), self.documents
        if ends is None:
            for first in range(0, self.count, CHUNK):
                yield tokens[first : first + CHUNK]
            return
        first = done = 0
        while done < len(ends):
            last = max(done + 1, int(np.searchsorted(ends, first + CHUNK, side="right")))
            chunk, places = tokens[first : ends[last - 1]], ends[done:last] - first
            filled = places[np.diff(places, prepend=0) > 0]  # an empty document is none
            lacking = filled[chunk[filled - 1] != eos_id]
            if len(lacking):
                wide = np.result_type(chunk.dtype, np.min_scalar_type(eos_id))
                chunk = np.insert(chunk.astype(wide), lacking, eos_id)
            yield chunk
            first, done = int(ends[last - 1]), last


def find(paths: Sequence[str], vocab_size: int, dtype: str = "") -> list[TokenFile]:
    """The token files of paths; of a folder, its .bin and .npy files in the order of their names.

    `dtype` is the type of tokens in files that do not say it, uint16 or uint32; by default the
    narrower one that holds the vocabulary. Raises DataError.
    """
    raw = {"uint16": "<u2", "uint32": "<u4", "": "<u2" if vocab_size <= 1 << 16 else "<u4"}[dtype]
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in (".bin", ".npy"))
            if not inside:
                raise DataError(f"{path}: has no .bin or .npy file")
            files += inside
        elif path.is_file():
            files.append(path.with_suffix(".bin") if path.suffix == ".idx" else path)
        else:
            raise DataError(f"{path}: no such file")
    return [_open(path, raw) for path in dict.fromkeys(files)]


def _open(path: Path, raw: str) -> TokenFile:
    """A file whose format is told by its beginning. Raises DataError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(_LLMC_HEADER)
        if (index := path.with_suffix(".idx")).exists():
            return _megatron(path, index, size)
        if head[:6] == b"\x93NUMPY":
            return _numpy(path)
        magic, version, count = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
        if len(head) == _LLMC_HEADER and magic in _LLMC:
            return _llmc(path, size, magic, version, count)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    width = np.dtype(raw).itemsize
    if size % width:
        raise DataError(f"{path}: {size} bytes are no whole number of {width}-byte tokens")
    return TokenFile(path, "raw", raw, 0, size // width)


def _numpy(path: Path) -> TokenFile:
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path}: not a NumPy file that can be read: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise DataError(
            f"{path}: has {array.dtype} of shape {array.shape}; needs whole numbers of 1 dimension"
        )
    return TokenFile(path, "npy", array.dtype.str, array.offset, len(array))


def _llmc(path: Path, size: int, magic: int, version: int, count: int) -> TokenFile:
    known, dtype, vocab_size = _LLMC[magic]
    if version != known:
        raise DataError(f"{path}: has version {version} of llm.c's format; {known} can be read")
    expected = _LLMC_HEADER + count * np.dtype(dtype).itemsize
    if size != expected:
        raise DataError(
            f"{path}: has {size} bytes, and its header says {count} tokens, {expected} bytes"
        )
    return TokenFile(path, "llm.c", dtype, _LLMC_HEADER, count, None, vocab_size)


def _megatron(path: Path, index: Path, size: int) -> TokenFile:
    """A file with Megatron's index: lengths and byte offsets of sequences, documents of them."""
    data = index.read_bytes()
    if data[:9] != _MEGATRON:
        raise DataError(f"{index}: is no index of Megatron's; remove it, or give the right one")
    try:
        version, code, sequences, entries = struct.unpack_from("<QBQQ", data, 9)
        place = 9 + struct.calcsize("<QBQQ")
        lengths = np.frombuffer(data, "<i4", sequences, place)
        offsets = np.frombuffer(data, "<i8", sequences, place + 4 * sequences)
        documents = np.frombuffer(data, "<i8", entries, place + 12 * sequences)
    except (struct.error, ValueError) as error:
        raise DataError(f"{index}: is damaged: {error}") from None
    if version != 1 or code not in _MEGATRON_TYPES:
        raise DataError(f"{index}: version {version} with type {code} cannot be read")
    dtype = _MEGATRON_TYPES[code]
    ends = np.cumsum(lengths, dtype=np.int64)
    count, width = int(ends[-1]) if sequences else 0, np.dtype(dtype).itemsize
    if size != count * width or not np.array_equal(offsets, (ends - lengths) * width):
        raise DataError(
            f"{index}: its sequences are not those of {path}, {size} bytes, one after the other"
        )
    if not entries or documents[0] or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise DataError(f"{index}: is damaged: its documents are not its {sequences} sequences")
    borders = np.concatenate([[0], ends])[documents[1:]]
    return TokenFile(path, "megatron", dtype, 0, count, borders)
