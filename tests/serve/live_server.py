"""A server under test, its client, and a throttle that pauses, slows or breaks its engine."""

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gptjax.sample import Sampler
from gptjax.serve.api import Served

SLOTS, QUEUE, CAPACITY, MAX_BODY = 2, 4, 1024, 20_000
JSON = {"Content-Type": "application/json"}


@dataclass
class Throttle:
    """Before each step of an engine: waits until `running` is set, sleeps, and raises `error`."""

    running: threading.Event = field(default_factory=threading.Event)
    seconds: float = 0.0
    error: Exception | None = None

    def install(self, sampler: Sampler) -> None:
        make = sampler.engine

        def engine(**sizes: Any) -> Any:
            made = make(**sizes)
            step = made.step

            def throttled(limit: int = 64) -> Any:
                self.running.wait()
                time.sleep(self.seconds)
                if self.error is not None:
                    raise self.error
                return step(limit)

            made.step = throttled
            return made

        sampler.engine = engine  # type: ignore[method-assign]
        self.running.set()


@dataclass
class Server:
    """A server under test and its client."""

    port: int
    served: Served
    throttle: Throttle

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def send(
        self,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] = JSON,
        method: str | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.connect()
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return response.status, names, response.read()
        finally:
            connection.close()

    def complete(self, **fields: Any) -> tuple[int, Any]:
        status, _, body = self.send("/v1/completions", json.dumps(fields).encode())
        return status, json.loads(body)

    def metric(self, name: str, **labels: str) -> float:
        value = self.served.metrics.registry.get_sample_value(name, labels)
        assert value is not None
        return value

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds, for at most a minute."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)
