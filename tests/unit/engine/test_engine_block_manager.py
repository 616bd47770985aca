"""Blocks: who gets which, that none is lost, and that the pool can grow and shrink."""

from __future__ import annotations

import pytest
from engine_helpers import BLOCK_SIZE, make_request
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.block_manager import BlockIntegrityError, BlockManager
from services.worker.engine.request import Request


def _holding(blocks: BlockManager, *nums_blocks: int) -> list[Request]:
    requests = [make_request(f"r{i}") for i in range(len(nums_blocks))]
    for request, num_blocks in zip(requests, nums_blocks, strict=True):
        assert blocks.allocate(request, num_blocks * BLOCK_SIZE)
    return requests


def test_lowest_ids_are_handed_out_first() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    first, second, third = _holding(blocks, 2, 2, 2)
    blocks.free(second)
    blocks.free(first)
    assert blocks.allocate(third, 5 * BLOCK_SIZE)
    assert third.block_table == [4, 5, 0, 1, 2]


def test_allocation_covers_the_tokens_and_only_appends() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    (request,) = _holding(blocks, 0)
    tables = []
    for num_tokens in (1, 4, 5, 3, 12):
        assert blocks.allocate(request, num_tokens)
        tables.append(list(request.block_table))
    assert tables == [[0], [0], [0, 1], [0, 1], [0, 1, 2]]


def test_too_large_an_allocation_changes_nothing() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    held, other = _holding(blocks, 1, 2)
    assert not blocks.allocate(held, 3 * BLOCK_SIZE)
    assert (held.block_table, blocks.num_free_blocks) == ([0], 1)
    blocks.check_integrity([held, other])


def test_usage_follows_what_is_held() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    (request,) = _holding(blocks, 2)
    assert (blocks.num_used_blocks, blocks.num_free_blocks, blocks.usage) == (2, 6, 0.25)
    blocks.free(request)
    assert (blocks.num_used_blocks, blocks.usage) == (0, 0.0)


def test_a_grown_pool_hands_out_the_new_ids_last() -> None:
    blocks = BlockManager(2, BLOCK_SIZE)
    (request,) = _holding(blocks, 1)
    blocks.grow(4)
    assert blocks.allocate(request, 4 * BLOCK_SIZE)
    assert request.block_table == [0, 1, 2, 3]


def test_shrinking_refuses_what_does_not_fit_and_changes_nothing() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    held, other = _holding(blocks, 3, 2)
    assert blocks.shrink(4, [held, other]) is None
    assert (blocks.num_blocks, held.block_table, other.block_table) == (8, [0, 1, 2], [3, 4])
    blocks.check_integrity([held, other])


@pytest.mark.parametrize("num_blocks", [0, 9])
def test_shrinking_to_nothing_or_upwards_is_an_error(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="cannot shrink"):
        BlockManager(8, BLOCK_SIZE).shrink(num_blocks, [])


@given(st.data())
def test_shrinking_empties_the_tail_and_keeps_every_block_where_the_moves_say(
    data: st.DataObject,
) -> None:
    blocks = BlockManager(24, BLOCK_SIZE)
    requests = _holding(blocks, *data.draw(st.lists(st.integers(0, 4), max_size=6)))
    for request in data.draw(
        st.lists(st.sampled_from(requests), unique_by=id) if requests else st.just([])
    ):
        blocks.free(request)
    content = {id(request): list(request.block_table) for request in requests}
    kv = {block: block for block in range(24)}
    target = data.draw(st.integers(1, 24))

    moves = blocks.shrink(target, requests)

    if moves is None:
        assert sum(len(request.block_table) for request in requests) > target
        return
    for move in moves:
        assert move.destination < target <= move.source
        kv[move.destination] = kv[move.source]
    for request in requests:
        assert all(block < target for block in request.block_table)
        assert [kv[block] for block in request.block_table] == content[id(request)]
    blocks.check_integrity(requests)
    assert blocks.num_blocks == target


@given(
    nums_blocks=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    freed=st.sets(st.integers(0, 7)),
    chosen=st.sets(st.integers(0, 7)),
)
def test_those_brought_forward_get_the_lowest_ids_and_nobody_loses_a_block(
    nums_blocks: list[int], freed: set[int], chosen: set[int]
) -> None:
    blocks = BlockManager(64, BLOCK_SIZE)
    requests = _holding(blocks, *nums_blocks)
    for index in freed & set(range(len(requests))):
        blocks.free(requests[index])
    content = {b: (r.request_id, i) for r in requests for i, b in enumerate(r.block_table)}
    first = [request for index, request in enumerate(requests) if index in chosen]
    num_first = sum(len(request.block_table) for request in first)
    swaps = blocks.bring_forward(first, requests)
    for swap in swaps:  # what the caller does with the KV
        held = (content.pop(swap.high, None), content.pop(swap.low, None))
        content |= {b: owner for b, owner in zip((swap.low, swap.high), held, strict=True) if owner}
    assert all(swap.low < num_first <= swap.high for swap in swaps)
    assert {block for r in first for block in r.block_table} == set(range(num_first))
    assert content == {b: (r.request_id, i) for r in requests for i, b in enumerate(r.block_table)}
    blocks.check_integrity(requests)


class TestIntegrity:
    """Each kind of damage is found."""

    def test_a_block_with_two_owners(self) -> None:
        blocks = BlockManager(4, BLOCK_SIZE)
        first, second = _holding(blocks, 1, 1)
        second.block_table[0] = first.block_table[0]
        with pytest.raises(BlockIntegrityError, match="block 0 belongs to request r0 and"):
            blocks.check_integrity([first, second])

    def test_a_block_both_free_and_held(self) -> None:
        blocks = BlockManager(4, BLOCK_SIZE)
        (request,) = _holding(blocks, 1)
        request.block_table.append(3)
        with pytest.raises(BlockIntegrityError, match="block 3 belongs to the free list"):
            blocks.check_integrity([request])

    def test_a_lost_block(self) -> None:
        blocks = BlockManager(4, BLOCK_SIZE)
        _holding(blocks, 1)
        with pytest.raises(BlockIntegrityError, match="block 0 is neither"):
            blocks.check_integrity([])

    def test_computed_tokens_without_blocks(self) -> None:
        blocks = BlockManager(4, BLOCK_SIZE)
        (request,) = _holding(blocks, 1)
        request.num_computed_tokens = BLOCK_SIZE + 1
        with pytest.raises(BlockIntegrityError, match="only 1 blocks"):
            blocks.check_integrity([request])

    def test_a_block_outside_the_pool(self) -> None:
        blocks = BlockManager(4, BLOCK_SIZE)
        (request,) = _holding(blocks, 1)
        request.block_table.append(4)
        with pytest.raises(BlockIntegrityError, match="block 4 is not in the pool"):
            blocks.check_integrity([request])
