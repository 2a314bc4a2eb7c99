"""The formats that files come in, told by their first bytes: compression, encodings of text, and
what is no text."""

import bz2
import codecs
import gzip
import io
import lzma
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

HEAD = 8192  # bytes by which a file's format is told
_BUFFER = 1 << 16
_WINDOW = {int(zstd.DecompressionParameter.window_log_max): 31}  # what `zstd --long=31` needs

BROKEN = (
    OSError,
    EOFError,  # a compressed file that ends too early
    RuntimeError,  # a zip archive with a password
    NotImplementedError,  # a zip archive with an unknown compression
    zlib.error,
    lzma.LZMAError,
    zstd.ZstdError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


class _Raw(io.RawIOBase):
    """A stream of what `read` returns for a number of bytes; seekable where `whole` is."""

    def __init__(self, read: Callable[[int], bytes], whole: Any = None) -> None:
        self._read, self._whole = read, whole

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._whole is not None and self._whole.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        self._whole.seek(offset, whence)
        return self._whole.tell()

    def readinto(self, buffer: Any) -> int:
        filled = 0
        while filled < len(buffer) and (got := self._read(len(buffer) - filled)):
            buffer[filled : filled + len(got)] = got
            filled += len(got)
        return filled


def buffered(read: Callable[[int], bytes], whole: Any = None) -> io.BufferedReader:
    """A stream of what `read` returns; seekable where `whole`, which it reads from, is."""
    return io.BufferedReader(cast(io.RawIOBase, _Raw(read, whole)), _BUFFER)


@dataclass(frozen=True)
class Compression:
    """A compression by the bytes and the suffixes that tell it."""

    name: str
    magic: bytes
    suffixes: tuple[str, ...]
    open: Callable[[IO[bytes]], Any]


COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b", (".gz", ".gzip", ".tgz"), gzip.open),
    Compression("xz", b"\xfd7zXZ\x00", (".xz", ".txz"), lzma.open),
    Compression("bzip2", b"BZh", (".bz2", ".tbz2"), bz2.open),
    Compression(
        "Zstandard",
        b"\x28\xb5\x2f\xfd",
        (".zst", ".zstd"),
        lambda f: zstd.ZstdFile(f, options=_WINDOW),
    ),
)
COMPRESSED = {suffix for c in COMPRESSIONS for suffix in c.suffixes}
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FOREIGN = {
    b"%PDF": "PDF",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
    b"\x04\x22\x4d\x18": "LZ4",
    b"\xff\x06\x00\x00sNaPpY": "Snappy",
    b"LZIP": "lzip",
    b"\x1f\x9d": "compress",
    b"{\\rtf": "RTF",
}
_CONTROL = bytes([*range(8), *range(14, 27), *range(28, 32), 127])  # not \t \n \f \r \x1b ...


def not_text(head: bytes) -> str:
    """Why a file that begins with these bytes is no text; empty for text."""
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            return f"is {name}, which is not read"
    few = max(4, len(head) // 100)
    if 4 * head.count(0) > len(head) and head.count(0) > few:
        return "has NULs between its bytes, as UTF-16 without its mark has"
    if len(head) - len(head.translate(None, _CONTROL)) > few:
        return "is no text by its first bytes"
    return ""


def as_utf8(stream: IO[bytes], encoding: str) -> Callable[[int], bytes]:
    """A `read` that gives another encoding's text as UTF-8; what is invalid stays invalid."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")

    def read(size: int) -> bytes:
        while True:
            raw = stream.read(max(size // 4, 1))  # UTF-8 may have half as many bytes again
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError:
                decoder.reset()
                return b"\xff" if not raw else b"\xff" * min(size, 2)
            if text or not raw:
                return text.encode("utf-8", "surrogatepass")

    return read


def seekable(stream: io.BufferedReader) -> IO[bytes]:
    """The stream, or all of it in memory where it cannot be read in any order."""
    return stream if stream.seekable() else io.BytesIO(stream.read())
