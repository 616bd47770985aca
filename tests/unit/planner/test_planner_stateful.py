"""Whatever happens to workers and planners: versions rise, and every layer has a live owner."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.planner.pressure import GroupLoad
from shared.layout import Plan, PlanPhase
from shared.messages import AdminAction, AdminRequest, WorkerState
from tests.planner_simulator import Mood, SimCluster
from tests.planner_support import NUM_LAYERS, blocks_of

WORKERS = st.sampled_from("abcdef")
#: Ticks after which everything that was started must be over.
CALM_TICKS = 80


class PlannerMachine(RuleBasedStateMachine):
    """Random joins, deaths, restarts, refusals, silences, orders, loads and changes of leader."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = SimCluster(may_drop=True)

    @initialize(count=st.integers(2, 6))
    def begin(self, count: int) -> None:
        for worker_id in "abcdef"[:count]:
            self.cluster.join(worker_id)
        self.cluster.tick(0.2)

    @rule(worker_id=WORKERS)
    def join_or_restart(self, worker_id: str) -> None:
        self.cluster.join(worker_id)

    @rule(worker_id=WORKERS)
    def die(self, worker_id: str) -> None:
        self.cluster.workers.pop(worker_id, None)

    @rule(worker_id=WORKERS)
    def drain(self, worker_id: str) -> None:
        if (worker := self.cluster.workers.get(worker_id)) is not None:
            worker.info = worker.info.model_copy(update={"state": WorkerState.DRAINING})

    @rule(worker_id=WORKERS, mood=st.sampled_from(Mood))
    def change_mood(self, worker_id: str, mood: Mood) -> None:
        if (worker := self.cluster.workers.get(worker_id)) is not None:
            worker.mood = mood

    @rule()
    def change_leader(self) -> None:
        self.cluster.change_leader()

    @rule()
    def lose_the_store(self) -> None:
        self.cluster.stored = None

    @rule(
        action=st.sampled_from([AdminAction.DROP, AdminAction.RESTORE]),
        workers=st.lists(WORKERS, max_size=3, unique=True),
        hold=st.sampled_from([None, 0.0, 5.0]),
    )
    def order(self, action: AdminAction, workers: list[str], hold: float | None) -> None:
        self.cluster.wish = AdminRequest(action=action, workers=tuple(workers), hold_seconds=hold)
        self.cluster.tick(0.1, self.loads(60))

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0]), percent=st.sampled_from([None, 10, 90, 150]))
    def tick(self, seconds: float, percent: int | None) -> None:
        self.cluster.tick(seconds, self.loads(percent))

    @rule(ticks=st.integers(1, 6))
    def burst(self, ticks: int) -> None:
        for _ in range(ticks):
            self.cluster.tick(0.2, self.loads(150))

    @rule(ticks=st.integers(1, 6))
    def quiet(self, ticks: int) -> None:
        for _ in range(ticks):
            self.cluster.tick(0.5, self.loads(10))

    @rule(worker_id=WORKERS, ticks=st.integers(0, 7), restarts=st.booleans())
    def die_during_a_drop(self, worker_id: str, ticks: int, restarts: bool) -> None:
        self.cluster.wish = AdminRequest(action=AdminAction.DROP)
        for _ in range(ticks):
            self.cluster.tick(0.1, self.loads(60))
        self.cluster.workers.pop(worker_id, None)
        if restarts:
            self.cluster.join(worker_id)
        self.cluster.tick(0.1, self.loads(60))

    @rule(worker_id=WORKERS, ticks=st.integers(0, 7), mood=st.sampled_from(Mood))
    def sulk_during_an_order(self, worker_id: str, ticks: int, mood: Mood) -> None:
        is_dropped = self.cluster.stored is not None and any(
            len(group.members) > 1 for group in self.cluster.stored.groups
        )
        action = AdminAction.RESTORE if is_dropped else AdminAction.DROP
        self.cluster.wish = AdminRequest(action=action)
        for _ in range(ticks):
            self.cluster.tick(0.1, self.loads(60))
        self.change_mood(worker_id, mood)
        self.cluster.tick(0.1, self.loads(60))

    @rule(ticks=st.integers(0, 3))
    def change_leader_during_a_drop(self, ticks: int) -> None:
        self.cluster.wish = AdminRequest(action=AdminAction.DROP)
        for _ in range(ticks):
            self.cluster.tick(0.1, self.loads(60))
        self.cluster.change_leader()
        self.cluster.tick(0.1, self.loads(60))

    def teardown(self) -> None:
        """When everybody plays along, every transition ends and every worker serves again."""
        self.cluster.wish = None
        for worker in self.cluster.workers.values():
            worker.mood = Mood.PLAYS_ALONG
        self.calm()
        self.leave_who_drains()
        self.calm()
        if self.cluster.stored is None:
            return
        plan = self.cluster.plan
        assert plan.change is None
        placed = {member.worker_id for group in plan.groups for member in group.members}
        ready = {
            worker_id
            for worker_id, worker in self.cluster.workers.items()
            if worker.info.state is WorkerState.READY
        }
        assert placed == ready
        self.check_members_hold_their_layers(plan)

    def calm(self) -> None:
        for _ in range(CALM_TICKS):
            self.cluster.tick(0.5, self.loads(60))

    def leave_who_drains(self) -> None:
        """Nobody needs them any more, but for members of groups that drain as a whole."""
        draining = {
            worker_id
            for worker_id, worker in self.cluster.workers.items()
            if worker.info.state is WorkerState.DRAINING
        }
        for group in self.cluster.stored.groups if self.cluster.stored is not None else ():
            members = {member.worker_id for member in group.members}
            assert not members & draining or members <= draining
        for worker_id in draining:
            del self.cluster.workers[worker_id]

    @invariant()
    def versions_only_rise(self) -> None:
        assert self.cluster.versions == sorted(set(self.cluster.versions))

    @invariant()
    def groups_hold_every_layer(self) -> None:
        if self.cluster.stored is None:
            return
        plan = self.cluster.stored
        for group in plan.serving_groups:
            assert group.tiles(NUM_LAYERS)
        for worker in self.cluster.workers.values():
            if worker.serving is not None:
                span = next(
                    m.span for m in worker.serving.members if m.worker_id == worker.info.worker_id
                )
                assert worker.holds(span)

    @invariant()
    def a_prepared_layout_takes_nothing_away(self) -> None:
        if self.cluster.stored is None or self.cluster.stored.phase is PlanPhase.COMMIT:
            return
        for group in self.cluster.stored.serving_groups:
            for member in group.members:
                worker = self.cluster.workers.get(member.worker_id)
                if worker is not None and worker.serving == group:
                    assert worker.holds(member.span)

    def check_members_hold_their_layers(self, plan: Plan) -> None:
        for group in plan.groups:
            for member in group.members:
                assert self.cluster.workers[member.worker_id].holds(member.span)
                assert self.cluster.workers[member.worker_id].serving == group

    def loads(self, percent: int | None) -> dict[str, GroupLoad] | None:
        if percent is None or self.cluster.stored is None:
            return None
        loads = {}
        for group in self.cluster.stored.serving_groups:
            total = blocks_of(group)
            demand = total * percent // 100
            loads[group.group_id] = GroupLoad(total, min(total, demand), max(0, demand - total))
        return loads


PlannerMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=20,
    suppress_health_check=[HealthCheck.too_slow],
)
TestPlanner = PlannerMachine.TestCase
