"""Counters of one link. Written by its two threads, read by anybody; under the link's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from services.worker.links.base import ClassStats, LinkClass, LinkStats, Transport

_NUM_DELAYS = 1024


@dataclass(slots=True)
class _Counts:
    frames: int = 0
    num_bytes: int = 0
    chunks: int = 0

    def add(self, payload_bytes: int, ends_frame: bool) -> None:
        self.num_bytes += payload_bytes
        self.chunks += 1
        self.frames += ends_frame


class LinkMeter:
    """What a link has done so far."""

    def __init__(self) -> None:
        self.sent = {each: _Counts() for each in LinkClass}
        self.received = {each: _Counts() for each in LinkClass}
        self._delays: deque[float] = deque(maxlen=_NUM_DELAYS)
        self._max_delay = 0.0

    def control_delay(self, seconds: float) -> None:
        """A CONTROL frame waited so long for its first byte to go."""
        self._delays.append(seconds)
        self._max_delay = max(self._max_delay, seconds)

    def picture(
        self,
        transport: Transport,
        queued_bytes: Mapping[LinkClass, int],
        bandwidth: float | None,
        chunk_bytes: int,
    ) -> LinkStats:
        """The counters as they stand."""
        delays = sorted(self._delays)
        return LinkStats(
            transport=transport,
            classes={each: self._class_stats(each, queued_bytes[each]) for each in LinkClass},
            control_delay_max_seconds=self._max_delay,
            control_delay_p99_seconds=delays[len(delays) * 99 // 100] if delays else 0.0,
            bandwidth_bytes_per_second=bandwidth,
            chunk_bytes=chunk_bytes,
        )

    def _class_stats(self, link_class: LinkClass, queued_bytes: int) -> ClassStats:
        sent, received = self.sent[link_class], self.received[link_class]
        return ClassStats(
            frames_sent=sent.frames,
            bytes_sent=sent.num_bytes,
            chunks_sent=sent.chunks,
            frames_received=received.frames,
            bytes_received=received.num_bytes,
            chunks_received=received.chunks,
            queued_bytes=queued_bytes,
        )
