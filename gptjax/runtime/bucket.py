"""Files in buckets: gs:// and s3://, for runs, text, tokenizers and token stores.

Single files are read and written through fsspec; arrays and whatever needs a conditional write go
through TensorStore. Credentials, regions and endpoints are those of the libraries' own settings:
AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ... for s3://; GOOGLE_APPLICATION_CREDENTIALS, or
the machine's own account, for gs://, and STORAGE_EMULATOR_HOST for an endpoint of one's own.
"""

import importlib
import os
import re
import time
from collections.abc import Callable
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

T = TypeVar("T")


def remote(place: Any) -> bool:
    """Whether a path or its text names a place in a bucket."""
    return "://" in str(place)


def path_of(place: str) -> Any:
    """A path with pathlib's methods: of a local file, gs:// or s3://.

    Raises ConfigError for a bucket where the packages that read it are not installed.
    """
    if not remote(place):
        return Path(place)
    scheme = place.partition("://")[0]
    try:
        importlib.import_module(_PACKAGES[scheme])
        from upath import UPath
    except ImportError as error:
        install = f"pip install 'gptjax[{scheme}]'"
        raise ConfigError([f"{place}: needs the package {error.name}: {install}"]) from None
    options = {"endpoint_url": os.environ["STORAGE_EMULATOR_HOST"], "token": "anon"}
    given = options if scheme == "gs" and "STORAGE_EMULATOR_HOST" in os.environ else {}
    return UPath(place, use_listings_cache=False, **given)  # others write there too


def size_of(path: Any) -> int:
    """Bytes of a file. Raises OSError."""
    return int(path.stat().st_size)


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
