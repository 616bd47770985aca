"""make_batch lays tokens out as vLLM and FlashAttention name it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.worker.model.batch import UNKNOWN_TOKEN, SequenceSlice, make_batch

BLOCK_SIZE = 16


def test_the_picture_in_the_module() -> None:
    batch = make_batch(
        [
            SequenceSlice([109], 9, [3], True),
            SequenceSlice([204, 205, 206], 4, [5], False),
            SequenceSlice([302], 17, [7, 2], True),
        ],
        BLOCK_SIZE,
    )
    assert batch.token_ids.tolist() == [109, 204, 205, 206, 302]
    assert batch.positions.tolist() == [9, 4, 5, 6, 17]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4, 5]
    assert batch.seqused_k.tolist() == [10, 7, 18]
    assert batch.slot_mapping.tolist() == [3 * 16 + 9, 5 * 16 + 4, 5 * 16 + 5, 5 * 16 + 6, 33]
    assert batch.block_table.tolist() == [[3, 0], [5, 0], [7, 2]]
    assert batch.logits_rows.tolist() == [0, 4]
    assert batch.end_position == 18


slices = st.builds(
    lambda length, start, spare, wants: SequenceSlice(
        list(range(length)), start, list(range(-(-(start + length) // BLOCK_SIZE) + spare)), wants
    ),
    st.integers(1, 40),
    st.integers(0, 100),
    st.integers(0, 3),
    st.booleans(),
)


@given(st.lists(slices, min_size=1, max_size=12))
def test_every_token_has_its_position_and_slot(items: list[SequenceSlice]) -> None:
    batch = make_batch(items, BLOCK_SIZE)
    for index, item in enumerate(items):
        begin, end = batch.cu_seqlens_q[index : index + 2].tolist()
        positions = range(item.start, item.start + len(item.token_ids))
        assert batch.token_ids[begin:end].tolist() == item.token_ids
        assert batch.positions[begin:end].tolist() == list(positions)
        slots = [item.block_table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
        assert batch.slot_mapping[begin:end].tolist() == slots
        assert batch.seqused_k[index] == positions.stop
        width = len(item.block_table)
        assert batch.block_table[index, :width].tolist() == item.block_table
        assert (end - 1 in batch.logits_rows.tolist()) == item.wants_token
    assert batch.end_position == int(batch.positions.max()) + 1


def test_unknown_tokens_are_those_of_the_launch_before() -> None:
    items = [
        SequenceSlice([UNKNOWN_TOKEN], 9, [3], True, source_row=2),
        SequenceSlice([204, 205], 4, [5], False),
        SequenceSlice([UNKNOWN_TOKEN], 17, [7, 2], True, source_row=0),
    ]
    batch = make_batch(items, BLOCK_SIZE, source_ids=torch.tensor([31, 32, 33]))
    assert batch.token_ids.tolist() == [33, 204, 205, 31]
    assert batch.positions.tolist() == [9, 4, 5, 17]
    with pytest.raises(ValueError, match="launch before"):
        make_batch(items, BLOCK_SIZE)


def test_types_are_those_of_the_kernels() -> None:
    batch = make_batch([SequenceSlice([1], 0, [0], False)], BLOCK_SIZE)
    for tensor in (batch.token_ids, batch.positions, batch.slot_mapping, batch.logits_rows):
        assert tensor.dtype is torch.int64
    for tensor in (batch.cu_seqlens_q, batch.seqused_k, batch.block_table):
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()
    assert batch.logits_rows.numel() == 0
