"""Fixtures: a server with a tiny model, on a free port."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import pytest
from live_server import CAPACITY, MAX_BODY, QUEUE, SLOTS, Server, Throttle

from gptjax.config import ComputeConfig
from gptjax.sample import Sampler
from gptjax.serve import connections, socket
from gptjax.serve.api import Served, make_app
from gptjax.serve.metrics import Metrics
from gptjax.serve.worker import Worker
from gptjax.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def make_sampler(tiny_model, random_params) -> Callable[..., Sampler]:
    """Makes a sampler of a tiny model with a byte tokenizer or none; needs an ambient mesh."""

    def make(*, text: bool = True) -> Sampler:
        model = tiny_model(vocab_size=264, context=CAPACITY * 2, layers=1)
        compute = ComputeConfig(dtype="float32")
        tokenizer = ByteTokenizer() if text else None
        return Sampler(random_params(model), model, compute, tokenizer)

    return make


@pytest.fixture(scope="session")
def start(make_sampler, on_mesh) -> Callable[..., Any]:
    """`with start(token=..., hosts=...) as server`."""

    @contextmanager
    def running(
        token: bytes | None = None,
        hosts: tuple[str, ...] | None = ("127.0.0.1", "localhost"),
        text: bool = True,
    ) -> Iterator[Server]:
        jax.config.update("jax_disable_most_optimizations", True)
        throttle, metrics = Throttle(), Metrics()
        with on_mesh():
            sampler = make_sampler(text=text)
            throttle.install(sampler)
            worker = Worker(sampler, metrics, slots=SLOTS, capacity=CAPACITY, queue=QUEUE)
            worker.start()
        jax.config.update("jax_disable_most_optimizations", False)
        served = Served("tiny", sampler, worker, metrics, CAPACITY, QUEUE, MAX_BODY)
        app = make_app(served, token=token, hosts=hosts)
        server = connections.Server(app, drain_seconds=15)
        bound = socket.bind("127.0.0.1", 0)
        socket.listen(bound)
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
    """A server that is idle when a test begins and when it ends."""
    yield _server
    _server.throttle.running.set()
    _server.throttle.seconds = 0.0
    idle = lambda: _server.metric("gptjax_rows_busy") == _server.metric("gptjax_queue_length") == 0
    _server.until(idle)
