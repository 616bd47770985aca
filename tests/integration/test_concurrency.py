"""Many streams at once, more than there is room for, and clusters that grow under load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.conftest import eventually
from tests.integration.clients import Answer, Streams, ask, completion
from tests.integration.harness import Cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_STREAMS = 200
NUM_TOKENS = 48
TOKENS_TOTAL = "kunserve_worker_tokens_total"
PREEMPTIONS_TOTAL = "vllm:num_preemptions_total"
ENDLESS = 2000
#: KV for a few dozen of the requests.
WORKER_MEMORY = "8MiB"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: Mapping[str, str]
) -> AsyncIterator[Cluster]:
    """Two routers, and two workers with KV for a part of what the tests ask for."""
    settings = {**tiny_settings, "KUNSERVE_DEVICE_MEMORY": WORKER_MEMORY}
    async with Cluster(
        tmp_path_factory.mktemp("cluster"), workers=2, routers=2, settings=settings
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def requests() -> list[dict[str, Any]]:
    """Requests of many lengths, whose answers need more KV than all workers have."""
    return [
        completion(number, NUM_TOKENS + number % 7, prompt=f"{number} " + "abc " * (number % 40))
        for number in range(NUM_STREAMS)
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(cluster: Cluster, requests: list[dict[str, Any]]) -> list[Answer]:
    """The answers to `requests` where nobody waits for anything."""
    answers: list[Answer] = []
    for start in range(0, len(requests), 20):
        answers += await ask(cluster.url, requests[start : start + 20])
    assert len({answer.text for answer in answers}) == len(requests)
    return answers


async def of_workers(cluster: Cluster, name: str) -> list[float]:
    """A metric of each running worker."""
    return [await cluster.metric(worker, name) for worker in cluster.workers if worker.is_running]


async def test_two_hundred_streams_get_their_own_tokens_in_order(
    cluster: Cluster, requests: list[dict[str, Any]], expected: list[Answer]
) -> None:
    before = await of_workers(cluster, TOKENS_TOTAL)
    assert sum(await of_workers(cluster, PREEMPTIONS_TOTAL)) == 0
    async with Streams(cluster.urls, requests) as streams:
        answers = await streams.answers()
    assert answers == expected
    after = await of_workers(cluster, TOKENS_TOTAL)
    assert all(b < a for b, a in zip(before, after, strict=True))  # they shared the work
    assert sum(await of_workers(cluster, PREEMPTIONS_TOTAL)) > 0


async def test_a_worker_that_joins_is_given_work(
    cluster: Cluster, requests: list[dict[str, Any]], expected: list[Answer]
) -> None:
    joined_is_ready = asyncio.Event()

    async def keep_the_others_busy() -> None:
        while not joined_is_ready.is_set():
            assert await ask(cluster.urls[1], requests[:8]) == expected[:8]

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(keep_the_others_busy())
        joined = cluster.add_worker()
        await cluster.wait_ready()
        joined_is_ready.set()
    async with Streams(cluster.urls, requests) as streams:
        assert await streams.answers() == expected
    assert await cluster.metric(joined, TOKENS_TOTAL) > 0
    joined.terminate()
    assert await joined.wait() == 0


async def test_two_hundred_streams_lose_a_worker_and_nothing_else(
    cluster: Cluster, requests: list[dict[str, Any]], expected: list[Answer]
) -> None:
    async with Streams(cluster.urls, requests) as streams:
        await eventually(lambda: sum(stream.num_tokens for stream in streams.streams) > NUM_STREAMS)
        cluster.workers[0].kill()
        cluster.workers[0].start()
        assert await streams.answers() == expected
    await cluster.wait_ready()


# --- more than there is room for -----------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small_cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: Mapping[str, str]
) -> AsyncIterator[Cluster]:
    """Room for two requests at the worker, and for two more that wait."""
    settings = {
        **tiny_settings,
        "KUNSERVE_MAX_NUM_REQUESTS": "2",
        "KUNSERVE_MAX_QUEUED_REQUESTS": "2",
        "KUNSERVE_NO_WORKER_TIMEOUT_SECONDS": "1",
    }
    async with Cluster(tmp_path_factory.mktemp("cluster"), workers=1, settings=settings) as cluster:
        yield cluster


async def status_and_retry_after(url: str, body: dict[str, Any]) -> tuple[int, str | None]:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
        session.post(f"{url}/v1/completions", json=body) as response,
    ):
        answer = await response.json()
        if response.status != 200:
            assert answer["error"]["code"] == response.status
        return response.status, response.headers.get("Retry-After")


async def test_what_neither_fits_nor_may_wait_is_refused_with_429(small_cluster: Cluster) -> None:
    cluster = small_cluster
    (router,) = cluster.routers
    waiting = [completion(number, 20) for number in range(2)]

    async def two_wait() -> bool:
        return await cluster.metric(router, "kunserve_router_queued_requests") == 2

    async with Streams(cluster.urls, [completion(n, ENDLESS) for n in range(2)]) as running:
        await running.wait_tokens(1)
        async with Streams(cluster.urls, waiting) as streams:
            await eventually(two_wait)
            for stream in (False, True):
                status, retry_after = await status_and_retry_after(
                    cluster.url, completion(0, 20, stream=stream)
                )
                assert status == 429
                assert int(retry_after or 0) >= 1
            await running.wait_tokens(2)  # those that run go on
            await running.disconnect()
            answers = await streams.answers()
    assert answers == await ask(cluster.url, waiting)


async def test_without_a_worker_requests_are_refused_with_503(small_cluster: Cluster) -> None:
    cluster = small_cluster
    (worker,) = cluster.workers
    request = completion(0, 20)
    (before,) = await ask(cluster.url, [request])
    worker.kill()
    status, retry_after = await status_and_retry_after(cluster.url, request)
    assert status == 503
    assert int(retry_after or 0) >= 1
    async with aiohttp.ClientSession() as session, session.get(f"{cluster.url}/health") as response:
        assert response.status == 503
    worker.start()
    await cluster.wait_ready()
    assert await ask(cluster.url, [request]) == [before]
