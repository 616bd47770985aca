"""What counts as a bubble, and how far a cost model is called off."""

from __future__ import annotations

import pytest

from services.worker.engine.cost_model import ChunkShape, CostModel
from services.worker.engine.outputs import SchedulerLoad
from services.worker.engine_thread import EngineReport
from services.worker.meter import BatchTiming, EngineMeter, MeterReading, PredictionWindow
from services.worker.metrics import WorkerMetrics


def test_a_leader_that_waits_with_requests_waits_in_a_bubble() -> None:
    meter = EngineMeter()
    meter.worked(3.0)
    meter.waited(1.0, leads_work=True)
    meter.waited(10.0, leads_work=False)
    reading = meter.read()
    assert (reading.busy_seconds, reading.bubble_seconds) == (3.0, 1.0)


def test_a_thread_that_waits_while_its_device_computes_is_no_bubble() -> None:
    meter = EngineMeter()
    meter.waited(2.0, leads_work=True, is_computing=True)
    meter.waited(3.0, leads_work=False, is_computing=True)
    meter.batch_arrived(follows=True)
    reading = meter.read()
    assert (reading.busy_seconds, reading.bubble_seconds) == (5.0, 0.0)


def test_a_stage_learns_afterwards_whether_it_waited_in_a_bubble() -> None:
    meter = EngineMeter()
    meter.waited(5.0, leads_work=False)
    meter.batch_arrived(follows=False)  # the first request after a calm time
    assert meter.read().bubble_seconds == 0.0
    meter.waited(0.25, leads_work=False)
    meter.waited(0.25, leads_work=False)
    assert meter.read().bubble_seconds == 0.0
    meter.batch_arrived(follows=True)
    assert meter.read().bubble_seconds == 0.5
    meter.batch_arrived(follows=True)
    assert meter.read().bubble_seconds == 0.5


def test_a_leader_says_whether_its_work_ran_out() -> None:
    meter = EngineMeter()
    assert not meter.batch_sent()
    meter.waited(1.0, leads_work=True)
    assert meter.batch_sent()
    meter.waited(1.0, leads_work=False)
    assert not meter.batch_sent()
    assert meter.batch_sent()


def test_batches_are_predicted_once_there_is_a_model_and_read_once() -> None:
    meter = EngineMeter()
    meter.computed([ChunkShape(0, 4)], 3, 1.0)
    assert meter.read().timings == ()
    meter.layer = CostModel(alpha=0.0, beta=0.5, gamma=0.0, lam=0.0)
    meter.computed([ChunkShape(0, 4)], 3, 7.0)
    assert meter.read().timings == (BatchTiming(6.0, 7.0),)
    assert meter.read().timings == ()


def test_a_machine_that_is_slower_alike_makes_no_error() -> None:
    window = PredictionWindow()
    assert window.error() is None
    assert window.scale == 1.0
    window.add([BatchTiming(1.0, 2.0), BatchTiming(3.0, 6.0)])
    assert window.scale == 2.0
    assert window.error() == (0.0, 0.0)
    window.add([BatchTiming(4.0, 4.0)])
    error = window.error()
    assert error is not None
    assert 0.0 < error.mean <= error.p90


def test_old_batches_are_forgotten() -> None:
    window = PredictionWindow(num_batches=2)
    window.add([BatchTiming(1.0, 9.0), BatchTiming(1.0, 1.0), BatchTiming(2.0, 2.0)])
    assert window.error() == pytest.approx((0.0, 0.0))


def test_the_worker_shows_it_all_and_divides_by_no_zero() -> None:
    metrics = WorkerMetrics()
    load = SchedulerLoad(0, 0, 0, 0, 0, 0, 0)
    value = metrics.registry.get_sample_value
    metrics.observe(EngineReport((), load, 0, MeterReading(3.0, 1.0)))
    assert value("kunserve_stage_busy_seconds_total") == 3.0
    assert value("kunserve_stage_bubble_seconds_total") == 1.0
    assert value("vllm:kv_cache_usage_perc") == 0.0
    assert value("kunserve_cost_model_mean_error") is None
    timings = (BatchTiming(1.0, 1.5), BatchTiming(2.0, 3.0))
    metrics.observe(EngineReport((), load, 0, MeterReading(3.0, 1.0, timings)))
    assert value("kunserve_cost_model_mean_error") == pytest.approx(0.0)
    assert value("kunserve_cost_model_p90_error") == pytest.approx(0.0)
    assert value("kunserve_cost_model_scale") == pytest.approx(1.5)
