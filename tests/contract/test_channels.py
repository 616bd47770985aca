"""What every channel must do, over host memory, CUDA IPC and NCCL; fakes of both where no GPU is.

The other end is in this process or in another one. Rings are small, so that a test fills them.
"""

from __future__ import annotations

import functools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pytest
import torch

from services.worker.channels.base import ChannelError, ChannelKind, Direction, TensorChannel
from services.worker.channels.factory import ChannelFactory
from services.worker.channels.nccl import NcclChannels
from services.worker.channels.ring import Ticket
from services.worker.links.base import LinkClass
from services.worker.memory.errors import DeviceMemoryError
from tests.channel_peer import (
    NUM_SLOTS,
    SLOT_BYTES,
    FarEnd,
    LocalEnd,
    PeerProcess,
    SmallSizes,
    carried,
    content_of,
    establish_both,
    plan_for,
    process_factory,
    tensor_of,
)
from tests.fake_ipc import FakeIpcDriver
from tests.fake_nccl import Fabric, FakeNcclLibrary
from tests.link_peer import payload

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
CONTROL, EXCHANGE, RESTORE = LinkClass


@dataclass(frozen=True)
class Ends:
    """A channel under test and its other end."""

    near: TensorChannel
    far: FarEnd
    device: torch.device

    def pack(self, content: bytes, link_class: LinkClass = CONTROL) -> list[memoryview]:
        return carried(self.near.pack(tensor_of(content, self.device), link_class))

    def put(self, content: bytes, link_class: LinkClass = EXCHANGE) -> list[memoryview]:
        tensor = tensor_of(content, self.device)
        return carried(self.near.put(len(content), link_class, lambda place: place.copy_(tensor)))

    def take(self, packed: object) -> bytes:
        with self.near.received(carried(packed)) as tensor:  # type: ignore[arg-type]
            return content_of(tensor)

    def fill(self, link_class: LinkClass) -> list[list[memoryview]]:
        """Send until there is no room."""
        sent = []
        while self.near.has_room(link_class):
            sent.append(self.put(payload(len(sent), 100), link_class))
        return sent


def channels_between(
    near: ChannelFactory, far: ChannelFactory, kind: ChannelKind
) -> list[TensorChannel]:
    sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    establish = [functools.partial(each.establish, plan=plan_for(kind)) for each in (near, far)]
    with sockets[0], sockets[1]:
        return [each.channel for each in establish_both(*establish, sockets)]


@contextmanager
def between(near: ChannelFactory, far: ChannelFactory, kind: ChannelKind) -> Iterator[Ends]:
    """Both ends here."""
    channels = channels_between(near, far, kind)
    yield Ends(channels[0], LocalEnd(channels[1], CPU), CPU)
    for channel in channels:
        channel.close()


@contextmanager
def host() -> Iterator[Ends]:
    factories = [ChannelFactory.through_host(CPU) for _ in range(2)]
    with between(*factories, ChannelKind.HOST) as ends:
        yield ends


@contextmanager
def ipc_here() -> Iterator[Ends]:
    kind, drivers = ChannelKind.CUDA_IPC, [FakeIpcDriver(), FakeIpcDriver()]
    factories = [ChannelFactory(CPU, SmallSizes(), [kind], ipc=driver) for driver in drivers]
    with between(*factories, kind) as ends:
        yield ends
    wait_until(lambda: all(driver.is_idle for driver in drivers))


@contextmanager
def ipc_process(peer: PeerProcess) -> Iterator[Ends]:
    kind, driver = ChannelKind.CUDA_IPC, FakeIpcDriver()
    factory = ChannelFactory(CPU, SmallSizes(), [kind], ipc=driver)
    with peer.open(factory, kind, CPU) as (near, far):
        yield Ends(near, far, CPU)
    wait_until(lambda: driver.is_idle)


@contextmanager
def nccl_here() -> Iterator[Ends]:
    kind, fabric = ChannelKind.NCCL, Fabric()
    nccl = [NcclChannels(FakeNcclLibrary(fabric), CPU) for _ in range(2)]
    factories = [ChannelFactory(CPU, SmallSizes(), [kind], nccl=each) for each in nccl]
    with between(*factories, kind) as ends:
        yield ends


@contextmanager
def on_one_gpu(peer: PeerProcess, kind: ChannelKind) -> Iterator[Ends]:
    with peer.open(process_factory(kind, GPU), kind, GPU) as (near, far):
        yield Ends(near, far, GPU)


def gpu_ipc(peer: PeerProcess) -> AbstractContextManager[Ends]:
    return on_one_gpu(peer, ChannelKind.CUDA_IPC)


def gpu_host(peer: PeerProcess) -> AbstractContextManager[Ends]:
    return on_one_gpu(peer, ChannelKind.HOST)


@contextmanager
def gpu_nccl(peer: PeerProcess) -> Iterator[Ends]:
    """NCCL wants a GPU for each rank."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is no second GPU")
    kind, other_gpu = ChannelKind.NCCL, torch.device("cuda", 1)
    with peer.open(process_factory(kind, GPU), kind, other_gpu) as (near, far):
        yield Ends(near, far, GPU)


def wait_until(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(1000):
        if condition():
            return
        done.wait(0.01)
    pytest.fail("condition does not hold after 10 s")


@pytest.fixture(scope="module")
def peer() -> Iterator[PeerProcess]:
    """Another process, for all channels that go to one."""
    process = PeerProcess()
    yield process
    process.kill()


#: (how to open one, whether to another process)
RINGS = [
    pytest.param((ipc_here, False), id="ipc-here"),
    pytest.param((ipc_process, True), id="ipc-process"),
    pytest.param((nccl_here, False), id="nccl-here"),
    pytest.param((gpu_ipc, True), id="gpu-ipc", marks=pytest.mark.gpu),
    pytest.param((gpu_nccl, True), id="gpu-nccl", marks=pytest.mark.gpu),
]
HOSTS = [
    pytest.param((host, False), id="host"),
    pytest.param((gpu_host, True), id="gpu-host", marks=pytest.mark.gpu),
]


@contextmanager
def opened(request: pytest.FixtureRequest) -> Iterator[Ends]:
    opener, needs_peer = request.param
    peers = [request.getfixturevalue("peer")] if needs_peer else []
    with opener(*peers) as ends:
        yield ends


@pytest.fixture(params=[*HOSTS, *RINGS])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    with opened(request) as ends:
        yield ends


@pytest.fixture(params=RINGS)
def rings(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Channels whose room is bounded."""
    with opened(request) as ends:
        yield ends


# --- what arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize("link_class", LinkClass)
def test_tensors_arrive_as_they_were(ends: Ends, link_class: LinkClass) -> None:
    """Many more than there are slots, and up to the size of one."""
    for number in range(25):
        content = payload(number, [1, 100, SLOT_BYTES, 4096, 33][number % 5])
        assert ends.far.take(ends.pack(content, link_class)) == content
        assert ends.take(ends.far.pack(content, link_class)) == content


def test_both_directions_and_all_classes_at_once(ends: Ends) -> None:
    sent = []
    for number, link_class in enumerate([*LinkClass, *LinkClass]):
        content = payload(number, 1000 * number + 1)
        sent.append((content, ends.put(content, link_class), ends.far.put(content, link_class)))
    for content, ours, theirs in sent:
        assert ends.far.take(ours) == content
        assert ends.take(theirs) == content


def test_a_tensor_may_be_overwritten_once_it_is_packed(ends: Ends) -> None:
    """Frames of class CONTROL are copied when they are sent, if need be: see `Link.send`."""
    tensor = tensor_of(payload(1, 5000), ends.device)
    packed = carried(ends.near.pack(tensor, CONTROL))
    tensor.zero_()
    assert ends.far.take(packed) == payload(1, 5000)


def test_a_received_tensor_may_be_used_in_place(ends: Ends) -> None:
    with ends.near.received(carried(ends.far.pack(payload(1, 64), CONTROL))) as tensor:
        values = tensor.view(torch.float32)
        values.fill_(2.0)
        packed = carried(ends.near.pack(values, CONTROL))
    assert ends.far.take(packed) == content_of(torch.full((16,), 2.0).view(torch.uint8))


def test_bulk_is_written_into_the_place_it_is_sent_from(ends: Ends) -> None:
    """In two pieces, as a kernel does that gathers layer by layer."""

    def write(place: torch.Tensor) -> None:
        place[:100].fill_(1)
        place[100:].fill_(2)

    packed = carried(ends.near.put(300, RESTORE, write))
    assert ends.far.take(packed) == b"\1" * 100 + b"\2" * 200


def test_what_could_not_be_written_was_not_sent(ends: Ends) -> None:
    def fail(place: torch.Tensor) -> None:
        place.zero_()
        raise MemoryError("no memory for that")

    for _ in range(10):
        with pytest.raises(MemoryError):
            ends.near.put(10, EXCHANGE, fail)
    assert ends.far.take(ends.put(b"after")) == b"after"


def test_a_tensor_that_fails_its_receiver_is_gone(ends: Ends) -> None:
    for number in range(10):
        packed = carried(ends.far.put(payload(number, 50), EXCHANGE))
        with pytest.raises(KeyError), ends.near.received(packed):
            raise KeyError(number)
    assert ends.take(ends.far.put(b"after", EXCHANGE)) == b"after"


def test_traffic_is_counted(ends: Ends) -> None:
    ends.far.take(ends.pack(bytes(1000)))
    ends.take(ends.far.put(bytes(300), RESTORE))
    traffic = ends.near.traffic()
    assert traffic[ends.near.kind, Direction.SENT] == 1000
    assert traffic[ends.near.kind, Direction.RECEIVED] == 300
    assert sum(traffic.values()) == 1300


@pytest.mark.parametrize("packed", [[], [b""], [b"no ticket"]])
def test_what_was_never_packed_is_refused(rings: Ends, packed: list[bytes]) -> None:
    with pytest.raises(ChannelError), rings.near.received(packed):
        pass


def test_a_frame_without_its_tensor_is_refused() -> None:
    with host() as ends:
        for packed in ([], [bytearray()]):
            with pytest.raises(ChannelError), ends.near.received(packed):
                pass


# --- what there is room for ----------------------------------------------------------------------


@pytest.mark.parametrize("link_class", [EXCHANGE, RESTORE])
def test_bulk_waits_for_a_free_slot(rings: Ends, link_class: LinkClass) -> None:
    sent = rings.fill(link_class)
    assert len(sent) == NUM_SLOTS[link_class]
    with pytest.raises(ChannelError, match="room"):
        rings.put(b"more", link_class)
    assert rings.far.take(sent[0]) == payload(0, 100)
    wait_until(lambda: rings.near.has_room(link_class))
    sent.append(rings.put(payload(len(sent), 100), link_class))
    assert not rings.near.has_room(link_class)
    for number, packed in enumerate(sent[1:], 1):
        assert rings.far.take(packed) == payload(number, 100)


def test_classes_do_not_take_each_others_room(rings: Ends) -> None:
    for link_class in LinkClass:
        assert len(rings.fill(link_class)) == NUM_SLOTS[link_class]


def test_bulk_that_fits_no_slot_is_refused(rings: Ends) -> None:
    with pytest.raises(ChannelError, match="room"):
        rings.put(bytes(SLOT_BYTES + 1))
    assert rings.near.part_bytes == SLOT_BYTES


def test_an_activation_without_a_slot_goes_through_the_host(rings: Ends) -> None:
    packed = [rings.pack(payload(number, 200)) for number in range(2 * NUM_SLOTS[CONTROL])]
    contents = [rings.far.take(each) for each in packed]
    assert contents == [payload(number, 200) for number in range(len(packed))]
    num_host = len(packed) - NUM_SLOTS[CONTROL]
    assert rings.near.traffic()[ChannelKind.HOST, Direction.SENT] == 200 * num_host
    wait_until(lambda: rings.near.has_room(CONTROL))
    assert len(rings.pack(b"beside the frame again")) == 1


def test_an_activation_that_fits_no_slot_goes_through_the_host(rings: Ends) -> None:
    content = payload(3, 2 * SLOT_BYTES)
    assert rings.far.take(rings.pack(content)) == content
    assert rings.near.has_room(CONTROL)


# --- the end -------------------------------------------------------------------------------------


def test_nothing_is_sent_or_received_on_a_closed_channel(rings: Ends) -> None:
    ours, theirs = rings.put(b"on its way"), carried(rings.far.put(b"on its way", EXCHANGE))
    rings.near.close()
    rings.near.close()
    assert not rings.near.has_room(EXCHANGE)
    with pytest.raises(ChannelError):
        rings.put(b"more")
    with pytest.raises(ChannelError), rings.near.received(theirs):
        pass
    assert len(rings.pack(b"in the frame")) == 2
    assert ours


@pytest.mark.parametrize("is_near_first", [True, False])
def test_memory_is_kept_until_the_other_end_has_let_it_go(is_near_first: bool) -> None:
    kind, drivers = ChannelKind.CUDA_IPC, [FakeIpcDriver(), FakeIpcDriver()]
    factories = [ChannelFactory(CPU, SmallSizes(), [kind], ipc=driver) for driver in drivers]
    channels = channels_between(*factories, kind)
    first, last = (0, 1) if is_near_first else (1, 0)
    channels[first].close()
    wait_until(lambda: drivers[first].calls["close_memory"] == 1)
    assert not drivers[first].calls["free"]  # the fake would refuse it
    channels[last].close()
    wait_until(lambda: all(driver.is_idle for driver in drivers))


@pytest.fixture
def mortal() -> Iterator[PeerProcess]:
    """A process that the test kills."""
    process = PeerProcess()
    yield process
    process.kill()


def test_a_killed_peer_leaves_nothing_behind(mortal: PeerProcess) -> None:
    kind, driver = ChannelKind.CUDA_IPC, FakeIpcDriver()
    factory = ChannelFactory(CPU, SmallSizes(), [kind], ipc=driver)
    with mortal.open(factory, kind, CPU) as (near, far):
        near.put(100, EXCHANGE, lambda place: place.zero_())
        far.put(b"x", EXCHANGE)
        mortal.kill()
        near.close()
        wait_until(lambda: driver.is_idle)


def test_a_stream_does_not_wait_for_a_dead_peer_for_ever(mortal: PeerProcess) -> None:
    """Its ticket came, but its stream died before the tensor was there."""
    kind, driver = ChannelKind.CUDA_IPC, FakeIpcDriver(patience_seconds=20.0)
    factory = ChannelFactory(CPU, SmallSizes(), [kind], ipc=driver)
    with mortal.open(factory, kind, CPU) as (near, _):
        never_sent, received = Ticket(EXCHANGE, 1, 100).encode(), threading.Event()

        def receive() -> None:
            driver.attach()
            with near.received([never_sent]):
                received.set()

        threading.Thread(target=receive, daemon=True).start()
        mortal.kill()
        assert not received.wait(0.2)
        near.abort()
        assert not received.wait(0.3)  # others must be able to notice, too
        wait_until(received.is_set)


def test_what_hangs_in_nccl_is_aborted() -> None:
    with nccl_here() as ends:
        never_sent = Ticket(EXCHANGE, 1, 100).encode()
        timer = threading.Timer(0.1, ends.near.abort)
        timer.start()
        with ends.near.received([never_sent]):
            pass  # else the fake's current stream would have given up
        timer.join()


def test_nccl_takes_tensors_in_order_only() -> None:
    with nccl_here() as ends:
        first, second = ends.put(b"first"), ends.put(b"second")
        with pytest.raises(ChannelError, match="next"):
            ends.far.take(second)
        assert ends.far.take(first) == b"first"
        assert ends.far.take(second) == b"second"


def test_a_slot_that_was_never_filled_is_an_error_in_the_fake() -> None:
    """So that the other tests prove something."""
    with ipc_here() as ends:
        never_sent = Ticket(EXCHANGE, 0, 100).encode()
        with pytest.raises(DeviceMemoryError, match="never"), ends.near.received([never_sent]):
            pass
