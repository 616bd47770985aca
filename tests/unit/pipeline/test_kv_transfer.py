"""KV travels in parts: every block of all layers once, no part too small, none too large."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.worker.pipeline.kv_transfer import cut_parts

MIB = 1024 * 1024


@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 600), st.integers(1, 2 * MIB))
def test_parts_cover_each_block_of_each_layer_once(
    start: int, count: int, num_blocks: int, block_bytes: int
) -> None:
    parts = cut_parts(start, start + count, num_blocks, block_bytes, MIB)
    covered = [
        (layer, block)
        for layers, blocks in parts
        for layer in range(*layers)
        for block in range(*blocks)
    ]
    layers = range(start, start + count)
    assert covered == [(layer, block) for layer in layers for block in range(num_blocks)]


@given(st.integers(1, 60), st.integers(1, 5000), st.integers(1, 2 * MIB))
def test_parts_are_as_large_as_they_may_be(count: int, num_blocks: int, block_bytes: int) -> None:
    parts = cut_parts(0, count, num_blocks, block_bytes, MIB)
    sizes = [len(range(*p.layers)) * len(range(*p.blocks)) * block_bytes for p in parts]
    assert max(sizes) <= max(MIB, block_bytes)
    full = [size for part, size in zip(parts, sizes, strict=True) if part.blocks[1] < num_blocks]
    assert all(size + block_bytes > MIB for size in full)  # cut within a layer
    whole = [size for part, size in zip(parts, sizes, strict=True) if part.layers[1] < count]
    layer_bytes = num_blocks * block_bytes
    if layer_bytes <= MIB:  # cut between layers
        assert all(size + layer_bytes > MIB for size in whole)
