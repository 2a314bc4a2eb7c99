"""A server's metrics for Prometheus; each server has its own registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of requests and tokens, gauges of queue and slots, histograms of latency."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "gptjax_requests",
            "Completion requests by outcome: ok, refused (invalid), busy (the queue was full), "
            "gone (the client disconnected), failed (an error of the server)",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("ok", "refused", "busy", "gone", "failed"):
            self.requests.labels(outcome)  # so that each is exported from the start, as 0
        self.prompt_tokens = Counter(
            "gptjax_prompt_tokens", "Tokens of accepted prompts", registry=registry
        )
        self.completion_tokens = Counter(
            "gptjax_completion_tokens", "Tokens drawn", registry=registry
        )
        self.queue_length = Gauge(
            "gptjax_queue_length", "Samples that wait for a decode slot", registry=registry
        )
        self.slots = Gauge(
            "gptjax_rows", "Decode slots: most samples that decode at a time", registry=registry
        )
        self.busy_slots = Gauge("gptjax_rows_busy", "Decode slots in use", registry=registry)
        self.first_token = Histogram(
            "gptjax_first_token_seconds",
            "Time from a request's arrival in the queue to its first token",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.each_token = Histogram(
            "gptjax_token_seconds",
            "Time between two tokens of a sample",
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format, version 0.0.4."""
        return generate_latest(self.registry)
