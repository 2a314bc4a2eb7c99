"""Connections of the server: how many may be open, and how long the head of a request may take.

Every open connection takes a file descriptor, and a client that sends half a head keeps it for as
long as it likes. So a head has a time limit, and when all connections that may be open are open,
a new one takes the place of the one that has waited longest for its request.
"""

import asyncio
import functools
import os
import resource
from dataclasses import dataclass, field
from socket import socket as Socket
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptjax.errors import ConfigError
from gptjax.serve import socket as listening

HEAD_SECONDS = 10.0
"""Time from the opening of a connection, or the end of a response, to the end of the next head."""

_MOST = 1024  # open connections
_LEAST = 16
_AT_ONCE = 128
_FILES = 32  # descriptors for files and libraries that are opened while the server runs

_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclass
class Connections:
    """The connections of a server: at most `most` are open, and `at_once` are accepted in a turn of
    asyncio's loop. `waiting` are those without a whole request, the longest first.
    """

    most: int
    at_once: int
    waiting: dict["Protocol", None] = field(default_factory=dict)


def connections_by_limit() -> Connections:
    """As many connections as the limit of open files (`ulimit -n`) leaves room for.

    Raises ConfigError for a limit that leaves room for fewer than 16.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = _MOST * 2 if limit == resource.RLIM_INFINITY else limit - len(os.listdir("/dev/fd"))
    free -= _FILES
    # A connection beyond the limit is accepted all the same, and closed a turn or two later.
    at_once = max(1, min(_AT_ONCE, free // 8))
    most = min(_MOST, free - 3 * at_once)
    if most < _LEAST:
        why = f"the limit of open files is {limit}, too few for {_LEAST} connections"
        raise ConfigError([f"{why}; raise it with `ulimit -n`"])
    return Connections(most, at_once)


class Server(uvicorn.Server):
    """uvicorn for an application, with these limits.

    Raises ConfigError for a limit of open files that is too low.
    """

    def __init__(self, app: ASGIApp, drain_seconds: int) -> None:
        super().__init__(_config(app, drain_seconds))

    async def startup(self, sockets: list[Socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets or ():  # asyncio has listened with what it accepts at once
            listening.listen(bound)


def _config(app: ASGIApp, drain_seconds: int) -> uvicorn.Config:
    limited = connections_by_limit()
    return uvicorn.Config(
        app,
        http=functools.partial(Protocol, limited),  # type: ignore[arg-type]
        loop="asyncio",  # uvloop accepts as many as there are
        backlog=limited.at_once,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=drain_seconds,
    )


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a time limit for heads and a limit of open connections."""

    def __init__(self, limited: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._limited = limited
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limited.most:
            if longest := next(iter(self._limited.waiting), None):
                longest._stop_waiting()
                longest.transport.abort()
            else:
                self._answer_and_close(_FULL)
                return
        self._update()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _update(self) -> None:
        """Notes whether the connection waits for a request, and starts or stops the timer."""
        if self.transport.is_closing() or self.conn.their_state not in {h11.IDLE, h11.SEND_BODY}:
            self._stop_waiting()
            return
        self._limited.waiting.setdefault(self)
        if self.conn.their_state is h11.SEND_BODY and self.conn.our_state is not h11.DONE:
            self._stop_timer()  # api.py limits the body that it reads
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def _stop_waiting(self) -> None:
        self._limited.waiting.pop(self, None)
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        received = self.conn.trailing_data[0]
        self._answer_and_close(_LATE if received else b"")

    def _answer_and_close(self, answer: bytes) -> None:
        self._stop_waiting()
        self.transport.write(answer)
        self.transport.close()
