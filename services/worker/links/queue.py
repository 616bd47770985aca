"""The priority queue in front of a link. Pure: no I/O, no clock, no threads.

    CONTROL   f f            each handed out in one piece
    EXCHANGE  f f f f        cut into chunks; after each one the queue is asked again,
    RESTORE   f f f          so that a higher class waits for one chunk at most

Owned by `StreamLink`, under its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.worker.links.base import LinkClass, LinkFrame
from services.worker.links.framing import MAX_FRAME_BYTES, FrameCutter

Released = Callable[[], None] | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """What goes on the wire in one go.

    Args:
        queued_at: when its frame was queued.
        released: to be called when the chunk was written; None unless it ends a borrowed frame.
    """

    link_class: LinkClass
    pieces: list[memoryview]
    payload_bytes: int
    begins_frame: bool
    ends_frame: bool
    queued_at: float
    released: Released


class _Entry:
    """A queued frame."""

    def __init__(
        self, frame: LinkFrame, link_class: LinkClass, queued_at: float, released: Released
    ) -> None:
        self.cutter = FrameCutter(frame, link_class)
        self.begun = False
        self.queued_at = queued_at
        self.released = released


class FrameQueue:
    """Frames that wait to be sent, by class.

    Args:
        limit_bytes: from how many queued bytes of payload on a bulk class refuses more; CONTROL
            has no limit.
    """

    def __init__(self, limit_bytes: Mapping[LinkClass, int]) -> None:
        self._limit_bytes = dict(limit_bytes)
        self._entries: dict[LinkClass, deque[_Entry]] = {each: deque() for each in LinkClass}
        self._queued_bytes = dict.fromkeys(LinkClass, 0)

    def __bool__(self) -> bool:
        return any(self._entries.values())

    def holds(self, link_class: LinkClass) -> bool:
        """Whether a frame of this class waits or is half sent."""
        return bool(self._entries[link_class])

    def queued_bytes(self, link_class: LinkClass) -> int:
        """Payload of this class that was not handed out yet."""
        return self._queued_bytes[link_class]

    def accepts(self, link_class: LinkClass) -> bool:
        """Whether a frame, of any size, may be queued: the class is below its limit."""
        limit = self._limit_bytes.get(link_class)
        return limit is None or self._queued_bytes[link_class] < limit

    def push(
        self, frame: LinkFrame, link_class: LinkClass, now: float, released: Released = None
    ) -> bool:
        """Queue a frame behind those of its class; False where the class has its fill.

        Raises LinkError where the frame cannot be sent at all.
        """
        if not self.accepts(link_class):
            return False
        entry = _Entry(frame, link_class, now, released)
        self._entries[link_class].append(entry)
        self._queued_bytes[link_class] += entry.cutter.payload_bytes
        return True

    def next_chunk(self, chunk_bytes: int) -> Chunk | None:
        """Take the next chunk of the highest class that waits; None where none does."""
        for link_class, entries in self._entries.items():
            if entries:
                limit = MAX_FRAME_BYTES if link_class is LinkClass.CONTROL else chunk_bytes
                return self._take(link_class, entries, limit)
        return None

    def clear(self) -> list[Callable[[], None]]:
        """Drop everything; returns what is to be called now that no buffer is in use."""
        released = [
            entry.released
            for entries in self._entries.values()
            for entry in entries
            if entry.released is not None
        ]
        for link_class, entries in self._entries.items():
            entries.clear()
            self._queued_bytes[link_class] = 0
        return released

    def _take(self, link_class: LinkClass, entries: deque[_Entry], max_bytes: int) -> Chunk:
        entry = entries[0]
        pieces, payload_bytes = entry.cutter.take(max_bytes)
        self._queued_bytes[link_class] -= payload_bytes
        begins_frame, entry.begun = not entry.begun, True
        ends_frame = entry.cutter.is_done
        if ends_frame:
            entries.popleft()
        return Chunk(
            link_class,
            pieces,
            payload_bytes,
            begins_frame,
            ends_frame,
            entry.queued_at,
            entry.released if ends_frame else None,
        )
