"""Members of a pipeline die or hang at every point of a drop and a restore, while answers stream.

The process is hit the moment it gets to the point, by a signal that it sends itself
(`fault_points.py`). Clients read what they would have read, the survivor stays alive and serves,
and whoever comes back is a replica again.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import eventually
from tests.integration.clients import Answer, Streams, ask, completion
from tests.integration.harness import Cluster
from tests.integration.layouts import Operator
from tests.integration.service_process import ServiceProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS = [completion(number, 500) for number in range(12)]
#: So many tokens have arrived everywhere when something happens.
UNDER_WAY = 30
RECOVERY_SECONDS = 60.0
SETTINGS = {
    "KUNSERVE_MIN_DWELL_SECONDS": "0",
    "KUNSERVE_LINK_BANDWIDTH": "2MB",  # the exchange takes long enough to be hit
}
ROLES = ("leader", "follower")


@dataclass(frozen=True)
class Point:
    """The moment a member enters `state` while `action` is carried out."""

    name: str
    action: str
    state: str

    def __str__(self) -> str:
        return self.name


PREPARING = Point("preparing", "drop", "PREPARING")
PREPARED = Point("prepared", "drop", "PREPARED")
COMMITTING = Point("committing", "drop", "COMMITTING")
EXCHANGING = Point("exchanging", "drop", "SETTLING")
DROPPED = Point("dropped", "drop", "SETTLED")
RESTORING = Point("restoring", "restore", "PREPARING")
RESTORED = Point("restored", "restore", "PREPARED")
RETURNING = Point("returning", "restore", "COMMITTING")
LEAVING = Point("leaving", "restore", "SETTLING")
POINTS = (
    PREPARING,
    PREPARED,
    COMMITTING,
    EXCHANGING,
    DROPPED,
    RESTORING,
    RESTORED,
    RETURNING,
    LEAVING,
)


def cases(points: tuple[Point, ...], quick: set[tuple[Point, str]]) -> list[Any]:
    """Every role at each of `points`; those that are not `quick` take part in the soak only."""
    return [
        pytest.param(
            point,
            role,
            marks=() if (point, role) in quick else pytest.mark.soak,
            id=f"{role} {point}",
        )
        for point in points
        for role in ROLES
    ]


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


async def recover(cluster: Cluster, operator: Operator) -> None:
    """Start what does not run; return when all workers are replicas in the plan."""
    cluster.void_signals()
    for process in cluster.processes:
        if not process.is_running:
            process.start()
    names = sorted(worker.name for worker in cluster.workers)

    async def is_whole() -> bool:
        view = await cluster.cluster()
        groups = view["groups"] if view is not None else []
        members = [[member["worker"] for member in group["members"]] for group in groups]
        if view is not None and view["state"] == "dropped":
            await operator.ask("restore")
        return sorted(members) == [[name] for name in names]

    await eventually(is_whole, RECOVERY_SECONDS)
    await cluster.wait_ready()


async def members_of_drop(cluster: Cluster) -> dict[str, ServiceProcess]:
    """Who will lead, and who will follow, if layers are dropped now."""
    plan = await Operator(cluster).order("drop", dry_run=True)
    (group,) = plan["groups"]
    processes = {worker.name: worker for worker in cluster.workers}
    return dict(
        zip(ROLES, (processes[member["worker"]] for member in group["members"]), strict=True)
    )


async def bring_to(cluster: Cluster, point: Point) -> None:
    """Carry out what comes before the point's action."""
    if point.action == "restore":
        await Operator(cluster).order("drop")
        await eventually(lambda: is_at_rest(cluster, "dropped"), RECOVERY_SECONDS)


async def serves_alone(cluster: Cluster, worker: ServiceProcess) -> bool:
    """Whether the plan has a worker as a replica."""
    view = await cluster.cluster()
    groups = view["groups"] if view is not None else []
    return [worker.name] in [[m["worker"] for m in group["members"]] for group in groups]


@pytest.mark.parametrize(
    ("point", "role"),
    cases(
        POINTS,
        {(COMMITTING, "follower"), (EXCHANGING, "leader"), (DROPPED, "follower")}
        | {(RESTORING, "leader"), (LEAVING, "follower")},
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
        planner = await leading_planner(cluster)
        cluster.signal_at(members[role], point.state, planner.pid, signal.SIGKILL)
        await Operator(cluster).ask(point.action)  # it may die before it answers
        assert await planner.wait() == -signal.SIGKILL
        assert await streams.answers() == undisturbed
        await eventually(lambda: is_at_rest(cluster), RECOVERY_SECONDS)
    for worker in members.values():
        assert "group broken" not in worker.log


@pytest.mark.parametrize(
    ("point", "role"),
    cases(
        (PREPARING, PREPARED, COMMITTING, EXCHANGING, DROPPED, RESTORING, RESTORED, LEAVING),
        {(DROPPED, "leader"), (COMMITTING, "follower")},
    ),
)
@pytest.mark.parametrize("keeps_store", [True, False])
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


async def is_at_rest(cluster: Cluster, *states: str) -> bool:
    """Whether nothing is under way, and every worker is in a group."""
    view = await cluster.cluster()
    if view is None or view["state"] not in (states or ("stable", "dropped")):
        return False
    placed = {member["worker"] for group in view["groups"] for member in group["members"]}
    return placed == {worker.name for worker in cluster.workers}


async def leading_planner(cluster: Cluster) -> ServiceProcess:
    """The planner that leads; waits until one does."""
    found: list[ServiceProcess] = []

    async def one_leads() -> bool:
        states = [(planner, await cluster.state(planner)) for planner in cluster.planners]
        found[:] = [planner for planner, state in states if state and state["role"] == "leading"]
        return len(found) == 1

    await eventually(one_leads)
    return found[0]
