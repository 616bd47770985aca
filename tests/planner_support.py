"""Workers that exist only as leases, acknowledgements and control answers, to test planners."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from services.planner.decision import decide
from services.planner.inputs import Inputs
from services.planner.pressure import Pressure
from services.planner.service import serve
from services.planner.settings import PlannerSettings
from shared.buckets import open_acks, open_members, open_plan
from shared.bus.base import Bus, BusMessage
from shared.layout import GroupPlan, Plan, PlanPhase, Span, TransitionLog
from shared.membership import Lease
from shared.messages import (
    AckState,
    AdminReply,
    Drain,
    LoadReport,
    PlanAck,
    WorkerInfo,
    WorkerState,
    decode_control,
)
from shared.subjects import PLAN_KEY, TRANSITIONS_KEY, Subjects, worker_key

NUM_LAYERS = 4
LEASE_TTL_SECONDS = 2.0
MEMORY_BYTES = 2**30
LAYER_BYTES = 2**27
KV_LAYER_BLOCK_BYTES = 2**17
#: Blocks of a replica, and blocks that fit into one copy of the model.
WHOLE_BLOCKS = COPY_BLOCKS = 1024


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
        "kv_block_bytes": KV_LAYER_BLOCK_BYTES * NUM_LAYERS,
        "memory_bytes": MEMORY_BYTES,
        "weight_bytes": LAYER_BYTES * NUM_LAYERS,
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


@dataclass
class Behaviour:
    """How a paper worker answers; None: not at all."""

    prepare: AckState | None = AckState.PREPARED
    commit: AckState | None = AckState.APPLIED
    settle: AckState | None = AckState.SETTLED


class PaperWorker:
    """Keeps a lease, follows plans as a worker must, takes Drain, reports load where it leads."""

    def __init__(self, bus: Bus, deployment: str, worker_id: str) -> None:
        self._bus = bus
        self._subjects = Subjects(deployment)
        self.info = worker_info(worker_id)
        self.applied: list[tuple[int, int]] = []
        self.prepared: list[tuple[int, int]] = []
        self.refuses_to_drain = ""
        self.behaviour = Behaviour()
        self.demand_blocks: int | None = None  # None: sends no reports
        self.num_load_reports = 0
        self._plan: Plan | None = None

    @asynccontextmanager
    async def living(self) -> AsyncIterator[PaperWorker]:
        """Live until the context is left, then leave properly."""
        members = await open_members(self._bus, self._subjects, LEASE_TTL_SECONDS)
        self._acks = await open_acks(self._bus, self._subjects)
        key = worker_key(self.info.worker_id)
        self._lease = Lease(self._bus, members, key, self.info, LEASE_TTL_SECONDS)
        control = await self._bus.subscribe(
            self._subjects.control(self.info.worker_id), self._on_control
        )
        self._tasks = [
            asyncio.create_task(self._lease.run()),
            asyncio.create_task(self._follow_plan()),
            asyncio.create_task(self._report()),
        ]
        try:
            yield self
        finally:
            await self._stop()
            await control.unsubscribe()
            await self._lease.release()

    async def die(self) -> None:
        """Leave at once, as seen by others: no more answers, and the lease is gone."""
        await self._stop()
        await self._lease.release()

    def become(self, **changes: Any) -> None:
        """Change the lease."""
        self.info = self.info.model_copy(update=changes)
        self._lease.update(self.info)

    async def answer(self, plan: Plan, state: AckState | None, detail: str = "") -> None:
        """Acknowledge a plan."""
        if state is None:
            return
        ack = PlanAck(
            worker_id=self.info.worker_id,
            term=plan.term,
            epoch=plan.epoch,
            state=state,
            detail=detail,
        )
        await self._acks.put(self.info.worker_id, ack.encode())

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _on_control(self, message: BusMessage) -> None:
        assert isinstance(decode_control(message.payload), Drain)
        if not self.refuses_to_drain:
            self.become(state=WorkerState.DRAINING)
        reply = AdminReply(error=self.refuses_to_drain)
        await self._bus.publish(message.reply, reply.encode())

    async def _follow_plan(self) -> None:
        plans = await open_plan(self._bus, self._subjects)
        async with aclosing(plans.watch()) as changes:
            async for entry in changes:
                if entry.key == PLAN_KEY and entry.value is not None:
                    await self._take(Plan.decode(entry.value))

    async def _take(self, plan: Plan) -> None:
        if self._plan is not None and plan.version <= self._plan.version:
            return
        self._plan = plan
        if plan.phase is PlanPhase.PREPARE:
            self.prepared.append(plan.version)
            await self.answer(plan, self.behaviour.prepare, "as the test wants")
            return
        self.applied.append(plan.version)
        self._hold_span(plan)
        await self.answer(plan, self.behaviour.commit, "as the test wants")
        if plan.change is not None and self.behaviour.commit is AckState.APPLIED:
            await self.answer(plan, self.behaviour.settle, "as the test wants")

    def _hold_span(self, plan: Plan) -> None:
        group = plan.group_of(self.info.worker_id)
        spans = (
            [m.span for m in group.members if m.worker_id == self.info.worker_id] if group else []
        )
        if spans and self.info.layers != tuple(spans):
            self.become(**figures_of(spans[0]))

    async def _report(self) -> None:
        while True:
            if self.demand_blocks is not None and self._plan is not None:
                await self._publish_load(self._plan, self.demand_blocks)
            await asyncio.sleep(0.05)

    async def _publish_load(self, plan: Plan, demand_blocks: int) -> None:
        groups = [g for g in plan.serving_groups if g.leader == self.info.worker_id]
        if not groups:
            return
        total = blocks_of(groups[0])
        report = LoadReport(
            worker_id=self.info.worker_id,
            group_id=groups[0].group_id,
            epoch=plan.epoch,
            block_size=16,
            kv_blocks_total=total,
            kv_blocks_used=min(total, demand_blocks),
            requests_running=1,
            requests_waiting=0,
            waiting_blocks=max(0, demand_blocks - total),
        )
        await self._bus.publish(self._subjects.load(self.info.worker_id), report.encode())
        self.num_load_reports += 1


def figures_of(span: Span) -> dict[str, Any]:
    """The lease of a `worker_info` worker that holds only `span`."""
    weight_bytes = LAYER_BYTES * len(span)
    return {
        "layers": (span,),
        "weight_bytes": weight_bytes,
        "kv_bytes": MEMORY_BYTES - weight_bytes,
        "free_bytes": 0,
        "kv_block_bytes": KV_LAYER_BLOCK_BYTES * len(span),
    }


def blocks_of(group: GroupPlan) -> int:
    """KV blocks of a group of `worker_info` workers: those of its poorest stage."""
    return min(
        (MEMORY_BYTES - LAYER_BYTES * len(member.span)) // (KV_LAYER_BLOCK_BYTES * len(member.span))
        for member in group.members
    )


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
