"""What the leader decides: versions only rise, uncertainty holds, unchanged stays unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.planner.decision import decide
from services.planner.inputs import Inputs
from services.planner.rules import Action, Decision, Rule
from shared.layout import Change, GroupPlan, LayoutState, MemberPlan, Plan, PlanPhase, Span
from shared.messages import AckState, ModelCosts, PlanAck, WorkerInfo, WorkerState
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


@pytest.mark.parametrize(
    ("layer_bytes", "rule"), [(2**27, Rule.OVERLOAD), (0, Rule.NOTHING_TO_DROP)]
)
def test_layers_are_dropped_only_where_that_gains_blocks(layer_bytes: int, rule: Rule) -> None:
    costs = ModelCosts(
        layer_weight_bytes=layer_bytes,
        embedding_weight_bytes=0,
        head_weight_bytes=0,
        whole_weight_bytes=layer_bytes * NUM_LAYERS,
        kv_layer_block_bytes=2**17,
    )
    living = {w: worker_info(w, costs=costs) for w in "ab"}
    num_blocks = 2 * (2**30 - layer_bytes * NUM_LAYERS) // (2**17 * NUM_LAYERS)
    pressure = make_pressure(2 * num_blocks, num_blocks)
    decision = decide(Inputs(1, living, plan_for("a", "b"), pressure=pressure, may_drop=True))
    assert decision.rule is rule


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


def pipeline_plan() -> Plan:
    """The plan at rest in which a and b are one pipeline."""
    stored = plan_for("a", "b")
    members = (
        MemberPlan(worker_id="a", span=Span(start=0, end=2), incarnation="1"),
        MemberPlan(worker_id="b", span=Span(start=2, end=NUM_LAYERS), incarnation="1"),
    )
    group = GroupPlan(group_id="ab", members=members, epoch=5)
    changes = {"groups": (group,), "state": LayoutState.DROPPED, "epoch": 5}
    return stored.model_copy(update=changes)


def halves() -> dict[str, WorkerInfo]:
    """Members of `pipeline_plan` as their leases show them."""
    low, high = (Span(start=0, end=2),), (Span(start=2, end=NUM_LAYERS),)
    return {"a": worker_info("a", layers=low), "b": worker_info("b", layers=high)}


def failed(worker_id: str, plan: Plan) -> dict[str, PlanAck]:
    ack = PlanAck(
        worker_id=worker_id, term=plan.term, epoch=plan.epoch, state=AckState.FAILED, detail="b"
    )
    return {worker_id: ack}


@pytest.mark.parametrize("held", [False, True])
def test_a_failed_pipeline_is_broken_up_whoever_is_out_of_sight(held: bool) -> None:
    stored = pipeline_plan()
    living = {"a": halves()["a"]}
    inputs = Inputs(1, living, stored, acks=failed("a", stored), membership_held=held)
    assert published(decide(inputs)).groups == ()


@pytest.mark.parametrize("state", [WorkerState.RELOADING, WorkerState.STARTING])
def test_a_member_that_lost_its_group_is_placed_when_it_is_whole(state: WorkerState) -> None:
    """Its lease may be late with the layers, but not with its state."""
    stored = pipeline_plan()
    for layers in (halves()["a"].layers, worker_info("a").layers):
        reloading = {"a": worker_info("a", layers=layers, state=state)}
        plan = published(decide(Inputs(1, reloading, stored)))
        assert plan.groups == ()
    whole = published(decide(Inputs(1, workers("a"), plan, acks=failed("a", stored))))
    assert leaders(whole) == ["a"]


def test_a_member_whose_peer_died_is_not_placed_while_it_lacks_layers() -> None:
    stored = pipeline_plan()
    plan = published(decide(Inputs(1, {"b": halves()["b"]}, stored)))
    assert plan.groups == ()
    assert decide(Inputs(1, {"b": halves()["b"]}, plan)).action is Action.KEEP


@pytest.mark.parametrize("phase", PlanPhase)
def test_an_outage_is_no_missed_deadline(phase: PlanPhase) -> None:
    """After it nobody has had the time to answer yet."""
    change = Change(cause="", started_at=0.0, previous_groups=plan_for("a", "b").groups)
    under_way = pipeline_plan().model_copy(
        update={"phase": phase, "change": change, "deadline_at": 10.0}
    )
    for held, action in ((True, Action.KEEP), (False, Action.PUBLISH)):
        inputs = Inputs(1, workers("a", "b"), under_way, membership_held=held, now=20.0)
        assert decide(inputs).action is action
