"""What an operator is told about an order that changes nothing."""

from __future__ import annotations

import pytest

from services.planner.rules import Action, Decision
from shared.messages import AdminAction, AdminRequest
from tests.planner_simulator import SimCluster


def cluster(*workers: str, dropped: bool = False) -> SimCluster:
    """A cluster at rest, of replicas or of pairs."""
    simulated = SimCluster()
    for worker_id in workers:
        simulated.join(worker_id)
    simulated.tick(0.1)
    settle(simulated)
    if dropped:
        order(simulated, AdminAction.DROP)
        settle(simulated)
    return simulated


def settle(simulated: SimCluster) -> None:
    while simulated.plan.change is not None or simulated.tick(0.1).action is Action.PUBLISH:
        simulated.tick(0.1)


def order(simulated: SimCluster, action: AdminAction, *workers: str) -> Decision:
    simulated.wish = AdminRequest(action=action, workers=workers)
    return simulated.tick(0.1)


@pytest.mark.parametrize(
    ("workers", "dropped", "action", "named", "expected"),
    [
        ("a", False, "drop", (), "there is only one worker"),
        ("ab", True, "drop", (), "all workers serve in one pipeline already"),
        ("ab", True, "drop", ("a", "b"), "a, b serve in one pipeline already"),
        ("ab", False, "drop", ("z",), "no group has a worker z"),
        ("ab", False, "restore", (), "every worker holds every layer already"),
        ("ab", False, "restore", ("a",), "a already holds every layer"),
        ("abc", True, "restore", ("z", "a"), "no group has a worker z"),
    ],
)
def test_an_order_in_vain_says_why(
    workers: str, dropped: bool, action: str, named: tuple[str, ...], expected: str
) -> None:
    simulated = cluster(*workers, dropped=dropped)
    before = simulated.plan
    reply = order(simulated, AdminAction(action), *named).reply
    assert reply is not None
    assert expected in reply.error
    assert simulated.plan == before


def test_a_pair_is_no_order_to_join_others() -> None:
    simulated = cluster(*"abcd")
    order(simulated, AdminAction.DROP, "a", "b")
    settle(simulated)
    reply = order(simulated, AdminAction.DROP, "b", "a").reply
    assert reply is not None
    assert "already" in reply.error
    assert order(simulated, AdminAction.DROP, "a").plan is not None  # this is
