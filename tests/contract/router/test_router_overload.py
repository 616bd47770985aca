"""What clients see when there is no room: they wait, or are told when to return."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from shared.bus.base import BusMessage
from shared.messages import GenerateStatus, QueueReport
from shared.subjects import Subjects
from tests.conftest import eventually
from tests.contract.router.router_requests import COMPLETIONS, body, expected
from tests.router_support import Cluster, post_stream
from tests.stub_worker import StubBehaviour


async def test_a_refusing_worker_passes_the_request_to_the_next(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(refuse_with=GenerateStatus.OVERLOADED))
    await cluster.add_worker("w1")
    await cluster.add_router()
    await cluster.ready()
    for seed in range(6):
        events = await post_stream(http, cluster.url + COMPLETIONS, body(seed))
        assert events.text == expected(seed)


async def test_requests_wait_in_the_router_until_a_worker_has_room(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    behaviour = StubBehaviour(refuse_with=GenerateStatus.OVERLOADED)
    await cluster.add_worker("w0", behaviour)
    service = await cluster.add_router()
    await cluster.ready()
    running = [
        asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body(seed)))
        for seed in range(10)
    ]
    await eventually(lambda: len(service.context.generator) == 10)
    behaviour.refuse_with = None
    answers = await asyncio.gather(*running)
    assert [events.text for events in answers] == [expected(seed) for seed in range(10)]


async def test_planners_are_told_what_waits_and_when_nothing_does(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    behaviour = StubBehaviour(refuse_with=GenerateStatus.OVERLOADED)
    await cluster.add_worker("w0", behaviour)
    await cluster.add_router()
    reports: list[QueueReport] = []

    async def take(message: BusMessage) -> None:
        reports.append(QueueReport.decode(message.payload))

    await cluster.bus.subscribe(Subjects("default").all_queues, take)
    await cluster.ready()
    running = [
        asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body(seed)))
        for seed in range(2)
    ]
    await eventually(lambda: bool(reports) and reports[-1].requests_waiting == 2)
    assert reports[-1].waiting_tokens >= 2
    behaviour.refuse_with = None
    await asyncio.gather(*running)
    await eventually(lambda: reports[-1].requests_waiting == reports[-1].waiting_tokens == 0)


@pytest.mark.parametrize(
    "limits", [{"max_queued_requests": 2}, {"max_queued_tokens": 5}], ids=["requests", "tokens"]
)
async def test_a_full_queue_refuses_with_429(
    cluster: Cluster, http: aiohttp.ClientSession, limits: dict[str, int]
) -> None:
    behaviour = StubBehaviour(refuse_with=GenerateStatus.OVERLOADED)
    await cluster.add_worker("w0", behaviour)
    service = await cluster.add_router(**limits)
    await cluster.ready()
    running = [
        asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body(seed)))
        for seed in range(2)
    ]
    await eventually(lambda: service.num_queued == 2)
    async with http.post(cluster.url + COMPLETIONS, json=body()) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert (await response.json())["error"]["code"] == 429
    behaviour.refuse_with = None
    assert [events.text for events in await asyncio.gather(*running)] == [expected(0), expected(1)]


async def test_a_busy_cluster_refuses_with_429_after_the_timeout(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_worker("w0", StubBehaviour(refuse_with=GenerateStatus.OVERLOADED))
    await cluster.add_router(queue_timeout_seconds=0.3)
    await cluster.ready()
    async with http.post(cluster.url + COMPLETIONS, json=body()) as response:
        assert response.status == 429
        assert "Retry-After" in response.headers


async def test_no_worker_is_503_after_the_timeout(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await cluster.add_router(no_worker_timeout_seconds=0.3)
    async with http.post(cluster.url + COMPLETIONS, json=body()) as response:
        assert response.status == 503
        assert "Retry-After" in response.headers


async def test_a_request_waits_for_the_first_worker(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    service = await cluster.add_router()
    running = asyncio.create_task(post_stream(http, cluster.url + COMPLETIONS, body()))
    await eventually(lambda: service.num_queued == 1)
    await cluster.add_worker("w0")
    assert (await running).text == expected()


async def test_too_long_for_every_worker_is_400(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    behaviour = StubBehaviour(refuse_with=GenerateStatus.TOO_LONG, refusal="never fits here")
    await cluster.add_worker("w0", behaviour)
    await cluster.add_router()
    await cluster.ready()
    async with http.post(cluster.url + COMPLETIONS, json=body()) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == "never fits here"


async def test_requests_spread_over_workers_by_free_kv(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    for name, blocks in (("small", 4), ("large", 400)):
        await cluster.add_worker(name, StubBehaviour(kv_blocks_total=blocks))
    await cluster.add_router()
    await cluster.ready()
    request = {"prompt": "x" * 40, "max_tokens": 10}
    await asyncio.gather(
        *(post_stream(http, cluster.url + COMPLETIONS, request) for _ in range(30))
    )
    assert len(cluster.workers["small"].requests) == 0
    assert len(cluster.workers["large"].requests) == 30
