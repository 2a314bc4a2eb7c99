"""Reading ranges of a token store in a bucket, by TensorStore."""

import sys
from collections.abc import Sequence

import numpy as np

from gptjax import bucket

_REQUESTS = 128  # at a time, each of which waits for the bucket; TensorStore's own limit is 32
_PATIENCE_S = 600.0  # of a range while the bucket fails


class RemoteTokens:
    """The tokens of a split in a bucket."""

    def __init__(self, folder: str) -> None:
        import tensorstore

        requests = {f"{kind}_request_concurrency": {"limit": _REQUESTS} for kind in ("s3", "gcs")}
        spec = {
            "driver": "zarr3",
            "kvstore": bucket.kvstore(folder),
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
            "context": {"cache_pool": {"total_bytes_limit": 256 << 20}, **requests},
        }
        self._what = f"{folder}: cannot be read"
        opened = lambda: tensorstore.open(spec, read=True).result()
        self._array = bucket.patiently(opened, self._what, _tell, _PATIENCE_S)

    def read(self, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The tokens from first to before last of each span, fetched at the same time.

        Raises OutputError where the bucket fails for long.
        """
        return bucket.patiently(lambda: self._read(spans), self._what, _tell, _PATIENCE_S)

    def _read(self, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        import tensorstore

        with tensorstore.Batch() as batch:  # spans next to each other are one request
            reads = [self._array[first:last].read(batch=batch) for first, last in spans]
        return [read.result() for read in reads]


def _tell(line: str) -> None:
    print(f"gptjax: {line}", file=sys.stderr)
