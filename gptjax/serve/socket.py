"""Where a server listens and who may ask: addresses, and the token."""

import ipaddress
import os
import socket
from pathlib import Path

from gptjax.errors import ConfigError, OutputError

TOKEN_VARIABLE = "GPTJAX_TOKEN"
"""Environment variable that may hold the token."""

_BACKLOG = 512


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, which does not listen yet; port 0 is a free one.

    Raises ConfigError for a host that there is not, OutputError for a port that cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError([f"--host={host}: no such host: {error.strerror}"]) from None
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
    """Takes connections from now on. Raises OutputError where another process was faster."""
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _refused(host, port, error) from None


def _refused(host: str, port: int, error: OSError) -> OutputError:
    why = f"--host={host} --port={port}: cannot be listened on: {error.strerror}"
    return OutputError(f"{why}; give another --port, or 0 for one that is free")


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    address = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0])
    return address.is_loopback


def url(bound: socket.socket) -> str:
    """The address of the socket, for people to open."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def read_token(file: str | None) -> bytes | None:
    """The token in a file, or else in the environment; None where there is neither.

    Never from the command line, which every user of a machine can read. Raises ConfigError.
    """
    if file is None:
        name, text = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
        if text is None:
            return None
    else:
        name = f"--token-file={file}"
        try:
            text = Path(file).read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise ConfigError([f"{name}: cannot be read: {error}"]) from None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            [f"{name}: must hold one token of ASCII characters without spaces, as made by "
             "`openssl rand -hex 32`"]
        )  # fmt: skip
    return token.encode()
