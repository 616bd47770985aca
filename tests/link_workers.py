"""Workers reduced to their endpoints of links, for tests of the handshake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch

from services.worker.channels.factory import ChannelFactory
from services.worker.links.base import LinkPeer, Transport
from services.worker.links.config import LinkConfig
from services.worker.links.context import EndpointAddress, LinkContext, LinkHandlers
from services.worker.links.endpoint import LinkEndpoint
from services.worker.links.host import host_id
from services.worker.links.link import StreamLink
from services.worker.links.messages import LinkAnswer, LinkOffer
from shared.bus.base import Bus
from shared.subjects import Subjects
from tests.link_peer import Inbox

SUBJECTS = Subjects("links")
DEADLINE = 10.0


@dataclass
class Worker:
    """An endpoint and what it was called with."""

    worker_id: str
    bus: Bus
    host_id: str = field(default_factory=host_id)
    transports: tuple[Transport, ...] = (Transport.SHM, Transport.TCP)
    current: tuple[int, int] = (1, 5)
    memory: int | None = None
    channels: ChannelFactory = field(
        default_factory=lambda: ChannelFactory.through_host(torch.device("cpu"))
    )
    inbox: Inbox = field(default_factory=Inbox)
    accepted: list[StreamLink] = field(default_factory=list)

    def __post_init__(self) -> None:
        address = EndpointAddress("127.0.0.1", "", self.host_id, self.transports, self.memory)
        handlers = LinkHandlers(self.accepted.append, self.inbox.on_frame, self.inbox.on_down)
        self.endpoint = LinkEndpoint(
            LinkContext(
                self.worker_id,
                self.bus,
                SUBJECTS,
                address,
                LinkConfig(),
                handlers,
                self.channels,
                lambda: self.current,
            )
        )

    async def open(self, epoch: int = 5, seconds: float = DEADLINE) -> StreamLink:
        """A link to worker b, which may have two activations on their way there."""
        peer = LinkPeer("b", "g0", 1, epoch)
        return await self.endpoint.open(peer, num_activations=2, timeout_seconds=seconds)


def close_all(links: list[StreamLink]) -> None:
    for link in links:
        link.close()


class TamperingBus:
    """A bus on which answers to offers are changed on their way."""

    def __init__(self, bus: Bus, change: Callable[[LinkOffer, LinkAnswer], LinkAnswer]) -> None:
        self._bus = bus
        self._change = change

    async def request(self, subject: str, payload: bytes, *, timeout_seconds: float) -> bytes:
        answer = await self._bus.request(subject, payload, timeout_seconds=timeout_seconds)
        return self._change(LinkOffer.decode(payload), LinkAnswer.decode(answer)).encode()


def tampering(bus: Bus, change: Callable[[LinkOffer, LinkAnswer], LinkAnswer]) -> Bus:
    return cast(Bus, TamperingBus(bus, change))
