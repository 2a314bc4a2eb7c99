"""The HTTP API, an ASGI application: completions, models, health, metrics and the page."""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptjax.errors import GptjaxError
from gptjax.sample import Sampler
from gptjax.serve import protocol
from gptjax.serve.metrics import Metrics
from gptjax.serve.protocol import Call, Refusal, ResponseBuilder
from gptjax.serve.worker import Busy, Job, Stopped, TextChunk, Worker

OPEN = ("/", "/health")
"""Paths that need no token: the page, which asks for one, and the health check."""

Chunks = asyncio.Queue[TextChunk | GptjaxError | None]
"""Output of a job; None after the client has disconnected."""

_BODY_SECONDS = 30.0  # until a body must have arrived


@dataclass(frozen=True)
class Served:
    """A served model and its limits: `capacity` tokens of prompt and continuation, `queue` samples
    of a request, `max_body` bytes of a body.
    """

    name: str
    sampler: Sampler
    worker: Worker
    metrics: Metrics
    capacity: int
    queue: int
    max_body: int


def make_app(served: Served, *, token: bytes | None, hosts: Sequence[str] | None) -> Starlette:
    """The application. Requests must carry the `token` and name one of the `hosts`, if given."""
    endpoints = _Endpoints(served, guarded=token is not None)
    middleware = [Middleware(_SafeHeaders)]
    if hosts is not None:
        guard = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
        middleware.append(guard)
    if token is not None:
        middleware.append(Middleware(_Token, token=token))
    return Starlette(
        routes=[
            Route("/", endpoints.page),
            Route("/health", endpoints.health),
            Route("/metrics", endpoints.metrics),
            Route("/v1/models", endpoints.models),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={
            Refusal: _refused,
            HTTPException: _http_error,
            Exception: _internal_error,
        },
    )


# --- responses -------------------------------------------------------------------------------


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # As ASCII: JSON may contain half of a surrogate pair, which UTF-8 cannot encode.
    return Response(json.dumps(value), status, headers, media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _json(error.to_json(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    refusal = Refusal(message, status=error.status_code)
    return _json(refusal.to_json(), error.status_code, dict(error.headers or {}))


async def _internal_error(_: Request, __: Exception) -> Response:
    # Starlette raises the exception again after this response, so the log has its traceback.
    return _json(Refusal("an error in the server; its log says more", status=500).to_json(), 500)


class _Token:
    """Middleware: rejects requests without the token."""

    def __init__(self, app: ASGIApp, token: bytes) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN and not self._allowed(scope):
            refusal = Refusal(
                "this server needs its token: send the header 'Authorization: Bearer TOKEN'",
                status=401,
                code="invalid_api_key",
            )
            headers = {"WWW-Authenticate": "Bearer"}
            await _json(refusal.to_json(), 401, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        same = hmac.compare_digest(token.strip(), self._token)
        return same and scheme.lower() == b"bearer"


class _SafeHeaders:
    """Middleware: headers that keep browsers from sniffing, caching and framing responses."""

    HEADERS = {  # noqa: RUF012
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    POLICY = "default-src 'none'; frame-ancestors 'none'"

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self.HEADERS)
                headers.setdefault("Content-Security-Policy", self.POLICY)
            await send(message)

        await self._app(scope, receive, with_headers)


def page_with_policy() -> tuple[str, str]:
    """The page, and a Content-Security-Policy that allows only its own script and style."""
    page = resources.files("gptjax.serve").joinpath("page.html").read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(one.encode()).digest() for one in inline)
        return " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, policy


# --- endpoints -------------------------------------------------------------------------------


class _Endpoints:
    """The handlers of all paths."""

    def __init__(self, served: Served, *, guarded: bool) -> None:
        self._served, self._created = served, int(time.time())
        page, self._policy = page_with_policy()
        self._page = page.replace("data-guarded=no", f"data-guarded={'yes' if guarded else 'no'}")

    async def page(self, _: Request) -> Response:
        headers = {"Content-Security-Policy": self._policy}
        return Response(self._page, headers=headers, media_type="text/html")

    async def health(self, _: Request) -> Response:
        alive = self._served.worker.alive
        return _json({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics(self, _: Request) -> Response:
        kind = "text/plain; version=0.0.4"
        return Response(self._served.metrics.exposition(), media_type=kind)

    async def models(self, _: Request) -> Response:
        model = {
            "id": self._served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "gptjax",
            "capacity": self._served.capacity,
        }
        return _json({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        outcomes = self._served.metrics.requests
        try:
            return await self._complete(request)
        except Refusal as error:
            outcome = {429: "busy", 500: "failed", 503: "failed"}.get(error.status, "refused")
            outcomes.labels(outcome).inc()
            raise
        except ClientDisconnect:
            outcomes.labels("gone").inc()
            return Response(status_code=499)  # no client is left to read it
        except Exception:
            outcomes.labels("failed").inc()
            raise

    async def _complete(self, request: Request) -> Response:
        served = self._served
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # This also keeps out pages of other sites: they cannot send this type unasked.
            raise Refusal(f"Content-Type: {kind or 'none'}: must be application/json", status=415)
        body = await _read(request, served.max_body)
        call = protocol.parse(body, model=served.name, most=served.queue)
        requests = await asyncio.to_thread(call.requests, served.sampler, served.capacity)
        loop = asyncio.get_running_loop()
        chunks: Chunks = asyncio.Queue()

        def send(chunk: TextChunk | GptjaxError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        job = Job(requests, send, streamed=call.stream)
        try:
            served.worker.submit(job)
        except Busy as error:
            raise Refusal(str(error), status=429, headers={"Retry-After": "1"}) from None
        except GptjaxError as error:
            raise _engine_error(error) from None
        completion = _Completion(served, call, job, chunks)
        watcher = asyncio.create_task(_watch_disconnect(request, chunks))
        handed_over = False
        try:
            if call.stream:
                # Waits before the status is sent, so that an earlier failure has its own status.
                first = await completion.next()
                handed_over = True
                return _EventStream(completion, first)
            return await completion.whole()
        finally:
            watcher.cancel()
            if not handed_over:
                job.cancel()


def _engine_error(error: GptjaxError) -> Refusal:
    return Refusal(str(error), status=503 if isinstance(error, Stopped) else 500)


async def _read(request: Request, most: int) -> bytes:
    """The body of a request. Raises Refusal for one of more than `most` bytes, or a slow one."""
    # The rest of the body is not read, so the connection cannot be reused.
    close = {"Connection": "close"}
    refusal = Refusal(f"the body is longer than {most} bytes", status=413, headers=close)
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise refusal
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise refusal
    except TimeoutError:
        message = f"the body did not arrive within {_BODY_SECONDS:.0f} s"
        raise Refusal(message, status=408, headers=close) from None
    return bytes(body)


async def _watch_disconnect(request: Request, chunks: Chunks) -> None:
    """Puts None into the queue when the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    chunks.put_nowait(None)


class _Completion:
    """One call while it runs: makes a response from the chunks of its job."""

    def __init__(self, served: Served, call: Call, job: Job, chunks: Chunks) -> None:
        self._call, self._chunks, self.job = call, chunks, job
        self._outcomes = served.metrics.requests
        self._logprobs = call.settings.logprobs is not None
        self._token_ids = served.sampler.tokenizer is None
        self._builder = ResponseBuilder(
            served.name,
            call.settings.seed,
            int(time.time()),
            token_ids=self._token_ids,
            warnings=call.warnings(served.sampler.tokenizer),
        )
        self._choices = len(job.requests) * call.settings.samples
        self._ended = self._drawn = 0

    async def next(self) -> TextChunk:
        """The next chunk. Raises ClientDisconnect, or Refusal if the engine has ended."""
        chunk = await self._chunks.get()
        if chunk is None:
            raise ClientDisconnect
        if isinstance(chunk, GptjaxError):
            raise _engine_error(chunk)
        self._drawn += len(chunk.ids)
        self._ended += chunk.finish is not None
        return chunk

    async def whole(self) -> Response:
        """The response to a call that does not stream."""
        chunks: list[list[TextChunk]] = [[] for _ in range(self._choices)]
        while self._ended < self._choices:
            chunk = await self.next()
            chunks[chunk.choice].append(chunk)
        choices = [
            self._builder.choice(
                index,
                "".join(chunk.text for chunk in own),
                [i for chunk in own for i in chunk.ids],
                [one for chunk in own for one in chunk.tokens] if self._logprobs else None,
                own[-1].finish,
            )
            for index, own in enumerate(chunks)
        ]
        self._outcomes.labels("ok").inc()
        return _json(self._builder.whole(choices, self._usage()))

    async def events(self, chunk: TextChunk) -> AsyncGenerator[str, None]:
        """Server-sent events of this chunk and all that follow."""
        outcome = "gone"
        try:
            while True:
                if chunk.text or chunk.tokens or chunk.finish or self._token_ids:
                    yield _event(self._builder.whole([self._choice(chunk)], None))
                if self._ended == self._choices:
                    break
                chunk = await self.next()
            if self._call.usage:
                yield _event(self._builder.whole([], self._usage()))
            outcome = "ok"
            yield "data: [DONE]\n\n"
        except Refusal as error:
            outcome = "failed"
            yield _event(error.to_json())
        finally:
            self._outcomes.labels(outcome).inc()

    def _choice(self, chunk: TextChunk) -> dict[str, Any]:
        tokens = chunk.tokens if self._logprobs else None
        return self._builder.choice(chunk.choice, chunk.text, chunk.ids, tokens, chunk.finish)

    def _usage(self) -> dict[str, int]:
        prompts = sum(len(request.prompt) for request in self.job.requests)
        return protocol.usage_of(prompts, self._drawn)


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


class _EventStream(StreamingResponse):
    """A streaming response; cancels its job when it ends for any reason."""

    def __init__(self, completion: _Completion, first: TextChunk) -> None:
        self._job = completion.job
        self._events = completion.events(first)
        super().__init__(self._events, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()
            await self._events.aclose()
