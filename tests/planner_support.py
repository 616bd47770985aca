"""Workers that exist only as leases, acknowledgements and control answers, to test planners."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from services.planner.decision import decide
from services.planner.inputs import Inputs
from services.planner.pressure import Pressure
from services.planner.service import serve
from services.planner.settings import PlannerSettings
from shared.buckets import open_acks, open_members, open_plan
from shared.bus.base import Bus, BusMessage
from shared.layout import Plan, Span, TransitionLog
from shared.membership import Lease
from shared.messages import (
    AckState,
    AdminReply,
    Drain,
    PlanAck,
    WorkerInfo,
    WorkerState,
    decode_control,
)
from shared.subjects import PLAN_KEY, TRANSITIONS_KEY, Subjects, worker_key

NUM_LAYERS = 4
LEASE_TTL_SECONDS = 2.0


def worker_info(worker_id: str, **changes: Any) -> WorkerInfo:
    """A ready worker that holds the whole model."""
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "incarnation": "1",
        "host": "host",
        "pid": 1,
        "state": WorkerState.READY,
        "model_id": "model",
        "num_layers": NUM_LAYERS,
        "max_model_len": 2048,
        "device": "cpu",
        "dtype": "float32",
        "block_size": 16,
        "kv_block_bytes": 1024,
        "memory_bytes": 2**30,
        "weight_bytes": 2**29,
        "kv_bytes": 2**28,
        "free_bytes": 2**28,
        "layers": (Span(start=0, end=NUM_LAYERS),),
        "started_at": 0.0,
    }
    return WorkerInfo(**fields | changes)


def workers(*ids: str) -> dict[str, WorkerInfo]:
    """Ready workers by id."""
    return {worker_id: worker_info(worker_id) for worker_id in ids}


def plan_for(*ids: str, term: int = 1, epoch: int = 1) -> Plan:
    """The stable plan of these workers."""
    published = decide(Inputs(term=term, workers=workers(*ids))).plan
    assert published is not None
    return published.model_copy(update={"term": term, "epoch": epoch})


def make_pressure(demand_blocks: int, capacity_blocks: int, **changes: Any) -> Pressure:
    """A look at a cluster whose demand is steady."""
    fields: dict[str, Any] = {
        "demand_blocks": demand_blocks,
        "capacity_blocks": capacity_blocks,
        "whole_blocks": capacity_blocks,
        "forecast_blocks": demand_blocks,
        "peak_blocks": demand_blocks,
        "trend_blocks_per_second": 0.0,
        "num_short_groups": int(demand_blocks > capacity_blocks),
    }
    return Pressure(**fields | changes)


class PaperWorker:
    """Keeps a lease, applies plans as soon as it sees them, takes Drain."""

    def __init__(self, bus: Bus, deployment: str, worker_id: str) -> None:
        self._bus = bus
        self._subjects = Subjects(deployment)
        self.info = worker_info(worker_id)
        self.applied: list[tuple[int, int]] = []
        self.refuses_to_drain = ""

    @asynccontextmanager
    async def living(self) -> AsyncIterator[PaperWorker]:
        """Live until the context is left, then leave properly."""
        members = await open_members(self._bus, self._subjects, LEASE_TTL_SECONDS)
        key = worker_key(self.info.worker_id)
        self._lease = Lease(self._bus, members, key, self.info, LEASE_TTL_SECONDS)
        control = await self._bus.subscribe(
            self._subjects.control(self.info.worker_id), self._on_control
        )
        tasks = [asyncio.create_task(self._lease.run()), asyncio.create_task(self._follow_plan())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await control.unsubscribe()
            await self._lease.release()

    def become(self, **changes: Any) -> None:
        """Change the lease."""
        self.info = self.info.model_copy(update=changes)
        self._lease.update(self.info)

    async def _on_control(self, message: BusMessage) -> None:
        assert isinstance(decode_control(message.payload), Drain)
        if not self.refuses_to_drain:
            self.become(state=WorkerState.DRAINING)
        reply = AdminReply(error=self.refuses_to_drain)
        await self._bus.publish(message.reply, reply.encode())

    async def _follow_plan(self) -> None:
        plans = await open_plan(self._bus, self._subjects)
        acks = await open_acks(self._bus, self._subjects)
        async with aclosing(plans.watch()) as changes:
            async for entry in changes:
                if entry.key != PLAN_KEY or entry.value is None:
                    continue
                plan = Plan.decode(entry.value)
                if self.applied and plan.version <= self.applied[-1]:
                    continue
                self.applied.append(plan.version)
                ack = PlanAck(
                    worker_id=self.info.worker_id,
                    term=plan.term,
                    epoch=plan.epoch,
                    state=AckState.APPLIED,
                )
                await acks.put(self.info.worker_id, ack.encode())


@asynccontextmanager
async def running_planner(
    bus: Bus, deployment: str, planner_id: str = "p0", **changes: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """A planner until the context is left; cancel the task to kill it without a goodbye."""
    settings = PlannerSettings(
        deployment=deployment,
        planner_id=planner_id,
        lease_ttl_seconds=LEASE_TTL_SECONDS,
        **changes,
    )
    stop = asyncio.Event()
    task = asyncio.create_task(serve(bus, settings, stop))
    try:
        yield task
    finally:
        stop.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 20)


async def read_plan(bus: Bus, deployment: str) -> Plan | None:
    """The plan in the store."""
    entry = await (await open_plan(bus, Subjects(deployment))).get(PLAN_KEY)
    return Plan.decode(entry.value) if entry is not None and entry.value is not None else None


async def read_transitions(bus: Bus, deployment: str) -> TransitionLog:
    """The log of transitions in the store."""
    entry = await (await open_plan(bus, Subjects(deployment))).get(TRANSITIONS_KEY)
    if entry is None or entry.value is None:
        return TransitionLog()
    return TransitionLog.decode(entry.value)


def plan_is(bus: Bus, deployment: str, *worker_ids: str) -> Callable[[], Awaitable[bool]]:
    """A condition: the plan has exactly these workers, each a group of one."""

    async def condition() -> bool:
        plan = await read_plan(bus, deployment)
        if plan is None:
            return False
        return [group.leader for group in plan.groups] == sorted(worker_ids)

    return condition
