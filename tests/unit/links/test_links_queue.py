"""The priority queue: nothing lost, classes in order, bulk in chunks, limits kept."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.links.base import LinkClass, LinkError, LinkFrame
from services.worker.links.framing import MAX_FRAME_BYTES, Reassembler
from services.worker.links.queue import Chunk, FrameQueue

CONTROL, EXCHANGE, RESTORE = LinkClass
LIMITS = {EXCHANGE: 100, RESTORE: 100}


def frame(*sizes: int, kind: int = 1, header: bytes = b"") -> LinkFrame:
    return LinkFrame(kind, "g", 3, header, [bytes([kind % 256]) * size for size in sizes])


def drain(queue: FrameQueue, chunk_bytes: int) -> Iterator[Chunk]:
    while (chunk := queue.next_chunk(chunk_bytes)) is not None:
        yield chunk


def test_a_higher_class_goes_first_after_one_chunk() -> None:
    queue = FrameQueue(LIMITS)
    queue.push(frame(50), RESTORE, 0.0)
    assert queue.next_chunk(10).link_class is RESTORE  # type: ignore[union-attr]
    queue.push(frame(20), EXCHANGE, 0.0)
    assert queue.next_chunk(10).link_class is EXCHANGE  # type: ignore[union-attr]
    queue.push(frame(1000), CONTROL, 0.0)
    chunks = list(drain(queue, 10))
    assert [chunk.link_class for chunk in chunks] == [CONTROL, EXCHANGE] + [RESTORE] * 4
    assert chunks[0].payload_bytes == 1000


def test_a_class_that_has_its_fill_refuses() -> None:
    queue = FrameQueue(LIMITS)
    assert queue.push(frame(99), EXCHANGE, 0.0)
    assert queue.push(frame(50), EXCHANGE, 0.0)
    assert not queue.push(frame(1), EXCHANGE, 0.0)
    assert queue.queued_bytes(EXCHANGE) == 149
    assert queue.push(frame(100), RESTORE, 0.0)
    assert all(queue.push(frame(1000), CONTROL, 0.0) for _ in range(10))


def test_a_class_below_its_limit_takes_a_frame_of_any_size() -> None:
    queue = FrameQueue(LIMITS)
    assert queue.push(frame(1000), EXCHANGE, 0.0)
    assert not queue.accepts(EXCHANGE)
    for _ in range(9):
        queue.next_chunk(100)
    assert not queue.accepts(EXCHANGE)
    queue.next_chunk(1)
    assert queue.push(frame(1000), EXCHANGE, 0.0)


def test_a_frame_over_the_limit_is_refused_aloud() -> None:
    one_byte = memoryview(bytes(1)).cast("B")
    many = [one_byte] * 70_000
    with pytest.raises(LinkError, match="too many"):
        FrameQueue(LIMITS).push(LinkFrame(1, "g", 1, b"", many), CONTROL, 0.0)
    big = bytes(MAX_FRAME_BYTES // 16)
    with pytest.raises(LinkError, match="over the limit"):
        FrameQueue(LIMITS).push(LinkFrame(1, "g", 1, b"x", [big] * 16), CONTROL, 0.0)


def test_what_is_dropped_is_released_once() -> None:
    queue = FrameQueue(LIMITS)
    calls: list[str] = []
    for name in "abc":
        queue.push(frame(10), EXCHANGE, 0.0, functools.partial(calls.append, name))
    first = queue.next_chunk(10)
    assert first is not None
    assert first.released is not None
    queue.next_chunk(5)  # b is half sent
    first.released()
    for call in queue.clear():
        call()
    assert calls == ["a", "b", "c"]
    assert not queue
    assert queue.queued_bytes(EXCHANGE) == 0


Push = tuple[LinkClass, list[int], int]
operations = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(LinkClass), st.lists(st.integers(0, 60), max_size=4), st.integers(0, 9)
        ),
        st.integers(1, 40),  # take a chunk of so many bytes at most
    ),
    max_size=60,
)


@given(operations)
def test_whatever_is_queued_arrives_in_order_of_its_class(history: list[Push | int]) -> None:
    """And no chunk is taken from a class while a higher one waits, or is larger than asked."""
    queue, reassembler = FrameQueue({}), Reassembler()
    sent: dict[LinkClass, list[LinkFrame]] = {each: [] for each in LinkClass}
    received: dict[LinkClass, list[LinkFrame]] = {each: [] for each in LinkClass}
    number = 0

    def take(chunk_bytes: int) -> None:
        waiting = [each for each in LinkClass if queue.holds(each)]
        chunk = queue.next_chunk(chunk_bytes)
        assert (chunk is None) == (not waiting)
        if chunk is None:
            return
        assert chunk.link_class is waiting[0]
        assert chunk.payload_bytes <= chunk_bytes or chunk.link_class is CONTROL
        for link_class, whole in receive(reassembler, b"".join(chunk.pieces)):
            received[link_class].append(whole)

    for step in history:
        if isinstance(step, int):
            take(step)
            continue
        link_class, sizes, header_bytes = step
        number += 1
        sent[link_class].append(frame(*sizes, kind=number, header=b"h" * header_bytes))
        queue.push(sent[link_class][-1], link_class, 0.0)
    while queue:
        take(7)
    assert all(queue.queued_bytes(each) == 0 for each in LinkClass)
    for each in LinkClass:
        assert [plain(f) for f in received[each]] == [plain(f) for f in sent[each]]


def receive(reassembler: Reassembler, data: bytes) -> Iterator[tuple[LinkClass, LinkFrame]]:
    view = memoryview(data)
    while view:
        target = reassembler.target()
        nbytes = min(len(target), len(view))
        target[:nbytes] = view[:nbytes]
        view = view[nbytes:]
        arrival = reassembler.filled(nbytes)
        if arrival is not None and arrival.frame is not None:
            yield arrival.link_class, arrival.frame


def plain(whole: LinkFrame) -> tuple[int, str, int, bytes, list[bytes]]:
    buffers = [bytes(buffer) for buffer in whole.buffers]
    return whole.kind, whole.group_id, whole.epoch, whole.header, buffers
