"""The thread that owns the engine: jobs come in from any thread, pieces of text go out.

The engine is built, stepped and dropped in this one thread, on the mesh that is ambient where
`Worker.start` is called. It decodes in short bursts, so that a new job, or the end of one whose
client has left, waits for a few tokens only.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax

from gptjax.errors import GptjaxError
from gptjax.sample import Engine, Event, Request, Room, Sampler, SamplingParams
from gptjax.sample.decoding import READ
from gptjax.sample.sampler import accept
from gptjax.serve.metrics import Metrics
from gptjax.serve.token_text import Spelled, Spelling

BIASES = 300
"""Most tokens with a bias in a request, as in OpenAI's interface."""

_STREAMED_BURST = 1  # tokens between two looks at the queue while someone watches
_BURST = 8  # and otherwise

_log = logging.getLogger("gptjax.serve")


class Busy(GptjaxError):
    """The queue has no room for a job."""


class Failed(GptjaxError):
    """The engine has failed, and serves nothing more."""

    def __init__(self) -> None:
        super().__init__("the engine has failed; the server's log says why")


class Stopped(GptjaxError):
    """The server ends before a job has."""

    def __init__(self) -> None:
        super().__init__("the server is being stopped; try again later")


@dataclass(frozen=True)
class TensorMapping:
    """What is new of one continuation: certain text, and the tokens that were drawn.

    `spelled` are tokens whose text is out, of jobs that ask for log-probabilities. `finish` as in
    `sample.Event`, and "stop" after a stop text.
    """

    choice: int
    text: str
    ids: list[int]
    spelled: list[Spelled] = field(default_factory=list)
    finish: str | None = None


class Job:
    """Prompts to be continued by one client.

    `tell` is called in the worker's thread with each piece, or with a GptjaxError in place of all
    that are left. Choice i*n + k is sample k of prompt i.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        tell: Callable[[TensorMapping | GptjaxError], None],
        *,
        streamed: bool,
    ) -> None:
        self.requests, self.tell, self.streamed = requests, tell, streamed
        self.cancelled = False
        self.left = sum(request.settings.samples for request in requests)
        self.begun = time.perf_counter()

    def cancel(self) -> None:
        """Wants no more; its rows are free before the next burst. From any thread."""
        self.cancelled = True
        for request in self.requests:
            request.cancel()


class _Sample:
    """A continuation of a job while it is decoded."""

    def __init__(self, job: Job, request: Request, choice: int, sampler: Sampler) -> None:
        self.job, self._request, self._choice = job, request, choice
        self._text = sampler.continuation(request)
        self._stop_ids = request.stop_ids
        asked = request.settings.logprobs is not None
        self._spelling = Spelling(sampler, request.prompt) if asked else None
        self._held: list[Spelled] = []
        self.latest: float | None = None

    def take(self, event: Event) -> TensorMapping:
        """What an event makes known; cancels the sample at a stop text."""
        text = self._text
        tokens, new = accept(event.tokens, text, event.finish, self._stop_ids)
        finish = event.finish
        if text is not None and text.stopped:
            if finish is None:
                self._request.cancel(event.sample)
            finish = "stop"
        spelled: list[Spelled] = []
        if self._spelling is not None:
            self._held += map(self._spelling.add, tokens)
            out = 0 if text is None else len(text.text)
            if text is not None and text.stopped:  # what begins the stop text is no part of it
                self._held = [one for one in self._held if one.start < out]
            certain = len(self._held)
            if finish is None:
                certain = next((i for i, s in enumerate(self._held) if s.end > out), certain)
            spelled, self._held = self._held[:certain], self._held[certain:]
        return TensorMapping(self._choice, new, [token.id for token in tokens], spelled, finish)


class Worker:
    """Serves jobs with `rows` rows of `capacity` tokens; as many as `queue` samples wait."""

    def __init__(
        self, sampler: Sampler, metrics: Metrics, *, rows: int, capacity: int, queue: int
    ) -> None:
        self._sampler, self._metrics = sampler, metrics
        self._rows, self._capacity, self._queue = rows, capacity, queue
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._open = 0  # samples taken in and not ended
        self._stopping, self._deadline = False, math.inf
        self._failure: BaseException | None = None
        self._jobs: set[Job] = set()
        self._samples: dict[tuple[Request, int], _Sample] = {}
        self._thread: threading.Thread | None = None

    # --- what other threads see ---

    def start(self) -> float:
        """Builds the engine and runs a tiny request on it; returns the seconds that this took.

        Raises what either of them raises.
        """
        ready, began = threading.Event(), time.perf_counter()
        mesh = jax.sharding.get_mesh()

        def work() -> None:
            try:
                with jax.set_mesh(mesh):
                    engine = self._warm()
                    ready.set()
                    self._serve(engine)
            except BaseException as error:
                self._fail(error, told=ready.is_set())
                ready.set()

        self._thread = threading.Thread(target=work, name="engine", daemon=True)
        self._thread.start()
        ready.wait()
        if self._failure is not None:
            raise self._failure
        return time.perf_counter() - began

    def submit(self, job: Job) -> None:
        """Takes a job in. Raises Busy where the queue has no room for it, Stopped and Failed."""
        with self._changed:
            if self._stopping:
                raise Stopped
            if not self.alive:
                raise Failed
            if self._open + job.left > self._rows + self._queue:
                raise Busy(
                    f"the queue has no room for {job.left} more: {self._open} continuations are "
                    f"under way or wait, of at most {self._rows + self._queue}; try again later"
                )
            self._open += job.left
            self._inbox.append(job)
            self._changed.notify()
        self._metrics.prompt_tokens.inc(sum(len(request.prompt) for request in job.requests))

    def drain(self, seconds: float) -> None:
        """Ends after so long what is under way then. Takes no lock: a signal's handler may call."""
        self._deadline = time.monotonic() + seconds

    def stop(self, seconds: float) -> None:
        """Ends the thread, and waits for that at most so long. Jobs that are left are told."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Whether jobs are served."""
        return (
            self._thread is not None
            and self._thread.is_alive()
            and self._failure is None
            and not self._stopping
        )

    @property
    def rows(self) -> int:
        """Samples that decode at a time."""
        return self._rows

    # --- the thread ---

    def _warm(self) -> Engine:
        """An engine that has compiled what most requests need."""
        sampler = self._sampler
        room = Room(stops=max(1, len(sampler.stop_ids)), biases=BIASES, penalties=True)
        engine = sampler.engine(rows=self._rows, capacity=self._capacity, room=room)
        self._rows = engine.rows  # rounded up to what the mesh divides
        settings = SamplingParams(top_p=0.95, max_tokens=1, logprobs=5)
        prompt = [0] * min(READ + 2, self._capacity - 1)  # longer than what decoding reads itself
        engine.submit(Request(prompt, settings))
        for _ in engine.run():
            pass
        self._metrics.rows.set(self._rows)
        return engine

    def _serve(self, engine: Engine) -> None:
        metrics = self._metrics
        metrics.queue_length.set_function(
            lambda: engine.waiting + sum(job.left for job in self._inbox)
        )
        metrics.busy_rows.set_function(lambda: engine.busy)
        while True:
            with self._changed:
                while not (self._inbox or self._stopping or engine.busy or engine.waiting):
                    self._changed.wait()
                self._stopping |= time.monotonic() > self._deadline
                if self._stopping:
                    break
                new, self._inbox = self._inbox, []
            self._jobs.update(new)
            self._drop_cancelled()
            for job in new:
                self._seat(job, engine)
            watched = any(job.streamed for job in self._jobs)
            for event in engine.step(_STREAMED_BURST if watched else _BURST):
                self._tell(event)
        self._end(Stopped())

    def _seat(self, job: Job, engine: Engine) -> None:
        if job.cancelled:
            return
        choice = 0
        for request in job.requests:
            for sample in range(request.settings.samples):
                one = _Sample(job, request, choice, self._sampler)
                self._samples[request, sample] = one
                choice += 1
        engine.submit(*job.requests)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._jobs if job.cancelled]:
            self._jobs.remove(job)
            for request in job.requests:
                for sample in range(request.settings.samples):
                    self._samples.pop((request, sample), None)
            with self._changed:
                self._open -= job.left

    def _tell(self, event: Event) -> None:
        one = self._samples.get((event.request, event.sample))
        if one is None or not event.tokens:
            return
        now, job = time.perf_counter(), one.job
        piece = one.take(event)
        self._measure(one, len(piece.ids), now)
        if piece.finish is not None:
            del self._samples[event.request, event.sample]
            job.left -= 1
            with self._changed:
                self._open -= 1
            if not job.left:
                self._jobs.remove(job)
        job.tell(piece)

    def _measure(self, one: _Sample, count: int, now: float) -> None:
        metrics = self._metrics
        metrics.completion_tokens.inc(count)
        if one.latest is None:
            metrics.first_token.observe(now - one.job.begun)
        else:
            for _ in range(count):
                metrics.each_token.observe((now - one.latest) / count)
        one.latest = now

    def _fail(self, error: BaseException, *, told: bool) -> None:
        with self._changed:
            self._failure = error
        if told:
            _log.error("the engine has failed; requests are refused from now on", exc_info=error)
        self._end(Failed())

    def _end(self, error: GptjaxError) -> None:
        """Tells the jobs that are left that there will be no more."""
        with self._changed:
            jobs, self._inbox, self._open = {*self._jobs, *self._inbox}, [], 0
        self._jobs, self._samples = set(), {}
        for gauge in (self._metrics.queue_length, self._metrics.busy_rows):
            gauge.set_function(lambda: 0)
        for job in jobs:
            job.tell(error)
