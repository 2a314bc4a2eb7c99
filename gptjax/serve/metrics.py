"""What a server counts and measures, for Prometheus; each server has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of requests and tokens, gauges of queue and rows, histograms of latency."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = {"registry": self.registry}
        self.requests = Counter(
            "gptjax_requests",
            "Completion requests: ok, refused (the request's fault), busy (the queue was full), "
            "gone (the client left), failed (the server's fault)",
            ["outcome"],
            **of,
        )
        for outcome in ("ok", "refused", "busy", "gone", "failed"):
            self.requests.labels(outcome)  # so that all are there, with 0
        self.prompt_tokens = Counter("gptjax_prompt_tokens", "Tokens of accepted prompts", **of)
        self.completion_tokens = Counter("gptjax_completion_tokens", "Tokens drawn", **of)
        self.queue_length = Gauge("gptjax_queue_length", "Samples without a row yet", **of)
        self.rows = Gauge("gptjax_rows", "Samples that decode at a time, at most", **of)
        self.busy_rows = Gauge("gptjax_rows_busy", "Samples that decode now", **of)
        self.first_token = Histogram(
            "gptjax_first_token_seconds",
            "From a request's arrival at the queue to its first token",
            buckets=FIRST_TOKEN,
            **of,
        )
        self.each_token = Histogram(
            "gptjax_token_seconds",
            "Between two tokens of a sample",
            buckets=EACH_TOKEN,
            **of,
        )

    def exposition(self) -> bytes:
        """All of them in Prometheus' text format, version 0.0.4."""
        return generate_latest(self.registry)
