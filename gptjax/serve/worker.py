"""The thread that owns the engine: it takes jobs from any thread and returns chunks of text.

The engine is built, stepped and dropped in this one thread, on the ambient mesh of `Worker.start`'s
caller. It decodes in short bursts, so that a new job, or the cancellation of one, waits for a few
tokens only.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax

from gptjax.errors import GptjaxError
from gptjax.sample import Engine, EngineLimits, Event, Request, Sampler, SamplingParams
from gptjax.sample.decoding import INLINE_PROMPT
from gptjax.sample.sampler import accept
from gptjax.serve.metrics import Metrics
from gptjax.serve.token_text import TokenText, TokenTextStream

BIASES = 300
"""Most biased tokens in a request, as in OpenAI's API."""

_STREAMED_BURST = 1  # decode steps between two looks at the queue, while a client streams
_BURST = 8  # otherwise

_log = logging.getLogger("gptjax.serve")


class Busy(GptjaxError):
    """The queue is full."""


class Failed(GptjaxError):
    """The engine has failed, and will serve no more jobs."""

    def __init__(self) -> None:
        super().__init__("the engine has failed; the server's log says why")


class Stopped(GptjaxError):
    """The server stops before a job has ended."""

    def __init__(self) -> None:
        super().__init__("the server is being stopped; try again later")


@dataclass(frozen=True)
class TextChunk:
    """New output of one continuation: final text, and the tokens that were drawn.

    `tokens` are those whose text is complete, if the job requests log-probabilities. `finish` is as
    in `sample.Event`, and "stop" after a stop text.
    """

    choice: int
    text: str
    ids: list[int]
    tokens: list[TokenText] = field(default_factory=list)
    finish: str | None = None


class Job:
    """The prompts of one client's request.

    `send` is called in the worker's thread with each chunk, or with a GptjaxError instead of all
    remaining ones. Choice i*n + k is sample k of prompt i.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        send: Callable[[TextChunk | GptjaxError], None],
        *,
        streamed: bool,
    ) -> None:
        self.requests, self.send, self.streamed = requests, send, streamed
        self.cancelled = False
        self.left = sum(request.settings.samples for request in requests)
        self.begun = time.perf_counter()

    def cancel(self) -> None:
        """Ends the job; its slots are free before the next burst. Any thread may call it."""
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
        self._token_texts = TokenTextStream(sampler, request.prompt) if asked else None
        self._pending: list[TokenText] = []
        self.latest: float | None = None

    def take(self, event: Event) -> TextChunk:
        """The chunk of an event; cancels the sample after a stop text."""
        text = self._text
        tokens, new = accept(event.tokens, text, event.finish, self._stop_ids)
        finish = event.finish
        if text is not None and text.stopped:
            if finish is None:
                self._request.cancel(event.sample)
            finish = "stop"
        done: list[TokenText] = []
        if self._token_texts is not None:
            self._pending += map(self._token_texts.add, tokens)
            out = 0 if text is None else len(text.text)
            if text is not None and text.stopped:  # without the tokens of the stop text
                self._pending = [one for one in self._pending if one.start < out]
            count = len(self._pending)
            if finish is None:
                count = next((i for i, t in enumerate(self._pending) if t.end > out), count)
                # One without text may be part of a character, and that of a stop text.
                while count and self._pending[count - 1].end == self._pending[count - 1].start:
                    count -= 1
            done, self._pending = self._pending[:count], self._pending[count:]
        return TextChunk(self._choice, new, [token.id for token in tokens], done, finish)


class Worker:
    """Serves jobs with `slots` decode slots of `capacity` tokens; at most `queue` samples wait."""

    def __init__(
        self, sampler: Sampler, metrics: Metrics, *, slots: int, capacity: int, queue: int
    ) -> None:
        self._sampler, self._metrics = sampler, metrics
        self._slots, self._capacity, self._queue = slots, capacity, queue
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._open = 0  # samples accepted and not ended
        self._stopping, self._deadline = False, math.inf
        self._failure: BaseException | None = None
        self._jobs: set[Job] = set()
        self._samples: dict[tuple[Request, int], _Sample] = {}
        self._thread: threading.Thread | None = None

    # --- for other threads ---

    def start(self) -> float:
        """Starts the thread, and waits until its engine is warmed up; returns the seconds taken.

        Raises the engine's error if it fails to warm up.
        """
        ready, began = threading.Event(), time.perf_counter()
        mesh = jax.sharding.get_mesh()

        def work() -> None:
            try:
                with jax.set_mesh(mesh):
                    engine = self._warm_up()
                    ready.set()
                    self._serve(engine)
            except BaseException as error:
                self._fail(error, log=ready.is_set())
                ready.set()

        self._thread = threading.Thread(target=work, name="engine", daemon=True)
        self._thread.start()
        ready.wait()
        if self._failure is not None:
            raise self._failure
        return time.perf_counter() - began

    def submit(self, job: Job) -> None:
        """Accepts a job. Raises Busy if the queue is full; Stopped; Failed."""
        with self._changed:
            if self._stopping:
                raise Stopped
            if not self.alive:
                raise Failed
            if self._open + job.left > self._slots + self._queue:
                raise Busy(
                    f"the queue has no space for {job.left} more: {self._open} continuations are "
                    f"running or queued, of at most {self._slots + self._queue}; try again later"
                )
            self._open += job.left
            self._inbox.append(job)
            self._changed.notify()
        self._metrics.prompt_tokens.inc(sum(len(request.prompt) for request in job.requests))

    def drain(self, seconds: float) -> None:
        """Stops after so many seconds. Takes no lock, so a signal handler may call it."""
        self._deadline = time.monotonic() + seconds

    def stop(self, seconds: float) -> None:
        """Stops the thread and waits for it at most so long. Remaining jobs get `Stopped`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Whether the worker serves jobs."""
        return (
            self._thread is not None
            and self._thread.is_alive()
            and self._failure is None
            and not self._stopping
        )

    @property
    def slots(self) -> int:
        """Samples that decode at a time."""
        return self._slots

    # --- the thread ---

    def _warm_up(self) -> Engine:
        """An engine that has compiled the programs of most requests."""
        sampler = self._sampler
        stops = max(1, len(sampler.stop_ids))
        limits = EngineLimits(stops=stops, biases=BIASES, penalties=True)
        engine = sampler.engine(slots=self._slots, capacity=self._capacity, limits=limits)
        self._slots = engine.slots  # rounded up
        settings = SamplingParams(top_p=0.95, max_tokens=1, logprobs=5)
        prompt = [0] * min(INLINE_PROMPT + 2, self._capacity - 1)  # long enough for a prefill
        engine.submit(Request(prompt, settings))
        for _ in engine.run():
            pass
        self._metrics.slots.set(self._slots)
        return engine

    def _serve(self, engine: Engine) -> None:
        metrics = self._metrics
        metrics.queue_length.set_function(
            lambda: engine.waiting + sum(job.left for job in self._inbox)
        )
        metrics.busy_slots.set_function(lambda: engine.busy)
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
                self._submit(job, engine)
            streamed = any(job.streamed for job in self._jobs)
            for event in engine.step(_STREAMED_BURST if streamed else _BURST):
                self._send(event)
        self._end(Stopped())

    def _submit(self, job: Job, engine: Engine) -> None:
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

    def _send(self, event: Event) -> None:
        one = self._samples.get((event.request, event.sample))
        if one is None or not event.tokens:
            return
        now, job = time.perf_counter(), one.job
        chunk = one.take(event)
        self._measure(one, len(chunk.ids), now)
        if chunk.finish is not None:
            del self._samples[event.request, event.sample]
            job.left -= 1
            with self._changed:
                self._open -= 1
            if not job.left:
                self._jobs.remove(job)
        job.send(chunk)

    def _measure(self, one: _Sample, count: int, now: float) -> None:
        metrics = self._metrics
        metrics.completion_tokens.inc(count)
        if one.latest is None:
            metrics.first_token.observe(now - one.job.begun)
        else:
            for _ in range(count):
                metrics.each_token.observe((now - one.latest) / count)
        one.latest = now

    def _fail(self, error: BaseException, *, log: bool) -> None:
        with self._changed:
            self._failure = error
        if log:
            _log.error("the engine has failed; requests are refused from now on", exc_info=error)
        self._end(Failed())

    def _end(self, error: GptjaxError) -> None:
        """Sends an error to all remaining jobs."""
        with self._changed:
            jobs, self._inbox, self._open = {*self._jobs, *self._inbox}, [], 0
        self._jobs, self._samples = set(), {}
        for gauge in (self._metrics.queue_length, self._metrics.busy_slots):
            gauge.set_function(lambda: 0)
        for job in jobs:
            job.send(error)
