"""What a plan makes of a pipeline: who loads, who must stop, who leads next."""

from __future__ import annotations

import pytest

from services.worker.regrouping import Regrouping
from shared.layout import GroupPlan, LayoutState, MemberPlan, Plan, Span

NUM_LAYERS = 12
Stages = list[tuple[str, int]]  # worker and the layer that its span ends at


def group(stages: Stages, epoch: int = 3) -> GroupPlan:
    start, members = 0, []
    for worker_id, end in stages:
        members.append(MemberPlan(worker_id=worker_id, span=Span(start=start, end=end)))
        start = end
    is_pipeline = len(stages) > 1
    prefix = f"p{epoch}" if is_pipeline else "g"
    return GroupPlan(
        group_id=f"{prefix}-{stages[0][0]}", members=tuple(members), epoch=epoch * is_pipeline
    )


def plan(*groups: Stages, epoch: int = 7) -> Plan:
    return Plan(
        term=1,
        epoch=epoch,
        state=LayoutState.DROPPING,
        model_id="m",
        num_layers=NUM_LAYERS,
        groups=tuple(group(stages, epoch) for stages in groups),
        created_at=0.0,
    )


PAIR: Stages = [("a", 6), ("b", 12)]
FOUR: Stages = [("a", 3), ("c", 6), ("b", 9), ("d", 12)]


@pytest.mark.parametrize(
    ("before", "after", "loads", "stops"),
    [
        pytest.param(PAIR, [[("a", 12)], [("b", 12)]], True, False, id="whole again"),
        pytest.param(PAIR, [FOUR], False, True, id="second drop"),
        pytest.param(FOUR, [PAIR, [("c", 6), ("d", 12)]], True, False, id="partial restore"),
        pytest.param(FOUR, [PAIR, [("c", 5), ("d", 12)]], True, True, id="a layer is given up"),
        pytest.param(PAIR, [[("b", 6), ("a", 12)]], True, True, id="places changed"),
        pytest.param(PAIR, [[("c", 12)]], True, False, id="nobody is placed"),
    ],
)
def test_what_a_regrouping_needs(
    before: Stages, after: list[Stages], loads: bool, stops: bool
) -> None:
    regroupings = {
        worker_id: Regrouping.of(plan(*after), worker_id, group(before)) for worker_id, _ in before
    }
    assert {r.loads for r in regroupings.values()} == {loads}  # all members say the same
    assert {r.stops for r in regroupings.values()} == {stops}


def test_a_leader_that_follows_must_stop_whatever_the_layers() -> None:
    before = group([("a", 6), ("b", 12)])
    next_plan = plan([("c", 3), ("a", 12)], [("b", 12)])
    assert Regrouping.of(next_plan, "a", before).stops


def test_a_replica_neither_loads_nor_stops() -> None:
    regrouping = Regrouping.of(plan(PAIR), "a", None)
    assert not regrouping.loads
    assert not regrouping.stops
    assert regrouping.after == group(PAIR, 7)


def test_heirs_are_the_leaders_among_the_members() -> None:
    regrouping = Regrouping.of(plan(PAIR, [("c", 6), ("d", 12)]), "a", group(FOUR))
    assert regrouping.heirs == {"a": 2, "c": 2}
    regrouping = Regrouping.of(plan([("x", 3), ("b", 6), ("a", 12)]), "a", group(PAIR))
    assert regrouping.heirs == {}


def test_the_epoch_at_which_it_was_read_makes_no_difference() -> None:
    again = plan(PAIR).model_copy(update={"epoch": 9})
    assert Regrouping.of(plan(PAIR), "a", None) == Regrouping.of(again, "a", None)
    assert Regrouping.of(plan(PAIR), "a", None) != Regrouping.of(plan(FOUR), "a", None)
