"""Demand against capacity, its trend, and what counts as overload."""

from __future__ import annotations

import pytest

from services.planner.pressure import GroupLoad, Overload, Pressure, PressureMonitor, Thresholds
from tests.planner_support import make_pressure

THRESHOLDS = Thresholds()


def watch(demands: list[int], capacity: int = 100, step_seconds: float = 0.25) -> Pressure:
    """The last look after a series of demands on one group."""
    monitor = PressureMonitor(THRESHOLDS)
    look = None
    for index, demand in enumerate(demands):
        load = GroupLoad(capacity, min(demand, capacity), max(0, demand - capacity))
        look = monitor.observe({"g": load}, capacity, (), now=index * step_seconds)
    assert look is not None
    return look


def test_demand_is_what_runs_and_all_that_waits() -> None:
    monitor = PressureMonitor(THRESHOLDS)
    loads = {"a": GroupLoad(100, 90, 30), "b": GroupLoad(100, 10, 0)}
    look = monitor.observe(loads, 150, (), now=0.0)
    assert (look.demand_blocks, look.capacity_blocks, look.whole_blocks) == (130, 200, 150)
    assert look.num_short_groups == 1
    assert look.ratio == 0.65


@pytest.mark.parametrize(("queued", "is_short"), [(30, False), (31, True)])
def test_what_waits_in_routers_is_demand_and_short_where_nobody_has_room(
    queued: int, is_short: bool
) -> None:
    loads = {"a": GroupLoad(100, 80, 10), "b": GroupLoad(100, 80, 0)}
    look = PressureMonitor(THRESHOLDS).observe(loads, 200, (), 0.0, queued)
    assert look.demand_blocks == 170 + queued
    assert look.num_short_groups == 0
    assert look.is_queue_short is is_short
    assert look.overload(THRESHOLDS) is (Overload.NOW if is_short else None)


@pytest.mark.parametrize(
    ("demand", "short", "expected"),
    [(94, 1, None), (95, 0, None), (95, 1, Overload.NOW), (300, 2, Overload.NOW)],
)
def test_overload_is_high_demand_and_a_queue_that_does_not_fit(
    demand: int, short: int, expected: Overload | None
) -> None:
    look = make_pressure(demand, 100, num_short_groups=short, forecast_blocks=0)
    assert look.overload(THRESHOLDS) is expected


def test_an_unknown_load_is_no_overload() -> None:
    look = make_pressure(300, 100, unknown=frozenset("a"))
    assert look.overload(THRESHOLDS) is None


def test_what_is_lacking_counts_the_forecast() -> None:
    assert make_pressure(150, 100).lacking_blocks == 50
    assert make_pressure(90, 100, forecast_blocks=130.0).lacking_blocks == 30
    assert make_pressure(90, 100).lacking_blocks == 0


def test_a_steady_rise_is_seen_before_memory_is_short() -> None:
    look = watch([20 + 5 * k for k in range(13)])
    assert look.trend_blocks_per_second == pytest.approx(20.0)
    assert look.forecast_blocks == pytest.approx(120.0)
    assert look.overload(THRESHOLDS) is Overload.FORECAST
    assert look.is_rising(THRESHOLDS)


def test_a_rise_at_low_demand_is_not_believed() -> None:
    look = watch([4 + 5 * k for k in range(13)])
    assert look.forecast_blocks > 100
    assert look.overload(THRESHOLDS) is None


def test_noise_and_short_series_have_no_trend() -> None:
    assert not watch([50, 52, 49, 51, 50, 48, 51, 50, 52, 50]).is_rising(THRESHOLDS)
    assert watch([10, 90, 95]).trend_blocks_per_second == 0.0
    assert not watch([10, 90, 95]).is_window_full


def test_falling_demand_forecasts_no_less_than_there_is() -> None:
    look = watch([90 - 5 * k for k in range(13)])
    assert look.trend_blocks_per_second < 0
    assert look.forecast_blocks == look.demand_blocks


def test_the_peak_is_that_of_the_window() -> None:
    assert watch([90, *[10] * 10]).peak_blocks == 90
    assert watch([90, *[10] * 13]).peak_blocks == 10


def test_samples_with_unknown_loads_are_left_out() -> None:
    monitor = PressureMonitor(THRESHOLDS)
    for k in range(13):
        look = monitor.observe({"a": GroupLoad(100, 50, 0)}, 100, ("b",), now=k * 0.25)
    assert look.unknown == {"b"}
    assert not look.is_window_full


def test_an_empty_cluster_has_no_pressure() -> None:
    look = PressureMonitor(THRESHOLDS).observe({}, 0, (), now=0.0)
    assert look.ratio == 0.0
    assert look.overload(THRESHOLDS) is None
