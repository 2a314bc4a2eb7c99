"""Servers of buckets on loopback, behind a proxy that can fail as a bucket does.

S3 is moto's server, which enforces conditional writes. Google's is gcp-storage-emulator, which does
not, does not say the generation of what is read, and lists and reads more than it is asked for: the
proxy sees to all of it, one request at a time.
"""

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

KINDS = ("429", "500", "503", "reset", "lost answer", "slow", "truncated")
EXPIRED = (
    b'<?xml version="1.0"?><Error><Code>ExpiredToken</Code>'
    b"<Message>The provided token has expired.</Message></Error>"
)
FULL = (
    b'<?xml version="1.0"?><Error><Code>QuotaExceeded</Code>'
    b"<Message>The bucket has reached its quota.</Message></Error>"
)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@dataclass
class Faults:
    """Which requests fail, decided by a seed: `share` of them, in bursts of up to `burst`.

    `refused` has the answers of writes alone, by status. `told` counts what was done. `hook` is
    called with the number of each request before it is passed on.
    """

    seed: int = 0
    share: float = 0.0
    burst: int = 4
    kinds: tuple[str, ...] = KINDS
    delay_s: float = 0.0
    refused: bytes = b""
    told: Counter[str] = field(default_factory=Counter)
    hook: Any = None

    def __post_init__(self) -> None:
        self._rng, self._lock = random.Random(self.seed), threading.Lock()
        self._left, self._kind, self.requests = 0, "", 0

    def next(self) -> str:
        with self._lock:
            self.requests += 1
            if not self._left and self._rng.random() < self.share:
                self._left = self._rng.randint(1, self.burst)
                self._kind = self._rng.choice(self.kinds)
            if not self._left:
                return ""
            self._left -= 1
            self.told[self._kind] += 1
            return self._kind


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server on loopback; `faults` may be replaced at any time."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, to: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.to, self.faults, self.one_at_a_time = to, Faults(), threading.Lock()
        self.at_once = threading.Semaphore(2)  # more than a few lose connections at the emulator
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """Says nothing: clients end while they are answered."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def _any(self) -> None:
        body, faults = self._body(), self.server.faults
        number = faults.requests + 1
        kind = faults.next()
        if faults.hook is not None:
            faults.hook(number)
        time.sleep(faults.delay_s)
        if kind in ("429", "500", "503"):
            self._answer(int(kind), [], b"<Error><Code>SlowDown</Code></Error>")
        elif kind == "reset":
            self._reset()
        elif faults.refused and self.command in ("PUT", "POST"):
            self._answer(403, [("Content-Type", "application/xml")], faults.refused)
        else:
            status, headers, answer = self._passed_on(body)
            if kind == "lost answer":
                self._reset()
                return
            if kind == "slow":
                time.sleep(0.3)
            self._answer(status, headers, answer, cut=kind == "truncated")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _passed_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        url = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(url.query)
        ask = lambda: self._ask(self.command, self.path, body, self.headers)
        if self.command == "POST" and "ifGenerationMatch" in query:
            name = urllib.parse.quote(query["name"][0], safe="")
            with self.server.one_at_a_time:
                object_url = f"{url.path.removeprefix('/upload')}/{name}"
                if self._generation(object_url) != query["ifGenerationMatch"][0]:
                    return 412, [("Content-Type", "application/json")], b"{}"
                return ask()
        if self.command == "GET" and query.get("alt") == ["media"]:
            with self.server.one_at_a_time:
                status, headers, answer = ask()
                generation = self._generation(url.path.removeprefix("/download"))
            headers = [*headers, ("x-goog-generation", generation)]
            if status == 200 and (asked := self.headers.get("Range")):
                return _part(answer, asked, headers)
            return status, headers, answer
        status, headers, answer = ask()
        if self.command == "GET" and url.path.endswith("/o") and status == 200:
            answer = _between(answer, query)
        return status, headers, answer

    def _generation(self, place: str) -> str:
        status, _, answer = self._ask("GET", place, b"", {})
        return str(json.loads(answer)["generation"]) if status == 200 else "0"

    def _ask(
        self, method: str, path: str, body: bytes, headers: Any
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.to, timeout=60)
        passed = {k: v for k, v in headers.items() if k.lower() not in _OF_A_HOP}
        with self.server.at_once:
            connection.connect()
            # The emulator's answers have two parts, and the second waits for a word of the first.
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            connection.request(method, path, body, passed | {"Content-Length": str(len(body))})
            response = connection.getresponse()
            answer = response.read()
            connection.close()
        return response.status, response.getheaders(), answer

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        length = len(body)
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = int(value)
            elif name.lower() not in _OF_A_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def _between(answer: bytes, query: dict[str, list[str]]) -> bytes:
    """A list of Google's with the objects from startOffset to before endOffset alone."""
    first, last = query.get("startOffset", [""])[0], query.get("endOffset", ["\U0010ffff"])[0]
    listed = json.loads(answer)
    listed["items"] = [one for one in listed.get("items", ()) if first <= one["name"] < last]
    return json.dumps(listed).encode()


def _part(
    answer: bytes, asked: str, headers: list[tuple[str, str]]
) -> tuple[int, list[tuple[str, str]], bytes]:
    """The bytes of an object that were asked for."""
    first, _, last = asked.removeprefix("bytes=").partition("-")
    begin = int(first) if first else max(0, len(answer) - int(last))
    end = min(int(last) + 1, len(answer)) if first and last else len(answer)
    place = ("Content-Range", f"bytes {begin}-{end - 1}/{len(answer)}")
    return 206, [*headers, place], answer[begin:end]


_OF_A_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade"}


@dataclass(frozen=True)
class Bucket:
    """A bucket, empty at first: `url` begins every place in it."""

    url: str
    proxy: Proxy
    environment: dict[str, str]


@contextmanager
def s3() -> Iterator[Bucket]:
    """moto's server with a bucket."""
    with _server("moto_server", "-H", "127.0.0.1", "-p") as port:
        _ask(port, "PUT", "/bucket", "")
        proxy = Proxy(port)
        yield Bucket(
            "s3://bucket",
            proxy,
            {
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
                "AWS_SECRET_ACCESS_KEY": "wJalrXUtnExample",
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        )
        proxy.shutdown()


@contextmanager
def gs() -> Iterator[Bucket]:
    """gcp-storage-emulator with a bucket."""
    start = ("start", "--in-memory", "--host", "127.0.0.1", "--port")
    with _server("gcp-storage-emulator", *start) as port:
        _ask(port, "POST", "/storage/v1/b?project=none", json.dumps({"name": "bucket"}))
        proxy = Proxy(port)
        yield Bucket("gs://bucket", proxy, {"STORAGE_EMULATOR_HOST": proxy.url})
        proxy.shutdown()


@contextmanager
def _server(program: str, *options: str) -> Iterator[int]:
    """A server in a process of its own, on a port that is given as its last argument."""
    port = free_port()
    command = [str(Path(sys.executable).parent / program), *options, str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as process:  # type: ignore[call-overload]
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, f"{program} has ended"
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield port
        process.terminate()


def _ask(port: int, method: str, path: str, body: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    status = connection.getresponse().status
    assert status in (200, 201), f"{method} {path}: {status}"


SERVERS = {"s3": s3, "gs": gs}


@contextmanager
def entered(one: Bucket) -> Iterator[Bucket]:
    """The bucket, with the environment that leads to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [
            name for name in os.environ if name.startswith(("AWS_", "STORAGE_", "GOOGLE"))
        ]:
            patch.delenv(name)
        for name, value in one.environment.items():
            patch.setenv(name, value)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", one.proxy.url)
        yield one
        _forget()


def _forget() -> None:
    """Drops the clients that fsspec keeps, which know the server of before."""
    for name in ("s3fs", "gcsfs"):
        if module := sys.modules.get(name):
            kind = module.S3FileSystem if name == "s3fs" else module.GCSFileSystem
            kind.clear_instance_cache()
