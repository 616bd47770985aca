"""Processes crash, hang and leave while answers stream: clients read the text they would have read.

Every answer is compared, token by token, with that of an undisturbed run of the same request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.conftest import eventually
from tests.integration.clients import Answer, Streams, ask, completion
from tests.integration.harness import Cluster
from tests.integration.service_process import ServiceProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS = [completion(number) for number in range(12)]
#: So many tokens have arrived everywhere when something happens: early in the streams.
UNDER_WAY = 20
#: Output of streams that a test ends, long before they would end themselves.
ENDLESS = 4000
RECOVERY_SECONDS = 30.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole_cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: Mapping[str, str]
) -> AsyncIterator[Cluster]:
    async with Cluster(
        tmp_path_factory.mktemp("cluster"),
        workers=2,
        routers=2,
        planners=2,
        settings=tiny_settings,
    ) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(whole_cluster: Cluster) -> list[Answer]:
    """The answers to `REQUESTS` where nothing happens."""
    answers = await ask(whole_cluster.url, REQUESTS)
    assert len({answer.text for answer in answers}) == len(REQUESTS)
    return answers


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(whole_cluster: Cluster, undisturbed: list[Answer]) -> AsyncIterator[Cluster]:
    """The cluster with everything running; what a test used is free again afterwards."""
    await whole_cluster.repair()
    for url in whole_cluster.urls:
        await eventually(partial(every_worker_takes_requests, whole_cluster, url))
    yield whole_cluster
    await whole_cluster.repair()
    for router in range(len(whole_cluster.routers)):
        await wait_idle(whole_cluster, router)


async def every_worker_takes_requests(cluster: Cluster, url: str) -> bool:
    """Whether a router spreads requests over all workers: it avoids one that failed for a while."""

    async def num_tokens() -> list[float]:
        name = "kunserve_worker_tokens_total"
        return [await cluster.metric(worker, name) for worker in cluster.workers]

    before = await num_tokens()
    await ask(url, [completion(number, max_tokens=2) for number in range(8)])
    after = await num_tokens()
    return all(b < a for b, a in zip(before, after, strict=True))


async def wait_idle(cluster: Cluster, router: int = 0) -> None:
    """Return when no request holds KV anywhere, as a router sees it."""

    async def is_idle() -> bool:
        view = await cluster.cluster(router)
        return all(
            group["requests_running"] == group["requests_waiting"] == group["kv_blocks_used"] == 0
            for group in view["groups"]
        )

    await eventually(is_idle, RECOVERY_SECONDS)


async def num_running_is(number: int, cluster: Cluster, router: int = 0) -> bool:
    """Whether so many requests run at the workers, as a router sees it."""
    view = await cluster.cluster(router)
    num_running: int = sum(group["requests_running"] for group in view["groups"])
    return num_running == number


async def wait_busy(cluster: Cluster, worker: ServiceProcess) -> None:
    """Return when a worker has open streams."""

    async def has_streams() -> bool:
        return bool((await cluster.state(worker))["open_streams"])

    await eventually(has_streams)


async def num_moves(cluster: Cluster) -> float:
    """Requests that routers moved to another worker, before or after the first had taken them."""
    names = ("kunserve_router_retries_total", "kunserve_router_migrations_total")
    return sum([await cluster.metric(router, name) for router in cluster.routers for name in names])


async def has_planner(cluster: Cluster) -> bool:
    """Whether a planner answers: this one refuses, as there is no such worker."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{cluster.url}/admin/drain", json={"worker": "nobody"}) as response,
    ):
        return response.status == 400


# --- workers -------------------------------------------------------------------------------------


async def test_workers_are_killed_and_come_back(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    for victim in cluster.workers:  # the streams of the second round run at the first one's victim
        moves = await num_moves(cluster)
        async with Streams(cluster.urls, REQUESTS) as streams:
            await streams.wait_tokens(UNDER_WAY)
            victim.kill()
            assert await streams.answers() == undisturbed
        assert await num_moves(cluster) > moves
        victim.start()
        await cluster.wait_ready()


async def test_the_only_worker_is_killed_and_its_successor_goes_on(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    first, second = cluster.workers
    first.terminate()
    assert await first.wait() == 0
    async with Streams(cluster.urls, REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        second.kill()
        second.start()
        assert await streams.answers() == undisturbed


async def test_answers_that_are_not_streamed_survive_a_kill(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    victim = cluster.workers[0]
    moves = await num_moves(cluster)
    running = asyncio.create_task(ask(cluster.url, REQUESTS))
    await wait_busy(cluster, victim)
    victim.kill()
    assert await running == undisturbed
    assert await num_moves(cluster) > moves


async def test_a_worker_that_hangs_repeats_nothing_when_it_wakes_up(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    hanging = cluster.workers[0]
    moves = await num_moves(cluster)
    async with Streams(cluster.urls, REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        hanging.pause()
        try:
            assert await streams.answers() == undisturbed
        finally:
            hanging.resume()
    assert await num_moves(cluster) > moves
    await cluster.wait_ready()
    assert await ask(cluster.urls[1], REQUESTS) == undisturbed


async def test_a_worker_that_hangs_for_a_moment_goes_on(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    hanging = cluster.workers[0]
    async with Streams(cluster.urls, REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        for most in range(2 * UNDER_WAY, 10 * UNDER_WAY, 2 * UNDER_WAY):
            hanging.pause()
            try:
                await eventually(partial(any_has, streams, most))
            finally:
                hanging.resume()
        assert await streams.answers() == undisturbed


def any_has(streams: Streams, num_tokens: int) -> bool:
    return any(stream.num_tokens >= num_tokens for stream in streams.streams)


async def test_a_drained_worker_finishes_what_it_runs(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    leaving, staying = cluster.workers
    async with Streams(cluster.urls, REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        moves = await num_moves(cluster)
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{cluster.url}/admin/drain", json={"worker": leaving.name}) as response,
        ):
            assert response.status == 200, await response.text()
        await eventually(lambda: serves_only(cluster, staying))
        assert await streams.answers() == undisturbed
    assert await num_moves(cluster) == moves
    taken = await cluster.metric(leaving, "kunserve_worker_tokens_total")
    assert await ask(cluster.url, REQUESTS) == undisturbed
    assert await cluster.metric(leaving, "kunserve_worker_tokens_total") == taken
    leaving.terminate()
    assert await leaving.wait() == 0


async def serves_only(cluster: Cluster, worker: ServiceProcess) -> bool:
    view = await cluster.cluster()
    return [group["leader"] for group in view["groups"]] == [worker.name]


async def test_a_worker_that_is_told_to_end_finishes_what_it_runs(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    leaving = cluster.workers[1]
    async with Streams(cluster.urls, REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        moves = await num_moves(cluster)
        leaving.terminate()
        assert await streams.answers() == undisturbed
    assert await leaving.wait() == 0
    assert await num_moves(cluster) == moves


# --- NATS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_store", [True, False])
async def test_nats_is_killed_and_comes_back(
    cluster: Cluster, undisturbed: list[Answer], keeps_store: bool
) -> None:
    before = await cluster.cluster()
    async with Streams(cluster.urls, REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        await cluster.nats.kill()
        if not keeps_store:
            cluster.wipe_nats_store()
        await cluster.nats.start()
        assert await streams.answers() == undisturbed
    await cluster.wait_ready()
    after = await cluster.cluster()
    assert (after["term"], after["epoch"]) >= (before["term"], before["epoch"])
    assert await ask(cluster.urls[1], REQUESTS) == undisturbed


async def test_nats_is_away_until_the_workers_have_long_finished(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    async def workers_are_done() -> bool:
        states = [await cluster.state(worker) for worker in cluster.workers]
        return not any(state["open_streams"] for state in states)

    async with Streams(cluster.urls, REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        await cluster.nats.kill()
        await eventually(workers_are_done)
        assert not all(stream.is_over for stream in streams.streams)
        await cluster.nats.start()
        assert await streams.answers() == undisturbed


# --- planners ------------------------------------------------------------------------------------


def layout(view: dict[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Who serves what; what the groups are busy with at the moment is left out."""
    return [(group["id"], group["leader"], group["members"]) for group in view["groups"]]


async def leaders(cluster: Cluster) -> list[ServiceProcess]:
    """The planners that believe to lead."""
    states = [(planner, await cluster.state(planner)) for planner in cluster.planners]
    return [planner for planner, state in states if state and state["role"] == "leading"]


async def test_the_leading_planner_is_killed_and_the_other_takes_over(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    await eventually(lambda: leaders(cluster))
    (victim,) = await leaders(cluster)
    (successor,) = [planner for planner in cluster.planners if planner is not victim]
    async with Streams(cluster.urls, REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        victim.kill()
        assert await streams.answers() == undisturbed

    async def has_taken_over() -> bool:
        return await leaders(cluster) == [successor] and await has_planner(cluster)

    await eventually(has_taken_over)


async def test_without_any_planner_requests_are_served_as_before(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    before = await cluster.cluster()
    async with Streams(cluster.urls, REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        for planner in cluster.planners:
            planner.kill()
        assert await streams.answers() == undisturbed
    assert not await has_planner(cluster)
    assert await ask(cluster.urls[1], REQUESTS) == undisturbed
    cluster.planners[0].start()
    await eventually(lambda: has_planner(cluster))
    after = await cluster.cluster()
    assert layout(after) == layout(before)
    assert (after["term"], after["epoch"]) >= (before["term"], before["epoch"])


async def test_a_planner_that_hangs_does_not_disturb_its_successor(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    await eventually(lambda: leaders(cluster))
    (hanging,) = await leaders(cluster)
    (successor,) = [planner for planner in cluster.planners if planner is not hanging]

    async def successor_leads() -> bool:
        return successor in await leaders(cluster)

    async with Streams(cluster.urls, REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        hanging.pause()
        try:
            await eventually(successor_leads)
            assert await streams.answers() == undisturbed
        finally:
            hanging.resume()

    async def only_the_successor_leads() -> bool:
        return await leaders(cluster) == [successor]

    await eventually(only_the_successor_leads)


# --- routers and clients -------------------------------------------------------------------------


async def test_a_killed_router_leaves_nothing_at_the_workers(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    victim, other = cluster.routers

    async with (
        Streams([victim.url], [completion(number, ENDLESS) for number in range(6)]) as lost,
        Streams([other.url], [completion(0, ENDLESS)]) as staying,
    ):
        await lost.wait_tokens(UNDER_WAY)
        await staying.wait_tokens(UNDER_WAY)
        async with Streams([other.url], REQUESTS) as streams:
            await streams.wait_tokens(UNDER_WAY)
            victim.kill()
            assert await streams.answers() == undisturbed
        for stream in lost.streams:
            with pytest.raises((aiohttp.ClientError, AssertionError)):
                await stream.result()
        await eventually(partial(num_running_is, 1, cluster, router=1))
        assert not staying.streams[0].is_over
    victim.start()
    await cluster.wait_ready()
    assert await ask(victim.url, REQUESTS) == undisturbed


async def test_a_router_that_is_told_to_end_finishes_what_it_runs(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    leaving, other = cluster.routers
    async with Streams([leaving.url], REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        leaving.terminate()
        assert await streams.answers() == undisturbed
    assert await leaving.wait() == 0
    assert await ask(other.url, REQUESTS) == undisturbed


async def test_a_router_that_hangs_has_missed_nothing(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    hanging, other = cluster.routers
    async with Streams([hanging.url], REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        hanging.pause()
        try:
            assert await ask(other.url, REQUESTS) == undisturbed
        finally:
            hanging.resume()
        assert await streams.answers() == undisturbed


async def test_clients_that_go_away_free_their_kv(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    gone = [completion(number, ENDLESS) for number in range(6)]
    waiting = asyncio.create_task(ask(cluster.url, gone))
    async with (
        Streams(cluster.urls, [completion(0, ENDLESS)]) as staying,
        Streams(cluster.urls, gone) as streams,
    ):
        await staying.wait_tokens(UNDER_WAY)
        await streams.wait_tokens(UNDER_WAY)
        waiting.cancel()
        await streams.disconnect()

        await eventually(partial(num_running_is, 1, cluster))
        await staying.wait_tokens(2 * UNDER_WAY)
    await wait_idle(cluster)
    assert await ask(cluster.url, REQUESTS) == undisturbed
