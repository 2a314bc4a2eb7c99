"""`gptjax serve`: a server with OpenAI's completions API, and a page to try a model.

`worker` is the thread that owns the engine, `api` the ASGI application, `protocol` the objects of
requests and responses, `token_text` the texts of single tokens in them, `socket` the address and
the token, `connections` the limits of open connections, `metrics` the metrics. Requires the
packages of the extra "serve".
"""

import importlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM
from socket import socket as Socket
from types import FrameType
from typing import TYPE_CHECKING

from gptjax.errors import ConfigError
from gptjax.serve import socket as listening

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from gptjax.serve.worker import Worker

PACKAGES = {
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "prometheus-client": "prometheus_client",
}
"""Packages of the extra "serve": names to install, and to import."""

CAPACITY = 2048
"""Default limit of tokens of prompt and continuation, if the model's context is larger."""

_MOST_ROWS = 1 << 16  # sequences that decode at a time
_DRAIN_SECONDS = 10  # for running requests to end, after a signal to stop


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    host: str = "127.0.0.1"
    port: int = 8000
    token_file: str | None = None
    name: str | None = None
    dtype: str | None = None
    rows: int = 8
    queue: int = 64
    max_tokens_limit: int | None = None
    max_body: int = 1 << 20

    def check(self) -> None:
        """Raises ConfigError with every invalid value."""
        problems = []
        if not 0 <= self.port < 2**16:
            problems.append(f"--port={self.port}: must be from 0 to 65535; 0 takes a free one")
        if self.rows > _MOST_ROWS:
            problems.append(f"--rows={self.rows}: must be at most {_MOST_ROWS}")
        for name in ("rows", "queue", "max_body"):
            if (value := getattr(self, name)) < 1:
                problems.append(f"--{name.replace('_', '-')}={value}: must be at least 1")
        if self.max_tokens_limit is not None and self.max_tokens_limit < 2:
            limit = f"--max-tokens-limit={self.max_tokens_limit}"
            problems.append(f"{limit}: must be at least 2: one token of prompt and one to draw")
        if problems:
            raise ConfigError(problems)


def serve(path: str, options: Options, say: Callable[[str], None]) -> None:
    """Serves the model of a run or of a Hugging Face folder until SIGTERM or SIGINT.

    Prints a line with its address when it listens. Raises ConfigError for invalid options and for
    too low a limit of open files, OutputError for a port in use, before the model is loaded, and
    the errors of `load.load_model`.
    """
    options.check()
    _require_packages()
    from gptjax.serve import connections

    connections.connections_by_limit()
    token = listening.read_token(options.token_file)
    bound = listening.bind(options.host, options.port)
    with bound:
        if token is None and not listening.is_loopback(bound):
            raise ConfigError(
                [
                    f"--host={options.host}: is reachable by others, so a token is required; "
                    f"give --token-file, or set {listening.TOKEN_VARIABLE}"
                ]
            )
        _load_and_serve(path, options, bound, token, say)


def _require_packages() -> None:
    missing = []
    for name, module in PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(name)
    if missing:
        raise ConfigError(
            [f"gptjax serve: {', '.join(missing)}: not installed; pip install 'gptjax[serve]'"]
        )


def _load_and_serve(
    path: str,
    options: Options,
    bound: Socket,
    token: bytes | None,
    say: Callable[[str], None],
) -> None:
    from gptjax import load_model
    from gptjax.serve.api import Served, make_app
    from gptjax.serve.metrics import Metrics
    from gptjax.serve.worker import Worker

    with load_model.load_model(path, dtype=options.dtype, say=say) as model:
        capacity = _capacity(options, model.cfg.model.context)
        name = options.name or Path(path.removeprefix("hf:")).resolve().name
        sampler, metrics = model.sampler(slots=options.rows, consume=True), Metrics()
        worker = Worker(
            sampler, metrics, slots=options.rows, capacity=capacity, queue=options.queue
        )
        say(f"warmed up in {worker.start():.1f} s")
        served = Served(name, sampler, worker, metrics, capacity, options.queue, options.max_body)
        local = listening.is_loopback(bound)
        hosts = ("localhost", "127.0.0.1", "::1", "[::1]", options.host) if local else None
        line = (
            f"{listening.url(bound)} serves {name}: {model.cfg.compute.dtype}, {worker.slots} "
            f"slots of {capacity} tokens, {'with' if token else 'without'} a token"
        )
        _run(make_app(served, token=token, hosts=hosts), worker, bound, line)
        say("stopped")


def _capacity(options: Options, context: int) -> int:
    """The most tokens of prompt and continuation."""
    capacity = options.max_tokens_limit or min(context, CAPACITY)
    if capacity > context:
        limit = f"--max-tokens-limit={capacity}"
        raise ConfigError([f"{limit}: is above the model's context of {context}"])
    return capacity


def _run(app: "ASGIApp", worker: "Worker", bound: Socket, line: str) -> None:
    """Runs the application until a signal; prints the line when it listens."""
    import uvicorn

    from gptjax.serve import connections

    server = connections.Server(app, _DRAIN_SECONDS + 5)

    def stop(sig: int, frame: FrameType | None) -> None:
        worker.drain(_DRAIN_SECONDS)
        uvicorn.Server.handle_exit(server, sig, frame)

    server.handle_exit = stop  # type: ignore[method-assign]
    listening.listen(bound)
    # uvicorn sets its handlers while it runs, and afterwards raises the signals that they caught.
    # Ours are set before and after, so that no signal is lost or ends the process by its default.
    before = {s: signal.signal(s, stop) for s in (SIGINT, SIGTERM)}
    try:
        print(line, flush=True)
        server.run(sockets=[bound])
        worker.stop(_DRAIN_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
