"""The listening socket, and the token that requests must carry."""

import ipaddress
import os
import socket
from pathlib import Path

from gptjax.errors import ConfigError, DataError, OutputError
from gptjax.runtime import regular_file

TOKEN_VARIABLE = "GPTJAX_TOKEN"
"""Environment variable that may hold the token."""

_BACKLOG = 512


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, which does not listen yet; port 0 takes a free one.

    Raises ConfigError for an unknown host, OutputError for a port that cannot be bound.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError([f"--host={host}: host not found: {error.strerror}"]) from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _refused(host, port, error) from None
    return bound


def listen(bound: socket.socket) -> None:
    """Accepts connections from now on. Raises OutputError if another process listens already."""
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _refused(host, port, error) from None


def _refused(host: str, port: int, error: OSError) -> OutputError:
    why = f"--host={host} --port={port}: cannot listen: {error.strerror}"
    return OutputError(f"{why}; give another --port, or 0 for one that is free")


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    address = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0])
    return address.is_loopback


def url(bound: socket.socket) -> str:
    """The URL of the socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def read_token(file: str | None) -> bytes | None:
    """The token in a file, or else in the environment; None if neither is given.

    It is never an argument, since every user of a machine can read command lines. Raises
    ConfigError for an unreadable file or an invalid token.
    """
    if file is None:
        name, text = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
        if text is None:
            return None
    else:
        name = f"--token-file={file}"
        try:
            text = regular_file.read(Path(file), name).decode("ascii")
        except (DataError, ValueError) as error:
            raise ConfigError([f"{name}: cannot be read: {error}"]) from None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            [f"{name}: must hold one token of ASCII characters without spaces, as made by "
             "`openssl rand -hex 32`"]
        )  # fmt: skip
    return token.encode()
