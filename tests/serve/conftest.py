"""A tiny model behind a real server on a free port, whose engine can be held and slowed."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import pytest
import uvicorn

from gptjax.config import ComputeConfig
from gptjax.sample import Sampler
from gptjax.serve import listening
from gptjax.serve.api import Served, make_app
from gptjax.serve.metrics import Metrics
from gptjax.serve.worker import Worker
from gptjax.tokenizer import ByteTokenizer

ROWS, QUEUE, CAPACITY, MAX_BODY = 2, 4, 1024, 20_000
JSON = {"Content-Type": "application/json"}


@dataclass
class Throttle:
    """Holds an engine before each step while `running` is not set; sleeps; raises."""

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
        """Waits for what must come sooner or later; a minute at most."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture(scope="session")
def make_sampler(tiny_model, random_params, on_mesh) -> Callable[[], Sampler]:
    """A sampler of a tiny model that reads bytes. It must be used on a mesh."""

    def make() -> Sampler:
        model = tiny_model(vocab_size=264, context=CAPACITY * 2, layers=1)
        compute = ComputeConfig(dtype="float32")
        return Sampler(random_params(model), model, compute, ByteTokenizer())

    return make


@pytest.fixture(scope="session")
def start(make_sampler, on_mesh) -> Callable[..., Any]:
    """`with start(token=..., hosts=...) as server`."""

    @contextmanager
    def running(
        token: bytes | None = None, hosts: tuple[str, ...] | None = ("127.0.0.1", "localhost")
    ) -> Iterator[Server]:
        jax.config.update("jax_disable_most_optimizations", True)
        throttle, metrics = Throttle(), Metrics()
        with on_mesh():
            sampler = make_sampler()
            throttle.install(sampler)
            worker = Worker(sampler, metrics, rows=ROWS, capacity=CAPACITY, queue=QUEUE)
            worker.start()
        jax.config.update("jax_disable_most_optimizations", False)
        served = Served("tiny", sampler, worker, metrics, CAPACITY, QUEUE, MAX_BODY)
        app = make_app(served, token=token, hosts=hosts)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="off", ws="none", access_log=False)
        )
        bound = listening.bind("127.0.0.1", 0)
        listening.listen(bound)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield Server(bound.getsockname()[1], served, throttle)
        finally:
            throttle.running.set()
            server.should_exit = True
            thread.join(30)
            worker.stop(30)
            bound.close()

    return running


@pytest.fixture(scope="session")
def _server(start) -> Iterator[Server]:
    with start() as server:
        yield server


@pytest.fixture
def server(_server: Server) -> Iterator[Server]:
    """A server that does nothing when a test begins, and is left so."""
    yield _server
    _server.throttle.running.set()
    _server.throttle.seconds = 0.0
    idle = lambda: _server.metric("gptjax_rows_busy") == _server.metric("gptjax_queue_length") == 0
    _server.until(idle)
