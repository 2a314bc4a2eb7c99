"""`gptjax serve`: a model behind OpenAI's completions interface, and a page to try it on.

`worker` is the thread that owns the engine, `api` the ASGI application, `protocol` what bodies and
answers look like, `spelling` how tokens are written in them, `listening` addresses and the token,
`metrics` what is counted. Needs the packages of the extra "serve".
"""

import importlib
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import FrameType

from gptjax.errors import ConfigError
from gptjax.serve import socket as listening

PACKAGES = {
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "prometheus-client": "prometheus_client",
}
"""What the extra "serve" brings: names to install, and to import."""

CAPACITY = 2048
"""Tokens of prompt and continuation, where the model's context is not below it."""

_DRAIN_SECONDS = 10  # for requests under way, when told to stop


@dataclass(frozen=True)
class Options:
    """How a model is served; the fields are the options of the command line."""

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
        """Raises ConfigError with every value that makes no sense."""
        problems = []
        if not 0 <= self.port < 2**16:
            problems.append(f"--port={self.port}: must be from 0 to 65535; 0 is one that is free")
        for name in ("rows", "queue", "max_body"):
            if (value := getattr(self, name)) < 1:
                problems.append(f"--{name.replace('_', '-')}={value}: must be at least 1")
        if self.max_tokens_limit is not None and self.max_tokens_limit < 2:
            limit = f"--max-tokens-limit={self.max_tokens_limit}"
            problems.append(f"{limit}: must be at least 2, a token of prompt and one to draw")
        if problems:
            raise ConfigError(problems)


def serve(path: str, options: Options, say: Callable[[str], None]) -> None:
    """Serves the model of a run or of a Hugging Face folder until SIGTERM or SIGINT.

    Prints a line with its address when it listens. Raises ConfigError and OutputError for what
    stands against it, before the model is opened, and what `opening.opened` raises.
    """
    options.check()
    _require_packages()
    token = listening.read_token(options.token_file)
    bound = listening.bind(options.host, options.port)
    with bound:
        local = listening.is_loopback(bound)
        if not local and token is None:
            raise ConfigError(
                [
                    f"--host={options.host}: others can reach it, so requests must carry a token; "
                    f"give --token-file, or set {listening.TOKEN_VARIABLE}"
                ]
            )
        _open_and_serve(path, options, bound, token, local, say)


def _require_packages() -> None:
    absent = []
    for name, module in PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError:
            absent.append(name)
    if absent:
        raise ConfigError(
            [f"gptjax serve: needs packages that are not installed: pip install {' '.join(absent)}"]
        )


def _open_and_serve(
    path: str,
    options: Options,
    bound: socket.socket,
    token: bytes | None,
    local: bool,
    say: Callable[[str], None],
) -> None:
    import uvicorn

    from gptjax import load_model
    from gptjax.serve.api import Served, make_app
    from gptjax.serve.metrics import Metrics
    from gptjax.serve.worker import Worker

    with load_model.load_model(path, dtype=options.dtype, say=say) as model:
        context = model.cfg.model.context
        capacity = options.max_tokens_limit or min(context, CAPACITY)
        if capacity > context:
            limit = f"--max-tokens-limit={capacity}"
            raise ConfigError([f"{limit}: is above the model's context of {context}"])
        name = options.name or Path(path.removeprefix("hf:")).resolve().name
        sampler, metrics = model.sampler(rows=options.rows), Metrics()
        worker = Worker(sampler, metrics, rows=options.rows, capacity=capacity, queue=options.queue)
        say(f"warmed up in {worker.start():.1f} s")
        served = Served(name, sampler, worker, metrics, capacity, options.queue, options.max_body)
        hosts = ("localhost", "127.0.0.1", "::1", "[::1]", options.host) if local else None
        config = uvicorn.Config(
            make_app(served, token=token, hosts=hosts),
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_DRAIN_SECONDS + 5,
        )
        server = uvicorn.Server(config)

        def told(number: int, frame: FrameType | None) -> None:
            worker.drain(_DRAIN_SECONDS)
            uvicorn.Server.handle_exit(server, number, frame)

        server.handle_exit = told  # type: ignore[method-assign]
        listening.listen(bound)
        # uvicorn sets these while it runs, and raises afterwards what they caught. Ours are there
        # before and after, so that no signal goes by or ends the process with its number.
        before = {s: signal.signal(s, told) for s in (SIGINT, SIGTERM)}
        try:
            print(
                f"{listening.url(bound)} serves {name}: {model.cfg.compute.dtype}, {worker.rows} "
                f"rows of {capacity} tokens, {'with' if token else 'without'} a token",
                flush=True,
            )
            server.run(sockets=[bound])
            worker.stop(_DRAIN_SECONDS)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        say("stopped")
