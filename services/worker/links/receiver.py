"""The receiving half of a link: bytes of the stream become frames.

Small reads go through a staging buffer, so that a small frame costs one read of the stream; large
payloads are read straight to where they belong.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from services.worker.links.base import LinkFrame
from services.worker.links.framing import Reassembler
from services.worker.links.meter import LinkMeter
from services.worker.links.stream import (
    READ_TICK_SECONDS,
    ByteStream,
    GoodbyeError,
    SilentPeerError,
)

_STAGING_BYTES = 16 * 1024
#: A single wait counts as no more silence than this: when this process was suspended or starved
#: the time says nothing about the peer.
_LONGEST_COUNTED_WAIT_SECONDS = 2 * READ_TICK_SECONDS


class FrameReceiver:
    """Reads frames off a stream; used by one thread."""

    def __init__(self, stream: ByteStream, meter: LinkMeter, silence_seconds: float) -> None:
        self._stream = stream
        self._meter = meter
        self._silence_seconds = silence_seconds
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._staged = self._staging[:0]
        self._reassembler = Reassembler()

    def frames(self) -> Iterator[LinkFrame]:
        """Yield frames until the stream ends, which is a StreamError that says how."""
        reassembler = self._reassembler
        while True:
            arrival = reassembler.filled(self._fill(reassembler.target()))
            if reassembler.said_goodbye:
                raise GoodbyeError("the peer closed the link")
            if arrival is None:
                continue
            counts = self._meter.received[arrival.link_class]
            counts.add(arrival.payload_bytes, arrival.frame is not None)
            if arrival.frame is not None:
                yield arrival.frame

    def _fill(self, target: memoryview) -> int:
        """Put the next bytes of the stream into `target`; returns how many, at least one."""
        if not self._staged:
            if len(target) >= _STAGING_BYTES:
                return self._read(target)
            self._staged = self._staging[: self._read(self._staging)]
        nbytes = min(len(target), len(self._staged))
        target[:nbytes] = self._staged[:nbytes]
        self._staged = self._staged[nbytes:]
        return nbytes

    def _read(self, target: memoryview) -> int:
        silence = 0.0
        began_at = time.monotonic()
        while not (nbytes := self._stream.read_some(target)):
            now = time.monotonic()
            silence += min(now - began_at, _LONGEST_COUNTED_WAIT_SECONDS)
            began_at = now
            if silence > self._silence_seconds:
                raise SilentPeerError(f"the peer sent nothing for {silence:.1f} s")
        return nbytes
