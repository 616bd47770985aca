"""The greedy against its definition; pairs by host and load; 10,000 workers."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.planner.candidates import Candidate, make_candidates
from services.planner.drop_plan import DropPlan, Pool, choose_merges, copies_to_free, plan_drop
from services.planner.layout_policy import replica
from services.planner.pressure import GroupLoad
from shared.layout import GroupPlan, MemberPlan, Plan, Span
from shared.messages import ModelCosts
from tests.planner_support import COPY_BLOCKS, NUM_LAYERS, plan_for, worker_info, workers

LOAD = GroupLoad(total_blocks=100, used_blocks=0, waiting_blocks=0)


def demand(blocks: int) -> GroupLoad:
    return GroupLoad(total_blocks=100, used_blocks=min(blocks, 100), waiting_blocks=0)


def pipeline_of(*ids: str, num_layers: int = NUM_LAYERS) -> GroupPlan:
    cuts = [k * num_layers // len(ids) for k in range(len(ids) + 1)]
    members = tuple(
        MemberPlan(worker_id=w, span=Span(start=a, end=b), incarnation="1")
        for w, a, b in zip(ids, cuts, cuts[1:], strict=False)
    )
    return GroupPlan(group_id=f"p1-{ids[0]}", members=members, epoch=1)


def candidates_of(loads: dict[str, int], hosts: dict[str, str] | None = None) -> list[Candidate]:
    living = {w: worker_info(w, host=(hosts or {}).get(w, "host")) for w in loads}
    groups = [replica(w, NUM_LAYERS) for w in loads]
    by_group = {f"g-{w}": demand(blocks) for w, blocks in loads.items()}
    return make_candidates(groups, living, by_group)


def merged(pools: list[Pool]) -> list[set[str]]:
    return [
        {member.worker_id for candidate in pool.parts for member in candidate.members}
        for pool in pools
        if len(pool.parts) > 1
    ]


def by_heap(sizes: list[int], num_merges: int, max_members: int) -> Counter[int]:
    """The paper's greedy on sizes alone."""
    heap = list(sizes)
    heapq.heapify(heap)
    for _ in range(num_merges):
        if len(heap) < 2 or sum(heapq.nsmallest(2, heap)) > max_members:
            break
        heapq.heappush(heap, heapq.heappop(heap) + heapq.heappop(heap))
    return Counter(heap)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    num_merges=st.integers(0, 12),
    pressures=st.randoms(use_true_random=False),
)
def test_always_the_two_smallest_are_merged(
    sizes: list[int], num_merges: int, pressures: object
) -> None:
    groups, living, loads = [], {}, {}
    for index, size in enumerate(sizes):
        ids = [f"w{index}-{k}" for k in range(size)]
        living |= {w: worker_info(w, num_layers=16, host=f"h{index % 3}") for w in ids}
        groups.append(pipeline_of(*ids, num_layers=16))
        loads[groups[-1].group_id] = demand(index * 7 % 5)
    pools = choose_merges(make_candidates(groups, living, loads), num_merges, max_members=16)
    result = Counter(sum(len(c.members) for c in pool.parts) for pool in pools)
    assert result == by_heap(sizes, num_merges, 16)
    ids = [c.group.group_id for pool in pools for c in pool.parts]
    assert sorted(ids) == sorted(group.group_id for group in groups)


def test_the_most_loaded_is_paired_with_the_least_loaded() -> None:
    candidates = candidates_of({"a": 10, "b": 90, "c": 50, "d": 40})
    assert merged(choose_merges(candidates, 1, NUM_LAYERS)) == [{"a", "b"}]
    pairs = merged(choose_merges(candidates, 2, NUM_LAYERS))
    assert sorted(map(sorted, pairs)) == [["a", "b"], ["c", "d"]]


def test_partners_of_the_same_host_come_first() -> None:
    hosts = {"a": "h1", "b": "h1", "c": "h2", "d": "h2"}
    candidates = candidates_of({"a": 90, "b": 80, "c": 10, "d": 0}, hosts)
    assert merged(choose_merges(candidates, 1, NUM_LAYERS)) == [{"a", "b"}]
    alone = candidates_of({"a": 90, "b": 80, "c": 10}, {"a": "h1", "b": "h2", "c": "h3"})
    assert merged(choose_merges(alone, 1, NUM_LAYERS)) == [{"a", "c"}]


@pytest.mark.parametrize(("lacking", "copies"), [(0, 1), (1, 1), (1024, 1), (1025, 2)])
def test_the_copies_to_free_hold_what_is_lacking(lacking: int, copies: int) -> None:
    candidates = candidates_of({"a": 0, "b": 0})
    assert copies_to_free(lacking, candidates) == copies


def drop(candidates: list[Candidate], num_merges: int) -> DropPlan | None:
    return plan_drop(candidates, num_merges=num_merges, needed_ratio=1.0)


def test_a_pair_gets_more_blocks_than_two_replicas_and_one_copy() -> None:
    living = workers("a", "b", "c")
    plan = plan_for("a", "b", "c")
    dropped = drop(make_candidates(plan.groups, living, {}), 1)
    assert dropped is not None
    assert dropped.num_merges == 1
    assert [len(group.members) for group in dropped.groups(7)] == [2, 1]
    pair = dropped.groups(7)[0]
    assert pair.epoch == 7
    assert [member.incarnation for member in pair.members] == ["1", "1"]
    before = sum(c.capacity_blocks for c in make_candidates(plan.groups, living, {}))
    assert dropped.capacity_blocks == before + COPY_BLOCKS


def test_the_more_loaded_worker_leads_the_pair() -> None:
    candidates = candidates_of({"a": 10, "b": 90})
    dropped = drop(candidates, 1)
    assert dropped is not None
    assert dropped.groups(7)[0].leader == "b"


def test_one_group_alone_cannot_drop() -> None:
    candidates = candidates_of({"a": 90})
    assert drop(candidates, 1) is None


def test_groups_do_not_get_more_stages_than_there_are_layers() -> None:
    candidates = candidates_of({f"w{k}": 50 for k in range(NUM_LAYERS + 1)})
    dropped = drop(candidates, 100)
    assert dropped is not None
    assert sorted(len(group.members) for group in dropped.groups(7)) == [2, 3]


def test_a_group_that_has_no_room_for_its_slices_stays_apart() -> None:
    tight = ModelCosts(
        layer_weight_bytes=2**28,
        embedding_weight_bytes=2**30,
        head_weight_bytes=2**30,
        whole_weight_bytes=2**29,
        kv_layer_block_bytes=2**17,
    )
    living = {w: worker_info(w, costs=tight) for w in "ab"}
    groups = plan_for("a", "b").groups
    assert drop(make_candidates(groups, living, {}), 1) is None


@pytest.mark.parametrize("num_merges", [1, 2500, 5000, 9999])
def test_ten_thousand_workers(num_merges: int) -> None:
    ids = [f"w{k:05}" for k in range(10_000)]
    layers = (Span(start=0, end=30),)
    living = {
        w: worker_info(w, host=f"h{k // 8}", num_layers=30, layers=layers)
        for k, w in enumerate(ids)
    }
    groups = [replica(w, 30) for w in ids]
    loads = {f"g-{w}": demand(k * 37 % 101) for k, w in enumerate(ids)}
    candidates = make_candidates(groups, living, loads)
    dropped = plan_drop(candidates, num_merges=num_merges, needed_ratio=1.2)
    assert dropped is not None
    sizes = Counter(len(group.members) for group in dropped.groups(7))
    assert dropped.num_merges == 10_000 - len(dropped.groups(7))
    assert sizes == by_heap([1] * 10_000, num_merges, 30)
    plan = Plan.model_validate(
        plan_for("a").model_dump() | {"num_layers": 30, "groups": dropped.groups(7)}
    )
    assert sum(len(group.members) for group in plan.groups) == 10_000
