"""Files in buckets: gs:// and s3://, for runs, text, tokenizers and token stores.

All but text goes through TensorStore, which writes to both on a condition; text is read piece by
piece, through fsspec. Credentials, regions and endpoints are those of the libraries' own settings:
AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ... for s3://; GOOGLE_APPLICATION_CREDENTIALS, or
the machine's own account, for gs://, and STORAGE_EMULATOR_HOST for an endpoint of one's own.
"""

import importlib
import io
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from gptjax.errors import ConfigError, OutputError

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}  # by scheme, as are the extras of gptjax
# TensorStore's own retries, between which nothing is said; `patiently` goes on after them.
_RETRIES = {"max_retries": 3, "initial_delay": "200ms", "max_delay": "2s"}
_SLOW_S = "60"  # a transfer below a few bytes a second for so long has failed
_PASSING = (
    r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|http_response_code='(5|408|429)"
)
_LASTING = r"PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|http_response_code='4(?!08|29)"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_FILE_S = 60.0  # of one small file while the bucket fails
_UPLOAD_S = 600.0  # of one file of a folder

T = TypeVar("T")


def remote(place: Any) -> bool:
    """Whether a path or its text names a place in a bucket."""
    return "://" in str(place)


def path_of(place: str) -> Any:
    """A path with pathlib's methods: of a local file, or as far as BucketPath has them."""
    return BucketPath(place.rstrip("/")) if remote(place) else Path(place)


def text_path_of(place: str) -> Any:
    """A path with pathlib's methods, whose files can be read piece by piece.

    Raises ConfigError for a bucket where the packages that read it are not installed.
    """
    if not remote(place):
        return Path(place)
    scheme = place.partition("://")[0]
    # Else it asks what kind of bucket each is, over gRPC, and waits a minute where none answers.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        importlib.import_module(_PACKAGES[scheme])
        from upath import UPath
    except ImportError as error:
        install = f"pip install 'gptjax[{scheme}]'"
        raise ConfigError([f"{place}: needs the package {error.name}: {install}"]) from None
    logging.getLogger(_PACKAGES[scheme]).setLevel(logging.CRITICAL)  # failures are told here
    options: dict[str, Any] = {"use_listings_cache": False}  # others write there too
    if scheme == "gs" and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
        options |= {"endpoint_url": emulator, "token": "anon"}
    return UPath(place, **options)


def _tell(line: str) -> None:
    print(f"gptjax: {line}", file=sys.stderr)


@dataclass(frozen=True)
class BucketPath:
    """A small file or a folder in a bucket, with the methods of pathlib's that gptjax needs.

    Files are read and written whole, and replaced at once. While the bucket fails the methods try
    again, with a line of why; then they raise OutputError.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name."""
        return Path(self.name).suffix

    @property
    def parent(self) -> "BucketPath":
        """The folder that it is in."""
        return BucketPath(self.url.rpartition("/")[0])

    def _ask(self, call: Callable[[Any, str], Any], what: str) -> Any:
        """The result of a call with the folder's store and this file's name in it."""
        store = open_kvstore(self.parent.url)
        return patiently(lambda: call(store, self.name).result(), f"{self}: {what}", _tell, _FILE_S)

    def _keys(self, first: str, last: str) -> list[str]:
        import tensorstore

        keys = tensorstore.KvStore.KeyRange(f"{self.name}{first}", f"{self.name}{last}")
        found = self._ask(lambda store, name: store.list(keys), "cannot be listed")
        return [key.decode() for key in found]

    def exists(self) -> bool:
        """Whether there is such a file."""
        return bool(self._keys("", "\0"))

    is_file = exists

    def is_dir(self) -> bool:
        """Whether there is a file below it."""
        return bool(self._keys("/", "0"))  # 0 is what follows /

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """The files and folders in it whose names match."""
        above = len(self.name) + 1
        names = {key[above:].partition("/")[0] for key in self._keys("/", "0")}
        yield from (self / name for name in sorted(names) if fnmatchcase(name, pattern))

    def iterdir(self) -> Iterator["BucketPath"]:
        """The files and folders in it."""
        return self.glob("*")

    def read_bytes(self) -> bytes:
        """The contents. Raises FileNotFoundError."""
        found = self._ask(lambda store, name: store.read(name), "cannot be read")
        if found.state != "value":
            raise FileNotFoundError(2, "no such file", self.url)
        return bytes(found.value)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The contents as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str) -> io.BytesIO:
        """The contents as a stream; `mode` is rb."""
        assert mode == "rb"
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, contents: bytes) -> None:
        """Writes or replaces the file."""
        self._ask(lambda store, name: store.write(name, contents), "cannot be written")

    def write_text(self, text: str) -> None:
        """Writes or replaces the file."""
        self.write_bytes(text.encode())

    def unlink(self) -> None:
        """Removes the file, if it is there."""
        self._ask(lambda store, name: store.write(name, None), "cannot be removed")


def local_copy(folder: str) -> Path:
    """A folder on this machine: itself, or a copy of one in a bucket, kept until the process ends.

    Raises OutputError where the bucket fails.
    """
    if not remote(folder):
        return Path(folder)
    if folder not in _copies:
        _copies[folder] = tempfile.TemporaryDirectory(prefix="gptjax-")
        store, copy = open_kvstore(folder), Path(_copies[folder].name)
        listed = patiently(
            lambda: store.list().result(), f"{folder}: cannot be read", _tell, _FILE_S
        )
        for key in sorted(listed):
            file = copy / key.decode()
            file.parent.mkdir(parents=True, exist_ok=True)
            read = lambda key=key: store.read(key).result().value
            file.write_bytes(patiently(read, f"{folder}: cannot be read", _tell, _FILE_S))
    return Path(_copies[folder].name)


_copies: dict[str, tempfile.TemporaryDirectory[str]] = {}


def upload(
    folder: Path,
    place: str,
    last: str,
    skipped: Collection[str] = (),
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Copies a folder's files to one in a bucket, those named `last` after all others.

    What is there already with the same contents stays, so a copy that was cut off goes on. `tell`
    is called with the bytes done and their total. Raises OutputError where the bucket fails, or has
    other contents in a file's place.
    """
    store = open_kvstore(place)
    files = [f for f in folder.rglob("*") if f.is_file() and f.name not in skipped]
    total, done = sum(file.stat().st_size for file in files), 0
    for file in sorted(files, key=lambda file: (file.name == last, file)):
        tell(done, total)
        key, contents = file.relative_to(folder).as_posix(), file.read_bytes()
        put = lambda key=key, contents=contents: _is_put(store, key, contents)
        if not patiently(put, f"{place}: cannot be written", _tell, _UPLOAD_S):
            raise OutputError(
                f"{place}/{key}: exists with other contents; give another place, or delete it"
            )
        done += len(contents)
    tell(done, total)


def _is_put(store: Any, key: str, contents: bytes) -> bool:
    """Writes a file that is not there; whether it has these contents in the end."""
    found = store.read(key).result()
    if found.state != "value":
        if store.write(key, contents, if_equal=found.stamp.generation).result().generation:
            return True
        found = store.read(key).result()
    return bool(found.value == contents)


def kvstore(folder: str) -> dict[str, Any]:
    """The key-value store of a folder, local or in a bucket, as TensorStore describes it."""
    scheme, _, address = folder.rstrip("/").rpartition("://")
    if not scheme:
        return {"driver": "file", "path": f"{Path(folder).absolute()}/"}
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", _SLOW_S)
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "16")
    bucket, _, key = address.partition("/")
    spec: dict[str, Any] = {"bucket": bucket, "path": f"{key}/" if key else ""}
    if scheme == "gs":
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
            os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        return {"driver": "gcs", "gcs_request_retries": _RETRIES, **spec}
    spec |= {"driver": "s3", "s3_request_retries": _RETRIES}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else it complains of files that need not be there
        spec["aws_credentials"] = {"type": "environment"}
    given = {
        "endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "aws_region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
    }
    return spec | {name: value for name, value in given.items() if value}


def open_kvstore(folder: str) -> Any:
    """The opened key-value store of a folder."""
    import tensorstore

    return tensorstore.KvStore.open(kvstore(folder)).result()


def patiently(call: Callable[[], T], what: str, say: Callable[[str], None], seconds: float) -> T:
    """The result of a call to a bucket, which is repeated for so long while the bucket fails.

    `what` is told with each failure. Raises OutputError where it fails for longer, or where trying
    again cannot help: a bucket that is not there, credentials that do not allow it. Raises what
    the call raises where the bucket is not at fault: damaged data, say.
    """
    ends, wait = time.monotonic() + seconds, _FIRST_WAIT_S
    while True:
        try:
            return call()
        except (ValueError, OSError) as error:  # of TensorStore, of fsspec
            reason = reason_of(error)
            if re.search(_LASTING, str(error)) or isinstance(error, PermissionError):
                raise OutputError(f"{what}: {reason}") from None
            if not (isinstance(error, OSError) or re.search(_PASSING, str(error))):
                raise
            if time.monotonic() + wait > ends:
                raise OutputError(f"{what}: failed for {seconds:.0f} s: {reason}") from None
        say(f"{what}: {reason}; trying again in {wait:.0f} s")
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT_S)


def reason_of(error: BaseException) -> str:
    """What a library says went wrong, without the response that it appends."""
    text = str(error).partition("\n")[0]
    return re.sub(r" ?\[[\w-]+='.*", "", text)[:300] or repr(error)[:300]
