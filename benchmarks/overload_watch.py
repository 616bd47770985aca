"""What the cluster does while the overload benchmark runs: KV demand, capacity, drops, restores.

Listens on the bus like a router does; times are this process's monotonic clock, as the client's
are. The series is computed afterwards: at every load report, the sums over the groups in force.

    LoadReport of each leader --+
                                +--> LoadSample ... --> series of (time, demand, capacity)
    plan key ------------------ +--> LayoutChange ...
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from shared.buckets import open_plan
from shared.bus.base import Bus, BusMessage, KeyValue
from shared.layout import LayoutState, Plan, PlanPhase
from shared.messages import LoadReport
from shared.subjects import PLAN_KEY, Subjects


@dataclass(frozen=True, slots=True)
class LoadSample:
    """A load report and when it came."""

    at: float
    report: LoadReport


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """A plan and when it was seen."""

    at: float
    plan: Plan


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """The whole cluster at one moment, in KV blocks and requests."""

    at: float
    demand_blocks: int
    used_blocks: int
    capacity_blocks: int
    requests_waiting: int


@dataclass(slots=True)
class ClusterWatch:
    """Collects what is heard; `run` is a task of its owner."""

    loads: list[LoadSample] = field(default_factory=list)
    layouts: list[LayoutChange] = field(default_factory=list)

    async def run(self, bus: Bus, deployment: str) -> None:
        """Listen for ever."""
        subjects = Subjects(deployment)
        bucket = await open_plan(bus, subjects)
        await bus.subscribe(subjects.all_loads, self._on_load)
        await self._follow(bucket)

    async def _on_load(self, message: BusMessage) -> None:
        self.loads.append(LoadSample(time.monotonic(), LoadReport.decode(message.payload)))

    async def _follow(self, bucket: KeyValue) -> None:
        async with aclosing(bucket.watch()) as entries:
            async for entry in entries:
                if entry.key == PLAN_KEY and entry.value is not None:
                    self.layouts.append(LayoutChange(time.monotonic(), Plan.decode(entry.value)))

    @property
    def plan(self) -> Plan | None:
        """The plan as it is now."""
        return self.layouts[-1].plan if self.layouts else None

    async def wait_state(self, state: LayoutState, timeout_seconds: float) -> bool:
        """Wait until the layout is at rest in `state`; False where it is not in time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while self.plan is None or self.plan.state is not state:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)  # the plan is pushed; this only looks at it
        except TimeoutError:
            return False
        return True

    @property
    def num_preemptions(self) -> int:
        """Of all schedulers since their start."""
        latest: dict[str, int] = {}
        for sample in self.loads:
            latest[sample.report.worker_id] = sample.report.num_preemptions
        return sum(latest.values())

    def series(self) -> list[LoadPoint]:
        """The load at every report, of the groups that were in force then."""
        return load_series(self.loads, self.layouts)


def load_series(loads: Sequence[LoadSample], layouts: Sequence[LayoutChange]) -> list[LoadPoint]:
    """Sums over the groups in force; moments at which a group has not reported yet are left out."""
    points: list[LoadPoint] = []
    latest: dict[str, LoadReport] = {}
    upcoming = list(reversed(layouts))
    groups: dict[str, str] = {}
    for sample in loads:
        while upcoming and upcoming[-1].at <= sample.at:
            plan = upcoming.pop().plan
            groups = {group.group_id: group.leader for group in plan.serving_groups}
        latest[sample.report.worker_id] = sample.report
        reports = [latest.get(leader) for leader in groups.values()]
        known = [report for report in reports if report is not None]
        if not groups or {report.group_id for report in known} != groups.keys():
            continue
        used = sum(report.kv_blocks_used for report in known)
        points.append(
            LoadPoint(
                at=sample.at,
                demand_blocks=used + sum(report.waiting_blocks for report in known),
                used_blocks=used,
                capacity_blocks=sum(report.kv_blocks_total for report in known),
                requests_waiting=sum(report.requests_waiting for report in known),
            )
        )
    return points


def transition_starts(layouts: Sequence[LayoutChange], state: LayoutState) -> list[float]:
    """When drops (DROPPING) or restores (RESTORING) were committed."""
    committed: list[float] = []
    before: tuple[LayoutState, PlanPhase] | None = None
    for change in layouts:
        now = (change.plan.state, change.plan.phase)
        if now == (state, PlanPhase.COMMIT) and now != before:
            committed.append(change.at)
        before = now
    return committed
