"""KV on its way between two workers: what is written when, and what must stay where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import pytest
import torch

from services.worker.channels.base import ChannelKind, TensorChannel
from services.worker.engine.request import KvKey
from services.worker.engine.routes import Transfer
from services.worker.kernels.cpu import CpuKernels
from services.worker.links.base import Link, LinkFrame, PeerMemory
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.device_mark import IsPast
from services.worker.pipeline.kv_courier import KvCourier
from services.worker.pipeline.messages import FrameKind, KvPart, KvTaken, Order
from services.worker.pipeline.peers import GroupPeers
from tests.tiny_models import TinyModels
from tests.unit.model.model_helpers import BLOCK_SIZE, open_runner
from tests.unit.pipeline.devices import Devices
from tests.unit.pipeline.pipeline_engine import memory_of
from tests.unit.pipeline.pipeline_helpers import make_group
from tests.unit.pipeline.wire import Wire

NAMES = ("w0", "w1")
SPAN = (1, 3)  # what travels


class Member:
    """A worker with some requests' blocks."""

    def __init__(
        self, name: str, runner: ModelRunner, memory: PeerMemory | None, channel: TensorChannel
    ) -> None:
        other = NAMES[1 - NAMES.index(name)]
        self.runner = runner
        self.wire = Wire(memory, channel)
        self.tables: dict[KvKey, list[int]] = {}
        self.filled: list[KvKey] = []
        peers = GroupPeers(name, make_group(NAMES), {other: cast(Link, self.wire)})
        self.courier = KvCourier(
            peers,
            runner,
            self.tables.get,
            self.filled.append,
            window_bytes=2 * runner.kv_block_bytes,
        )

    def fill(self, key: KvKey, table: list[int], value: float) -> None:
        """Hold a request whose KV is `value` and more with each layer."""
        self.tables[key] = table
        for layer in range(*SPAN):
            self.runner.kv_cache(layer)[table] = value + layer

    def holds(self, key: KvKey, value: float) -> bool:
        return all(
            torch.all(self.runner.kv_cache(layer)[self.tables[key]] == value + layer)
            for layer in range(*SPAN)
        )

    def receive(self, frame: LinkFrame) -> None:
        if frame.kind == FrameKind.KV_TAKEN:
            self.courier.taken(KvTaken.decode(frame.header))
        else:
            buffers = [bytearray(buffer) for buffer in frame.buffers]
            self.courier.take(KvPart.decode(frame.header), buffers)


@dataclass
class Pair:
    """KV goes from `source` to `destination`."""

    source: Member
    destination: Member
    reads_memory: bool

    def order(self, serial: int, key: KvKey, num_blocks: int = 2) -> Order:
        transfers = (Transfer(*NAMES, *SPAN),)
        return Order(
            serial=serial, key=key, num_tokens=num_blocks * BLOCK_SIZE, transfers=transfers
        )

    def deliver(self) -> None:
        """Let everything arrive that was sent so far."""
        for sender, receiver in (self.both, reversed(self.both)):
            while sender.wire.sent:
                receiver.receive(sender.wire.sent.popleft())

    def run(self) -> None:
        """Until nothing moves."""
        while any(member.courier.is_busy or member.wire.sent for member in self.both):
            for member in self.both:
                member.courier.pump()
            self.deliver()

    @property
    def both(self) -> tuple[Member, Member]:
        return self.source, self.destination


@pytest.fixture(params=["read", *ChannelKind])
def pair(
    request: pytest.FixtureRequest, tiny_models: TinyModels, kernels: CpuKernels
) -> Iterator[Pair]:
    """KV is read out of the other one's memory, or goes by a channel."""
    directory, reads_memory = tiny_models.directory("llama"), request.param == "read"
    devices = Devices(ChannelKind.HOST if reads_memory else request.param)
    with ExitStack() as stack:
        runners = [stack.enter_context(open_runner(directory, kernels)) for _ in NAMES]
        memories = [memory_of(runner) if reads_memory else None for runner in reversed(runners)]
        members = map(Member, NAMES, runners, memories, devices.channels(*NAMES))
        yield Pair(*members, reads_memory=reads_memory)


class Moments:
    """Moments of a device that works by itself."""

    def __init__(self) -> None:
        self.are_past = False

    def mark(self, device: torch.device) -> IsPast:
        return lambda: self.are_past


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Moments:
    moments = Moments()
    monkeypatch.setattr("services.worker.pipeline.kv_courier.mark", moments.mark)
    return moments


def key_of(number: int) -> KvKey:
    return KvKey(f"r{number}", 0, 0)


def test_blocks_arrive_where_the_destination_has_them(pair: Pair) -> None:
    pair.source.fill(key_of(1), [7, 3, 4, 5, 0], 1.0)
    pair.destination.tables[key_of(1)] = [2, 3, 9, 1, 30]
    order = pair.order(1, key_of(1), num_blocks=5)
    for member in pair.both:
        member.courier.obey(order)
    pair.run()
    assert pair.destination.filled == [key_of(1)]
    assert pair.destination.holds(key_of(1), 1.0)
    kv_bytes = 2 * 5 * pair.source.runner.kv_block_bytes
    assert [member.courier.num_bytes for member in pair.both] == [kv_bytes, kv_bytes]


def test_parts_may_come_before_their_orders(pair: Pair) -> None:
    """Orders come over other links, one after the other; a later one may be early, too."""
    for number in (1, 2, 3):
        pair.source.fill(key_of(number), [2 * number, 2 * number + 1], float(number))
        pair.destination.tables[key_of(number)] = [20 + 2 * number, 21 + 2 * number]
        pair.source.courier.obey(pair.order(number, key_of(number)))
    pair.run()
    assert pair.destination.filled == []
    for number in (1, 2, 3):
        pair.destination.courier.obey(pair.order(number, key_of(number)))
        pair.run()
        assert pair.destination.filled == [key_of(each) for each in range(1, number + 1)]
        assert pair.destination.holds(key_of(number), float(number))


def test_blocks_stay_until_they_were_read(pair: Pair) -> None:
    pair.source.fill(key_of(1), [7, 3], 1.0)
    pair.destination.tables[key_of(1)] = [2, 9]
    assert not pair.source.courier.is_read
    for member in pair.both:
        member.courier.obey(pair.order(1, key_of(1)))
    pair.source.courier.pump()
    assert pair.source.courier.is_read is pair.reads_memory
    pair.run()
    assert not pair.source.courier.is_read


def test_what_lies_in_buffers_is_bounded(pair: Pair) -> None:
    for number in range(1, 6):
        pair.source.fill(key_of(number), [2 * number, 2 * number + 1], float(number))
        pair.destination.tables[key_of(number)] = [2 * number, 2 * number + 1]
        for member in pair.both:
            member.courier.obey(pair.order(number, key_of(number)))
    pair.source.courier.pump()
    num_sent = len(pair.source.wire.sent)
    assert num_sent == (5 if pair.reads_memory else 1)
    pair.source.courier.pump()
    assert len(pair.source.wire.sent) == num_sent
    assert not pair.source.courier.is_busy  # it waits for word of the destination
    pair.run()
    assert len(pair.destination.filled) == 5


def test_a_request_that_is_gone_is_neither_sent_nor_written(pair: Pair) -> None:
    for number in (1, 2, 3):
        pair.source.fill(key_of(number), [2 * number, 2 * number + 1], float(number))
        pair.destination.tables[key_of(number)] = [20 + 2 * number, 21 + 2 * number]
        for member in pair.both:
            member.courier.obey(pair.order(number, key_of(number)))
    for member in pair.both:
        del member.tables[key_of(1)]
    pair.source.courier.pump()
    pair.deliver()
    before = pair.destination.runner.kv_cache(SPAN[0])[[24, 25]].clone()
    del pair.destination.tables[key_of(2)]  # after it arrived
    pair.run()
    assert pair.destination.filled == [key_of(3)]
    assert torch.equal(pair.destination.runner.kv_cache(SPAN[0])[[24, 25]], before)
    assert not pair.source.courier.is_read


def order_one(pair: Pair) -> None:
    """KV of one request travels, and its writing is launched."""
    pair.source.fill(key_of(1), [7, 3], 1.0)
    pair.destination.tables[key_of(1)] = [2, 9]
    for member in pair.both:
        member.courier.obey(pair.order(1, key_of(1)))
    for _ in range(5):
        for member in pair.both:
            member.courier.pump()
        pair.deliver()


def test_kv_is_there_when_the_device_has_written_it(pair: Pair, moments: Moments) -> None:
    order_one(pair)
    assert pair.destination.filled == []
    assert pair.destination.courier.is_busy
    moments.are_past = True
    pair.destination.courier.pump()
    assert pair.destination.filled == [key_of(1)]
    assert not pair.destination.courier.is_busy


def test_what_a_dead_member_may_not_have_sent_is_not_there(pair: Pair, moments: Moments) -> None:
    """The device has gone on without it."""
    order_one(pair)
    pair.destination.wire.is_up = False
    moments.are_past = True
    pair.destination.courier.pump()
    assert pair.destination.filled == []


def test_kv_that_is_not_here_cannot_be_sent(pair: Pair) -> None:
    with pytest.raises(KeyError, match="r1"):
        pair.source.courier.obey(pair.order(1, key_of(1)))
