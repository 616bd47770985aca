"""The whole loop in simulated time: it drops under a burst, does not flap, and restores."""

from __future__ import annotations

import pytest

from services.planner.pressure import Thresholds
from shared.layout import LayoutState
from tests.planner_simulator import SimCluster, SimLoad
from tests.planner_support import WHOLE_BLOCKS

STEP_SECONDS = 0.2


class Run:
    """A cluster under load; requests of 32 blocks that take 4 seconds."""

    def __init__(self, num_workers: int) -> None:
        self.cluster = SimCluster(may_drop=True)
        self.load = SimLoad()
        for k in range(num_workers):
            self.cluster.join(f"w{k}")
        self.cluster.tick(STEP_SECONDS)
        self.most_waiting = 0

    def go(self, seconds: float, arrivals_per_second: float) -> None:
        due = 0.0
        for _ in range(round(seconds / STEP_SECONDS)):
            due += arrivals_per_second * STEP_SECONDS
            self.load.arrive(int(due), blocks=32, seconds=4.0)
            due -= int(due)
            groups = self.cluster.plan.serving_groups
            loads = self.load.run(groups, self.cluster.now)
            self.most_waiting = max(self.most_waiting, len(self.load.waiting))
            self.cluster.tick(STEP_SECONDS, loads)

    def steady(self, share: float) -> float:
        """Arrivals per second that keep `share` of the replicas' blocks in use."""
        return share * len(self.cluster.workers) * WHOLE_BLOCKS / (32 * 4.0)

    @property
    def states(self) -> list[LayoutState]:
        return [transition.state for transition in self.cluster.transitions]


@pytest.mark.parametrize("num_workers", [2, 3, 4, 8])
def test_a_burst_drops_once_and_calm_restores_once(num_workers: int) -> None:
    run = Run(num_workers)
    run.go(20, run.steady(0.4))
    assert run.states == []
    run.go(30, run.steady(1.25))
    assert run.cluster.plan.state is LayoutState.DROPPED
    assert set(run.states) == {LayoutState.DROPPING}
    run.go(5, run.steady(0.2))
    run.go(40, run.steady(0.2))
    assert run.cluster.plan.state is LayoutState.STABLE
    assert run.states[-1] is LayoutState.RESTORING
    assert all(transition.result == "applied" for transition in run.cluster.transitions)
    assert len(run.cluster.plan.groups) == num_workers


def test_a_drop_shortens_the_queue() -> None:
    dropping, keeping = Run(4), Run(4)
    keeping.cluster.may_drop = False
    for run in (dropping, keeping):
        run.go(10, run.steady(0.4))
        run.go(20, run.steady(1.25))
    assert keeping.most_waiting > 20
    assert dropping.most_waiting < keeping.most_waiting / 4


def test_demand_around_the_limits_does_not_flap() -> None:
    run = Run(4)
    for _ in range(15):
        run.go(4, run.steady(1.15))
        run.go(4, run.steady(0.5))
    ended = [transition.started_at for transition in run.cluster.transitions]
    dwell = Thresholds().dwell_seconds
    reversals = [
        second - first
        for first, second, before, after in zip(
            ended, ended[1:], run.states, run.states[1:], strict=False
        )
        if (before, after) == (LayoutState.DROPPING, LayoutState.RESTORING)
    ]
    assert all(seconds >= dwell for seconds in reversals)
    assert len(run.states) <= 8


def test_more_demand_makes_deeper_pipelines_and_less_makes_them_shorter_again() -> None:
    run = Run(8)
    run.go(5, run.steady(0.4))
    run.go(30, run.steady(1.7))
    deepest = max(len(group.members) for group in run.cluster.plan.groups)
    assert deepest >= 4
    run.go(40, run.steady(0.1))
    assert run.cluster.plan.state is LayoutState.STABLE


def test_a_steady_rise_is_met_before_anything_waits() -> None:
    run = Run(2)
    for percent in range(30, 130, 2):
        run.go(1, run.steady(percent / 100))
    assert run.states[0] is LayoutState.DROPPING
    assert run.most_waiting == 0
    rules = {decision.rule.value for decision in run.cluster.decisions}
    assert "forecast" in rules
