"""What all links of a worker share."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

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
        current: the (term, epoch) the worker is at; offers of older plans are refused.
        totals: counts what all of them carry.
    """

    worker_id: str
    bus: Bus
    subjects: Subjects
    address: EndpointAddress
    config: LinkConfig
    handlers: LinkHandlers
    current: Callable[[], tuple[int, int]]
    totals: LinkTotals = field(default_factory=LinkTotals)


@dataclass(frozen=True, slots=True)
class Connection:
    """What a handshake ends with: a stream, and the peer's memory where both share it."""

    stream: ByteStream
    memory: PeerMemory | None = None


def make_link(
    context: LinkContext, connection: Connection, peer: LinkPeer, fallback: str
) -> StreamLink:
    """A link that is not started yet; says in the log what it runs on, loudly if on less."""
    stream, memory = connection.stream, connection.memory
    log = structlog.get_logger(component="links", worker=context.worker_id, peer=peer.worker_id)
    say = log.info if fallback in ("", DIFFERENT_HOSTS) else log.warning
    say(
        "link.up",
        transport=stream.transport.value,
        reads_memory=memory is not None,
        epoch=peer.epoch,
        fallback=fallback,
    )
    handlers = context.handlers
    link = StreamLink(
        stream, peer, context.config, handlers.on_frame, handlers.on_down, fallback, memory
    )
    context.totals.add(link)
    return link
