"""Bandwidth limit and chunk size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.links.pacing import (
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    ChunkSizer,
    TokenBucket,
)

MB = 10**6


@given(st.lists(st.tuples(st.integers(0, 5 * MB), st.floats(0, 0.5)), min_size=1, max_size=40))
def test_a_limited_link_never_carries_more(sends: list[tuple[int, float]]) -> None:
    """By any moment at most bandwidth x (time + burst) bytes are through, sent as told."""
    bucket, now, started, total = TokenBucket(10 * MB, 0.002), 100.0, 100.0, 0
    for nbytes, pause in sends:
        through = bucket.reserve(nbytes, now)
        total += nbytes
        assert total <= 10 * MB * (through - started + 0.002) + 1
        now = max(now, through) + pause


def test_a_busy_link_loses_nothing() -> None:
    bucket = TokenBucket(10 * MB, 0.0)
    ends = [bucket.reserve(MB, now=0.0) for _ in range(10)]
    assert ends == pytest.approx([0.1 * n for n in range(1, 11)])


def test_idle_time_is_not_saved_up() -> None:
    bucket = TokenBucket(10 * MB, 0.002)
    bucket.reserve(MB, now=0.0)
    assert bucket.reserve(MB, now=50.0) == pytest.approx(50.098)


@pytest.mark.parametrize("rate", [0, -1])
def test_a_bandwidth_of_nothing_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="bandwidth"):
        TokenBucket(rate)


def test_a_chunk_takes_the_set_time_at_the_measured_rate() -> None:
    sizer = ChunkSizer(0.002)
    assert sizer.chunk_bytes == MIN_CHUNK_BYTES
    for _ in range(50):
        sizer.add(500_000, 0.001)
    assert sizer.chunk_bytes == 1_000_000
    assert sizer.measured_bytes_per_second == pytest.approx(5e8)


def test_chunks_stay_within_bounds() -> None:
    fast, slow = ChunkSizer(0.002), ChunkSizer(0.002, 10 * MB)
    fast.add(10**9, 0.001)
    assert fast.chunk_bytes == MAX_CHUNK_BYTES
    slow.add(10**9, 0.001)  # the set limit rules
    assert slow.chunk_bytes == MIN_CHUNK_BYTES


def test_one_slow_chunk_does_not_count_less_than_a_fast_one() -> None:
    sizer = ChunkSizer(0.002)
    for _ in range(100):
        sizer.add(MB, 0.001)
        sizer.add(MB, 0.009)
    assert sizer.measured_bytes_per_second == pytest.approx(2e8, rel=0.2)


def test_a_tiny_chunk_says_little_about_the_bandwidth() -> None:
    sizer = ChunkSizer(0.002)
    for _ in range(50):
        sizer.add(MB, 0.001)
    sizer.add(1, 0.0001)  # the time of a call, not of a byte
    assert sizer.measured_bytes_per_second == pytest.approx(1e9, rel=0.05)
