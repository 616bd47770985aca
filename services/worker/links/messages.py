"""How two workers agree on a link, over the bus.

A -- LinkOffer --> ks.<deployment>.w.<B>.link        request/reply
A <-- LinkAnswer -- B      where to connect, and a key that is good for one connection
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from services.worker.channels.base import ChannelKind
from services.worker.channels.choice import ChannelOffer
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
    channels: ChannelOffer = Field(default=ChannelOffer(), description="what may carry tensors")
    num_activations: int = Field(
        default=0, description="that may be on their way to the receiver at once"
    )
    setup_seconds: float = Field(default=5.0, description="to set up what carries tensors")


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
    channels: tuple[ChannelKind, ...] = Field(
        default=(ChannelKind.HOST,), description="to carry tensors; tried in this order"
    )
    channel_fallback: str = Field(default="", description="why the best for the place is not tried")
    link_id: bytes = b""
    key: bytes = b""
