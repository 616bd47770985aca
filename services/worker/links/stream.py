"""What a transport gives a link: a stream of bytes in each direction.

`StreamLink` calls `write_some` and `wait_writable` from one thread at a time, `read_some` from
its receive thread, and `close` when both are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from services.worker.links.base import DownReason, LinkError, Transport

#: Longest wait of `read_some`: the grain of everything a receive thread notices by itself.
READ_TICK_SECONDS = 0.1


class StreamError(LinkError):
    """The stream cannot go on; `reason` is what the owner of the link is told."""

    reason: ClassVar[DownReason] = DownReason.FAULT


class StreamClosedError(StreamError):
    """The stream ended: the peer is gone, or this side shut it down."""

    reason = DownReason.LOST


class StreamProtocolError(StreamError):
    """The peer sent what no peer of this version sends."""

    reason = DownReason.PROTOCOL


class SilentPeerError(StreamError):
    """Nothing came for longer than a living peer is silent."""

    reason = DownReason.SILENT


class GoodbyeError(StreamError):
    """The peer closed the link in order."""

    reason = DownReason.CLOSED_BY_PEER


class ByteStream(Protocol):
    """A connected, reliable, ordered stream of bytes in both directions."""

    @property
    def transport(self) -> Transport:
        """What carries the bytes."""
        ...

    def write_some(self, pieces: Sequence[memoryview]) -> int:
        """Write a prefix of the concatenated pieces without waiting; 0 means no room.

        Raises StreamClosedError.
        """
        ...

    def wait_writable(self, timeout_seconds: float) -> None:
        """Wait until there may be room, the stream is shut down, or the time is over."""
        ...

    def read_some(self, target: memoryview) -> int:
        """Fill a prefix of `target`, waiting up to READ_TICK_SECONDS; 0 means nothing came.

        Raises StreamClosedError at the end of the stream, StreamProtocolError.
        """
        ...

    def shutdown(self) -> None:
        """End both directions and wake who waits. From any thread, idempotent."""
        ...

    def close(self) -> None:
        """Free the resources; nobody may be inside another call."""
        ...
