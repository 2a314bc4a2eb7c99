"""A bucket of each kind of server, for the tests of this folder."""

import itertools
from collections.abc import Iterator

import pytest
import servers
from servers import Bucket, Faults

_numbers = itertools.count()


@pytest.fixture(scope="module", params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def bucket(request: pytest.FixtureRequest) -> Iterator[Bucket]:
    """An S3 server's bucket, and then one of Google's."""
    with servers.SERVERS[request.param]() as one, servers.entered(one):
        yield one


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[Bucket]:
    """An S3 server's bucket."""
    with servers.s3() as one, servers.entered(one):
        yield one


@pytest.fixture
def place(bucket: Bucket) -> Iterator[str]:
    """A folder in the bucket that is used by one test; nothing fails after it."""
    yield f"{bucket.url}/{next(_numbers)}"
    bucket.proxy.faults = Faults()
