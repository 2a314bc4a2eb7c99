"""Clients that send half of a request: they are ended, and others are answered meanwhile."""

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from gptjax.errors import ConfigError
from gptjax.serve import connections

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@contextmanager
def open_files(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


@pytest.fixture
def few(start, monkeypatch):
    """A server that has at most 20 connections open."""
    limited = connections.Connections(most=20, at_once=8)
    monkeypatch.setattr(connections, "connections_by_limit", lambda: limited)
    with start() as server:
        yield server


def closed(sock: socket.socket) -> bool:
    sock.settimeout(0.01)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("start_of_request", [b"", HEAD, b"POST /v1/completions HTTP/1.1\r\n"])
def test_health_is_answered_while_many_requests_are_half_sent(few, start_of_request) -> None:
    with ExitStack() as stack:
        halves = [stack.enter_context(connect(few)) for _ in range(15)]
        for _ in range(10):
            more = [stack.enter_context(connect(few)) for _ in range(15)]
            for half in more:
                half.sendall(start_of_request)
            halves += more
            assert few.send("/health")[0] == 200
        few.until(lambda: sum(map(closed, halves)) >= len(halves) - 20)
        assert not closed(halves[-1])  # the last ones are left


def test_half_sent_bodies_give_way_too(few) -> None:
    body = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        for _ in range(60):
            half = stack.enter_context(connect(few))
            half.sendall(body + b"Content-Length: 100\r\n\r\n{")
        assert few.send("/health")[0] == 200


def test_running_requests_do_not_give_way(few) -> None:
    few.throttle.running.clear()
    request = b'{"prompt": "a", "max_tokens": 4, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        first = stack.enter_context(connect(few))
        first.sendall(head + b"Content-Length: %d\r\n\r\n" % len(request) + request)
        few.until(lambda: few.metric("gptjax_rows_busy") + few.metric("gptjax_queue_length") > 0)
        for _ in range(60):
            stack.enter_context(connect(few)).sendall(HEAD)
        few.throttle.running.set()
        assert first.recv(100).startswith(b"HTTP/1.1 200")


def test_a_new_connection_is_refused_where_all_requests_run(few, monkeypatch) -> None:
    few.throttle.running.clear()
    request = b'{"prompt": "a", "max_tokens": 4, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        running = [stack.enter_context(connect(few)) for _ in range(2)]
        for sock in running:
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(request) + request)
        few.until(lambda: few.metric("gptjax_rows_busy") + few.metric("gptjax_queue_length") > 1)
        monkeypatch.setattr(connections.connections_by_limit(), "most", 2)
        assert stack.enter_context(connect(few)).recv(100).startswith(b"HTTP/1.1 503")
        few.throttle.running.set()
        assert all(sock.recv(100).startswith(b"HTTP/1.1 200") for sock in running)


def test_a_head_has_a_time_limit(start, monkeypatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with start() as server, connect(server) as half, connect(server) as empty:
        began = time.monotonic()
        half.sendall(HEAD)
        assert half.recv(100).startswith(b"HTTP/1.1 408")
        assert empty.recv(100) == b""
        assert time.monotonic() - began >= 0.4


def test_the_time_limit_holds_for_a_head_byte_by_byte_and_after_a_response(
    start, monkeypatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    with start() as server, connect(server) as slow:
        slow.sendall(HEAD + b"\r\n")
        answered = b""
        while not answered.endswith(b"}"):
            answered += slow.recv(1000)
        assert answered.startswith(b"HTTP/1.1 200")
        slow.settimeout(0.1)
        for byte in HEAD * 3:
            slow.sendall(bytes([byte]))
            try:
                answered = slow.recv(100)
                break
            except TimeoutError:
                continue
        assert answered.startswith(b"HTTP/1.1 408")


def test_a_body_after_its_response_has_the_time_limit_too(start, monkeypatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with start(token=b"secret") as server, connect(server) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
        )
        assert sock.recv(1000).startswith(b"HTTP/1.1 401")
        sock.sendall(b"x")
        server.until(lambda: closed(sock))


def test_connections_by_the_limit_of_open_files() -> None:
    with open_files(4096):
        assert connections.connections_by_limit().most == 1024
    with open_files(400):
        some = connections.connections_by_limit()
        assert 16 <= some.most < 368
        assert some.most + 3 * some.at_once < 368
    with open_files(60), pytest.raises(ConfigError, match=r"limit of open files is 60.*ulimit -n"):
        connections.connections_by_limit()
