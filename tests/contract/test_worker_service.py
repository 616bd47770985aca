"""A whole worker, with a tiny real model, on a bus: what routers and planners may rely on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from services.worker.service import WorkerService
from services.worker.settings import WorkerSettings
from shared.buckets import open_acks, open_members, open_plan
from shared.bus.base import Bus, BusMessage, NoRespondersError
from shared.bus.memory import MemoryBus, MemoryServer
from shared.layout import GroupPlan, LayoutState, MemberPlan, Plan, PlanPhase, Span
from shared.messages import (
    AckState,
    Cancel,
    Drain,
    FinishReason,
    GenerateReply,
    GenerateRequest,
    GenerateStatus,
    LoadReport,
    Ping,
    PlanAck,
    Resume,
    ResumeReply,
    TokenFrame,
    TokenItem,
    WorkerInfo,
    WorkerState,
    pack_token_ids,
)
from shared.sampling import SamplingParams
from shared.subjects import PLAN_KEY, Subjects, worker_key
from tests.conftest import eventually
from tests.stub_worker import publish_plan
from tests.tiny_models import MAX_MODEL_LEN, NUM_LAYERS, VOCAB_SIZE, TinyModels

WORKER, ROUTER = "worker-a", "router-a"
GROUP = f"g-{WORKER}"
SUBJECTS = Subjects("default")
PROMPT = [5, 17, 42, 99, 3]
REPLY_SECONDS = 10.0


class Client:
    """A router's side of the protocol, keeping everything it is told."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.items: list[TokenItem] = []
        self.load: LoadReport | None = None
        self._dispatches = 0

    async def start(self) -> None:
        await self.bus.subscribe(SUBJECTS.tokens(ROUTER), self._on_frame)
        await self.bus.subscribe(SUBJECTS.all_loads, self._on_load)

    async def _on_frame(self, message: BusMessage) -> None:
        self.items.extend(TokenFrame.decode(message.payload).items)

    async def _on_load(self, message: BusMessage) -> None:
        self.load = LoadReport.decode(message.payload)

    async def generate(
        self,
        request_id: str,
        prompt: list[int] = PROMPT,
        output: tuple[int, ...] = (),
        attempt: int = 0,
        group_id: str = GROUP,
        **sampling: object,
    ) -> GenerateReply:
        self._dispatches += 1
        parameters = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **sampling}
        request = GenerateRequest(
            request_id=request_id,
            router_id=ROUTER,
            attempt=attempt,
            group_id=group_id,
            epoch=1,
            dispatch_number=self._dispatches,
            prompt_token_ids=pack_token_ids(prompt),
            output_token_ids=pack_token_ids(output),
            sampling=SamplingParams.model_validate(parameters),
            eos_token_ids=(VOCAB_SIZE - 1,),
        )
        answer = await self.bus.request(
            SUBJECTS.generate(WORKER), request.encode(), timeout_seconds=REPLY_SECONDS
        )
        return GenerateReply.decode(answer)

    async def tokens(self, request_id: str, attempt: int = 0) -> list[int]:
        """All output tokens of a stream, checked for gaps; returns when it has ended."""
        await eventually(lambda: self.ended(request_id, attempt))
        items = self.of(request_id, attempt)
        tokens: list[int] = []
        for item in items:
            assert item.index == items[0].index + len(tokens)
            tokens.extend(item.token_ids)
        return tokens

    def of(self, request_id: str, attempt: int = 0) -> list[TokenItem]:
        return [
            item for item in self.items if (item.request_id, item.attempt) == (request_id, attempt)
        ]

    def ended(self, request_id: str, attempt: int = 0) -> bool:
        return any(item.finish_reason is not None for item in self.of(request_id, attempt))


@asynccontextmanager
async def running_worker(
    server: MemoryServer, model: Path, **settings: object
) -> AsyncIterator[asyncio.Event]:
    """A worker that is ready and placed in a group; yields the event that stops it."""
    bus = MemoryBus(server, "test")
    worker_settings = WorkerSettings.model_validate(
        {
            "worker_id": WORKER,
            "model": str(model),
            "device_memory": "2MiB",
            "chunk_bytes": "16KiB",
            "threads": 1,
            "drain_timeout_seconds": 20.0,
            **settings,
        }
    )
    stop = asyncio.Event()
    service = asyncio.create_task(WorkerService(worker_settings, bus).run(stop))
    members = await open_members(bus, SUBJECTS, worker_settings.lease_ttl_seconds)

    async def is_ready() -> bool:
        if service.done():
            service.result()
        entry = await members.get(worker_key(WORKER))
        return (
            entry is not None
            and entry.value is not None
            and WorkerInfo.decode(entry.value).state is WorkerState.READY
        )

    await eventually(is_ready)
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(service, timeout=30.0)
        await bus.close()


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(time.monotonic)


@pytest_asyncio.fixture
async def client(server: MemoryServer, tiny_models: TinyModels) -> AsyncIterator[Client]:
    """A router's client of a ready worker."""
    bus = MemoryBus(server, "test")
    client = Client(bus)
    await client.start()
    async with running_worker(server, tiny_models.directory("llama")):
        await publish_plan(bus, [WORKER])
        await eventually(lambda: client.load is not None and client.load.group_id == GROUP)
        yield client
    await bus.close()


async def test_tokens_arrive_in_order_and_end(client: Client) -> None:
    assert (await client.generate("a")).status is GenerateStatus.ACCEPTED
    assert len(await client.tokens("a")) == 12
    assert [item.index for item in client.of("a")] == list(range(12))
    assert client.of("a")[-1].finish_reason is FinishReason.LENGTH


async def test_a_request_that_is_not_for_this_group_is_stale(client: Client) -> None:
    reply = await client.generate("a", group_id="g-other")
    assert reply.status is GenerateStatus.STALE_EPOCH


@pytest.mark.parametrize(
    ("prompt", "status"),
    [
        ([1] * MAX_MODEL_LEN, GenerateStatus.TOO_LONG),
        ([], GenerateStatus.INVALID),
        ([VOCAB_SIZE], GenerateStatus.INVALID),
    ],
)
async def test_what_cannot_be_served_is_refused_with_a_reason(
    client: Client, prompt: list[int], status: GenerateStatus
) -> None:
    reply = await client.generate("a", prompt=prompt)
    assert reply.status is status
    assert reply.detail


async def test_garbage_is_answered(client: Client) -> None:
    answer = await client.bus.request(
        SUBJECTS.generate(WORKER), b"\xc1garbage", timeout_seconds=REPLY_SECONDS
    )
    assert GenerateReply.decode(answer).status is GenerateStatus.INVALID
    assert (await client.generate("a")).status is GenerateStatus.ACCEPTED


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7, "top_p": 0.95}])
async def test_a_replay_continues_where_the_client_stands(
    client: Client, sampling: dict[str, object]
) -> None:
    await client.generate("a", **sampling)
    tokens = await client.tokens("a")
    await client.generate("a", output=tuple(tokens[:5]), attempt=1, **sampling)
    assert await client.tokens("a", attempt=1) == tokens[5:]
    assert client.of("a", attempt=1)[0].index == 5


async def test_lost_tokens_can_be_had_again(client: Client) -> None:
    await client.generate("a")
    tokens = await client.tokens("a")
    client.items.clear()
    reply = await client.bus.request(
        SUBJECTS.control(WORKER),
        Resume(request_id="a", attempt=0, num_received=4).encode(),
        timeout_seconds=REPLY_SECONDS,
    )
    assert ResumeReply.decode(reply).known
    assert await client.tokens("a") == tokens[4:]


async def test_an_unknown_stream_is_said_to_be_unknown(client: Client) -> None:
    reply = await client.bus.request(
        SUBJECTS.control(WORKER),
        Resume(request_id="x", attempt=0, num_received=0).encode(),
        timeout_seconds=REPLY_SECONDS,
    )
    assert not ResumeReply.decode(reply).known


async def test_a_cancelled_request_gives_its_memory_back(client: Client) -> None:
    await client.generate("a", max_tokens=200)
    await eventually(lambda: client.of("a"))
    cancel = Cancel(request_id="a", attempt=0)
    await client.bus.publish(SUBJECTS.control(WORKER), cancel.encode())
    await eventually(
        lambda: (
            client.load is not None
            and client.load.received.get(ROUTER) == 1
            and client.load.kv_blocks_used == 0
            and client.load.requests_running == 0
        )
    )
    assert not client.ended("a")


async def test_a_router_that_vanished_is_not_served_any_more(
    client: Client, server: MemoryServer
) -> None:
    await client.generate("a", max_tokens=200)
    await eventually(lambda: client.of("a"))
    watcher = Client(MemoryBus(server, "test"))
    await watcher.bus.subscribe(SUBJECTS.all_loads, watcher._on_load)
    await client.bus.close()
    await eventually(
        lambda: (
            watcher.load is not None
            and watcher.load.kv_blocks_used == 0
            and watcher.load.requests_running == 0
        )
    )
    await watcher.bus.close()


async def test_a_router_may_be_slower_to_come_back_from_an_outage(
    client: Client, server: MemoryServer
) -> None:
    await client.generate("a", max_tokens=200)
    await eventually(lambda: client.of("a"))
    server.stop()
    await client.bus.close()
    server.start(wipe_store=False)
    late = Client(MemoryBus(server, "test"))
    await late.bus.subscribe(SUBJECTS.all_loads, late._on_load)
    await eventually(lambda: late.load)  # token frames were sent before it, and found nobody
    await late.bus.subscribe(SUBJECTS.tokens(ROUTER), late._on_frame)
    resume = Resume(request_id="a", attempt=0, num_received=0)

    async def has_ended() -> bool:
        await late.bus.request(
            SUBJECTS.control(WORKER), resume.encode(), timeout_seconds=REPLY_SECONDS
        )
        return late.ended("a")

    await eventually(has_ended)
    assert late.of("a")[-1].finish_reason is FinishReason.LENGTH
    await late.bus.close()


async def test_load_reports_say_which_requests_they_include(client: Client) -> None:
    for number, request_id in enumerate("abc", start=1):
        await client.generate(request_id)
        await eventually(
            lambda number=number: (
                client.load is not None and client.load.received.get(ROUTER) == number
            )
        )


async def test_a_draining_worker_finishes_and_takes_nothing_new(client: Client) -> None:
    await client.generate("a", max_tokens=100)
    await client.bus.request(
        SUBJECTS.control(WORKER), Drain().encode(), timeout_seconds=REPLY_SECONDS
    )
    assert (await client.generate("b")).status is GenerateStatus.DRAINING
    assert len(await client.tokens("a")) == 100
    await eventually(lambda: client.load is not None and client.load.draining)


async def test_many_requests_share_the_worker_and_none_is_disturbed(client: Client) -> None:
    await client.generate("alone")
    alone = await client.tokens("alone")
    names = [f"r{number}" for number in range(40)]
    for name in names:
        assert (await client.generate(name)).status is GenerateStatus.ACCEPTED
    assert all([await client.tokens(name) == alone for name in names])


async def test_a_worker_says_what_it_is_and_acknowledges_the_plan(client: Client) -> None:
    acks = await open_acks(client.bus, SUBJECTS)

    async def acknowledged() -> bool:
        entry = await acks.get(WORKER)
        return (
            entry is not None
            and entry.value is not None
            and PlanAck.decode(entry.value).state is AckState.SETTLED
        )

    await eventually(acknowledged)
    await client.bus.request(
        SUBJECTS.control(WORKER), Ping().encode(), timeout_seconds=REPLY_SECONDS
    )


async def test_a_stopped_worker_leaves_at_once(
    server: MemoryServer, tiny_models: TinyModels
) -> None:
    bus = MemoryBus(server, "test")
    async with running_worker(server, tiny_models.directory("llama")) as stop:
        stop.set()
        members = await open_members(bus, SUBJECTS, 6.0)

        async def has_left() -> bool:
            return worker_key(WORKER) not in await members.entries()

        await eventually(has_left)
    with pytest.raises(NoRespondersError):
        await bus.request(SUBJECTS.control(WORKER), Ping().encode(), timeout_seconds=1.0)
    await bus.close()


async def test_a_plan_for_a_part_of_the_model_is_refused_and_service_goes_on(
    client: Client,
) -> None:
    half = NUM_LAYERS // 2
    members = (
        MemberPlan(worker_id=WORKER, span=Span(start=0, end=half)),
        MemberPlan(worker_id="worker-b", span=Span(start=half, end=NUM_LAYERS)),
    )
    plan = Plan(
        term=2,
        epoch=2**60,
        state=LayoutState.DROPPING,
        phase=PlanPhase.PREPARE,
        model_id="tiny",
        num_layers=NUM_LAYERS,
        groups=(GroupPlan(group_id="pair", members=members),),
        created_at=0.0,
    )
    plans, acks = await open_plan(client.bus, SUBJECTS), await open_acks(client.bus, SUBJECTS)
    await plans.put(PLAN_KEY, plan.encode())

    async def refused() -> bool:
        entry = await acks.get(WORKER)
        return (
            entry is not None
            and entry.value is not None
            and PlanAck.decode(entry.value).state is AckState.REFUSED
        )

    await eventually(refused)
    assert (await client.generate("a")).status is GenerateStatus.ACCEPTED
    assert len(await client.tokens("a")) == 12
