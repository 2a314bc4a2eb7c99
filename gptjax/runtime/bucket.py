"""Files in buckets: gs:// and s3://, for text, tokenizers and token stores.

Credentials, regions and endpoints are those of the libraries' own settings: for s3:// the
environment variables of AWS (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ...).
"""

import os
from typing import Any

from etils import epath

from gptjax.errors import ConfigError

_PACKAGES = "pip install 'gptjax[s3]'"


def path_of(place: str) -> Any:
    """A path with pathlib's methods: of a local file, gs:// or s3://.

    Raises ConfigError for s3:// where the packages that read it are not installed.
    """
    if not place.startswith("s3://"):
        return epath.Path(place)
    try:
        import s3fs  # noqa: F401
        from upath import UPath
    except ImportError as error:
        raise ConfigError([f"{place}: needs the package {error.name}: {_PACKAGES}"]) from None
    return UPath(place)


def size_of(path: Any) -> int:
    """Bytes of a file. Raises OSError."""
    stat = path.stat()
    return int(stat.length if isinstance(path, epath.Path) else stat.st_size)


def kvstore(folder: str) -> dict[str, Any] | str:
    """The key-value store of a folder in a bucket, as TensorStore describes it."""
    scheme, _, address = folder.rstrip("/").partition("://")
    if scheme != "s3":
        return f"{folder.rstrip('/')}/"
    bucket, _, key = address.partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{key}/" if key else ""}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else it complains of files that need not be there
        spec["aws_credentials"] = {"type": "environment"}
    given = {
        "endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "aws_region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
    }
    return spec | {name: value for name, value in given.items() if value}
