"""Frames survive any cutting of the stream, and nonsense on the wire is called so."""

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.links.base import LinkClass, LinkFrame
from services.worker.links.framing import GOODBYE, HEARTBEAT, FrameCutter, Reassembler, skip
from services.worker.links.stream import StreamProtocolError

HEAD = struct.Struct("<BBHI")


def feed(reassembler: Reassembler, data: bytes, grains: list[int]) -> list[LinkFrame]:
    """Hand `data` over in grains of at most these sizes, again and again."""
    frames, view, turn = [], memoryview(data), 0
    while view:
        target = reassembler.target()
        assert len(target)
        nbytes = min(len(target), len(view), grains[turn % len(grains)])
        turn += 1
        target[:nbytes] = view[:nbytes]
        view = view[nbytes:]
        arrival = reassembler.filled(nbytes)
        if arrival is not None and arrival.frame is not None:
            frames.append(arrival.frame)
    return frames


def wire(frame: LinkFrame, chunk_bytes: int) -> bytes:
    cutter, data = FrameCutter(frame, LinkClass.EXCHANGE), b""
    while not cutter.is_done:
        pieces, _ = cutter.take(chunk_bytes)
        data += b"".join(pieces) + HEARTBEAT
    return data


@given(
    frames=st.lists(
        st.builds(
            LinkFrame,
            st.integers(0, 2**31),
            st.text(max_size=8),
            st.integers(0, 2**40),
            st.binary(max_size=30),
            st.lists(st.binary(max_size=300), max_size=5),
        ),
        max_size=5,
    ),
    chunk_bytes=st.integers(1, 400),
    grains=st.lists(st.integers(1, 64), min_size=1, max_size=8),
)
def test_any_cutting_gives_the_same_frames(
    frames: list[LinkFrame], chunk_bytes: int, grains: list[int]
) -> None:
    data = b"".join(wire(frame, chunk_bytes) for frame in frames)
    received = feed(Reassembler(), data, grains)
    assert len(received) == len(frames)
    for ours, theirs in zip(frames, received, strict=True):
        assert theirs.header == ours.header
        assert (theirs.kind, theirs.group_id, theirs.epoch) == (
            ours.kind,
            ours.group_id,
            ours.epoch,
        )
        assert [bytes(buffer) for buffer in theirs.buffers] == list(ours.buffers)


def test_goodbye_is_heard() -> None:
    reassembler = Reassembler()
    feed(reassembler, HEARTBEAT, [8])
    assert not reassembler.said_goodbye
    feed(reassembler, GOODBYE, [3])
    assert reassembler.said_goodbye


def first(lengths: object, payload_bytes: int) -> bytes:
    preamble: bytes = msgpack.packb([1, "g", 1, lengths])
    return HEAD.pack(1, 0, len(preamble), payload_bytes) + preamble


@pytest.mark.parametrize(
    "data",
    [
        HEAD.pack(9, 0, 0, 0),  # unknown type
        HEAD.pack(1, 7, 1, 0),  # unknown class
        HEAD.pack(1, 0, 0, 5),  # no preamble
        HEAD.pack(2, 0, 0, 5),  # goes on with nothing
        HEAD.pack(1, 0, 3, 0) + b"\xc1\xc1\xc1",  # not msgpack
        HEAD.pack(1, 0, 1, 0) + b"\x07",  # not a list
        first([], 0),
        first([0, -1], 0),
        first([2**31], 0),  # over the limit
        first([1, "x"], 1),
        first([4], 5),  # longer than its frame
        first([4], 2) + b"ab" + HEAD.pack(2, 0, 0, 3),  # the same, later
        first([4], 2) + b"ab" + first([4], 2),  # begins before the last ended
        first([4], 2) + b"ab" + HEAD.pack(2, 0, 0, 0),  # an empty continuation
    ],
)
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(StreamProtocolError):
        feed(Reassembler(), data, [1000])


@given(st.lists(st.binary(max_size=20), max_size=6), st.integers(0, 150))
def test_skip(pieces: list[bytes], nbytes: int) -> None:
    rest = skip([memoryview(piece) for piece in pieces], nbytes)
    assert b"".join(rest) == b"".join(pieces)[nbytes:]
    assert all(len(piece) for piece in rest) or nbytes == 0
