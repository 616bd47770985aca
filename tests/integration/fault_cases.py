"""Points of a drop and a restore at which tests hit processes, and the way there and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.conftest import eventually
from tests.integration.harness import Cluster
from tests.integration.layouts import Operator
from tests.integration.service_process import ServiceProcess

RECOVERY_SECONDS = 60.0
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
