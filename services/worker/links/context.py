"""What all links of a worker share."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from services.worker.channels.factory import ChannelFactory, EstablishedChannel
from services.worker.links.base import (
    DownHandler,
    FrameHandler,
    LinkPeer,
    PeerMemory,
    Transport,
)
from services.worker.links.config import LinkConfig
from services.worker.links.handshake import DIFFERENT_HOSTS
from services.worker.links.link import StreamLink
from services.worker.links.stream import ByteStream
from services.worker.links.totals import LinkTotals
from shared.bus.base import Bus
from shared.subjects import Subjects

_WILDCARDS = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class EndpointAddress:
    """Where a worker accepts links.

    Args:
        host: address to listen on for TCP (`link_host`).
        advertise: what peers connect to (`link_advertise`); "": `host`, or this machine's name
            where that is a wildcard.
        host_id: see `host_id()`.
        transports: what may be used.
        memory_file: of this worker's memory, that peers on this host may read; see PeerMemory.
    """

    host: str
    advertise: str
    host_id: str
    transports: tuple[Transport, ...] = (Transport.SHM, Transport.TCP)
    memory_file: int | None = None

    @property
    def advertised_host(self) -> str:
        """What a LinkAnswer says."""
        if self.advertise:
            return self.advertise
        return socket.gethostname() if self.host in _WILDCARDS else self.host


@dataclass(frozen=True, slots=True)
class LinkHandlers:
    """What the worker does with links.

    Args:
        on_link: an accepted link, before its threads run; on the event loop.
        on_frame, on_down: of every link, from its receive thread.
    """

    on_link: Callable[[StreamLink], None]
    on_frame: FrameHandler
    on_down: DownHandler


@dataclass(frozen=True, slots=True)
class LinkContext:
    """The worker that links belong to.

    Args:
        channels: makes what carries tensors.
        current: the (term, epoch) the worker is at; offers of older plans are refused.
        totals: counts what all of them carry.
    """

    worker_id: str
    bus: Bus
    subjects: Subjects
    address: EndpointAddress
    config: LinkConfig
    handlers: LinkHandlers
    channels: ChannelFactory
    current: Callable[[], tuple[int, int]]
    totals: LinkTotals = field(default_factory=LinkTotals)


@dataclass(frozen=True, slots=True)
class Connection:
    """What a handshake ends with.

    Attributes:
        stream: for frames.
        tensors: what carries tensors, and why it is nothing better.
        memory: the peer's, where both share it.
    """

    stream: ByteStream
    tensors: EstablishedChannel
    memory: PeerMemory | None = None

    def close(self) -> None:
        """Give up a connection that no link was made of."""
        self.tensors.channel.close()
        self.stream.shutdown()
        self.stream.close()


async def connect_in_thread(connect: Callable[[], Connection]) -> Connection:
    """What `connect` gives, which may block; closed if nobody waits for it any more."""
    future = asyncio.ensure_future(asyncio.to_thread(connect))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(late: asyncio.Future[Connection]) -> None:
    if not late.cancelled() and late.exception() is None:
        late.result().close()


def make_link(
    context: LinkContext, connection: Connection, peer: LinkPeer, fallback: str
) -> StreamLink:
    """A link that is not started yet; says in the log what it runs on, loudly if on less."""
    stream, memory, tensors = connection.stream, connection.memory, connection.tensors
    log = structlog.get_logger(component="links", worker=context.worker_id, peer=peer.worker_id)
    is_fast = fallback in ("", DIFFERENT_HOSTS) and not tensors.fallback
    say = log.info if is_fast else log.warning
    say(
        "link.up",
        transport=stream.transport.value,
        reads_memory=memory is not None,
        channel=tensors.channel.kind.value,
        epoch=peer.epoch,
        fallback=fallback,
        channel_fallback=tensors.fallback,
    )
    handlers = context.handlers
    link = StreamLink(
        stream,
        peer,
        context.config,
        handlers.on_frame,
        handlers.on_down,
        fallback,
        peer_memory=memory,
        tensors=tensors,
    )
    context.totals.add(link)
    return link
