"""The seam between a worker and its peers: what a link is, whatever bytes travel on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from services.worker.memory.base import FileRun
from shared.errors import KunserveError

if TYPE_CHECKING:  # they know links
    from services.worker.channels.base import ChannelKind, TensorChannel, Traffic

Buffer = bytes | bytearray | memoryview


class LinkError(KunserveError):
    """A link could not be opened, or was used in a way it does not allow."""


class LinkDownError(LinkError):
    """The link is down or closed; nothing can be sent on it any more."""


class LinkClass(IntEnum):
    """Priority of a frame; a lower number goes first."""

    CONTROL = 0  # activations and control: never refused, never cut behind other classes
    EXCHANGE = 1  # KV of running requests
    RESTORE = 2  # weights


class Transport(StrEnum):
    """What carries the bytes of a link."""

    SHM = "shm"
    TCP = "tcp"


class DownReason(Enum):
    """Why a link went down."""

    CLOSED_BY_PEER = "closed by peer"
    LOST = "connection lost"
    SILENT = "peer is silent"
    PROTOCOL = "peer broke the protocol"
    FAULT = "internal fault"


@dataclass(frozen=True, slots=True)
class LinkFrame:
    """What is sent and received in one piece.

    Args:
        kind: what it is; a number of the caller's choice (an IntEnum of the pipeline).
        group_id, epoch: whose it is; a receiver that is not in that group discards it.
        header: a msgpack message of the caller's choice.
        buffers: C-contiguous memory of any size. Of a received frame each is one writable
            memoryview of bytes, aligned to 16 bytes, that belongs to the receiver.
    """

    kind: int
    group_id: str
    epoch: int
    header: bytes = b""
    buffers: Sequence[Buffer] = ()


@dataclass(frozen=True, slots=True)
class LinkPeer:
    """Who is at the other end, and as what the link was opened."""

    worker_id: str
    group_id: str
    term: int
    epoch: int


@dataclass(frozen=True, slots=True)
class ClassStats:
    """Counters of one class in both directions since the link is up."""

    frames_sent: int = 0
    bytes_sent: int = 0
    chunks_sent: int = 0
    frames_received: int = 0
    bytes_received: int = 0
    chunks_received: int = 0
    queued_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LinkStats:
    """A picture of a link at one moment.

    `control_delay_*` is the time a CONTROL frame waited between `send` and its first byte on the
    way (the last 1024 of them for the quantile). `bandwidth` is measured while bulk is sent, None
    before there was any. `tensors` counts what `channel` has carried, in frames or beside them.
    """

    transport: Transport
    classes: dict[LinkClass, ClassStats] = field(default_factory=dict)
    control_delay_max_seconds: float = 0.0
    control_delay_p99_seconds: float = 0.0
    bandwidth_bytes_per_second: float | None = None
    chunk_bytes: int = 0
    channel: ChannelKind | None = None
    channel_fallback: str = ""
    tensors: Traffic = field(default_factory=dict)


class PeerMemory(Protocol):
    """The memory of a worker on the same host, which its peer may read."""

    def view(self, run: FileRun) -> NDArray[np.uint8]:  # [nbytes]
        """The bytes of a run, not copied; ValueError where there are none."""
        ...


class Link(Protocol):
    """A connection to one peer. Frames of one class arrive in the order they were sent."""

    @property
    def peer(self) -> LinkPeer:
        """Who is at the other end."""
        ...

    @property
    def transport(self) -> Transport:
        """What carries the bytes."""
        ...

    @property
    def peer_memory(self) -> PeerMemory | None:
        """The peer's memory, where both may read each other's; None once the link is down."""
        ...

    @property
    def channel(self) -> TensorChannel:
        """What carries tensors, in the link's frames or beside them."""
        ...

    @property
    def is_up(self) -> bool:
        """False once the peer is lost or the link was closed."""
        ...

    def send(
        self,
        frame: LinkFrame,
        link_class: LinkClass,
        on_released: Callable[[], None] | None = None,
    ) -> bool:
        """Send or queue a frame; thread-safe, never waits for the network.

        Buffers of a CONTROL frame are copied before this returns, so the caller may reuse them at
        once. Buffers of the other classes are borrowed: they must not change until `on_released`
        is called, exactly once, from the link's thread (sent, or the link went down).

        Returns:
            False where a bulk class has its fill of queued bytes; then nothing was queued and
            `wait_writable` tells when to try again. Below the limit a frame of any size is
            accepted, so the limit is exceeded by one frame at most. CONTROL is always accepted.

        Raises:
            LinkDownError: the link is down or closed.
        """
        ...

    def wait_writable(self, link_class: LinkClass, timeout_seconds: float) -> bool:
        """Wait until `send` would accept a frame of this class, or the link is down.

        Returns False where neither happened in time.
        """
        ...

    def stats(self) -> LinkStats:
        """Counters so far."""
        ...

    def close(self) -> None:
        """End the link and its threads. Idempotent, from any thread, callbacks included.

        What is still queued is dropped; the peer is told. `on_down` is not called for it, and
        nothing else is once this has returned.
        """
        ...


#: Called with every whole frame, in the link's receive thread. It must only enqueue.
FrameHandler = Callable[[Link, LinkFrame], None]

#: Called once, after the last frame, in the link's receive thread, when the peer or the connection
#: is gone. It must only enqueue.
DownHandler = Callable[[Link, DownReason], None]
