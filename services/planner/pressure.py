"""How much KV memory the cluster needs against what it has, now and soon. Pure.

Everything is counted in blocks: 16 tokens of KV in all layers of the model. A request needs the
same number of them in every layout, a replica and a pipeline only have different numbers, so demand
means the same before, during and after a drop.

    demand  = blocks of running requests + blocks that all queued requests need, wherever they are
    forecast = demand + what its trend over the last seconds adds within the horizon
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When to drop and when to restore.

    Attributes:
        overload_ratio: share of capacity from which on a queue that does not fit is overload.
        forecast_floor_ratio: below this share of capacity no forecast is believed.
        restore_ratio: share of the capacity after a restore that demand must stay below.
        horizon_seconds: how far a trend is extended.
        window_seconds: how far back a trend looks, and for how long demand must have been low.
        rising_ratio: demand is not falling while it rises by this share of capacity per second.
        dwell_seconds: shortest time between two transitions, unless memory is short now.
    """

    overload_ratio: float = 0.95
    forecast_floor_ratio: float = 0.70
    restore_ratio: float = 0.50
    horizon_seconds: float = 2.0
    window_seconds: float = 3.0
    rising_ratio: float = 0.02
    dwell_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """The load of one group, in blocks."""

    total_blocks: int
    used_blocks: int
    waiting_blocks: int

    @property
    def demand_blocks(self) -> int:
        """What running and queued requests need."""
        return self.used_blocks + self.waiting_blocks

    @property
    def is_short(self) -> bool:
        """True if the queue needs more than is free."""
        return self.waiting_blocks > self.total_blocks - self.used_blocks


class Overload(StrEnum):
    """Why memory must be freed."""

    NOW = "now"
    FORECAST = "forecast"


@dataclass(frozen=True, slots=True)
class Pressure:
    """One look at the cluster.

    Attributes:
        whole_blocks: capacity if every worker were a replica.
        peak_blocks: the highest demand within the window.
        trend_blocks_per_second: slope of demand over the window; 0 while the window is short.
        num_short_groups: groups whose queue needs more than they have free.
        is_queue_short: what waits in routers needs more than the groups' own queues leave free.
        is_window_full: demand was known for most of the window, so its peak means something.
        unknown: workers whose load is not known; with any of them nothing is decided.
    """

    demand_blocks: int
    capacity_blocks: int
    whole_blocks: int
    forecast_blocks: float
    peak_blocks: int
    trend_blocks_per_second: float
    num_short_groups: int
    is_queue_short: bool = False
    is_window_full: bool = True
    unknown: frozenset[str] = frozenset()

    @property
    def ratio(self) -> float:
        """Demand as a share of capacity."""
        return self.demand_blocks / self.capacity_blocks if self.capacity_blocks else 0.0

    @property
    def lacking_blocks(self) -> int:
        """The paper's R: what the worse of demand and forecast needs beyond capacity."""
        needed = max(float(self.demand_blocks), self.forecast_blocks)
        return max(0, int(needed) - self.capacity_blocks)

    def overload(self, thresholds: Thresholds) -> Overload | None:
        """Whether memory is short, or will be."""
        if self.capacity_blocks == 0 or self.unknown:
            return None
        is_short = self.num_short_groups > 0 or self.is_queue_short
        if self.ratio >= thresholds.overload_ratio and is_short:
            return Overload.NOW
        is_high = self.ratio >= thresholds.forecast_floor_ratio
        if is_high and self.forecast_blocks > self.capacity_blocks:
            return Overload.FORECAST
        return None

    def is_rising(self, thresholds: Thresholds) -> bool:
        """Whether demand grows by more than noise."""
        return self.trend_blocks_per_second > thresholds.rising_ratio * self.capacity_blocks

    def figures(self) -> dict[str, float]:
        """For logs, metrics and `/cluster`."""
        return {
            "demand_blocks": self.demand_blocks,
            "capacity_blocks": self.capacity_blocks,
            "whole_blocks": self.whole_blocks,
            "forecast_blocks": round(self.forecast_blocks, 1),
            "peak_blocks": self.peak_blocks,
            "trend_blocks_per_second": round(self.trend_blocks_per_second, 1),
            "short_groups": self.num_short_groups,
            "ratio": round(self.ratio, 4),
        }


class PressureMonitor:
    """Remembers demand for the length of the window.

    `observe` is to be called a few times a second; times are seconds of one monotonic clock.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._samples: deque[tuple[float, int]] = deque()

    def observe(
        self,
        groups: Mapping[str, GroupLoad],
        whole_blocks: int,
        unknown: Collection[str],
        now: float,
        queued_blocks: int = 0,
    ) -> Pressure:
        """Take the loads of all groups.

        Args:
            groups: load of each group whose report is fresh.
            queued_blocks: what waits in routers, where no group has it.
            unknown: leaders without a fresh report: then demand is not known either, the sample is
                left out and the look says so.
        """
        in_groups = sum(load.demand_blocks for load in groups.values())
        capacity = sum(load.total_blocks for load in groups.values())
        demand = in_groups + queued_blocks
        if not unknown:
            self._samples.append((now, demand))
        while self._samples and self._samples[0][0] < now - self._thresholds.window_seconds:
            self._samples.popleft()
        trend = self._trend()
        return Pressure(
            demand_blocks=demand,
            capacity_blocks=capacity,
            whole_blocks=whole_blocks,
            forecast_blocks=demand + max(0.0, trend) * self._thresholds.horizon_seconds,
            peak_blocks=max((sample for _, sample in self._samples), default=demand),
            trend_blocks_per_second=trend,
            num_short_groups=sum(load.is_short for load in groups.values()),
            is_queue_short=queued_blocks > max(0, capacity - in_groups),
            is_window_full=self._covered_seconds >= 0.8 * self._thresholds.window_seconds,
            unknown=frozenset(unknown),
        )

    @property
    def _covered_seconds(self) -> float:
        return self._samples[-1][0] - self._samples[0][0] if self._samples else 0.0

    def _trend(self) -> float:
        """Least-squares slope of the samples; 0 while they cover less than a third of the window.

        The line weighs all samples of the window, so one burst of arrivals is no trend yet.
        """
        if self._covered_seconds < self._thresholds.window_seconds / 3 or len(self._samples) < 4:
            return 0.0
        mean_time = sum(time for time, _ in self._samples) / len(self._samples)
        mean_demand = sum(demand for _, demand in self._samples) / len(self._samples)
        covariance = sum((t - mean_time) * (d - mean_demand) for t, d in self._samples)
        return covariance / sum((t - mean_time) ** 2 for t, _ in self._samples)
