"""Leases and the view of them: who joined, changed, restarted, left, and when absence counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shared.bus.base import KeyValue
from shared.bus.memory import MemoryBus, MemoryServer
from shared.member_table import MemberTable
from shared.membership import (
    Lease,
    MemberEvent,
    MemberEventKind,
    MemberView,
)
from shared.messages import PlannerInfo, RouterInfo, WorkerState
from shared.subjects import planner_key, router_key, worker_key
from tests.conftest import eventually
from tests.planner_support import worker_info

TTL_SECONDS = 6.0
SHORT_TTL_SECONDS = 0.6

Present = dict[str, tuple[object, int]]


def kinds(events: list[MemberEvent]) -> list[tuple[str, str]]:
    return sorted((event.kind.value, event.key) for event in events)


# --- the table -----------------------------------------------------------------------------------


def test_join_change_restart_leave() -> None:
    table = MemberTable(TTL_SECONDS)
    a, keep = worker_info("a"), worker_info("keep")
    assert kinds(table.replace({"w.a": (a, 1), "w.k": (keep, 2)}, set(), 0.0)) == [
        ("joined", "w.a"),
        ("joined", "w.k"),
    ]
    assert table.replace({"w.a": (a, 3), "w.k": (keep, 4)}, set(), 1.0) == []
    drained = a.model_copy(update={"state": WorkerState.DRAINING})
    assert kinds(table.put("w.a", drained, 5)) == [("changed", "w.a")]
    again = a.model_copy(update={"incarnation": "2"})
    assert kinds(table.put("w.a", again, 6)) == [("restarted", "w.a")]
    left = table.replace({"w.k": (keep, 7)}, set(), 2.0)
    assert [(event.kind, event.key, event.info) for event in left] == [
        (MemberEventKind.LEFT, "w.a", again)
    ]
    assert table.members == {"w.k": keep}


def test_older_news_change_nothing() -> None:
    table = MemberTable(TTL_SECONDS)
    table.put("w.a", worker_info("a"), 5)
    assert table.put("w.a", worker_info("a", state=WorkerState.STARTING), 5) == []
    assert table.members["w.a"] == worker_info("a")


def test_nobody_leaves_while_the_view_is_held() -> None:
    table = MemberTable(TTL_SECONDS)
    table.replace({"w.a": (worker_info("a"), 1)}, set(), 0.0)
    table.hold(10.0)
    assert table.is_held(10.0 + TTL_SECONDS - 0.1)
    assert kinds(table.replace({"w.b": (worker_info("b"), 2)}, set(), 15.9)) == [("joined", "w.b")]
    assert not table.is_held(10.0 + TTL_SECONDS)
    assert kinds(table.replace({"w.b": (worker_info("b"), 3)}, set(), 16.0)) == [("left", "w.a")]


@pytest.mark.parametrize("already_back", [[], ["b"]])
def test_a_store_that_began_anew_holds_the_view(already_back: list[str]) -> None:
    table = MemberTable(TTL_SECONDS)
    table.replace({k: (worker_info(k), 50 + i) for i, k in enumerate("ab")}, set(), 0.0)
    back = {k: (worker_info(k), 1) for k in already_back}
    assert table.replace(back, set(), 1.0) == []
    assert table.is_held(1.0 + TTL_SECONDS - 0.1)
    assert set(table.members) == {"a", "b"}
    both = {"a": (worker_info("a"), 2), "b": (worker_info("b"), 3)}
    assert table.replace(both, set(), 2.0) == []
    gone = table.replace({"a": (worker_info("a"), 4)}, set(), 1.0 + TTL_SECONDS)
    assert kinds(gone) == [("left", "b")]


def test_an_unreadable_lease_is_not_an_absent_one() -> None:
    table = MemberTable(TTL_SECONDS)
    table.replace({"a": (worker_info("a"), 1), "b": (worker_info("b"), 2)}, set(), 0.0)
    assert table.replace({"b": (worker_info("b"), 3)}, {"a"}, 1.0) == []
    assert set(table.members) == {"a", "b"}


# --- lease and view on a bus ---------------------------------------------------------------------


class World:
    def __init__(self) -> None:
        self.server = MemoryServer(clock=time.monotonic)
        self.events: list[tuple[str, str]] = []

    async def open(self, name: str) -> tuple[MemoryBus, KeyValue]:
        bus = MemoryBus(self.server, name)
        return bus, await bus.key_value("members", ttl_seconds=SHORT_TTL_SECONDS)

    @asynccontextmanager
    async def view(self) -> AsyncIterator[MemberView]:
        bus, members = await self.open("viewer")
        view = MemberView(bus, members, SHORT_TTL_SECONDS, refresh_seconds=0.05)
        view.subscribe(lambda event: self.events.append((event.kind.value, event.key)))
        task = asyncio.create_task(view.run())
        try:
            await view.wait_primed()
            yield view
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await bus.close()

    @asynccontextmanager
    async def lease(self, worker_id: str) -> AsyncIterator[Lease]:
        bus, members = await self.open(worker_id)
        key = worker_key(worker_id)
        lease = Lease(bus, members, key, worker_info(worker_id), SHORT_TTL_SECONDS)
        task = asyncio.create_task(lease.run())
        try:
            yield lease
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_lease_is_seen_changed_and_released() -> None:
    world = World()
    async with world.view() as view, world.lease("a") as lease:
        await eventually(lambda: "a" in view.workers)
        lease.update(worker_info("a", state=WorkerState.DRAINING))
        await eventually(lambda: view.workers["a"].state is WorkerState.DRAINING)
        lease.update(worker_info("a", incarnation="2"))
        await eventually(lambda: view.workers["a"].incarnation == "2")
        await lease.release()
        await lease.release()
        await eventually(lambda: not view.workers)
    assert world.events[:3] == [
        ("joined", "worker.a"),
        ("changed", "worker.a"),
        ("restarted", "worker.a"),
    ]
    assert world.events[3:] == [("left", "worker.a")]


async def test_a_released_lease_is_not_renewed() -> None:
    world = World()
    async with world.lease("a") as lease:
        _, members = await world.open("reader")

        async def is_there() -> bool:
            return bool(await members.entries())

        await eventually(is_there)
        await lease.release()
        lease.update(worker_info("a"))
        await asyncio.sleep(0)
        assert await members.entries() == {}


async def test_a_silent_member_leaves_and_a_renewing_one_stays() -> None:
    world = World()
    async with world.view() as view, world.lease("alive"):
        async with world.lease("dead"):
            await eventually(lambda: set(view.workers) == {"alive", "dead"})
        await eventually(lambda: set(view.workers) == {"alive"})
    assert world.events.count(("left", "worker.dead")) == 1
    assert ("left", "worker.alive") not in world.events


async def test_routers_and_planners_are_members_too() -> None:
    world = World()
    async with world.view() as view:
        _, members = await world.open("writer")
        router = RouterInfo(router_id="r", host="h", pid=1, url="http://h:1", started_at=0.0)
        planner = PlannerInfo(planner_id="p", host="h", pid=2, started_at=0.0)
        await members.put(router_key("r"), router.encode())
        await members.put(planner_key("p"), planner.encode())
        await members.put("worker.broken", b"\xc1")
        await members.put("unknown.kind", b"")
        await eventually(lambda: view.routers and view.planners)
        assert view.routers == {"r": router}
        assert view.planners == {"p": planner}
        assert view.workers == {}


async def test_who_renews_late_after_an_outage_has_not_left() -> None:
    world = World()
    _, members = await world.open("writer")
    for name in ("prompt", "late"):
        await members.put(worker_key(name), worker_info(name).encode())
    async with world.view() as view:
        assert set(view.workers) == {"prompt", "late"}
        world.server.stop()
        outage_ends_at = time.monotonic() + SHORT_TTL_SECONDS
        await eventually(lambda: time.monotonic() > outage_ends_at)
        world.server.start(wipe_store=False)
        for incarnation in ("2", "3"):
            info = worker_info("prompt", incarnation=incarnation)
            await members.put(worker_key("prompt"), info.encode())
            await eventually(lambda: view.workers["prompt"].incarnation == incarnation)  # noqa: B023
        await members.put(worker_key("late"), worker_info("late", incarnation="2").encode())
        await eventually(lambda: view.workers["late"].incarnation == "2")
    assert not [event for event in world.events if event[0] == "left"]


@pytest.mark.parametrize("wipe_store", [False, True])
async def test_an_outage_makes_nobody_leave_who_lives(wipe_store: bool) -> None:
    world = World()
    async with world.view() as view, world.lease("alive"):
        async with world.lease("dying"):
            await eventually(lambda: set(view.workers) == {"alive", "dying"})
            world.server.stop()
        assert view.is_held
        outage_ends_at = time.monotonic() + 2 * SHORT_TTL_SECONDS
        await eventually(lambda: time.monotonic() > outage_ends_at)
        assert set(view.workers) == {"alive", "dying"}
        world.server.start(wipe_store=wipe_store)
        assert view.is_held
        await eventually(lambda: not view.is_held)
        await eventually(lambda: set(view.workers) == {"alive"})
    assert ("left", "worker.alive") not in world.events
