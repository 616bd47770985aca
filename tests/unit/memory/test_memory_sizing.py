"""How chunks become blocks, and when a budget is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.memory.errors import DeviceMemoryTooSmallError
from services.worker.memory.sizing import check_budget, even_growth, required_bytes
from shared.errors import ConfigError
from shared.settings import parse_bytes

MIB = 1024**2


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 300)), min_size=1, max_size=5),
    st.integers(0, 30),
)
def test_growth_gives_the_most_blocks_and_wastes_no_chunk(
    layers: list[tuple[int, int]], free_chunks: int
) -> None:
    chunk_bytes = 100
    mapped = [chunks for chunks, _ in layers]
    sizes = [size for _, size in layers]

    growth = even_growth(mapped, sizes, free_chunks, chunk_bytes)

    assert sum(growth) <= free_chunks
    after = [chunks + more for chunks, more in zip(mapped, growth, strict=True)]
    blocks = min(chunks * chunk_bytes // size for chunks, size in zip(after, sizes, strict=True))
    one_more = [-(-(blocks + 1) * size // chunk_bytes) for size in sizes]
    cost = sum(max(0, need - chunks) for need, chunks in zip(one_more, mapped, strict=True))
    assert cost > free_chunks
    needed = [-(-blocks * size // chunk_bytes) for size in sizes]
    assert all(
        more == max(0, need - chunks)
        for more, need, chunks in zip(growth, needed, mapped, strict=True)
    )


def test_no_layers_take_no_chunks() -> None:
    assert even_growth([], [], 5, 100) == []


def test_required_bytes_rounds_every_arena_and_layer_to_chunks() -> None:
    assert required_bytes([150, 100], [30, 30], num_blocks=4, chunk_bytes=100) == 700


def test_a_budget_that_is_enough_is_accepted_and_one_byte_less_is_not() -> None:
    check_budget(700, [150, 100], [30, 30], min_blocks=4, chunk_bytes=100)
    with pytest.raises(DeviceMemoryTooSmallError):
        check_budget(699, [150, 100], [30, 30], min_blocks=4, chunk_bytes=100)


def test_the_size_that_the_refusal_names_is_enough() -> None:
    arenas, blocks, chunk = [14 * MIB + 5] * 30, [24576] * 30, 2 * MIB
    with pytest.raises(ConfigError, match="the weights take") as refusal:
        check_budget(64 * MIB, arenas, blocks, 64, chunk)
    named = re.search(r"at least (\w+)", str(refusal.value))
    assert named is not None
    budget = parse_bytes(named.group(1))
    assert isinstance(budget, int)
    check_budget(budget, arenas, blocks, 64, chunk)
