"""Members of a pipeline die or hang at every point of a drop and a restore, while answers stream.

The process is hit the moment it gets to the point, by a signal that it sends itself
(`fault_points.py`). Clients read what they would have read, the survivor stays alive and serves,
and whoever comes back is a replica again.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Mapping

import aiohttp
import pytest
import pytest_asyncio

from tests.conftest import eventually
from tests.integration.clients import Answer, Streams, ask, completion
from tests.integration.fault_cases import (
    COMMITTING,
    DROPPED,
    EXCHANGING,
    LEAVING,
    POINTS,
    PREPARED,
    PREPARING,
    RECOVERY_SECONDS,
    RESTORED,
    RESTORING,
    ROLES,
    Point,
    bring_to,
    cases,
    is_at_rest,
    leading_planner,
    members_of_drop,
    recover,
    serves_alone,
)
from tests.integration.harness import Cluster
from tests.integration.layouts import Operator
from tests.integration.service_process import ServiceProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS = [completion(number, 500) for number in range(12)]
#: So many tokens have arrived everywhere when something happens.
UNDER_WAY = 30
SETTINGS = {
    "KUNSERVE_MIN_DWELL_SECONDS": "0",
    "KUNSERVE_LINK_BANDWIDTH": "2MB",  # the exchange takes long enough to be hit
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole_cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: Mapping[str, str]
) -> AsyncIterator[Cluster]:
    async with Cluster(
        tmp_path_factory.mktemp("cluster"),
        workers=2,
        planners=2,
        settings={**tiny_settings, **SETTINGS},
        has_fault_points=True,
    ) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(whole_cluster: Cluster) -> list[Answer]:
    """The answers to `REQUESTS` where nothing happens."""
    return await ask(whole_cluster.url, REQUESTS)


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(whole_cluster: Cluster, undisturbed: list[Answer]) -> AsyncIterator[Cluster]:
    """Replicas at rest, and at the end again, with nothing lost or left over."""
    operator = Operator(whole_cluster)
    await recover(whole_cluster, operator)
    yield whole_cluster
    await recover(whole_cluster, operator)
    await operator.check()


@pytest.mark.parametrize(
    ("point", "role"),
    cases(
        POINTS,
        {
            (COMMITTING, "follower"),
            (EXCHANGING, "leader"),
            (DROPPED, "follower"),
            (RESTORING, "leader"),
        },
    ),
)
async def test_a_member_is_killed(
    cluster: Cluster, undisturbed: list[Answer], point: Point, role: str
) -> None:
    members = await members_of_drop(cluster)
    victim = members[role]
    (survivor,) = set(cluster.workers) - {victim}
    pid = survivor.pid
    async with Streams([cluster.url], REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        await bring_to(cluster, point)
        cluster.signal_at(victim, point.state, victim.pid, signal.SIGKILL)
        await Operator(cluster).order(point.action)
        assert await victim.wait() == -signal.SIGKILL
        assert await streams.answers() == undisturbed
    assert await serves_alone(cluster, survivor)
    assert survivor.is_running
    assert survivor.pid == pid


@pytest.mark.parametrize(
    ("point", "role"),
    cases((PREPARED, EXCHANGING, DROPPED, RESTORING, LEAVING), {(DROPPED, "leader")}),
)
async def test_a_member_hangs_and_wakes_up(
    cluster: Cluster, undisturbed: list[Answer], point: Point, role: str
) -> None:
    """It finds its group broken, changes nothing by what it still says, and joins again."""
    members = await members_of_drop(cluster)
    hanging = members[role]
    (other,) = set(cluster.workers) - {hanging}
    async with Streams([cluster.url], REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        await bring_to(cluster, point)
        cluster.signal_at(hanging, point.state, hanging.pid, signal.SIGSTOP)
        try:
            await Operator(cluster).order(point.action)
            await eventually(lambda: serves_alone(cluster, other), RECOVERY_SECONDS)
            assert await streams.answers() == undisturbed
        finally:
            hanging.resume()
    await eventually(lambda: serves_alone(cluster, hanging), RECOVERY_SECONDS)
    assert await ask(cluster.url, REQUESTS) == undisturbed


@pytest.mark.parametrize(
    ("point", "role"),
    cases(
        (PREPARED, COMMITTING, EXCHANGING, DROPPED, RESTORING, RESTORED, LEAVING),
        {(EXCHANGING, "leader")},
    ),
)
async def test_the_leading_planner_is_killed_and_its_successor_goes_on(
    cluster: Cluster, undisturbed: list[Answer], point: Point, role: str
) -> None:
    members = await members_of_drop(cluster)
    async with Streams([cluster.url], REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        await bring_to(cluster, point)
        planner, breaks = await leading_planner(cluster), num_breaks(cluster)
        cluster.signal_at(members[role], point.state, planner.pid, signal.SIGKILL)
        await Operator(cluster).ask(point.action)  # it may die before it answers
        assert await planner.wait() == -signal.SIGKILL
        assert await streams.answers() == undisturbed
        await eventually(lambda: is_at_rest(cluster), RECOVERY_SECONDS)
    assert num_breaks(cluster) == breaks


@pytest.mark.parametrize(
    ("point", "role"),
    cases(
        (PREPARING, PREPARED, COMMITTING, EXCHANGING, DROPPED, RESTORING, RESTORED, LEAVING),
        {(DROPPED, "leader"), (COMMITTING, "follower")},
    ),
)
@pytest.mark.parametrize("keeps_store", [False, pytest.param(True, marks=pytest.mark.soak)])
async def test_nats_is_killed_and_comes_back(
    cluster: Cluster, undisturbed: list[Answer], point: Point, role: str, keeps_store: bool
) -> None:
    members = await members_of_drop(cluster)
    async with Streams([cluster.url], REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        await bring_to(cluster, point)
        cluster.signal_at(members[role], point.state, cluster.nats.pid, signal.SIGKILL)
        await Operator(cluster).ask(point.action)
        await cluster.nats.wait()
        if not keeps_store:
            cluster.wipe_nats_store()
        await cluster.nats.stop()
        await cluster.nats.start()
        assert await streams.answers() == undisturbed
        await eventually(lambda: is_at_rest(cluster), RECOVERY_SECONDS)


@pytest.mark.soak
@pytest.mark.parametrize("role", ROLES)
async def test_a_member_dies_while_nats_is_away(
    cluster: Cluster, undisturbed: list[Answer], role: str
) -> None:
    """Nobody hears what became of the requests before the routers ask."""
    members = await members_of_drop(cluster)
    (survivor,) = set(cluster.workers) - {members[role]}
    breaks = num_breaks(cluster)
    async with Streams([cluster.url], REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        await bring_to(cluster, RESTORING)
        await cluster.nats.kill()
        members[role].kill()
        await eventually(lambda: num_breaks(cluster) > breaks)
        await cluster.nats.start()
        assert await streams.answers() == undisturbed
    await eventually(lambda: serves_alone(cluster, survivor), RECOVERY_SECONDS)


@pytest.mark.parametrize("role", ["follower", pytest.param("leader", marks=pytest.mark.soak)])
async def test_a_member_that_is_told_to_end_leaves_when_nobody_needs_it(
    cluster: Cluster, undisturbed: list[Answer], role: str
) -> None:
    members = await members_of_drop(cluster)
    leaving = members[role]
    async with Streams([cluster.url], REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        await bring_to(cluster, RESTORING)
        moves, breaks = await num_replays(cluster), num_breaks(cluster)
        leaving.terminate()
        assert await streams.answers() == undisturbed
        assert await leaving.wait(RECOVERY_SECONDS) == 0
    assert await num_replays(cluster) == moves
    assert num_breaks(cluster) == breaks


async def test_a_member_that_is_drained_leaves_the_layout(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    """Until its group is restored the pipeline goes on, with new requests as well."""
    members = await members_of_drop(cluster)
    async with Streams([cluster.url], REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        await bring_to(cluster, RESTORING)
        moves = await num_replays(cluster)
        await drain(cluster, members["follower"])
        assert await ask(cluster.url, REQUESTS) == undisturbed
        assert await streams.answers() == undisturbed
    assert await num_replays(cluster) == moves
    await eventually(lambda: serves_alone(cluster, members["leader"]), RECOVERY_SECONDS)
    assert not await serves_alone(cluster, members["follower"])
    members["follower"].terminate()
    assert await members["follower"].wait() == 0


async def test_all_members_that_are_told_to_end_finish_what_they_run(
    cluster: Cluster, undisturbed: list[Answer]
) -> None:
    members = await members_of_drop(cluster)
    async with Streams([cluster.url], REQUESTS) as streams:
        await streams.wait_tokens(UNDER_WAY)
        await bring_to(cluster, RESTORING)
        moves = await num_replays(cluster)
        for worker in members.values():
            worker.terminate()
        assert await streams.answers() == undisturbed
    assert await num_replays(cluster) == moves
    assert [await worker.wait() for worker in members.values()] == [0, 0]


async def drain(cluster: Cluster, worker: ServiceProcess) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{cluster.url}/admin/drain", json={"worker": worker.name}) as response,
    ):
        assert response.status == 200, await response.text()


def num_breaks(cluster: Cluster) -> int:
    """Groups that broke so far, by each member that noticed."""
    return sum(worker.log.count("group broken") for worker in cluster.workers)


async def num_replays(cluster: Cluster) -> float:
    """Requests that lost their worker or their KV so far."""
    return await cluster.metric(cluster.routers[0], "kunserve_router_migrations_total")
