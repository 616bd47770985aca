"""What the leader decides: versions only rise, uncertainty holds, unchanged stays unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from services.planner.decision import decide
from services.planner.inputs import Inputs
from services.planner.rules import Action, Decision, Rule
from shared.layout import LayoutState, Plan
from shared.messages import WorkerState
from tests.planner_support import NUM_LAYERS, make_pressure, plan_for, worker_info, workers


def published(decision: Decision) -> Plan:
    assert decision.action is Action.PUBLISH
    assert decision.plan is not None
    return decision.plan


def leaders(plan: Plan) -> list[str]:
    return [group.leader for group in plan.groups]


def test_the_first_ready_worker_makes_the_first_plan() -> None:
    starting = {"a": worker_info("a", state=WorkerState.STARTING)}
    assert decide(Inputs(term=3, workers={})).rule is Rule.NO_WORKER_YET
    assert decide(Inputs(term=3, workers=starting)).action is Action.HOLD
    plan = published(decide(Inputs(term=3, workers=workers("a"))))
    assert (plan.term, plan.epoch, plan.state) == (3, 1, LayoutState.STABLE)
    assert leaders(plan) == ["a"]


def test_unchanged_means_no_new_epoch() -> None:
    stored = plan_for("a", "b")
    decision = decide(Inputs(term=1, workers=workers("a", "b"), stored=stored, remembered=stored))
    assert (decision.action, decision.rule) == (Action.KEEP, Rule.UNCHANGED)


def test_a_change_of_workers_is_a_new_epoch_and_says_what_changed() -> None:
    stored = plan_for("a", "b")
    plan = published(decide(Inputs(term=1, workers=workers("b", "c"), stored=stored)))
    assert (plan.term, plan.epoch) == (1, 2)
    assert leaders(plan) == ["b", "c"]
    assert plan.reason == "g-c joined; g-a left"


def test_a_draining_worker_leaves_the_layout() -> None:
    stored = plan_for("a", "b")
    living = workers("a", "b") | {"a": worker_info("a", state=WorkerState.DRAINING)}
    plan = published(decide(Inputs(1, living, stored)))
    assert leaders(plan) == ["b"]


def test_all_workers_gone_is_an_empty_plan_of_the_same_model() -> None:
    stored = plan_for("a")
    plan = published(decide(Inputs(term=1, workers={}, stored=stored)))
    assert plan.groups == ()
    assert plan.model_id == stored.model_id


def test_nothing_is_changed_while_absence_proves_nothing() -> None:
    stored = plan_for("a", "b")
    decision = decide(Inputs(1, workers("a"), stored, stored, membership_held=True))
    assert (decision.action, decision.rule) == (Action.HOLD, Rule.MEMBERSHIP_UNCERTAIN)
    assert decide(Inputs(1, workers("a"), membership_held=True)).action is Action.HOLD


def test_a_new_leader_rewrites_the_plan_with_its_term_and_the_same_epoch() -> None:
    stored = plan_for("a", term=4, epoch=7)
    for held in (False, True):
        decision = decide(Inputs(9, workers("a"), stored, stored, membership_held=held))
        assert decision.rule is Rule.NEW_TERM
        assert not decision.layout_changed
        assert published(decision).version == (9, 7)
        assert published(decision).groups == stored.groups


def test_a_lost_store_gets_the_same_layout_again_above_all_that_was_applied() -> None:
    remembered = plan_for("a", "b", term=4, epoch=7)
    decision = decide(
        Inputs(5, workers("a"), None, remembered, applied=(4, 7), membership_held=True)
    )
    assert decision.rule is Rule.STORE_LOST
    assert published(decision).groups == remembered.groups
    assert published(decision).version > (4, 7)


def test_a_planner_that_knows_nothing_starts_above_what_workers_applied() -> None:
    plan = published(decide(Inputs(term=1, workers=workers("a"), applied=(57, 9))))
    assert plan.version > (57, 9)
    assert plan.epoch > 9


def test_a_stored_plan_behind_the_workers_is_written_again() -> None:
    stored = plan_for("a", term=3, epoch=1)
    decision = decide(Inputs(3, workers("a"), stored, stored, applied=(57, 9)))
    assert decision.rule is Rule.BEHIND_WORKERS
    assert published(decision).version > (57, 9)


def test_an_unknown_load_holds_what_would_drop() -> None:
    stored = plan_for("a", "b")
    pressure = make_pressure(200, 100, unknown=frozenset("b"))
    decision = decide(Inputs(1, workers("a", "b"), stored, pressure=pressure, may_drop=True))
    assert (decision.action, decision.rule) == (Action.HOLD, Rule.LOADS_UNKNOWN)
    assert "b" in decision.detail
    assert decide(Inputs(1, workers("a", "b"), stored, pressure=pressure)).action is Action.KEEP


@dataclass
class World:
    """A store, a planner's memory and what workers applied, driven by random events."""

    term: int = 1
    living: set[str] = field(default_factory=set)
    stored: Plan | None = None
    remembered: Plan | None = None
    applied: tuple[int, int] = (0, 0)
    versions: list[tuple[int, int]] = field(default_factory=list)

    def step(self, held: bool) -> None:
        inputs = Inputs(
            term=self.term,
            workers=workers(*sorted(self.living)),
            stored=self.stored,
            remembered=self.remembered,
            applied=self.applied,
            membership_held=held,
        )
        plan = decide(inputs).plan
        if plan is not None:
            self.stored = self.remembered = plan
            self.term = max(self.term, plan.term)
            self.versions.append(plan.version)
            if plan.groups:
                self.applied = plan.version


EVENTS = ["join", "leave", "new leader", "lose store", "lose store and planner"]


@given(
    st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from("abc"), st.booleans()), max_size=30)
)
def test_versions_only_rise_and_the_decision_settles(
    events: list[tuple[str, str, bool]],
) -> None:
    world = World()
    for second, (event, worker_id, held) in enumerate(events, start=2):
        match event:
            case "join":
                world.living.add(worker_id)
            case "leave":
                world.living.discard(worker_id)
            case "new leader":
                world.remembered = world.stored
                world.term = max(world.term + 1, second)
            case "lose store":
                world.stored = None
            case "lose store and planner":
                world.stored = world.remembered = None
                world.term = max(world.applied[0] + 1, second)
        world.step(held)
        written = len(world.versions)
        world.step(held)
        assert len(world.versions) == written, "a decision must not be taken twice"
    assert world.versions == sorted(set(world.versions))
    assert all(plan_epoch >= 1 for _, plan_epoch in world.versions)


def test_plans_are_of_the_whole_model() -> None:
    assert plan_for("a").num_layers == NUM_LAYERS
