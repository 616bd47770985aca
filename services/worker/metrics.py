"""The worker's metrics: vLLM's names where the thing is the same, `kunserve_` for the rest.

What clients saw (tokens, latencies) is counted by the routers under vLLM's names;
the worker's own counts have names of their own, so that sums over all jobs count nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Counter, Summary
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.worker.engine.cost_model import PredictionError
from services.worker.engine.outputs import SchedulerLoad
from services.worker.engine_thread import EngineReport
from services.worker.meter import MeterReading, PredictionWindow
from services.worker.pipeline.events import PhaseTimed
from shared.metrics import new_registry


class WorkerMetrics(Collector):
    """Shows the engine's last load and counts what it produced."""

    def __init__(self, *others: Collector) -> None:
        self.registry = new_registry()
        self._load: SchedulerLoad | None = None
        self._reading = MeterReading()
        self._predictions = PredictionWindow()
        self._generated = Counter(
            "kunserve_worker_tokens", "tokens generated", registry=self.registry
        )
        self._finished = Counter(
            "kunserve_worker_requests",
            "requests ended, by reason",
            ["finished_reason"],
            registry=self.registry,
        )
        self._phase_seconds = Summary(
            "kunserve_phase_seconds",
            "time of the phases of drops and restores",
            ["phase"],
            registry=self.registry,
        )
        self._phase_bytes = Counter(
            "kunserve_phase_bytes",
            "weights given up or loaded, KV moved, by phase of drops and restores",
            ["phase"],
            registry=self.registry,
        )
        for collector in (self, *others):
            self.registry.register(collector)

    def observe(self, report: EngineReport) -> None:
        """Count what one round of the engine brought."""
        self._load, self._reading = report.load, report.reading
        self._predictions.add(report.reading.timings)
        for item in report.items:
            self._generated.inc(len(item.token_ids))
            if item.finish_reason is not None:
                self._finished.labels(item.finish_reason.value).inc()

        for event in report.events:
            if isinstance(event, PhaseTimed):
                self._phase_seconds.labels(event.phase.value).observe(event.seconds)
                self._phase_bytes.labels(event.phase.value).inc(event.num_bytes)

    def collect(self) -> Iterator[Metric]:
        load = self._load
        if load is None:
            return
        for name, text, value in (
            ("vllm:num_requests_running", "requests in the batch", load.requests_running),
            ("vllm:num_requests_waiting", "requests without KV", load.requests_waiting),
            (
                "vllm:kv_cache_usage_perc",
                "share of KV blocks in use, 0 to 1",
                load.kv_blocks_used / max(1, load.kv_blocks_total),
            ),
            ("kunserve_kv_blocks", "KV blocks in all", load.kv_blocks_total),
            ("kunserve_waiting_blocks", "KV blocks that the queue needs", load.waiting_blocks),
        ):
            yield GaugeMetricFamily(name, text, value=float(value))
        yield from self._cost_model()
        for name, text, value in (
            ("vllm:num_preemptions", "requests that gave their KV away", load.num_preemptions),
            ("kunserve_engine_steps", "batches computed", load.engine_steps),
            (
                "kunserve_stage_busy_seconds",
                "time as a stage of pipelines in which the engine worked",
                self._reading.busy_seconds,
            ),
            (
                "kunserve_stage_bubble_seconds",
                "time as a stage in which it waited though the leader had requests",
                self._reading.bubble_seconds,
            ),
        ):
            yield CounterMetricFamily(name, text, value=float(value))

    @property
    def prediction_error(self) -> PredictionError | None:
        """How far the cost model was off over the last batches; None before the first."""
        return self._predictions.error()

    def _cost_model(self) -> Iterator[Metric]:
        error = self.prediction_error
        if error is None:
            return
        for name, text, value in (
            ("mean_error", "mean relative error over the last batches", error.mean),
            ("p90_error", "90th percentile of the relative error", error.p90),
            ("scale", "measured over predicted time", self._predictions.scale),
        ):
            yield GaugeMetricFamily(f"kunserve_cost_model_{name}", text, value=value)
