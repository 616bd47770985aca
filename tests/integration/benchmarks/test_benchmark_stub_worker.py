"""The stub worker process speaks the protocol of a real one, on a real nats-server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.processes import ManagedProcess
from benchmarks.stub_engine import NUM_HOLD_DIGITS
from shared.bus.base import Bus, BusMessage, KeyValueEntry, NoRespondersError
from shared.bus.nats import connect
from shared.embedded_nats import EmbeddedNats
from shared.layout import Plan
from shared.messages import (
    FinishReason,
    GenerateReply,
    GenerateRequest,
    GenerateStatus,
    LoadReport,
    Ping,
    Resume,
    ResumeReply,
    TokenFrame,
    TokenItem,
    WorkerInfo,
    WorkerState,
)
from shared.sampling import SamplingParams
from shared.subjects import PLAN_KEY, Subjects, worker_key

SUBJECTS = Subjects("stubtest")
WORDS = (" the", " river", " and", " a", " stone")


def write_tokenizer(directory: Path) -> None:
    vocabulary = [*"0123456789", *(word.replace(" ", "Ġ") for word in WORDS), "<unk>"]
    model = models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    """A connection to a server on which two stub workers run."""
    write_tokenizer(tmp_path)
    async with EmbeddedNats() as nats:
        command = [sys.executable, "-m", "benchmarks.stub_worker", "--nats", nats.url]
        command += ["--deployment", SUBJECTS.deployment, "--model-dir", str(tmp_path)]
        command += ["--model-id", "m", "--steps-per-second", "200"]
        command += ["--stats", str(tmp_path / "stats.json")]
        async with ManagedProcess(command, log_path=tmp_path / "log"):
            connection = await connect(nats.url, service="test", instance="router")
            try:
                await wait_for_worker(connection)
                yield connection
            finally:
                await connection.close()
        assert json.loads((tmp_path / "stats.json").read_text())["tokens"] >= 0


async def wait_for_worker(bus: Bus) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await bus.request(SUBJECTS.control("stub-1"), Ping().encode(), timeout_seconds=5)
                return
            except NoRespondersError:
                await asyncio.sleep(0.02)


def request(max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id="r1",
        router_id="router-a",
        attempt=0,
        group_id="g0",
        epoch=1,
        dispatch_number=5,
        prompt_token_ids=b"",
        sampling=SamplingParams(max_tokens=max_tokens),
    )


async def subscribe_items(bus: Bus) -> asyncio.Queue[TokenItem]:
    items: asyncio.Queue[TokenItem] = asyncio.Queue()

    async def take(message: BusMessage) -> None:
        for item in TokenFrame.decode(message.payload).items:
            items.put_nowait(item)

    await bus.subscribe(SUBJECTS.tokens("router-a"), take)
    return items


async def test_a_request_is_accepted_and_streamed_to_its_end(bus: Bus) -> None:
    items = await subscribe_items(bus)
    answer = await bus.request(
        SUBJECTS.generate("stub-0"), request(12).encode(), timeout_seconds=10
    )
    assert GenerateReply.decode(answer).status is GenerateStatus.ACCEPTED
    position = 0
    finish_reason = None
    async with asyncio.timeout(10):
        while finish_reason is None:
            item = await items.get()
            assert (item.request_id, item.index) == ("r1", position)
            position += len(item.token_ids)
            finish_reason = item.finish_reason
    assert (position, finish_reason) == (12, FinishReason.LENGTH)


async def test_a_lost_part_is_sent_again(bus: Bus) -> None:
    await bus.request(SUBJECTS.generate("stub-0"), request(8000).encode(), timeout_seconds=10)
    items = await subscribe_items(bus)
    resume = Resume(request_id="r1", attempt=0, num_received=2).encode()
    answer = await bus.request(SUBJECTS.control("stub-0"), resume, timeout_seconds=10)
    assert ResumeReply.decode(answer).known
    async with asyncio.timeout(10):
        while (item := await items.get()).index != 2:
            pass
    assert len(item.token_ids) >= NUM_HOLD_DIGITS - 2
    unknown = Resume(request_id="nobody", attempt=0, num_received=0).encode()
    answer = await bus.request(SUBJECTS.control("stub-0"), unknown, timeout_seconds=10)
    assert not ResumeReply.decode(answer).known


async def test_plan_lease_and_load_are_published(bus: Bus) -> None:
    loads: asyncio.Queue[LoadReport] = asyncio.Queue()

    async def take(message: BusMessage) -> None:
        loads.put_nowait(LoadReport.decode(message.payload))

    plan = await (await bus.key_value(SUBJECTS.plan_bucket, history=8)).get(PLAN_KEY)
    assert len(Plan.decode(value_of(plan)).groups) == 2
    members = await bus.key_value(SUBJECTS.members_bucket, ttl_seconds=6.0)
    async with asyncio.timeout(10):
        async for entry in members.watch():
            if entry.key == worker_key("stub-0"):
                assert WorkerInfo.decode(value_of(entry)).state is WorkerState.READY
                break
    await bus.subscribe(SUBJECTS.all_loads, take)
    async with asyncio.timeout(10):
        assert (await loads.get()).kv_blocks_total > 0


def value_of(entry: KeyValueEntry | None) -> bytes:
    assert entry is not None
    assert entry.value is not None
    return entry.value
