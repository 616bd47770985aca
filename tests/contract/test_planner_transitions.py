"""Drops and restores on a bus: two phases, failovers, deaths and refusals in each of them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from shared.bus.base import Bus
from shared.bus.memory import MemoryBus, MemoryServer
from shared.bus.nats import connect
from shared.embedded_nats import EmbeddedNats
from shared.layout import LayoutState, Plan, PlanPhase, Transition
from shared.messages import AckState, AdminAction, AdminReply, AdminRequest, QueueReport
from shared.subjects import Subjects
from tests.conftest import eventually
from tests.planner_support import (
    WHOLE_BLOCKS,
    Behaviour,
    PaperWorker,
    plan_is,
    read_plan,
    read_transitions,
    running_planner,
)

FAST: dict[str, Any] = {"ack_timeout_seconds": 1.0, "restore_timeout_seconds": 1.0}


@dataclass
class World:
    """Workers a and b (or more), and planners that come and go."""

    server: MemoryServer | EmbeddedNats
    deployment: str
    stack: AsyncExitStack
    workers: dict[str, PaperWorker] = field(default_factory=dict)
    _buses: list[Bus] = field(default_factory=list)

    async def bus(self) -> Bus:
        instance = f"i{len(self._buses)}"
        if isinstance(self.server, MemoryServer):
            self._buses.append(MemoryBus(self.server, instance))
        else:
            self._buses.append(await connect(self.server.url, service="test", instance=instance))
        return self._buses[-1]

    async def add_worker(self, worker_id: str) -> PaperWorker:
        worker = PaperWorker(self._buses[0], self.deployment, worker_id)
        self.workers[worker_id] = await self.stack.enter_async_context(worker.living())
        return worker

    async def add_planner(self, planner_id: str = "p0", **settings: Any) -> Callable[[], None]:
        """Start a planner; returns how to kill it without a goodbye."""
        bus = await self.bus()
        task = await self.stack.enter_async_context(
            running_planner(bus, self.deployment, planner_id, **{**FAST, **settings})
        )

        def kill() -> None:
            task.cancel()

        return kill

    async def order(self, action: AdminAction, *workers: str, **fields: Any) -> AdminReply:
        request = AdminRequest(action=action, workers=workers, **fields)
        subject = Subjects(self.deployment).admin
        payload = await self._buses[0].request(subject, request.encode(), timeout_seconds=10)
        return AdminReply.decode(payload)

    async def plan(self) -> Plan:
        plan = await read_plan(self._buses[0], self.deployment)
        assert plan is not None
        return plan

    async def reaches(self, state: LayoutState, *groups: str) -> Plan:
        """Wait until the layout is at rest in `state` with these groups ("ab": a, then b)."""

        async def is_there() -> bool:
            plan = await self.plan()
            shape = {"".join(m.worker_id for m in group.members) for group in plan.groups}
            return plan.state is state and plan.change is None and shape == set(groups)

        await eventually(is_there)
        return await self.plan()

    async def is_in(self, phase: PlanPhase) -> Plan:
        async def is_there() -> bool:
            plan = await self.plan()
            return plan.change is not None and plan.phase is phase

        await eventually(is_there)
        return await self.plan()

    async def transitions(self, *states: LayoutState) -> list[Transition]:
        log = (await read_transitions(self._buses[0], self.deployment)).transitions
        return [transition for transition in log if transition.state in states]

    async def logged(self, state: LayoutState) -> Transition:
        async def is_there() -> bool:
            return bool(await self.transitions(state))

        await eventually(is_there)
        return (await self.transitions(state))[-1]

    async def close(self) -> None:
        for bus in self._buses:
            await bus.close()


@asynccontextmanager
async def open_world(
    server: MemoryServer | EmbeddedNats, unique: str, *worker_ids: str
) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(server, unique, stack)
        stack.push_async_callback(world.close)
        await world.bus()
        for worker_id in worker_ids:
            await world.add_worker(worker_id)
        yield world


@pytest_asyncio.fixture
async def world(unique: str) -> AsyncIterator[World]:
    async with open_world(MemoryServer(clock=time.monotonic), unique, "a", "b") as world:
        yield world


async def started(world: World, **settings: Any) -> World:
    await world.add_planner(**settings)
    await eventually(plan_is(world._buses[0], world.deployment, *world.workers))
    return world


# --- the whole way --------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "nats"])
def any_server(request: pytest.FixtureRequest) -> MemoryServer | EmbeddedNats:
    """Where planners and workers meet."""
    if request.param == "memory":
        return MemoryServer(clock=time.monotonic)
    real: EmbeddedNats = request.getfixturevalue("own_nats_server")
    return real


async def test_drop_and_restore_on_order(
    any_server: MemoryServer | EmbeddedNats, unique: str
) -> None:
    async with open_world(any_server, unique, "a", "b") as world:
        await started(world)
        first = await world.plan()
        reply = await world.order(AdminAction.DROP)
        assert reply.error == ""
        assert reply.plan is not None
        assert reply.plan.phase is PlanPhase.PREPARE
        dropped = await world.reaches(LayoutState.DROPPED, "ab")
        assert dropped.epoch > first.epoch
        assert dropped.groups == reply.plan.groups
        assert dropped.groups[0].epoch == reply.plan.epoch
        entry = await world.logged(LayoutState.DROPPING)
        assert entry.result == "applied"
        assert set(entry.phase_seconds) == {"prepare", "commit", "exchange"}
        assert "operator" in entry.cause

        assert (await world.order(AdminAction.RESTORE)).error == ""
        restored = await world.reaches(LayoutState.STABLE, "a", "b")
        assert restored.epoch > dropped.epoch
        assert (await world.logged(LayoutState.RESTORING)).result == "applied"
        for worker in world.workers.values():
            assert worker.applied == sorted(worker.applied)
            assert len(worker.prepared) == 2


async def test_nobody_is_told_to_drop_before_all_are_prepared(world: World) -> None:
    await started(world, ack_timeout_seconds=20.0)
    world.workers["b"].behaviour.prepare = None
    await world.order(AdminAction.DROP)
    plan = await world.is_in(PlanPhase.PREPARE)
    await eventually(lambda: world.workers["a"].prepared)
    assert plan.serving_groups != plan.groups
    assert [group.leader for group in plan.serving_groups] == ["a", "b"]
    assert (await world.plan()).phase is PlanPhase.PREPARE
    await world.workers["b"].answer(plan, AckState.PREPARED)
    await world.reaches(LayoutState.DROPPED, "ab")


async def test_a_dry_run_is_shown_and_not_done(world: World) -> None:
    await started(world)
    before = await world.plan()
    reply = await world.order(AdminAction.DROP, dry_run=True)
    assert reply.plan is not None
    assert reply.plan.dry_run
    assert len(reply.plan.groups) == 1
    assert await world.plan() == before


async def test_orders_that_cannot_be_carried_out_say_why(world: World) -> None:
    await started(world)
    assert "nothing can be restored" in (await world.order(AdminAction.RESTORE)).error
    assert "no group has a worker z" in (await world.order(AdminAction.DROP, "z")).error
    world.workers["a"].behaviour.settle = None
    await world.order(AdminAction.DROP)
    await world.is_in(PlanPhase.COMMIT)
    assert "dropping" in (await world.order(AdminAction.RESTORE)).error


async def test_four_workers_drop_in_two_rounds_and_come_back(unique: str) -> None:
    server = MemoryServer(clock=time.monotonic)
    async with open_world(server, unique, "a", "b", "c", "d") as world:
        await started(world)
        await world.order(AdminAction.DROP)
        await world.reaches(LayoutState.DROPPED, "ad", "bc")
        await world.order(AdminAction.DROP)
        plan = await world.reaches(LayoutState.DROPPED, "abdc")
        assert [len(member.span) for member in plan.groups[0].members] == [1, 1, 1, 1]
        await world.order(AdminAction.RESTORE)
        await world.reaches(LayoutState.STABLE, "a", "b", "c", "d")


async def test_load_alone_drops_and_restores(world: World) -> None:
    await started(world, policy="drop", min_dwell_seconds=1.0)
    for worker in world.workers.values():
        worker.demand_blocks = int(1.2 * WHOLE_BLOCKS)
    await world.reaches(LayoutState.DROPPED, "ab")
    entry = await world.logged(LayoutState.DROPPING)
    assert "demand" in entry.cause
    for worker in world.workers.values():
        worker.demand_blocks = 10
    await world.reaches(LayoutState.STABLE, "a", "b")
    assert len(await world.transitions(LayoutState.DROPPING, LayoutState.RESTORING)) == 2
    log = await read_transitions(world._buses[0], world.deployment)
    assert log.decision is not None
    assert log.decision.figures["demand_blocks"] <= 20


async def test_what_waits_in_a_router_is_demand_too(world: World) -> None:
    await started(world, policy="drop")
    for worker in world.workers.values():
        worker.demand_blocks = int(0.8 * WHOLE_BLOCKS)
    report = QueueReport(router_id="r", requests_waiting=9, waiting_tokens=16 * WHOLE_BLOCKS)

    async def is_dropped() -> bool:
        await world._buses[0].publish(Subjects(world.deployment).queue("r"), report.encode())
        return (await world.plan()).state is LayoutState.DROPPED

    await eventually(is_dropped)
    assert (await world.logged(LayoutState.DROPPING)).result == "applied"


async def test_the_policy_none_never_drops_by_itself(world: World) -> None:
    await started(world, policy="none")
    for worker in world.workers.values():
        worker.demand_blocks = 2 * WHOLE_BLOCKS
    epoch = (await world.plan()).epoch
    worker = world.workers["a"]
    num_reports = worker.num_load_reports
    await eventually(lambda: worker.num_load_reports > num_reports + 10)
    # Its answer comes from a look at the cluster, after all of them.
    assert not (await world.order(AdminAction.DROP, dry_run=True)).error
    assert (await world.plan()).epoch == epoch


async def test_a_missing_load_report_holds_and_says_so(world: World) -> None:
    await started(world, policy="drop")
    world.workers["a"].demand_blocks = 2 * WHOLE_BLOCKS

    async def is_held() -> bool:
        note = (await read_transitions(world._buses[0], world.deployment)).decision
        return note is not None and note.rule == "loads_unknown" and "b" in note.detail

    await eventually(is_held)
    assert (await world.plan()).state is LayoutState.STABLE


async def test_a_manual_drop_holds_over_a_change_of_leader(world: World) -> None:
    kill = await world.add_planner("p0", min_dwell_seconds=0.0)
    await eventually(plan_is(world._buses[0], world.deployment, "a", "b"))
    for worker in world.workers.values():
        worker.demand_blocks = 10
    await world.order(AdminAction.DROP)
    dropped = await world.reaches(LayoutState.DROPPED, "ab")
    assert dropped.hold is not None
    await world.add_planner("p1", min_dwell_seconds=0.0)
    kill()

    async def is_rewritten() -> bool:
        return (await world.plan()).term > dropped.term

    await eventually(is_rewritten)

    async def is_held() -> bool:
        note = (await read_transitions(world._buses[0], world.deployment)).decision
        return note is not None and note.rule == "held_by_operator"

    await eventually(is_held)
    assert (await world.plan()).groups == dropped.groups
    await world.order(AdminAction.RESTORE)
    assert (await world.reaches(LayoutState.STABLE, "a", "b")).hold is None


async def test_a_bounded_hold_runs_out(world: World) -> None:
    await started(world, min_dwell_seconds=0.0)
    for worker in world.workers.values():
        worker.demand_blocks = 10
    await world.order(AdminAction.DROP, hold_seconds=0.5)
    await world.reaches(LayoutState.STABLE, "a", "b")
    assert (await world.logged(LayoutState.RESTORING)).result == "applied"


async def test_a_draining_member_of_a_pipeline_leaves_after_a_restore(world: World) -> None:
    await started(world)
    await world.order(AdminAction.DROP)
    await world.reaches(LayoutState.DROPPED, "ab")
    reply = await world.order(AdminAction.DRAIN, "b")
    assert reply.error == ""
    await world.reaches(LayoutState.STABLE, "a")
    entry = await world.logged(LayoutState.RESTORING)
    assert "b is being drained" in entry.cause
    assert entry.result == "applied"


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "state", "groups", "result"),
    [
        (Behaviour(prepare=None), LayoutState.STABLE, "a b", "fell back: no answer from b"),
        (Behaviour(prepare=AckState.REFUSED), LayoutState.STABLE, "a b", "fell back: b refused"),
        (Behaviour(prepare=AckState.FAILED), LayoutState.STABLE, "a b", "fell back: b failed"),
        (Behaviour(commit=None), LayoutState.STABLE, "", "no answer from b"),
        (Behaviour(commit=AckState.REFUSED), LayoutState.STABLE, "", "b refused"),
        (Behaviour(settle=AckState.FAILED), LayoutState.STABLE, "", "b failed"),
        (Behaviour(settle=None), LayoutState.DROPPED, "ab", "not settled in time"),
    ],
)
async def test_a_worker_that_does_not_play_along(
    world: World, behaviour: Behaviour, state: LayoutState, groups: str, result: str
) -> None:
    await started(world, settle_timeout_seconds=0.5)
    world.workers["b"].behaviour = behaviour
    await world.order(AdminAction.DROP)
    entry = await world.logged(LayoutState.DROPPING)
    assert result in entry.result
    plan = await world.reaches(state, *groups.split())
    if state is LayoutState.STABLE:
        assert plan.hold is None or not groups


@pytest.mark.parametrize("phase", ["prepare", "commit", "settle"])
async def test_a_worker_dies_in_each_phase(world: World, phase: str) -> None:
    await started(world, ack_timeout_seconds=20.0, settle_timeout_seconds=20.0)
    setattr(world.workers["b"].behaviour, phase, None)
    await world.order(AdminAction.DROP)
    doomed = world.workers["b"]
    await eventually(lambda: doomed.prepared if phase == "prepare" else len(doomed.applied) == 2)
    await doomed.die()
    if phase == "prepare":
        await world.reaches(LayoutState.STABLE, "a")
    else:
        await world.reaches(LayoutState.STABLE)
        world.workers["a"].become(layers=world.workers["a"].info.layers)
    assert "b is gone" in (await world.logged(LayoutState.DROPPING)).result


async def test_a_survivor_serves_again_when_it_is_whole(world: World) -> None:
    await started(world)
    before = world.workers["a"].info
    await world.order(AdminAction.DROP)
    await world.reaches(LayoutState.DROPPED, "ab")
    await world.workers["b"].die()
    await world.reaches(LayoutState.STABLE)
    world.workers["a"].become(layers=before.layers)
    await world.reaches(LayoutState.STABLE, "a")


async def test_a_pipeline_whose_link_broke_is_dissolved(world: World) -> None:
    await started(world)
    whole = world.workers["a"].info.layers
    await world.order(AdminAction.DROP)
    dropped = await world.reaches(LayoutState.DROPPED, "ab")
    await world.workers["a"].answer(dropped, AckState.FAILED, "the link to b is down")
    await world.reaches(LayoutState.STABLE)
    for worker in world.workers.values():
        worker.become(layers=whole)
    await world.reaches(LayoutState.STABLE, "a", "b")


async def test_a_restarted_member_breaks_its_pipeline(world: World) -> None:
    await started(world)
    whole = world.workers["b"].info.layers
    await world.order(AdminAction.DROP)
    await world.reaches(LayoutState.DROPPED, "ab")
    world.workers["b"].become(incarnation="2", layers=whole)
    await world.reaches(LayoutState.STABLE, "b")


@pytest.mark.parametrize("phase", ["prepare", "commit", "settle"])
@pytest.mark.parametrize("answers", [True, False])
async def test_a_new_leader_goes_on_where_the_old_one_died(
    world: World, phase: str, answers: bool
) -> None:
    kill = await world.add_planner("p0", ack_timeout_seconds=20.0, settle_timeout_seconds=20.0)
    await eventually(plan_is(world._buses[0], world.deployment, "a", "b"))
    laggard = world.workers["b"]
    setattr(laggard.behaviour, phase, None)
    await world.order(AdminAction.DROP)
    await eventually(lambda: laggard.prepared if phase == "prepare" else len(laggard.applied) == 2)
    before = await world.plan()
    kill()
    await world.add_planner("p1", ack_timeout_seconds=1.0, settle_timeout_seconds=0.5)
    if answers:
        laggard.behaviour = Behaviour()
        await world.reaches(LayoutState.DROPPED, "ab")
    elif phase == "settle":
        await world.reaches(LayoutState.DROPPED, "ab")
    else:
        groups = ("a", "b") if phase == "prepare" else ()
        await world.reaches(LayoutState.STABLE, *groups)
    assert (await world.plan()).version > before.version
    for worker in world.workers.values():
        assert worker.applied == sorted(set(worker.applied))
