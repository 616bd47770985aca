"""At most one planner leads, terms only rise, and a failed renewal ends the lead."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from services.planner.leader import LeaderElection, Role
from shared.bus.memory import MemoryBus, MemoryServer
from shared.messages import LeaderLease
from shared.subjects import LEADER_KEY

TTL_SECONDS = 6.0


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """Planners of one memory server whose time stands still unless a test moves it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.wall_clock = Clock(100.0)
        self.server = MemoryServer(clock=self.clock)

    async def planner(self, planner_id: str) -> LeaderElection:
        self.bus = MemoryBus(self.server, planner_id)
        self.bucket = await self.bus.key_value("leader", ttl_seconds=TTL_SECONDS)
        return LeaderElection(self.bucket, planner_id, TTL_SECONDS, self.clock, self.wall_clock)

    async def lease(self) -> LeaderLease | None:
        entry = await self.bucket.get(LEADER_KEY)
        return LeaderLease.decode(entry.value) if entry and entry.value else None


@pytest.fixture
def world() -> World:
    return World()


async def test_one_of_two_leads(world: World) -> None:
    first, second = await world.planner("a"), await world.planner("b")
    for _ in range(5):
        await first.step(known_term=0)
        await second.step(known_term=0)
        assert (first.role, second.role) == (Role.LEADING, Role.STANDBY)
        world.clock.now += TTL_SECONDS / 3
    lease = await world.lease()
    assert lease is not None
    assert (lease.planner_id, lease.term) == ("a", first.term)


async def test_the_lead_goes_over_when_the_leader_falls_silent(world: World) -> None:
    first, second = await world.planner("a"), await world.planner("b")
    await first.step(known_term=0)
    world.clock.now += TTL_SECONDS - 0.1
    await second.step(known_term=0)
    assert second.role is Role.STANDBY
    world.clock.now += 0.2
    assert first.role is Role.STANDBY, "a leader that could not renew stops by itself"
    await second.step(known_term=first.term)
    assert second.role is Role.LEADING
    assert second.term > first.term
    await first.step(known_term=second.term)
    assert first.role is Role.STANDBY


async def test_a_leader_whose_lease_was_taken_steps_down_at_its_next_renewal(
    world: World,
) -> None:
    first = await world.planner("a")
    await first.step(known_term=0)
    await world.bucket.put(LEADER_KEY, LeaderLease(planner_id="b", term=99).encode())
    await first.step(known_term=0)
    assert first.role is Role.STANDBY


async def test_an_empty_lease_counts_as_none(world: World) -> None:
    planner = await world.planner("a")
    await world.bucket.put(LEADER_KEY, b"")
    await planner.step(known_term=0)
    assert planner.role is Role.LEADING


async def test_a_lease_given_up_is_taken_at_once(world: World) -> None:
    first, second = await world.planner("a"), await world.planner("b")
    await first.step(known_term=0)
    await first.release()
    assert first.role is Role.STANDBY
    await second.step(known_term=first.term)
    assert second.role is Role.LEADING
    assert second.term > first.term


async def test_a_standby_does_not_give_up_what_another_holds(world: World) -> None:
    first, second = await world.planner("a"), await world.planner("b")
    await first.step(known_term=0)
    await second.release()
    await first.step(known_term=0)
    assert first.role is Role.LEADING


async def test_an_outage_ends_the_lead_and_it_comes_back_with_a_higher_term(
    world: World,
) -> None:
    planner = await world.planner("a")
    await planner.step(known_term=0)
    term = planner.term
    for wipe_store in (False, True):
        world.server.stop()
        await planner.step(known_term=term)
        assert planner.role is Role.STANDBY
        world.server.start(wipe_store=wipe_store)
        await planner.step(known_term=term)
        assert planner.role is Role.LEADING
        assert planner.term > term
        term = planner.term
    await world.bus.close()


async def test_a_later_leader_has_a_higher_term_though_nobody_remembers_the_former() -> None:
    terms = []
    for day in range(3):
        world = World()
        world.wall_clock.now += day * 86400
        planner = await world.planner("a")
        await planner.step(known_term=0)
        terms.append(planner.term)
    assert terms == sorted(set(terms))


async def test_the_term_is_above_every_term_heard_of(world: World) -> None:
    planner = await world.planner("a")
    await planner.step(known_term=500)
    assert planner.term == 501
    planner.raise_term(600)
    await planner.step(known_term=0)
    lease = await world.lease()
    assert lease is not None
    assert lease.term == planner.term == 600
