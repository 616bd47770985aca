"""Two workers open a link to each other, over both buses; nobody else does."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from services.worker.links.base import LinkClass, LinkError, LinkFrame, LinkPeer, Transport
from services.worker.links.handshake import HELLO_BYTES, LinkRefusedError
from services.worker.links.link import StreamLink
from services.worker.links.messages import LinkAnswer, LinkOffer
from services.worker.memory.base import FileRun
from shared.bus.base import Bus
from shared.bus.memory import MemoryBus, MemoryServer
from shared.bus.nats import connect as connect_nats
from shared.embedded_nats import EmbeddedNats
from tests.conftest import eventually
from tests.link_peer import Kind
from tests.link_workers import DEADLINE, Worker, close_all, tampering

Start = Callable[[Worker], Awaitable[Worker]]


@pytest.fixture
def bus() -> MemoryBus:
    return MemoryBus(MemoryServer(lambda: 0.0), "links")


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts workers' endpoints; stops them, and closes all links they accepted, at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def run(worker: Worker) -> Worker:
            await worker.endpoint.start()
            stack.push_async_callback(worker.endpoint.close)
            stack.callback(close_all, worker.accepted)
            return worker

        yield run


async def exchange_frames(link: StreamLink, opener: Worker, acceptor: Worker) -> None:
    """Frames go both ways, and both ends know who the other is."""
    await eventually(lambda: acceptor.accepted)
    accepted = acceptor.accepted[0]
    assert accepted.peer == LinkPeer("a", "g0", 1, 5)
    assert link.peer == LinkPeer("b", "g0", 1, 5)
    assert accepted.transport is link.transport
    assert accepted.fallback == link.fallback
    for end, other in ((link, acceptor), (accepted, opener)):
        end.send(LinkFrame(Kind.DATA, "g0", 5, b"hello", [b"x" * 5000]), LinkClass.CONTROL)
        await eventually(other.inbox.has_frames)
        assert other.inbox.frames[0].header == b"hello"


async def test_workers_of_one_host_share_memory(bus: Bus, start: Start) -> None:
    a, b = await start(Worker("a", bus)), await start(Worker("b", bus))
    with contextlib.closing(await a.open()) as link:
        assert (link.transport, link.fallback) == (Transport.SHM, "")
        await exchange_frames(link, a, b)


@contextlib.contextmanager
def memory_with(data: bytes, seals: int = fcntl.F_SEAL_SHRINK) -> Iterator[int]:
    """A worker's memory; its file descriptor."""
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.write(file, data.ljust(mmap.PAGESIZE))
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        yield file
    finally:
        os.close(file)


def seen_from(link: StreamLink, nbytes: int) -> bytes | None:
    """What one end sees of the other's memory; None if nothing."""
    memory = link.peer_memory
    return None if memory is None else memory.view(FileRun(0, nbytes)).tobytes()


async def test_workers_of_one_host_read_each_other(bus: Bus, start: Start) -> None:
    with memory_with(b"of a") as file_a, memory_with(b"of b") as file_b:
        a = await start(Worker("a", bus, memory=file_a))
        b = await start(Worker("b", bus, memory=file_b))
        with contextlib.closing(await a.open()) as link:
            await exchange_frames(link, a, b)
            os.pwrite(file_a, b"now ", 0)
            assert (seen_from(link, 4), seen_from(b.accepted[0], 4)) == (b"of b", b"now ")
        await eventually(lambda: not b.accepted[0].is_up and b.accepted[0].peer_memory is None)
        assert link.peer_memory is None


@pytest.mark.parametrize("owner", ["a", "b"])
async def test_memory_of_one_alone_is_not_shared(bus: Bus, start: Start, owner: str) -> None:
    with memory_with(b"mine") as file:
        a = await start(Worker("a", bus, memory=file if owner == "a" else None))
        b = await start(Worker("b", bus, memory=file if owner == "b" else None))
        with contextlib.closing(await a.open()) as link:
            await exchange_frames(link, a, b)
            assert link.transport is Transport.SHM
            assert link.peer_memory is None
            assert b.accepted[0].peer_memory is None


async def test_memory_does_not_go_to_other_hosts(bus: Bus, start: Start) -> None:
    with memory_with(b"of a") as file_a, memory_with(b"of b") as file_b:
        a = await start(Worker("a", bus, memory=file_a))
        b = await start(Worker("b", bus, memory=file_b, host_id="elsewhere"))
        with contextlib.closing(await a.open()) as link:
            await exchange_frames(link, a, b)
            assert link.transport is Transport.TCP
            assert link.peer_memory is None


@pytest.mark.parametrize("owner", ["a", "b"])
async def test_memory_that_could_shrink_is_refused(bus: Bus, start: Start, owner: str) -> None:
    """Who reads what is gone dies of it."""
    with memory_with(b"of a") as good, memory_with(b"of b", seals=0) as bad:
        files = {"a": good, "b": good} | {owner: bad}
        a = await start(Worker("a", bus, memory=files["a"]))
        await start(Worker("b", bus, memory=files["b"]))
        with contextlib.closing(await a.open()) as link:
            assert link.transport is Transport.TCP
            assert "shared memory failed" in link.fallback


async def test_workers_of_two_hosts_use_tcp(bus: Bus, start: Start) -> None:
    a, b = await start(Worker("a", bus)), await start(Worker("b", bus, host_id="elsewhere"))
    with contextlib.closing(await a.open()) as link:
        assert link.transport is Transport.TCP
        assert "host" in link.fallback
        await exchange_frames(link, a, b)


async def test_over_a_real_server(nats_server: EmbeddedNats, start: Start) -> None:
    url = nats_server.url
    bus_a = await connect_nats(url, service="worker", instance="a")
    bus_b = await connect_nats(url, service="worker", instance="b")
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(bus_a.close)
        stack.push_async_callback(bus_b.close)
        a, b = await start(Worker("a", bus_a)), await start(Worker("b", bus_b))
        with contextlib.closing(await a.open()) as link:
            await exchange_frames(link, a, b)
        await b.endpoint.close()


async def test_a_fallback_from_shared_memory_is_told(bus: Bus, start: Start) -> None:
    def misdirect(_: LinkOffer, answer: LinkAnswer) -> LinkAnswer:
        return answer.model_copy(update={"socket_name": "kunserve-nobody-listens-here"})

    a, b = Worker("a", tampering(bus, misdirect)), await start(Worker("b", bus))
    with contextlib.closing(await a.open()) as link:
        assert link.transport is Transport.TCP
        assert "shared memory failed" in link.fallback
        await exchange_frames(link, a, b)


@pytest.mark.parametrize("transport", Transport)
async def test_a_wrong_key_is_refused(bus: Bus, start: Start, transport: Transport) -> None:
    def spoil(_: LinkOffer, answer: LinkAnswer) -> LinkAnswer:
        return answer.model_copy(update={"key": bytes(32)})

    b = await start(Worker("b", bus, transports=(transport,)))
    a = Worker("a", tampering(bus, spoil), transports=(transport,))
    with pytest.raises(LinkError, match=r"refused|no transport"):
        await a.open()
    assert not b.accepted


async def test_a_stale_plan_is_refused(bus: Bus, start: Start) -> None:
    a, b = Worker("a", bus), await start(Worker("b", bus, current=(1, 6)))
    with pytest.raises(LinkRefusedError, match="older"):
        await a.open(epoch=5)
    assert not b.accepted
    (await a.open(epoch=6)).close()


async def test_a_plan_that_ends_during_the_handshake_is_refused(bus: Bus, start: Start) -> None:
    b = await start(Worker("b", bus, host_id="elsewhere"))

    def end_the_plan(_: LinkOffer, answer: LinkAnswer) -> LinkAnswer:
        b.current = (2, 1)
        return answer

    a = Worker("a", tampering(bus, end_the_plan))
    with pytest.raises(LinkRefusedError, match="refused"):
        await a.open()
    assert not b.accepted


async def test_an_invitation_is_good_once(bus: Bus, start: Start) -> None:
    answers: list[LinkAnswer] = []

    def reuse(_: LinkOffer, answer: LinkAnswer) -> LinkAnswer:
        answers.append(answer)
        return answers[0]

    a, b = Worker("a", tampering(bus, reuse)), await start(Worker("b", bus, host_id="elsewhere"))
    with contextlib.closing(await a.open()):
        with pytest.raises(LinkRefusedError):
            await a.open()
        assert len(b.accepted) == 1


async def test_nothing_in_common_is_refused(bus: Bus, start: Start) -> None:
    a = Worker("a", bus, transports=(Transport.SHM,))
    await start(Worker("b", bus, host_id="elsewhere"))
    with pytest.raises(LinkRefusedError, match="no transport"):
        await a.open()


async def test_a_worker_that_is_gone(bus: Bus) -> None:
    with pytest.raises(LinkError, match="worker b"):
        await Worker("a", bus).open()


async def test_strangers_and_the_silent_are_turned_away(bus: Bus, start: Start) -> None:
    addresses: list[LinkAnswer] = []

    def note(_: LinkOffer, answer: LinkAnswer) -> LinkAnswer:
        addresses.append(answer)
        return answer

    a, b = Worker("a", tampering(bus, note)), await start(Worker("b", bus, host_id="elsewhere"))
    with contextlib.closing(await a.open()):
        for words in (b"GET / HTTP/1.1\r\n" + bytes(HELLO_BYTES), b""):
            stranger = socket.create_connection((addresses[0].host, addresses[0].port), DEADLINE)
            with stranger:
                stranger.setblocking(False)
                stranger.send(words)
                await eventually(functools.partial(hangs_up, stranger))
    assert len(b.accepted) == 1


def hangs_up(connection: socket.socket) -> bool:
    """Whether the other side closed the connection without a word."""
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
