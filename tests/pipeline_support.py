"""Two real workers on one bus, and a client that writes the plans, as planner and router do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from services.worker.service import WorkerService
from services.worker.settings import WorkerSettings
from shared.buckets import open_acks, open_members, open_plan
from shared.bus.base import BusMessage
from shared.bus.memory import MemoryBus, MemoryServer
from shared.layout import Change, GroupPlan, LayoutState, MemberPlan, Plan, PlanPhase, Span
from shared.messages import (
    AckState,
    GenerateReply,
    GenerateRequest,
    GenerateStatus,
    LoadReport,
    PlanAck,
    TokenFrame,
    TokenItem,
    WorkerInfo,
    WorkerState,
    pack_token_ids,
)
from shared.sampling import SamplingParams
from shared.subjects import PLAN_KEY, Subjects, worker_key
from tests.conftest import eventually
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE
from tests.unit.model.model_helpers import random_tokens

SUBJECTS = Subjects("default")
ROUTER = "router-a"
WORKERS = ("worker-a", "worker-b")
PIPELINE = "p-1"
REPLY_SECONDS = 10.0
NUM_TOKENS = 150  # so many that no stream ends before the layout has changed
SAMPLINGS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
}


@dataclass
class Client:
    """A router's side of the protocol, and the planner's."""

    bus: MemoryBus
    items: list[TokenItem] = field(default_factory=list)
    speakers: dict[str, list[str]] = field(default_factory=dict)  # who sent it, by request
    loads: dict[str, LoadReport] = field(default_factory=dict)
    plan: Plan | None = None
    num_dispatches: int = 0
    workers: Sequence[str] = WORKERS

    async def start(self) -> None:
        await self.bus.subscribe(SUBJECTS.tokens(ROUTER), self._on_frame)
        await self.bus.subscribe(SUBJECTS.all_loads, self._on_load)
        self._plans = await open_plan(self.bus, SUBJECTS)
        self._acks = await open_acks(self.bus, SUBJECTS)
        self._members = await open_members(self.bus, SUBJECTS, 6.0)

    async def _on_frame(self, message: BusMessage) -> None:
        frame = TokenFrame.decode(message.payload)
        for item in frame.items:
            self.items.append(item)
            self.speakers.setdefault(item.request_id, []).append(frame.worker_id)

    async def _on_load(self, message: BusMessage) -> None:
        report = LoadReport.decode(message.payload)
        self.loads[report.worker_id] = report

    # --- plans -----------------------------------------------------------------------------------

    async def take_over(self) -> None:
        """Another planner leads: it writes the plan again, under its own term."""
        assert self.plan is not None
        self.plan = self.plan.model_copy(update={"term": self.plan.term + 1})
        await self._plans.put(PLAN_KEY, self.plan.encode())

    async def publish(
        self, groups: Sequence[GroupPlan], state: LayoutState, phase: PlanPhase, change: bool
    ) -> None:
        previous = self.plan.groups if self.plan is not None else ()
        epoch = self.plan.epoch + 1 if self.plan is not None else 1
        self.plan = Plan(
            term=self.plan.term if self.plan is not None else 1,
            epoch=epoch,
            state=state,
            phase=phase,
            model_id="tiny",
            num_layers=NUM_LAYERS,
            groups=tuple(groups),
            created_at=time.time(),
            change=Change(cause="test", started_at=0.0, previous_groups=previous)
            if change
            else None,
        )
        await self._plans.put(PLAN_KEY, self.plan.encode())

    async def answered(self, *states: AckState) -> bool:
        """Whether all workers said one of `states` to the newest plan."""
        assert self.plan is not None
        for worker_id in self.workers:
            entry = await self._acks.get(worker_id)
            if entry is None or entry.value is None:
                return False
            ack = PlanAck.decode(entry.value)
            if (ack.term, ack.epoch) != self.plan.version:
                return False
            if ack.state not in states:
                assert ack.state not in (AckState.REFUSED, AckState.FAILED), ack
                return False
        return True

    async def is_refused_by(self, worker_id: str) -> bool:
        """Whether a worker's newest word is that it refuses."""
        entry = await self._acks.get(worker_id)
        assert entry is not None
        assert entry.value is not None
        return PlanAck.decode(entry.value).state is AckState.REFUSED

    async def be_replicas(self) -> None:
        groups = [make_group(f"g-{worker_id}", [worker_id]) for worker_id in self.workers]
        await self.publish(groups, LayoutState.STABLE, PlanPhase.COMMIT, change=False)
        await self.settled()

    async def prepare(self) -> GroupPlan:
        assert self.plan is not None
        group = make_group(PIPELINE, list(WORKERS), self.plan.epoch + 1)
        await self.publish([group], LayoutState.DROPPING, PlanPhase.PREPARE, change=True)
        await eventually(lambda: self.answered(AckState.PREPARED))
        return group

    async def drop(self) -> None:
        group = await self.prepare()
        await self.publish([group], LayoutState.DROPPING, PlanPhase.COMMIT, change=True)
        await eventually(lambda: self.answered(AckState.APPLIED, AckState.SETTLED))

    async def restore(self) -> None:
        groups = [make_group(f"g-{worker_id}", [worker_id]) for worker_id in self.workers]
        await self.publish(groups, LayoutState.RESTORING, PlanPhase.PREPARE, change=True)
        await eventually(lambda: self.answered(AckState.PREPARED))
        await self.publish(groups, LayoutState.RESTORING, PlanPhase.COMMIT, change=True)
        await eventually(lambda: self.answered(AckState.APPLIED, AckState.SETTLED))

    async def regroup(self, state: LayoutState, *groups: Sequence[str]) -> None:
        """Go to another layout, each group named by its workers; returns when it is settled."""
        assert self.plan is not None
        epoch = self.plan.epoch + 1
        plans = [
            make_group(f"p-{g[0]}", g, epoch) if len(g) > 1 else make_group(f"g-{g[0]}", g)
            for g in groups
        ]
        await self.publish(plans, state, PlanPhase.PREPARE, change=True)
        await eventually(lambda: self.answered(AckState.PREPARED))
        await self.publish(plans, state, PlanPhase.COMMIT, change=True)
        await eventually(lambda: self.answered(AckState.APPLIED, AckState.SETTLED))
        await self.settled()

    async def settled(self) -> None:
        await eventually(lambda: self.answered(AckState.SETTLED))

    async def info(self, worker_id: str) -> WorkerInfo:
        entry = await self._members.get(worker_key(worker_id))
        assert entry is not None
        assert entry.value is not None
        return WorkerInfo.decode(entry.value)

    # --- requests --------------------------------------------------------------------------------

    async def generate(self, name: str, worker_id: str, group_id: str, **sampling: object) -> None:
        self.num_dispatches += 1
        parameters = {"max_tokens": NUM_TOKENS, "ignore_eos": True, **sampling}
        request = GenerateRequest(
            request_id=name,
            router_id=ROUTER,
            attempt=0,
            group_id=group_id,
            epoch=1,
            dispatch_number=self.num_dispatches,
            prompt_token_ids=pack_token_ids(prompt_of(name)),
            sampling=SamplingParams.model_validate(parameters),
            eos_token_ids=(VOCAB_SIZE - 1,),
        )
        answer = await self.bus.request(
            SUBJECTS.generate(worker_id), request.encode(), timeout_seconds=REPLY_SECONDS
        )
        reply = GenerateReply.decode(answer)
        assert reply.status is GenerateStatus.ACCEPTED, reply

    def of(self, name: str) -> list[TokenItem]:
        return [item for item in self.items if item.request_id == name]

    def ended(self, name: str) -> bool:
        return any(item.finish_reason is not None for item in self.of(name))

    async def tokens(self, name: str) -> list[int]:
        """All tokens of a stream that has ended; none may be missing or come twice."""
        await eventually(lambda: self.ended(name), 60.0)
        tokens: list[int] = []
        for item in self.of(name):
            assert item.error == ""
            assert item.index == len(tokens)
            tokens += item.token_ids
        return tokens

    def is_idle(self) -> bool:
        return all(
            report.kv_blocks_used == 0 and report.requests_running == 0
            for report in self.loads.values()
        )


def prompt_of(name: str) -> list[int]:
    return random_tokens(8 + 7 * (len(name) + ord(name[-1]) % 5), sum(name.encode()), VOCAB_SIZE)


def make_group(group_id: str, worker_ids: Sequence[str], epoch: int = 0) -> GroupPlan:
    bounds = [NUM_LAYERS * position // len(worker_ids) for position in range(len(worker_ids) + 1)]
    members = tuple(
        MemberPlan(worker_id=worker_id, span=Span(start=start, end=end))
        for worker_id, start, end in zip(worker_ids, bounds, bounds[1:], strict=False)
    )
    return GroupPlan(group_id=group_id, epoch=epoch, members=members)


@asynccontextmanager
async def running_worker(server: MemoryServer, worker_id: str, model: Path) -> AsyncIterator[None]:
    bus = MemoryBus(server, worker_id)
    settings = WorkerSettings.model_validate(
        {
            "worker_id": worker_id,
            "model": str(model),
            "device_memory": "2MiB",
            "chunk_bytes": "16KiB",
            "threads": 1,
            "max_num_batched_tokens": 32,
            "max_num_seqs": 16,
            "drain_timeout_seconds": 0.5,
        }
    )
    stop = asyncio.Event()
    service = asyncio.create_task(WorkerService(settings, bus).run(stop))
    members = await open_members(bus, SUBJECTS, settings.lease_ttl_seconds)

    async def is_ready() -> bool:
        if service.done():
            service.result()
        entry = await members.get(worker_key(worker_id))
        if entry is None or entry.value is None:
            return False
        return WorkerInfo.decode(entry.value).state is WorkerState.READY

    await eventually(is_ready)
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait([service], timeout=30.0)
        await bus.close()


@asynccontextmanager
async def running_cluster(model: Path, workers: Sequence[str] = WORKERS) -> AsyncIterator[Client]:
    """Replicas that the plan knows."""
    server = MemoryServer(time.monotonic)
    async with AsyncExitStack() as stack:
        client = Client(MemoryBus(server, "test"), workers=workers)
        stack.push_async_callback(client.bus.close)
        await client.start()
        for worker_id in workers:
            await stack.enter_async_context(running_worker(server, worker_id, model))
        await client.be_replicas()
        yield client


async def start_streams(client: Client) -> dict[str, dict[str, object]]:
    """A few streams on each worker, each of which has tokens already."""
    streams = {}
    for worker_id in WORKERS:
        for kind, sampling in SAMPLINGS.items():
            for number in range(2):
                name = f"{worker_id}-{kind}-{number}"
                streams[name] = sampling
                await client.generate(name, worker_id, f"g-{worker_id}", **sampling)
    await eventually(lambda: all(client.of(name) for name in streams))
    return streams
