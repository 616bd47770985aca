"""Layer slices against brute force: only dropping where possible, enough blocks, fastest."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.planner.slices import Slicing, slice_layers
from services.planner.stages import Interval, StageShape
from shared.messages import ModelCosts

NUM_LAYERS = 6


def costs(**changes: float) -> ModelCosts:
    fields: dict[str, float] = {
        "layer_weight_bytes": 100,
        "embedding_weight_bytes": 0,
        "head_weight_bytes": 0,
        "whole_weight_bytes": 100 * NUM_LAYERS,
        "kv_layer_block_bytes": 1,
        "layer_seconds": 1.0,
    }
    return ModelCosts.model_validate(fields | changes)


def member(
    memory_bytes: int = 1200,
    held: tuple[Interval, ...] = ((0, NUM_LAYERS),),
    model: ModelCosts | None = None,
) -> StageShape:
    return StageShape(memory_bytes, held, model or costs(), NUM_LAYERS)


def sizes(slicing: Slicing | None) -> list[int]:
    assert slicing is not None
    return [end - start for start, end in pairwise(slicing.cuts)]


def evaluate(
    members: list[StageShape], order: tuple[int, ...], cuts: tuple[int, ...]
) -> tuple[int, int, float] | None:
    """(fetched, blocks, slowest) of one division, by the definitions; None: no room."""
    fetched, blocks, slowest = 0, [], 0.0
    for place, (start, end) in enumerate(pairwise(cuts)):
        one = members[order[place]]
        weights = (end - start) * one.costs.layer_weight_bytes
        seconds = (end - start) * one.costs.layer_seconds
        if place == 0:
            weights += one.costs.embedding_weight_bytes
            seconds += one.costs.embedding_seconds
        if place == len(order) - 1:
            weights += one.costs.head_weight_bytes
            seconds += one.costs.head_seconds
        room = one.memory_bytes - weights
        blocks.append(room // ((end - start) * one.costs.kv_layer_block_bytes))
        slowest = max(slowest, seconds)
        held = {layer for a, b in one.held for layer in range(a, b)}
        fetched += len(set(range(start, end)) - held)
    return (fetched, min(blocks), slowest) if min(blocks) >= 1 else None


def brute_force(members: list[StageShape], wanted: int) -> tuple[int, int, float] | None:
    """The best of all orders and cuts: (fetched, blocks up to the wanted ones, slowest)."""
    found = []
    for order in permutations(range(len(members))):
        for inner in combinations(range(1, NUM_LAYERS), len(members) - 1):
            value = evaluate(members, order, (0, *inner, NUM_LAYERS))
            if value is not None:
                found.append((value[0] > 0, value[0], -min(value[1], wanted), value[2]))
    if not found:
        return None
    _, fetched, blocks, slowest = min(found)
    return fetched, -blocks, slowest


@st.composite
def members_of_one_cut(draw: st.DrawFn) -> list[StageShape]:
    """Members as they arise: merged pipelines, whose slices are staggered, and replicas."""
    members: list[StageShape] = []
    for _ in range(draw(st.integers(1, 2))):
        inner = draw(st.sets(st.integers(1, NUM_LAYERS - 1), max_size=2))
        for start, end in pairwise([0, *sorted(inner), NUM_LAYERS]):
            model = costs(
                head_seconds=draw(st.sampled_from([0.0, 2.5])),
                layer_seconds=draw(st.sampled_from([1.0, 1.5])),
                head_weight_bytes=draw(st.sampled_from([0, 150])),
            )
            members.append(member(draw(st.sampled_from([500, 900, 1200])), ((start, end),), model))
    return members


@given(members=members_of_one_cut(), wanted=st.integers(1, 900))
def test_a_slicing_is_valid_and_as_good_as_the_best_that_only_drops(
    members: list[StageShape], wanted: int
) -> None:
    best = brute_force(members, wanted)
    slicing = slice_layers(members, wanted)
    if best is None:
        assert slicing is None
        return
    assert slicing is not None
    assert sorted(slicing.members) == list(range(len(members)))
    value = evaluate(members, slicing.members, slicing.cuts)
    assert value == (slicing.num_fetched, slicing.num_blocks, slicing.slowest_seconds)
    if best[0] == 0 and len(members) > 1:
        assert slicing.num_fetched == 0, "dropping alone would do"
    are_equal = len({(one.costs, one.memory_bytes) for one in members}) == 1
    if best[0] == 0 and are_equal:  # where layers must travel, room goes before few layers
        fetched, blocks, slowest = value
        assert (fetched, -min(blocks, wanted), slowest) <= (best[0], -best[1], best[2])


@given(
    head_seconds=st.floats(0, 4), num_members=st.integers(2, NUM_LAYERS), wanted=st.integers(1, 400)
)
def test_equal_replicas_get_the_best_slices_there_are(
    head_seconds: float, num_members: int, wanted: int
) -> None:
    members = [member(model=costs(head_seconds=head_seconds))] * num_members
    slicing = slice_layers(members, wanted)
    assert slicing is not None
    best = brute_force(members, wanted) if num_members <= 4 else None
    if best is not None:
        assert min(slicing.num_blocks, wanted) == best[1]
        assert slicing.slowest_seconds == pytest.approx(best[2])
    assert slicing.num_fetched == 0


def test_the_lm_head_takes_layers_from_the_last_stage() -> None:
    assert sizes(slice_layers([member()] * 2, 1)) == [3, 3]
    heavy = costs(head_seconds=2.0)
    assert sizes(slice_layers([member(model=heavy)] * 2, 1)) == [4, 2]


def test_a_fast_stage_does_not_cost_the_blocks_that_are_needed() -> None:
    members = [member(model=costs(head_seconds=4.0))] * 2
    fast, roomy = slice_layers(members, 1), slice_layers(members, 10**9)
    assert fast is not None
    assert roomy is not None
    assert fast.slowest_seconds < roomy.slowest_seconds
    assert fast.num_blocks < roomy.num_blocks


def test_unmeasured_layers_count_by_their_bytes() -> None:
    model = costs(layer_seconds=0.0, head_weight_bytes=200)
    assert sizes(slice_layers([member(model=model)] * 2, 1)) == [4, 2]


def test_a_slower_worker_gets_fewer_layers() -> None:
    members = [member(model=costs(layer_seconds=2.0)), member()]
    assert sizes(slice_layers(members, 1)) == [2, 4]


def test_merged_pipelines_interleave_without_fetching() -> None:
    half = NUM_LAYERS // 2
    low, high = ((0, half),), ((half, NUM_LAYERS),)
    members = [member(held=low), member(held=high), member(held=low), member(held=high)]
    slicing = slice_layers(members, 1)
    assert slicing is not None
    assert slicing.num_fetched == 0
    assert [members[index].held for index in slicing.members] == [low, low, high, high]


def test_where_dropping_does_not_do_the_fewest_layers_are_fetched() -> None:
    members = [member(held=((0, 2),)), member(held=((1, 3),))]
    slicing = slice_layers(members, 1)
    assert slicing is not None
    assert slicing.num_fetched == 3


def test_more_members_than_layers_or_no_room_for_a_block_is_no_pipeline() -> None:
    assert slice_layers([member()] * (NUM_LAYERS + 1), 1) is None
    assert slice_layers([member(memory_bytes=200)] * 2, 1) is None


def test_blocks_of_a_replica() -> None:
    assert member().whole_blocks == 100
    assert member(memory_bytes=10).whole_blocks == 0
