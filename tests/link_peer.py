"""The other end of a link in tests: an agent that does what frames tell it, here or in a process.

`python -m tests.link_peer <transport> <socket fd> <memory fd>` runs one until its link is down.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import msgpack

from services.worker.links.base import (
    DownReason,
    FrameHandler,
    Link,
    LinkClass,
    LinkDownError,
    LinkFrame,
    LinkPeer,
    Transport,
)
from services.worker.links.config import LinkConfig
from services.worker.links.link import StreamLink
from services.worker.links.shm import ShmStream, create_ring_memory
from services.worker.links.stream import ByteStream
from services.worker.links.tcp import TcpStream

PEER = LinkPeer("peer", "g0", 1, 1)


class Kind(IntEnum):
    """What a frame tells the agent."""

    ECHO = 1  # send it back, in the class that its header names
    NOTE = 2  # answer with how many EXCHANGE chunks and frames came before it
    FLOOD = 3  # send [class, count, bytes, seed] frames of payload()
    DATA = 4  # nothing


def payload(seed: int, nbytes: int) -> bytes:
    """Bytes that both ends can make."""
    return random.Random(seed).randbytes(nbytes)


class Agent:
    """Obeys frames on a thread of its own, so that it may block on back-pressure."""

    def __init__(self) -> None:
        self._jobs: list[threading.Thread] = []

    def on_frame(self, link: Link, frame: LinkFrame) -> None:
        match frame.kind:
            case Kind.ECHO:
                self._start(lambda: send_patiently(link, frame, LinkClass(frame.header[0])))
            case Kind.NOTE:
                exchange = link.stats().classes[LinkClass.EXCHANGE]
                counts = [exchange.chunks_received, exchange.frames_received]
                answer = LinkFrame(Kind.NOTE, frame.group_id, frame.epoch, msgpack.packb(counts))
                link.send(answer, LinkClass.CONTROL)
            case Kind.FLOOD:
                self._start(lambda: self._flood(link, *msgpack.unpackb(frame.header)))

    def _start(self, job: Callable[[], None]) -> None:
        previous = self._jobs[-1] if self._jobs else None

        def run() -> None:
            if previous is not None:
                previous.join()
            with contextlib.suppress(LinkDownError):
                job()

        thread = threading.Thread(target=run, daemon=True)
        self._jobs.append(thread)
        thread.start()

    def _flood(self, link: Link, link_class: int, count: int, nbytes: int, seed: int) -> None:
        for number in range(count):
            data = payload(seed + number, nbytes)
            frame = LinkFrame(Kind.DATA, "g0", 1, msgpack.packb(number), [data])
            send_patiently(link, frame, LinkClass(link_class))


def send_patiently(link: Link, frame: LinkFrame, link_class: LinkClass) -> None:
    """Send, waiting for room; LinkDownError where the link goes down."""
    while not link.send(frame, link_class):
        if not link.wait_writable(link_class, 20.0):
            raise TimeoutError("no room on the link")


@dataclass
class Inbox:
    """What the tested end of a link was called with."""

    frames: list[LinkFrame] = field(default_factory=list)
    downs: list[DownReason] = field(default_factory=list)

    def on_frame(self, link: Link, frame: LinkFrame) -> None:
        self.frames.append(frame)

    def on_down(self, link: Link, reason: DownReason) -> None:
        self.downs.append(reason)

    def has_frames(self) -> bool:
        return bool(self.frames)

    def of_kind(self, kind: Kind) -> list[LinkFrame]:
        return [frame for frame in self.frames if frame.kind == kind]


def connected_sockets(transport: Transport) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection as the handshake leaves them."""
    if transport is Transport.SHM:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def make_stream(
    transport: Transport, connection: socket.socket, memory: int, is_acceptor: bool
) -> ByteStream:
    """A stream over one end."""
    if transport is Transport.SHM:
        return ShmStream(connection, memory, is_acceptor)
    return TcpStream(connection)


@dataclass
class Linked:
    """A link under test and its peer: an agent here (`far`) or in a process."""

    link: StreamLink
    inbox: Inbox
    far: StreamLink | None = None
    far_inbox: Inbox = field(default_factory=Inbox)
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The peer's process."""
        if self.process is None:
            raise ValueError("the peer is in this process")
        return self.process.pid


@contextlib.contextmanager
def linked_here(
    transport: Transport, config: LinkConfig, on_frame: FrameHandler | None = None
) -> Iterator[Linked]:
    """A link whose peer is an agent in this process."""
    inbox, far_inbox = Inbox(), Inbox()
    near, far = connected_sockets(transport)
    memory = create_ring_memory()
    near_stream = make_stream(transport, near, memory, is_acceptor=False)
    far_stream = make_stream(transport, far, memory, is_acceptor=True)
    os.close(memory)
    link = StreamLink(near_stream, PEER, config, on_frame or inbox.on_frame, inbox.on_down)
    far_link = StreamLink(far_stream, PEER, config, Agent().on_frame, far_inbox.on_down)
    far_link.start()
    link.start()
    try:
        yield Linked(link, inbox, far_link, far_inbox)
    finally:
        link.close()
        far_link.close()


@contextlib.contextmanager
def linked_process(transport: Transport, config: LinkConfig) -> Iterator[Linked]:
    """A link whose peer is an agent in a process of its own, killed at the end."""
    near, far = connected_sockets(transport)
    memory = create_ring_memory()
    with far:
        command = [sys.executable, "-m", "tests.link_peer"]
        command += [transport.value, str(far.fileno()), str(memory)]
        process = subprocess.Popen(command, pass_fds=(far.fileno(), memory))
    inbox = Inbox()
    near.settimeout(60)
    near.recv(1, socket.MSG_PEEK)  # a peer that still starts must not be taken for a silent one
    stream = make_stream(transport, near, memory, is_acceptor=False)
    os.close(memory)
    link = StreamLink(stream, PEER, config, inbox.on_frame, inbox.on_down)
    link.start()
    try:
        yield Linked(link, inbox, process=process)
    finally:
        link.close()
        process.kill()
        process.wait(10)


def main() -> None:
    transport, connection, memory = Transport(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    down = threading.Event()
    stream = make_stream(transport, socket.socket(fileno=connection), memory, is_acceptor=True)
    os.close(memory)
    config = LinkConfig(heartbeat_seconds=0.05)
    link = StreamLink(stream, PEER, config, Agent().on_frame, lambda *_: down.set())
    link.start()
    down.wait(120)
    link.close()


if __name__ == "__main__":
    main()
