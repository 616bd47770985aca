"""How two workers agree on a link, over the bus.

A -- LinkOffer --> ks.<deployment>.w.<B>.link        request/reply
A <-- LinkAnswer -- B      where to connect, and a key that is good for one connection
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from services.worker.links.base import Transport
from shared.wire import Message


class LinkOffer(Message):
    """`worker_id` wants a link to the receiver, for a group of a plan."""

    worker_id: str
    group_id: str
    term: int
    epoch: int
    host_id: str = Field(description="equal on workers that can share memory, see host.py")
    transports: tuple[Transport, ...]
    fallback: str = Field(default="", description="why a faster transport is not offered")
    shares_memory: bool = Field(default=False, description="the peer may read this worker's KV")


class LinkAnswerStatus(StrEnum):
    """What a worker said to a LinkOffer."""

    ACCEPTED = "accepted"
    STALE_EPOCH = "stale_epoch"  # the offer belongs to a plan that is over
    NO_TRANSPORT = "no_transport"  # nothing that both can do


class LinkAnswer(Message):
    """Where and how to connect; `detail` is a sentence where the offer is refused."""

    status: LinkAnswerStatus
    detail: str = ""
    transport: Transport = Transport.TCP
    fallback: str = Field(default="", description="why it is not a faster transport")
    host: str = ""
    port: int = 0
    socket_name: str = Field(default="", description="abstract unix socket, without the NUL")
    shares_memory: bool = Field(default=False, description="both pass each other their memory")
    link_id: bytes = b""
    key: bytes = b""
