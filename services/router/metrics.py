"""The router's metrics: own names (`kunserve_router_`), and vLLM's where the meaning is the same.

No label holds a request id. The registry is the process's, served by `GET /metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_E2E_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


class Rejection(StrEnum):
    """Why a request was turned away."""

    QUEUE_FULL = "queue_full"
    NO_WORKER = "no_worker"
    DRAINING = "draining"


class RouterMetrics:
    """Counters, gauges and histograms of one router."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self.registry = registry
        self._model_name = model_name
        self.retries = self._counter(
            "kunserve_router_retries", "requests sent to another worker because one did not answer"
        )
        self.migrations = self._counter(
            "kunserve_router_migrations", "running requests replayed because their worker was lost"
        )
        self.cancellations = self._counter(
            "kunserve_router_cancellations", "requests cancelled at a worker before their end"
        )
        self.stream_gaps = self._counter(
            "kunserve_router_stream_gaps", "token frames noticed to be missing"
        )
        self.malformed = self._counter(
            "kunserve_router_malformed_messages", "messages on the bus that could not be read"
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "prompt tokens of all requests")
        self.generation_tokens = self._counter("vllm:generation_tokens", "tokens generated")
        self.time_to_first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "arrival to first token", _TTFT_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "vllm:inter_token_latency_seconds", "time between tokens", _ITL_BUCKETS
        )
        self.e2e_latency = self._histogram(
            "vllm:e2e_request_latency_seconds", "arrival to last token", _E2E_BUCKETS
        )
        self.queue_time = self._histogram(
            "vllm:request_queue_time_seconds", "time waiting for a seat at the worker", _E2E_BUCKETS
        )
        self._requests = Counter(
            "kunserve_router_requests",
            "HTTP requests by path and status",
            ["path", "code"],
            registry=self.registry,
        )
        self._rejections = Counter(
            "kunserve_router_rejections",
            "requests turned away",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self._success = Counter(
            "vllm:request_success",
            "requests that ended well",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )

    def count_request(self, path: str, status: int) -> None:
        """One HTTP request is answered; `path` is the route's pattern, not the client's text."""
        self._requests.labels(path, str(status)).inc()

    def reject(self, reason: Rejection) -> None:
        """One request is turned away."""
        self._rejections.labels(self._model_name, reason.value).inc()

    def finish(self, finish_reason: str) -> None:
        """One generation ended well."""
        self._success.labels(self._model_name, finish_reason).inc()

    def watch(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Show a value that is read whenever the metrics are."""
        gauge = Gauge(name, description, ["model_name"], registry=self.registry)
        gauge.labels(self._model_name).set_function(read)

    def _counter(self, name: str, description: str) -> Counter:
        counter = Counter(name, description, ["model_name"], registry=self.registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            name, description, ["model_name"], buckets=buckets, registry=self.registry
        )
        return histogram.labels(self._model_name)
