"""Two workers agree on what carries their tensors while they open a link, or on why it is less."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from services.worker.channels.base import ChannelError, ChannelKind
from services.worker.channels.factory import ChannelFactory
from services.worker.channels.nccl import NcclChannels
from services.worker.links.base import LinkClass, LinkError, LinkFrame, Transport
from services.worker.links.handshake import WELCOME_BYTES, make_hello
from services.worker.links.link import StreamLink
from services.worker.links.messages import LinkAnswer, LinkOffer
from services.worker.links.totals import LinkTotals
from shared.bus.memory import MemoryBus, MemoryServer
from tests.channel_peer import SmallSizes, content_of
from tests.conftest import eventually
from tests.fake_ipc import FakeIpcDriver
from tests.fake_nccl import Fabric, FakeNcclLibrary
from tests.link_peer import Kind
from tests.link_workers import DEADLINE, SUBJECTS, Worker, close_all

CPU = torch.device("cpu")
CUDA_IPC, NCCL, HOST = ChannelKind


@dataclass
class Gpu:
    """A GPU that lies in host memory, and what a worker on it can do."""

    name: str
    fabric: Fabric
    kinds: tuple[ChannelKind, ...] = (CUDA_IPC, NCCL, HOST)
    nccl_version: int = 22809
    driver: FakeIpcDriver = field(default_factory=FakeIpcDriver)

    def __post_init__(self) -> None:
        self.nccl = NcclChannels(FakeNcclLibrary(self.fabric, self.nccl_version), CPU)
        self.factory = ChannelFactory(
            CPU, SmallSizes(), self.kinds, gpu=self.name, ipc=self.driver, nccl=self.nccl
        )


@dataclass
class Pair:
    """Worker a opens links to worker b."""

    a: Worker
    b: Worker

    @property
    def accepted(self) -> StreamLink:
        return self.b.accepted[-1]


@dataclass
class Lab:
    """Starts pairs of workers, closes them, and looks whether anything is left."""

    gpus: list[Gpu] = field(default_factory=list)
    fabric: Fabric = field(default_factory=Fabric)
    bus: MemoryBus = field(default_factory=lambda: MemoryBus(MemoryServer(lambda: 0.0), "channels"))
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    def gpu(self, name: str, **options: object) -> Gpu:
        gpu = Gpu(name, self.fabric, **options)  # type: ignore[arg-type]
        self.gpus.append(gpu)
        return gpu

    async def start(
        self, a: ChannelFactory, b: ChannelFactory, *, hosts: tuple[str, str] = ("h", "h")
    ) -> Pair:
        workers = [
            Worker(name, self.bus, host_id=host, channels=channels)
            for name, host, channels in zip("ab", hosts, (a, b), strict=True)
        ]
        for worker in workers:
            await worker.endpoint.start()
            self.stack.push_async_callback(worker.endpoint.close)
            self.stack.callback(close_all, worker.accepted)
        return Pair(*workers)

    async def two_gpus(self, *, hosts: tuple[str, str] = ("h", "h"), **options: object) -> Pair:
        factories = [self.gpu(name, **options).factory for name in ("gpu-a", "gpu-b")]
        return await self.start(*factories, hosts=hosts)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    lab = Lab()
    async with lab.stack:
        yield lab
    await eventually(lambda: all(gpu.driver.is_idle for gpu in lab.gpus))


@contextlib.asynccontextmanager
async def opened(pair: Pair) -> AsyncIterator[tuple[StreamLink, StreamLink]]:
    """Both ends of a link."""
    with contextlib.closing(await pair.a.open()) as link:
        await eventually(lambda: pair.b.accepted)
        yield link, pair.accepted


def kinds_and_fallbacks(*links: StreamLink) -> list[tuple[ChannelKind | None, str]]:
    return [(link.stats().channel, link.stats().channel_fallback) for link in links]


async def carry(sender: StreamLink, receiver: StreamLink, inbox: list[LinkFrame]) -> None:
    """An activation and some KV arrive, each with its frame."""
    for link_class in (LinkClass.CONTROL, LinkClass.EXCHANGE):
        inbox.clear()
        tensor = torch.arange(50, dtype=torch.float32) + link_class
        packed = sender.channel.pack(tensor, link_class)
        sender.send(LinkFrame(Kind.DATA, "g0", 5, b"", packed), link_class)
        await eventually(lambda: inbox)
        with receiver.channel.received(inbox[0].buffers) as received:
            assert content_of(received) == content_of(tensor.view(torch.uint8))


# --- what is chosen ------------------------------------------------------------------------------


async def test_gpus_of_one_host_share_memory(lab: Lab) -> None:
    pair = await lab.two_gpus()
    with capture_logs() as logs:
        async with opened(pair) as (link, accepted):
            assert kinds_and_fallbacks(link, accepted) == [(CUDA_IPC, "")] * 2
            await carry(link, accepted, pair.b.inbox.frames)
            await carry(accepted, link, pair.a.inbox.frames)
    told = [(log["log_level"], log["channel"]) for log in logs if log["event"] == "link.up"]
    assert told == [("info", "cuda_ipc")] * 2


async def test_two_workers_of_one_gpu_share_memory(lab: Lab) -> None:
    gpus = lab.gpu("gpu"), lab.gpu("gpu")
    pair = await lab.start(gpus[0].factory, gpus[1].factory)
    async with opened(pair) as (link, accepted):
        assert kinds_and_fallbacks(link, accepted) == [(CUDA_IPC, "")] * 2


async def test_gpus_of_two_hosts_use_nccl(lab: Lab) -> None:
    pair = await lab.two_gpus(hosts=("h", "elsewhere"))
    async with opened(pair) as (link, accepted):
        assert link.transport is Transport.TCP
        assert kinds_and_fallbacks(link, accepted) == [(NCCL, "")] * 2
        await carry(link, accepted, pair.b.inbox.frames)
        await carry(accepted, link, pair.a.inbox.frames)


@pytest.mark.parametrize("is_opener_on_gpu", [True, False])
async def test_a_worker_without_a_gpu_has_no_better_way(lab: Lab, is_opener_on_gpu: bool) -> None:
    factories = [lab.gpu("gpu").factory, ChannelFactory.through_host(CPU)]
    pair = await lab.start(*(factories if is_opener_on_gpu else reversed(factories)))
    async with opened(pair) as (link, accepted):
        assert kinds_and_fallbacks(link, accepted) == [(HOST, "")] * 2
        await carry(link, accepted, pair.b.inbox.frames)


async def test_the_metrics_say_what_each_link_runs_on(lab: Lab) -> None:
    pair = await lab.two_gpus()
    totals, registry = LinkTotals(), CollectorRegistry()
    registry.register(totals)
    async with opened(pair) as (link, accepted):
        totals.add(link)
        await carry(link, accepted, pair.b.inbox.frames)
        labels = {"peer": "b", "transport": "shm", "channel": "cuda_ipc", "channel_fallback": ""}
        assert registry.get_sample_value("kunserve_links_up", labels) == 1.0
    assert registry.get_sample_value("kunserve_links_up", labels) is None
    sent = {"channel": "cuda_ipc", "direction": "sent"}
    assert registry.get_sample_value("kunserve_tensor_bytes_total", sent) == 400.0


# --- fallbacks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["allocate", "export_memory", "register", "open_memory", "read"])
@pytest.mark.parametrize("victim", [0, 1])
async def test_what_a_driver_refuses_is_a_fallback_at_both_ends(
    lab: Lab, call: str, victim: int
) -> None:
    pair = await lab.two_gpus(hosts=("h", "h"))
    lab.gpus[victim].driver.fail(call)
    with capture_logs() as logs:
        async with opened(pair) as (link, accepted):
            for kind, fallback in kinds_and_fallbacks(link, accepted):
                assert kind is NCCL
                assert fallback.startswith("cuda_ipc: ")
                assert f"{call}: refused by the test" in fallback
            await carry(link, accepted, pair.b.inbox.frames)
    told = [log["log_level"] for log in logs if log["event"] == "link.up"]
    assert told == ["warning", "warning"]


async def test_memory_that_does_not_hold_what_was_written_is_not_used(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between GPUs that a broken bridge connects."""
    pair = await lab.two_gpus(kinds=(CUDA_IPC, HOST))
    monkeypatch.setattr(lab.gpus[0].driver, "write", lambda address, data: None)
    async with opened(pair) as (link, accepted):
        for kind, fallback in kinds_and_fallbacks(link, accepted):
            assert kind is HOST
            assert "did not arrive" in fallback


async def test_nccl_of_two_versions_is_not_mixed(lab: Lab) -> None:
    gpus = lab.gpu("gpu-a"), lab.gpu("gpu-b", nccl_version=22705)
    pair = await lab.start(gpus[0].factory, gpus[1].factory, hosts=("h", "elsewhere"))
    async with opened(pair) as (link, accepted):
        for kind, fallback in kinds_and_fallbacks(link, accepted):
            assert kind is HOST
            assert "22705" in fallback


async def test_nccl_that_does_not_connect_is_given_up_in_time_and_for_good(lab: Lab) -> None:
    """The ranks never find each other, as where no interface leads from host to host."""
    gpus = [Gpu(name, Fabric()) for name in ("gpu-a", "gpu-b")]
    pair = await lab.start(*(gpu.factory for gpu in gpus), hosts=("h", "elsewhere"))
    for seconds, reason in ((1.0, "did not come within"), (DEADLINE, "does not offer it")):
        with contextlib.closing(await pair.a.open(seconds=seconds)) as link:
            await eventually(lambda: pair.b.accepted)
            for kind, fallback in kinds_and_fallbacks(link, pair.accepted):
                assert kind is HOST
                assert reason in fallback
        pair.b.accepted.clear()


# --- what the settings insist on -----------------------------------------------------------------


async def test_a_worker_that_must_use_the_host_path_makes_the_other_one_use_it(lab: Lab) -> None:
    gpus = lab.gpu("gpu-a", kinds=(HOST,)), lab.gpu("gpu-b")
    pair = await lab.start(gpus[0].factory, gpus[1].factory)
    async with opened(pair) as (link, accepted):
        for kind, fallback in kinds_and_fallbacks(link, accepted):
            assert kind is HOST
            assert "does not offer it" in fallback


async def test_workers_that_insist_on_different_things_have_no_link(lab: Lab) -> None:
    gpus = lab.gpu("gpu-a", kinds=(CUDA_IPC,)), lab.gpu("gpu-b", kinds=(NCCL,))
    pair = await lab.start(gpus[0].factory, gpus[1].factory)
    with pytest.raises(LinkError, match="no channel for tensors"):
        await pair.a.open()


async def test_a_channel_that_is_insisted_on_and_fails_leaves_no_link(lab: Lab) -> None:
    pair = await lab.two_gpus(kinds=(CUDA_IPC,))
    lab.gpus[1].driver.fail("allocate")
    with pytest.raises(ChannelError, match=r"no channel for tensors.*refused by the test"):
        await pair.a.open()
    assert not pair.b.accepted


# --- the peer dies, or hangs, in the middle of it ------------------------------------------------


def interrupt(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, first: Callable[[], object]) -> None:
    """Do something first when memory for a channel is allocated."""
    allocate = gpu.driver.allocate

    def interrupted(nbytes: int) -> int:
        first()
        return allocate(nbytes)

    monkeypatch.setattr(gpu.driver, "allocate", interrupted)


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """Set at the end of the test at the latest."""
    event = threading.Event()
    yield event
    event.set()


async def test_a_driver_that_hangs_at_the_peer_is_given_up_in_time(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, go_on: threading.Event
) -> None:
    """The connection it hangs on is given up with it."""
    pair = await lab.two_gpus()
    interrupt(lab.gpus[1], monkeypatch, lambda: go_on.wait(20.0))
    with contextlib.closing(await pair.a.open(seconds=2.0)) as link:
        assert (link.transport, link.channel.kind) == (Transport.TCP, NCCL)
        assert "it took too long" in link.fallback
        go_on.set()
        await eventually(lambda: all(gpu.driver.is_idle for gpu in lab.gpus))
        assert len(pair.b.accepted) == 1


async def test_an_open_that_is_called_off_leaves_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, go_on: threading.Event
) -> None:
    pair, began = await lab.two_gpus(), threading.Event()
    interrupt(lab.gpus[0], monkeypatch, lambda: (began.set(), go_on.wait(20.0)))
    opening = asyncio.create_task(pair.a.open())
    await eventually(began.is_set)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    go_on.set()
    await eventually(lambda: pair.b.accepted and not pair.accepted.is_up)
    close_all(pair.b.accepted)
    await eventually(lambda: all(gpu.driver.is_idle for gpu in lab.gpus))


@pytest.mark.parametrize("words", [b"", b"\x00\x10\x00\x00half a message", b"\xff" * 8])
async def test_a_peer_that_breaks_off_in_the_set_up_leaves_nothing(lab: Lab, words: bytes) -> None:
    """It has said a good hello, and dies or talks nonsense instead of giving its memory."""
    gpu = lab.gpu("gpu-b")
    pair = await lab.start(lab.gpu("gpu-a").factory, gpu.factory)
    offer = LinkOffer(
        worker_id="a",
        group_id="g0",
        term=1,
        epoch=5,
        host_id="h",
        transports=tuple(Transport),
        channels=lab.gpus[1].factory.offer,
    )
    answer = LinkAnswer.decode(
        await lab.bus.request(SUBJECTS.link("b"), offer.encode(), timeout_seconds=DEADLINE)
    )
    assert answer.channels == (CUDA_IPC, NCCL, HOST)
    await asyncio.to_thread(say_hello_and, words, answer)
    await eventually(lambda: gpu.driver.calls["allocate"] and gpu.driver.is_idle)
    assert not pair.b.accepted


def say_hello_and(words: bytes, answer: LinkAnswer) -> None:
    """Connect as the answer says, up to the welcome; then say something, and hang up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE)
        connection.connect(f"\0{answer.socket_name}")
        connection.sendall(make_hello(answer.link_id, answer.key))
        connection.recv(WELCOME_BYTES)
        connection.sendall(words)
