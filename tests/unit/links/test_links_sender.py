"""The sending half over a stream whose room the test hands out: who goes when, exactly."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence

import pytest

from services.worker.links.base import LinkClass, LinkDownError, LinkFrame, Transport
from services.worker.links.config import LinkConfig
from services.worker.links.framing import Arrival, Reassembler
from services.worker.links.meter import LinkMeter
from services.worker.links.pacing import MIN_CHUNK_BYTES
from services.worker.links.sender import FrameSender
from services.worker.links.stream import StreamClosedError
from tests.conftest import eventually

CONTROL, EXCHANGE, RESTORE = LinkClass


class GatedStream:
    """Takes as many bytes as the test has given room for, and reassembles them."""

    transport = Transport.TCP

    def __init__(self) -> None:
        self._room = threading.Condition()
        self._room_bytes = 0
        self._reassembler = Reassembler()
        self.broken = False
        self.arrivals: list[Arrival] = []

    def give_room(self, nbytes: int) -> None:
        with self._room:
            self._room_bytes += nbytes
            self._room.notify()

    def write_some(self, pieces: Sequence[memoryview]) -> int:
        if self.broken:
            raise StreamClosedError("broken")
        with self._room:
            data = b"".join(pieces)[: self._room_bytes]
            self._room_bytes -= len(data)
        view = memoryview(data)
        while view:
            target = self._reassembler.target()
            nbytes = min(len(target), len(view))
            target[:nbytes] = view[:nbytes]
            view = view[nbytes:]
            if (arrival := self._reassembler.filled(nbytes)) is not None:
                self.arrivals.append(arrival)
        return len(data)

    def wait_writable(self, timeout_seconds: float) -> None:
        with self._room:
            self._room.wait_for(lambda: self._room_bytes or self.broken, timeout_seconds)

    def read_some(self, target: memoryview) -> int:
        raise NotImplementedError

    def shutdown(self) -> None:
        self.broken = True
        self.give_room(0)

    def close(self) -> None:
        return


@pytest.fixture
def stream() -> GatedStream:
    return GatedStream()


@pytest.fixture
def sender(stream: GatedStream) -> Iterator[FrameSender]:
    config = LinkConfig(heartbeat_seconds=3600.0, chunk_seconds=1e-9)
    sender = FrameSender(stream, LinkMeter(), config)
    thread = threading.Thread(target=sender.run)
    thread.start()
    yield sender
    sender.stop()
    stream.give_room(1 << 40)
    thread.join(10)
    assert not thread.is_alive()


def frame(nbytes: int, kind: int = 1) -> LinkFrame:
    return LinkFrame(kind, "g", 1, b"", [bytes(nbytes)])


async def test_control_waits_for_the_chunk_under_way_and_no_other(
    stream: GatedStream, sender: FrameSender
) -> None:
    sender.send_bulk(frame(10 * MIN_CHUNK_BYTES), EXCHANGE, None)
    stream.give_room(1000)  # the first chunk is under way
    await eventually(lambda: stream._room_bytes == 0)
    for kind in (1, 2):
        sender.send_control(frame(100, kind))
    sender.send_bulk(frame(100), RESTORE, None)
    stream.give_room(1 << 30)
    await eventually(lambda: len(stream.arrivals) == 13)
    order = [arrival.link_class for arrival in stream.arrivals]
    assert order[:3] == [EXCHANGE, CONTROL, CONTROL]
    assert set(order[3:12]) == {EXCHANGE}
    assert order[12] is RESTORE


async def test_control_that_did_not_fit_is_finished_before_anything_else(
    stream: GatedStream, sender: FrameSender
) -> None:
    stream.give_room(500)
    sender.send_control(frame(100_000, kind=1))
    sender.send_control(frame(10, kind=2))
    sender.send_bulk(frame(10), EXCHANGE, None)
    stream.give_room(1 << 30)
    await eventually(lambda: len(stream.arrivals) == 3)
    kinds = [arrival.frame.kind for arrival in stream.arrivals if arrival.frame is not None]
    assert kinds == [1, 2, 1]
    assert stream.arrivals[2].link_class is EXCHANGE


async def test_control_on_an_idle_link_goes_before_send_returns(
    stream: GatedStream, sender: FrameSender
) -> None:
    stream.give_room(1 << 20)
    sender.send_control(frame(100_000))
    assert [arrival.link_class for arrival in stream.arrivals] == [CONTROL]


async def test_room_is_told_when_the_class_is_empty_again(stream: GatedStream) -> None:
    """A frame larger than the limit: only its last chunk makes room."""
    sender = FrameSender(stream, LinkMeter(), LinkConfig(exchange_limit_bytes=1))
    sender.send_bulk(frame(1000), EXCHANGE, None)
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(sender.wait_writable(EXCHANGE, 60.0)))
    writer = threading.Thread(target=sender.run)
    waiter.start()
    writer.start()
    assert not answers
    stream.give_room(1 << 20)
    await eventually(lambda: answers)
    assert answers == [True]
    sender.stop()
    writer.join(10)


async def test_a_broken_stream_ends_the_sender_and_releases_what_was_lent() -> None:
    stream, released = GatedStream(), list[int]()
    sender = FrameSender(stream, LinkMeter(), LinkConfig())
    for number in range(3):
        sender.send_bulk(frame(1000), EXCHANGE, functools.partial(released.append, number))
    stream.broken = True
    with pytest.raises(StreamClosedError):
        sender.run()
    assert sorted(released) == [0, 1, 2]
    assert sender.is_stopped
    with pytest.raises(LinkDownError):
        sender.send_control(frame(1))
    with pytest.raises(LinkDownError):
        sender.send_bulk(frame(1), EXCHANGE, None)


async def test_control_on_a_broken_stream_is_an_error(stream: GatedStream) -> None:
    stream.broken = True
    sender = FrameSender(stream, LinkMeter(), LinkConfig())
    with pytest.raises(LinkDownError):
        sender.send_control(frame(1))
