"""Planners with workers on a bus: the plan follows the workers, through failovers and outages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import aiohttp
import pytest
import pytest_asyncio

from shared.buckets import open_leader, open_plan
from shared.bus.base import Bus, NoRespondersError, RevisionConflictError
from shared.bus.memory import MemoryBus, MemoryServer
from shared.bus.nats import connect
from shared.embedded_nats import EmbeddedNats
from shared.messages import AdminAction, AdminReply, AdminRequest, LeaderLease
from shared.subjects import LEADER_KEY, PLAN_KEY, Subjects
from tests.conftest import eventually
from tests.planner_support import (
    LEASE_TTL_SECONDS,
    PaperWorker,
    plan_is,
    read_plan,
    read_transitions,
    running_planner,
)

Connect = Callable[[], Awaitable[Bus]]


@pytest.fixture(params=["memory", "nats"])
def server(request: pytest.FixtureRequest) -> MemoryServer | EmbeddedNats:
    """Where planners and workers meet; the test may kill it."""
    if request.param == "memory":
        return MemoryServer(clock=time.monotonic)
    real: EmbeddedNats = request.getfixturevalue("own_nats_server")
    return real


@pytest_asyncio.fixture
async def connect_bus(server: MemoryServer | EmbeddedNats) -> AsyncIterator[Connect]:
    buses: list[Bus] = []

    async def make() -> Bus:
        instance = f"i{len(buses)}"
        bus: Bus = (
            MemoryBus(server, instance)
            if isinstance(server, MemoryServer)
            else await connect(server.url, service="test", instance=instance)
        )
        buses.append(bus)
        return bus

    yield make
    for bus in buses:
        await bus.close()


@pytest_asyncio.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Holds planners and workers until the test ends."""
    async with AsyncExitStack() as contexts:
        yield contexts


async def restart_empty(server: MemoryServer | EmbeddedNats) -> None:
    if isinstance(server, MemoryServer):
        server.stop()
        server.start(wipe_store=True)
    else:
        await server.kill()
        await server.start()


async def renewals(bus: Bus, unique: str, count: int) -> None:
    """Return when the leader renewed its lease `count` times: so many decisions were taken."""
    leader = await open_leader(bus, Subjects(unique), LEASE_TTL_SECONDS)
    seen: set[int] = set()

    async def enough() -> bool:
        entry = await leader.get(LEADER_KEY)
        seen.update([entry.revision] if entry else [])
        return len(seen) > count

    await eventually(enough)


async def test_the_plan_follows_the_workers(
    connect_bus: Connect, stack: AsyncExitStack, unique: str
) -> None:
    bus = await connect_bus()
    await stack.enter_async_context(running_planner(await connect_bus(), unique))
    first = await stack.enter_async_context(PaperWorker(bus, unique, "a").living())
    await eventually(plan_is(bus, unique, "a"))

    async def settled(count: int) -> bool:
        return len((await read_transitions(bus, unique)).transitions) == count

    await eventually(lambda: settled(1))
    async with PaperWorker(bus, unique, "b").living():
        await eventually(plan_is(bus, unique, "a", "b"))
        await eventually(lambda: settled(2))
    await eventually(plan_is(bus, unique, "a"))
    await eventually(lambda: len(first.applied) == 3)
    assert first.applied == sorted(first.applied)
    await eventually(lambda: settled(3))
    log = (await read_transitions(bus, unique)).transitions
    assert [(t.cause, t.result) for t in log] == [
        ("g-a joined", "applied"),
        ("g-b joined", "applied"),
        ("g-b left", "applied"),
    ]


async def test_nothing_new_means_no_new_plan(
    connect_bus: Connect, stack: AsyncExitStack, unique: str
) -> None:
    bus = await connect_bus()
    await stack.enter_async_context(running_planner(await connect_bus(), unique))
    await stack.enter_async_context(PaperWorker(bus, unique, "a").living())
    await eventually(plan_is(bus, unique, "a"))
    plans = await open_plan(bus, Subjects(unique))
    before = await plans.get(PLAN_KEY)
    await renewals(bus, unique, 3)
    assert await plans.get(PLAN_KEY) == before


async def test_a_crashed_worker_leaves_the_plan_when_its_lease_expires(
    connect_bus: Connect, stack: AsyncExitStack, unique: str
) -> None:
    bus, doomed = await connect_bus(), await connect_bus()
    await stack.enter_async_context(running_planner(await connect_bus(), unique))
    await stack.enter_async_context(PaperWorker(bus, unique, "a").living())
    await stack.enter_async_context(PaperWorker(doomed, unique, "b").living())
    await eventually(plan_is(bus, unique, "a", "b"))
    await doomed.close()
    await eventually(plan_is(bus, unique, "a"))


async def test_when_the_leader_dies_another_planner_takes_over(
    connect_bus: Connect, stack: AsyncExitStack, unique: str
) -> None:
    bus, doomed = await connect_bus(), await connect_bus()
    leader = await stack.enter_async_context(running_planner(doomed, unique, "p0"))
    worker = await stack.enter_async_context(PaperWorker(bus, unique, "a").living())
    await eventually(plan_is(bus, unique, "a"))
    await stack.enter_async_context(running_planner(await connect_bus(), unique, "p1"))
    plans = await open_plan(bus, Subjects(unique))
    before = await plans.get(PLAN_KEY)
    assert before is not None
    old = await read_plan(bus, unique)
    assert old is not None

    await doomed.close()
    leader.cancel()

    async def rewritten() -> bool:
        plan = await read_plan(bus, unique)
        assert plan is not None
        return plan.version > old.version

    await eventually(rewritten)
    new = await read_plan(bus, unique)
    assert new is not None
    assert new.groups == old.groups
    assert new.epoch == old.epoch
    await eventually(lambda: worker.applied[-1] == new.version)
    with pytest.raises(RevisionConflictError):
        await plans.update(PLAN_KEY, old.encode(), before.revision)
    await stack.enter_async_context(PaperWorker(bus, unique, "b").living())
    await eventually(plan_is(bus, unique, "a", "b"))


async def test_a_leader_that_leaves_hands_over_without_waiting_for_its_lease(
    connect_bus: Connect, stack: AsyncExitStack, unique: str
) -> None:
    bus = await connect_bus()
    await stack.enter_async_context(PaperWorker(bus, unique, "a").living())
    async with running_planner(await connect_bus(), unique, "p0"):
        await eventually(plan_is(bus, unique, "a"))
        await stack.enter_async_context(running_planner(await connect_bus(), unique, "p1"))
    leader = await open_leader(bus, Subjects(unique), LEASE_TTL_SECONDS)
    entry = await leader.get(LEADER_KEY)
    assert entry is not None, "the lease must not have expired yet"
    assert not entry.value or LeaderLease.decode(entry.value).planner_id == "p1"
    await stack.enter_async_context(PaperWorker(bus, unique, "b").living())
    await eventually(plan_is(bus, unique, "a", "b"))


async def test_a_server_that_lost_its_store_gets_the_same_plan_above_the_old_one(
    server: MemoryServer | EmbeddedNats,
    connect_bus: Connect,
    stack: AsyncExitStack,
    unique: str,
) -> None:
    bus = await connect_bus()
    await stack.enter_async_context(running_planner(await connect_bus(), unique))
    workers = [
        await stack.enter_async_context(PaperWorker(await connect_bus(), unique, name).living())
        for name in ("a", "b")
    ]
    await eventually(plan_is(bus, unique, "a", "b"))
    old = await read_plan(bus, unique)
    assert old is not None
    await eventually(lambda: all(w.applied and w.applied[-1] == old.version for w in workers))
    applied = [len(worker.applied) for worker in workers]

    await restart_empty(server)
    await eventually(lambda: bus.is_connected)
    await eventually(plan_is(bus, unique, "a", "b"))
    await renewals(bus, unique, 2)
    new = await read_plan(bus, unique)
    assert new is not None
    assert new.version > old.version
    assert new.groups == old.groups
    await eventually(lambda: all(w.applied[-1] == new.version for w in workers))
    for worker, before in zip(workers, applied, strict=True):
        assert worker.applied == sorted(set(worker.applied))
        assert len(worker.applied) > before
    await stack.enter_async_context(PaperWorker(bus, unique, "c").living())
    await eventually(plan_is(bus, unique, "a", "b", "c"))


async def test_a_fresh_planner_on_an_empty_store_starts_above_what_workers_hold(
    connect_bus: Connect, stack: AsyncExitStack, unique: str
) -> None:
    bus = await connect_bus()
    worker = await stack.enter_async_context(PaperWorker(bus, unique, "a").living())
    worker.become(applied_epoch=41)
    await stack.enter_async_context(running_planner(await connect_bus(), unique))
    await eventually(plan_is(bus, unique, "a"))
    plan = await read_plan(bus, unique)
    assert plan is not None
    assert plan.epoch > 41


# --- admin ---------------------------------------------------------------------------------------


async def drain(bus: Bus, deployment: str, *workers: str) -> AdminReply:
    request = AdminRequest(action=AdminAction.DRAIN, workers=workers)
    subject = Subjects(deployment).admin
    return AdminReply.decode(await bus.request(subject, request.encode(), timeout_seconds=10))


async def test_a_drained_worker_leaves_the_plan(
    connect_bus: Connect, stack: AsyncExitStack, unique: str
) -> None:
    bus = await connect_bus()
    await stack.enter_async_context(running_planner(await connect_bus(), unique, "p0"))
    await stack.enter_async_context(running_planner(await connect_bus(), unique, "p1"))
    for name in ("a", "b"):
        await stack.enter_async_context(PaperWorker(bus, unique, name).living())
    await eventually(plan_is(bus, unique, "a", "b"))
    reply = await drain(bus, unique, "a")
    assert reply.error == ""
    await eventually(plan_is(bus, unique, "b"))


async def test_a_drain_that_cannot_be_done_says_why(
    connect_bus: Connect, stack: AsyncExitStack, unique: str
) -> None:
    bus = await connect_bus()
    await stack.enter_async_context(running_planner(await connect_bus(), unique))
    worker = await stack.enter_async_context(PaperWorker(bus, unique, "a").living())
    worker.refuses_to_drain = "busy with a transition"
    await eventually(plan_is(bus, unique, "a"))
    assert "no worker nobody" in (await drain(bus, unique, "nobody")).error
    assert "busy with a transition" in (await drain(bus, unique, "a")).error
    assert (await drain(bus, unique)).error
    raw = await bus.request(Subjects(unique).admin, b"\xc1", timeout_seconds=10)
    assert "AdminRequest" in AdminReply.decode(raw).error
    assert await plan_is(bus, unique, "a")()


async def test_without_a_leader_an_operator_is_told_at_once(
    connect_bus: Connect, unique: str
) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(NoRespondersError):
            await drain(await connect_bus(), unique, "a")


# --- what it shows -------------------------------------------------------------------------------


async def test_admin_endpoints(
    connect_bus: Connect, stack: AsyncExitStack, unique: str, unused_tcp_port: int
) -> None:
    bus = await connect_bus()
    await stack.enter_async_context(
        running_planner(await connect_bus(), unique, admin_port=unused_tcp_port)
    )
    await stack.enter_async_context(PaperWorker(bus, unique, "a").living())
    await eventually(plan_is(bus, unique, "a"))
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with aiohttp.ClientSession() as session:

        async def misses_a_load() -> bool:
            async with session.get(url + "/debug/state") as response:
                return bool((await response.json())["stale_loads"] == ["a"])

        await eventually(misses_a_load)
        for path in ("/live", "/ready"):
            async with session.get(url + path) as response:
                assert response.status == 200
        async with session.get(url + "/debug/state") as response:
            state = await response.json()
            assert state["role"] == "leading"
            assert state["plan"]["groups"][0]["group_id"] == "g-a"
            assert state["policy"] == "drop"
        async with session.get(url + "/metrics") as response:
            text = await response.text()
    assert "kunserve_planner_is_leader 1.0" in text
    assert "kunserve_planner_plan_epoch 1.0" in text
    assert 'kunserve_planner_decisions_total{action="publish",rule="first_plan"} 1.0' in text
    assert "kunserve_nats_connected 1.0" in text
