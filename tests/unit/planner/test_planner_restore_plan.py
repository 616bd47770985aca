"""What may be split, how far, and which group first."""

from __future__ import annotations

from services.planner.candidates import Candidate, make_candidates
from services.planner.layout_policy import replica
from services.planner.pressure import GroupLoad
from services.planner.restore_plan import RestorePlan, plan_restore, plan_whole
from shared.layout import GroupPlan, MemberPlan, Span
from tests.planner_support import (
    COPY_BLOCKS,
    NUM_LAYERS,
    WHOLE_BLOCKS,
    figures_of,
    worker_info,
)


def pipeline_of(*ids: str) -> GroupPlan:
    cuts = [k * NUM_LAYERS // len(ids) for k in range(len(ids) + 1)]
    members = tuple(
        MemberPlan(worker_id=w, span=Span(start=cuts[k], end=cuts[k + 1]), incarnation="1")
        for k, w in enumerate(ids)
    )
    return GroupPlan(group_id=f"p1-{ids[0]}", members=members, epoch=1)


def capacity_of(group: GroupPlan) -> int:
    return len(group.members) * WHOLE_BLOCKS + (len(group.members) - 1) * COPY_BLOCKS


def build(demands: dict[GroupPlan, int]) -> list[Candidate]:
    living = {
        member.worker_id: worker_info(
            member.worker_id,
            **figures_of(member.span),
        )
        for group in demands
        for member in group.members
    }
    loads = {g.group_id: GroupLoad(capacity_of(g), used, 0) for g, used in demands.items()}
    return make_candidates(list(demands), living, loads)


def restore(demands: dict[GroupPlan, int]) -> RestorePlan | None:
    return plan_restore(
        build(demands),
        demand_blocks=sum(demands.values()),
        restore_ratio=0.5,
        epoch=9,
    )


def shape(plan: RestorePlan | None) -> list[list[str]]:
    assert plan is not None
    return [[member.worker_id for member in group.members] for group in plan.groups]


def test_low_demand_makes_replicas() -> None:
    plan = restore({pipeline_of("a", "b"): int(0.9 * WHOLE_BLOCKS)})
    assert shape(plan) == [["a"], ["b"]]
    assert plan is not None
    assert plan.groups == (replica("a", NUM_LAYERS), replica("b", NUM_LAYERS))
    assert plan.capacity_blocks == 2 * WHOLE_BLOCKS


def test_half_of_the_undropped_capacity_is_the_limit() -> None:
    assert restore({pipeline_of("a", "b"): WHOLE_BLOCKS - 1}) is not None
    assert restore({pipeline_of("a", "b"): WHOLE_BLOCKS}) is None


def test_four_become_two_pairs_where_replicas_would_be_too_small() -> None:
    plan = restore({pipeline_of("a", "b", "c", "d"): int(2.5 * WHOLE_BLOCKS)})
    assert shape(plan) == [["a", "c"], ["b", "d"]]
    assert plan is not None
    assert all(group.tiles(NUM_LAYERS) and group.epoch == 9 for group in plan.groups)


def test_three_become_a_pair_and_a_replica() -> None:
    assert shape(restore({pipeline_of("a", "b", "c"): int(1.6 * WHOLE_BLOCKS)})) == [
        ["a", "c"],
        ["b"],
    ]


def test_the_deepest_and_then_the_least_loaded_come_first() -> None:
    quiet, busy = pipeline_of("a", "b"), pipeline_of("c", "d")
    plan = restore({quiet: 0, busy: int(1.2 * WHOLE_BLOCKS)})
    assert shape(plan) == [["a"], ["b"], ["c", "d"]]
    deep, pair = pipeline_of("a", "b", "c", "d"), pipeline_of("e", "f")
    plan = restore({deep: int(1.9 * WHOLE_BLOCKS), pair: int(1.2 * WHOLE_BLOCKS)})
    assert shape(plan) == [["a"], ["b"], ["c"], ["d"], ["e", "f"]]


def test_the_cluster_as_a_whole_keeps_room() -> None:
    groups = {pipeline_of("a", "b"): 0, replica("z", NUM_LAYERS): int(1.6 * WHOLE_BLOCKS)}
    assert restore(groups) is None


def test_an_order_does_not_ask_for_demand() -> None:
    demands = {pipeline_of("a", "b"): 2 * WHOLE_BLOCKS, pipeline_of("c", "d"): 0}
    candidates = build(demands)
    assert shape(plan_whole(candidates, {"p1-a"})) == [["a"], ["b"], ["c", "d"]]
    assert plan_whole(candidates, {"g-z"}) is None
    assert shape(plan_whole(candidates, {"p1-a"}, {"b"})) == [["a"], ["c", "d"]]
