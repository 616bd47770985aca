"""KV travels in parts: all layers once, none too small, none larger than it must be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.worker.pipeline.kv_transfer import layer_parts

MIB = 1024 * 1024


@given(st.integers(0, 40), st.integers(1, 60), st.integers(1, 8 * MIB))
def test_parts_cover_each_layer_once(start: int, count: int, layer_bytes: int) -> None:
    parts = layer_parts(start, start + count, layer_bytes)
    covered = [layer for first, last in parts for layer in range(first, last)]
    assert covered == list(range(start, start + count))
    for first, last in parts:
        assert (last - first) * layer_bytes <= max(MIB, layer_bytes)
    for first, last in parts[:-1]:
        assert (last - first + 1) * layer_bytes > MIB
