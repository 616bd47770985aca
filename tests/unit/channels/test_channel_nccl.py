"""A lane's streams keep their order, also while the current stream lags behind."""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from services.worker.channels.base import ChannelKind, TensorChannel
from services.worker.channels.factory import ChannelFactory
from services.worker.channels.nccl import NcclChannels
from services.worker.links.base import LinkClass
from tests.channel_peer import SmallSizes, carried, content_of, establish_both, plan_for
from tests.fake_nccl import CurrentStream, Fabric, FakeEvent, FakeNcclLibrary

CPU = torch.device("cpu")
EXCHANGE = LinkClass.EXCHANGE
#: What a stream that does not wait gets to show it.
MOMENT = 0.1


class LaggingStream(CurrentStream):
    """Has not come to what was launched, until it may go on."""

    def __init__(self) -> None:
        self._events: list[FakeEvent] = []

    def record_event(self) -> FakeEvent:
        self._events.append(FakeEvent())
        return self._events[-1]

    def go_on(self) -> None:
        for event in self._events:
            event.happen()


@dataclass
class End:
    """One side."""

    library: FakeNcclLibrary
    channel: TensorChannel

    def lag(self) -> LaggingStream:
        self.library.current = LaggingStream()
        return self.library.current


@pytest.fixture
def ends() -> Iterator[list[End]]:
    fabric, kind = Fabric(), ChannelKind.NCCL
    libraries = [FakeNcclLibrary(fabric) for _ in range(2)]
    factories = [
        ChannelFactory(CPU, SmallSizes(), [kind], nccl=NcclChannels(library, CPU))
        for library in libraries
    ]
    sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with sockets[0], sockets[1]:
        near, far = (functools.partial(each.establish, plan=plan_for(kind)) for each in factories)
        made = establish_both(near, far, sockets)
    yield [End(library, each.channel) for library, each in zip(libraries, made, strict=True)]
    for each in made:
        each.channel.close()


def put(channel: TensorChannel, letter: str) -> tuple[torch.Tensor, list[memoryview]]:
    """Send a tensor full of a letter; returns the slot, too."""
    slots: list[torch.Tensor] = []

    def write(place: torch.Tensor) -> None:
        slots.append(place.fill_(ord(letter)))

    packed = carried(channel.put(100, EXCHANGE, write))
    return slots[0], packed


def test_a_tensor_is_sent_when_it_is_written(ends: list[End]) -> None:
    sender, receiver = ends
    stream = sender.lag()
    slot, packed = put(sender.channel, "a")
    time.sleep(MOMENT)
    slot.fill_(ord("b"))  # the lagging stream writes it only now
    stream.go_on()
    with receiver.channel.received(packed) as tensor:
        assert content_of(tensor) == b"b" * 100


def test_a_slot_is_received_into_when_it_is_drained(ends: list[End]) -> None:
    """There are two at the receiving end: the third tensor waits for the first to be used."""
    sender, receiver = ends
    packed = [put(sender.channel, letter)[1] for letter in "abc"]
    stream = receiver.lag()
    with receiver.channel.received(packed[0]) as first, receiver.channel.received(packed[1]):
        pass
    seen: list[bytes] = []

    def use_the_first() -> None:
        seen.append(content_of(first))
        stream.go_on()

    timer = threading.Timer(MOMENT, use_the_first)
    timer.start()
    with receiver.channel.received(packed[2]) as tensor:
        timer.join()
        assert content_of(tensor) == b"c" * 100
    assert seen == [b"a" * 100]
