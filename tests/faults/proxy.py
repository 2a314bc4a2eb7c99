"""A TCP proxy on loopback, whose connections can be lost."""

import contextlib
import socket
import threading
import time


class Proxy:
    """Passes connections to `port` on to `to`, a port that was free when this was made."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.to: int = free.getsockname()[1]
        self._open: list[socket.socket] = []
        self._dropped = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def drop_after(self, seconds: float) -> None:
        """Loses all connections then, and takes no new ones."""
        threading.Timer(seconds, self._drop).start()

    def _drop(self) -> None:
        self._dropped.set()
        for one in [self._listening, *self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while not self._dropped.is_set():
            try:
                near, _ = self._listening.accept()
                far = self._connect()
            except OSError:
                return
            self._open += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _connect(self) -> socket.socket:
        while True:  # the other end may not listen yet
            try:
                return socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                if self._dropped.is_set():
                    raise
                time.sleep(0.05)

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
